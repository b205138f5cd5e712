# Sourced: pipelines whose finished stages are skipped and whose failures end everything.
#
# A pipeline is a shell function that calls, in order:
#   stage NAME ARTIFACT COMMAND...       a step that all later ones build on
#   training NAME ARTIFACT COMMAND...    the same, but gets --resume when it was interrupted
#   evaluation NAME ARTIFACT COMMAND...  a step that only the report builds on
#   report NAME ARTIFACT COMMAND...      the last step
# ARTIFACT is a file pattern relative to the base folder that the command leaves behind ("" for none).
# `run_pipeline FUNCTION` runs it twice: once to learn the names, once for real.
#
# A stage is skipped when its command is the one that ended with 0 last time and nothing it builds on has
# run since. `scripts/run_state.py` keeps the records. Settings, read by run_pipeline:
#   DRY_RUN=1   print every command, run none      ONLY=NAME   run that stage and no other
#   LIST=1      print the names                    FROM=NAME   leave what comes before as it is, run the rest

PIPELINE_MODE=learn   # learn, then run
PIPELINE_NAMES=()     # in order
PIPELINE_KINDS=()     # stage, training, evaluation or report, by the same index
PIPELINE_STARTED=0    # 1 once FROM or ONLY was reached

stage() { pipeline_step stage "$@"; }
training() { pipeline_step training "$@"; }
evaluation() { pipeline_step evaluation "$@"; }
report() { pipeline_step report "$@"; }

run_pipeline() {
    PIPELINE_MODE=learn
    "$1"
    if [ "${LIST:-0}" = 1 ]; then
        printf '%s\n' "${PIPELINE_NAMES[@]}"
        return
    fi
    pipeline_require_name "${ONLY:-}"
    pipeline_require_name "${FROM:-}"
    PIPELINE_MODE=run
    "$1"
}

pipeline_require_name() {
    local name
    [ -n "$1" ] || return 0
    for name in "${PIPELINE_NAMES[@]}"; do
        [ "$name" != "$1" ] || return 0
    done
    echo "error: unknown stage '$1'; the stages are: ${PIPELINE_NAMES[*]}" >&2
    exit 2
}

pipeline_step() {
    local kind="$1" name="$2" artifact="$3"
    shift 3
    if [ "$PIPELINE_MODE" = learn ]; then
        PIPELINE_NAMES+=("$name")
        PIPELINE_KINDS+=("$kind")
        return
    fi
    local forced=0
    pipeline_selected "$name" || return 0
    if [ "$name" = "${ONLY:-}" ] || [ "$name" = "${FROM:-}" ]; then
        forced=1
    fi
    if [ "${DRY_RUN:-0}" = 1 ]; then
        echo "$*"
        return
    fi

    local status
    status="$(python -m scripts.run_state check "$name" --command="$*" --artifact="$artifact")"
    if [ "$status" = "done" ] && [ "$forced" = 0 ]; then
        echo "== $name: done before, skipped"
        return
    fi
    local command=("$@")
    if [ "$kind" = training ] && [ "$status" = begun ]; then
        command+=(--resume)
    fi
    echo "== $name: ${command[*]}"
    python -m scripts.run_state begin "$name" --command="$*" --clears="$(pipeline_built_on "$kind" "$name")"
    local code=0
    pipeline_run "${command[@]}" || code=$?
    python -m scripts.run_state end "$name" --artifact="$artifact" --exit_code="$code" ||
        { [ "$code" != 0 ] || code=1; }
    case "$code" in
    0) return ;;
    85 | 130 | 143) # 85: a training run that was asked to stop and has saved
        echo "stage $name was stopped (exit code $code); start the same command again to go on" >&2 ;;
    *)
        echo "stage $name ended with exit code $code; mend the cause and start the same command again:" \
            "what is finished is skipped, what was interrupted goes on" >&2 ;;
    esac
    exit "$code"
}

# Whether ONLY and FROM let a stage run.
pipeline_selected() {
    if [ -n "${ONLY:-}" ]; then
        [ "$1" = "$ONLY" ]
        return
    fi
    if [ -z "${FROM:-}" ] || [ "$1" = "$FROM" ]; then
        PIPELINE_STARTED=1
    fi
    [ "$PIPELINE_STARTED" = 1 ]
}

# The stages that are no longer done when NAME runs, separated by commas.
pipeline_built_on() {
    local kind="$1" name="$2" names="" after=0 i
    for i in "${!PIPELINE_NAMES[@]}"; do
        if [ "$after" = 1 ] && { [ "$kind" != evaluation ] || [ "${PIPELINE_KINDS[$i]}" = report ]; }; then
            names="$names,${PIPELINE_NAMES[$i]}"
        fi
        [ "${PIPELINE_NAMES[$i]}" != "$name" ] || after=1
    done
    echo "${names#,}"
}

# Run a command so that a signal to this script reaches it, and wait until it has really ended: a training
# run that is told to stop still writes a checkpoint.
pipeline_run() {
    local signal_code=0 code=0 child
    "$@" &
    child=$!
    trap 'signal_code=130; kill -TERM "$child" 2>/dev/null || true' INT
    trap 'signal_code=143; kill -TERM "$child" 2>/dev/null || true' TERM HUP
    wait "$child" || code=$?
    while kill -0 "$child" 2>/dev/null; do
        code=0
        wait "$child" || code=$?
    done
    trap - INT TERM HUP
    # Stopped early is not finished, even if the command left politely.
    [ "$signal_code" = 0 ] || code="$signal_code"
    return "$code"
}
