# shellcheck shell=bash
# Sourced: pipelines whose finished stages are skipped and whose failures end everything.
#
# A pipeline is a shell function that calls, in order:
#   stage NAME ARTIFACT COMMAND...       a step that all later ones build on
#   files NAME ARTIFACT COMMAND...       the same, but it makes files that others may remove be there: it looks
#                                        at them each time, also when it is done
#   training NAME ARTIFACT COMMAND...    the same as stage, but gets --resume when it was interrupted
#   evaluation NAME ARTIFACT COMMAND...  a step that only the report builds on
#   report NAME ARTIFACT COMMAND...      the last step
#   ahead NAME COMMAND...                begin the command of a later stage already, beside those between;
#                                        the stage waits for it and then runs the command itself, which
#                                        finds the work done, goes on with it, or fails for all to see
# ARTIFACT is a file pattern relative to the base folder that the command leaves behind ("" for none).
# A COMMAND that begins with the word `ranks` is a Python module that runs on all devices: the word is
# replaced by the array LAUNCH (default: python -m). `run_pipeline FUNCTION` runs the pipeline twice: once
# to learn the names, once for real; `finish_pipeline` then says what is there.
#
# A stage is skipped when its command is the one that ended with 0 last time, what it left is still there
# and nothing it builds on has run since. `scripts/run_state.py` keeps the records. Settings:
#   DRY_RUN=1   print every command, run none      ONLY=NAME    run that stage and no other
#   LIST=1      print the names                    FROM=NAME    leave what comes before as it is
#   SKIP_DONE=1 ONLY and FROM, too, skip what is   UNTIL=NAME   run nothing behind that stage
#               done, instead of running it again
#   STOP_SIGNAL what a running command is sent when this shell is told to stop (default TERM)
#   STAGE_LOGS  a folder for one log per stage, besides what is printed
#
# While signals are trapped nothing here stands in $(...), <(...) or >(...): bash 5.2 runs a trap while it
# parses those and then fails with "unexpected EOF" and exit code 2, or gives an empty answer when a signal
# came just before (a stage would be recorded with an empty command and start from nothing). Functions
# answer in REPLY, programs in a file.
#
# Exit codes: 0, that of the stage that failed, 2 for a wrong name; when asked to stop, 85 after USR1 or
# when a training run has saved and left by itself, 130 after Ctrl-C, 143 after TERM.

PIPELINE_MODE=learn   # learn, then run
PIPELINE_NAMES=()     # in order
PIPELINE_KINDS=()     # stage, files, training, evaluation or report, by the same index
PIPELINE_SELECTED=()  # names of the stages that this run includes
PIPELINE_STARTED=0    # 1 once FROM was reached
PIPELINE_ENDED=0      # 1 once UNTIL was passed
PIPELINE_STOP=0       # the exit code, once a signal has asked for a stop
PIPELINE_CHILD=""     # process id of the running command
PIPELINE_TOLD=""      # process id of the one that was told to stop
PIPELINE_AHEAD=""     # process id of the one that `ahead` began
PIPELINE_AHEAD_NAME=""
PIPELINE_SCRATCH=""   # a folder for what programs answer
PIPELINE_LACKING=0    # 1 once a file was found missing that a stage builds on
LAUNCH=(python -m)
# Flags of how a command is carried out, not of what it computes: not part of what makes it another one.
# --compile is none of them: other kernels round differently.
PIPELINE_FREE_FLAGS="--run --device_batch_size --save_every --keep_last --max_minutes --background_save
    --log_every --spike_limit --bpb_limit"

stage() { pipeline_step stage "$@"; }
files() { pipeline_step files "$@"; }
training() { pipeline_step training "$@"; }
evaluation() { pipeline_step evaluation "$@"; }
report() { pipeline_step report "$@"; }

# Learn the names of the stages and refuse what the command line asks of others. Runs nothing.
learn_pipeline() {
    [ "${#PIPELINE_NAMES[@]}" = 0 ] || return 0
    PIPELINE_MODE=learn
    "$1"
    pipeline_require_name "${ONLY:-}"
    pipeline_require_name "${FROM:-}"
    pipeline_require_name "${UNTIL:-}"
    pipeline_require_order "${FROM:-}" "${UNTIL:-}"
}

run_pipeline() {
    learn_pipeline "$1"
    if [ "${LIST:-0}" = 1 ]; then
        printf '%s\n' "${PIPELINE_NAMES[@]}"
        return
    fi
    PIPELINE_MODE=run
    PIPELINE_SCRATCH="$(mktemp -d)"
    trap pipeline_leave EXIT
    trap 'pipeline_stop 130' INT
    trap 'pipeline_stop 143' TERM HUP
    trap 'pipeline_stop 85' USR1
    "$1"
    trap - INT TERM HUP USR1
}

# Say what this run has left, from the records and the files; fails when a stage is not done after all.
finish_pipeline() {
    python -m scripts.run_state verify "$(IFS=,; echo "${PIPELINE_SELECTED[*]}")"
}

# Fail when a file is not there that a stage before FROM leaves for those behind it.
check_pipeline() {
    [ -n "${FROM:-}" ] || return 0
    PIPELINE_MODE=check PIPELINE_STARTED=0 PIPELINE_LACKING=0
    "$1"
    PIPELINE_STARTED=0
    return "$PIPELINE_LACKING"
}

ahead() {
    local name="$1" log
    shift
    [ "$PIPELINE_MODE" = run ] && [ "${DRY_RUN:-0}" = 0 ] && pipeline_comes "$name" || return 0
    pipeline_record "$@"
    pipeline_ask status "$name" --command="$REPLY"
    [ "$REPLY" != "done" ] || return 0
    pipeline_ahead_log "$name"
    log="$REPLY"
    mkdir -p "${log%/*}"
    echo "== $name, beside what follows: $* >$log"
    "$@" >"$log" 2>&1 </dev/null &
    PIPELINE_AHEAD=$! PIPELINE_AHEAD_NAME="$name"
}

pipeline_ahead_log() { REPLY="${STAGE_LOGS:-$NANOCHAT_BASE_DIR/logs}/$1-ahead.log"; }

# Wait for what was begun ahead of a stage. Whether it has succeeded is the stage's to find out.
pipeline_finish_ahead() {
    local code=0 log
    [ "$PIPELINE_AHEAD_NAME" = "$1" ] || return 0
    pipeline_ahead_log "$1"
    log="$REPLY"
    ! kill -0 "$PIPELINE_AHEAD" 2>/dev/null || echo "== $1: waiting for what was begun before; see $log"
    pipeline_wait "$PIPELINE_AHEAD" || code=$?
    PIPELINE_AHEAD="" PIPELINE_AHEAD_NAME=""
    if [ "$code" != 0 ] && [ "$PIPELINE_STOP" = 0 ]; then
        echo "== $1: what was begun before has failed (exit code $code, see $log); once more:"
        tail -n 5 "$log"
    fi
}

# However this shell ends.
pipeline_leave() {
    rm -rf "$PIPELINE_SCRATCH"
    [ -n "$PIPELINE_AHEAD" ] || return 0
    kill "$PIPELINE_AHEAD" 2>/dev/null || true
    wait "$PIPELINE_AHEAD" 2>/dev/null || true
    PIPELINE_AHEAD=""
}

# Whether a stage that comes later is one of those that ONLY, FROM and UNTIL let run.
pipeline_comes() {
    local name seen=0
    [ -z "${ONLY:-}" ] && [ "${FROM:-}" != "$1" ] || return 1
    for name in "${PIPELINE_NAMES[@]}"; do
        [ "$name" != "$1" ] || seen=1
        [ "$name" != "${FROM:-}" ] || [ "$seen" = 0 ] || return 1
        [ "$name" != "${UNTIL:-}" ] || [ "$seen" = 1 ] || return 1
    done
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

pipeline_require_order() {
    local name
    [ -n "$1" ] && [ -n "$2" ] || return 0
    for name in "${PIPELINE_NAMES[@]}"; do
        [ "$name" != "$1" ] || return 0
        [ "$name" != "$2" ] || break
    done
    echo "error: --from $1 comes after --until $2, so there is nothing to run" >&2
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
    if [ "$PIPELINE_MODE" = check ]; then
        pipeline_require_artifact "$kind" "$name" "$artifact"
        return
    fi
    pipeline_selected "$name" || return 0
    local command=("$@")
    if [ "$1" = ranks ]; then
        command=("${LAUNCH[@]}" "${@:2}")
    fi
    if [ "${DRY_RUN:-0}" = 1 ]; then
        echo "${command[*]}"
        return
    fi

    PIPELINE_SELECTED+=("$name")
    pipeline_finish_ahead "$name"
    local forced=False status record clears
    ! pipeline_forced "$name" || forced=True
    pipeline_record "$@"
    record="$REPLY"
    pipeline_built_on "$kind" "$name"
    clears="$REPLY"
    # Files that are fetched once more are the same files.
    if [ "$kind" = files ]; then
        pipeline_ask status "$name" --command="$record"
        [ "$REPLY" = new ] || clears=""
    fi
    pipeline_ask begin "$name" --command="$record" --clears="$clears" --force="$forced"
    status="$REPLY"
    if [ "$status" = "done" ] && [ "$forced" = False ] &&
        { [ "$kind" != files ] || "${command[@]}" >/dev/null; }; then
        echo "== $name: done before, skipped"
        return
    fi
    if [ "$kind" = training ] && [ "$status" = begun ]; then
        command+=(--resume)
    fi
    echo "== $name: ${command[*]}"
    local code=0
    pipeline_run "$name" "${command[@]}" || code=$?
    python -m scripts.run_state end "$name" --artifact="$artifact" --exit_code="$code" ||
        { [ "$code" != 0 ] || code=1; }
    case "$code" in
    0) return ;;
    85 | 130 | 143) # 85: a training run that was asked to stop and has saved
        echo "stage $name was stopped (exit code $code); start the same command again to go on" >&2 ;;
    *)
        pipeline_show_log "$name"
        echo "stage $name ended with exit code $code; mend the cause and start the same command again:" \
            "what is finished is skipped, what was interrupted goes on" >&2 ;;
    esac
    exit "$code"
}

pipeline_require_artifact() {
    [ "$2" != "$FROM" ] || PIPELINE_STARTED=1
    [ "$PIPELINE_STARTED" = 0 ] && [ -n "$3" ] || return 0
    case "$1" in evaluation | report) return 0 ;; esac
    compgen -G "$NANOCHAT_BASE_DIR/$3" >/dev/null || {
        echo "error: stage $2, which comes before $FROM, has left no $NANOCHAT_BASE_DIR/$3;" \
            "begin there: --from $2" >&2
        PIPELINE_LACKING=1
    }
}

# Whether ONLY, FROM and UNTIL let a stage run.
pipeline_selected() {
    if [ -n "${ONLY:-}" ]; then
        [ "$1" = "$ONLY" ]
        return
    fi
    if [ -z "${FROM:-}" ] || [ "$1" = "$FROM" ]; then
        PIPELINE_STARTED=1
    fi
    [ "$PIPELINE_ENDED" = 0 ] || return 1
    [ "$1" != "${UNTIL:-}" ] || PIPELINE_ENDED=1
    [ "$PIPELINE_STARTED" = 1 ]
}

# Whether a stage runs even if it is done.
pipeline_forced() {
    [ "${SKIP_DONE:-0}" = 0 ] && { [ "$1" = "${ONLY:-}" ] || [ "$1" = "${FROM:-}" ]; }
}

# What the keeper of the records answers, in REPLY.
pipeline_ask() {
    python -m scripts.run_state "$@" >"$PIPELINE_SCRATCH/answer"
    read -r REPLY <"$PIPELINE_SCRATCH/answer"
}

# A command as it is remembered, in REPLY: the same on any number of devices and under any run name.
pipeline_record() {
    local word flag kept=()
    if [ "$1" = ranks ]; then
        shift
        set -- python -m "$@"
    fi
    for word in "$@"; do
        for flag in $PIPELINE_FREE_FLAGS; do
            [ "${word%%=*}" != "$flag" ] || continue 2
        done
        kept+=("$word")
    done
    REPLY="${kept[*]}"
}

# The stages that are no longer done when NAME runs, separated by commas, in REPLY.
pipeline_built_on() {
    local kind="$1" name="$2" names="" after=0 i
    for i in "${!PIPELINE_NAMES[@]}"; do
        if [ "$after" = 1 ] && { [ "$kind" != evaluation ] || [ "${PIPELINE_KINDS[$i]}" = report ]; }; then
            names="$names,${PIPELINE_NAMES[$i]}"
        fi
        [ "${PIPELINE_NAMES[$i]}" != "$name" ] || after=1
    done
    REPLY="${names#,}"
}

# Run a command so that a signal to this shell reaches it, and wait until it has really ended: a training
# run that is told to stop still writes a checkpoint.
pipeline_run() {
    local name="$1" code=0
    shift
    [ "$PIPELINE_STOP" = 0 ] || return "$PIPELINE_STOP"
    if [ -n "${STAGE_LOGS:-}" ]; then
        pipeline_run_logged "$STAGE_LOGS/$name.log" "$@" || code=$?
    else
        "$@" &
        pipeline_wait $! || code=$?
    fi
    # Stopped early is not finished, even if the command left politely.
    [ "$PIPELINE_STOP" = 0 ] || code="$PIPELINE_STOP"
    return "$code"
}

# The same with both outputs printed and added to a log. SLURM signals every process of a job: the one
# that writes the log must not be the first to go.
pipeline_run_logged() {
    local log="$1" code=0 pipe="$PIPELINE_SCRATCH/output" both input output tee
    shift
    mkdir -p "${log%/*}"
    printf '== %(%F %T)T: %s\n' -1 "$*" >>"$log"
    mkfifo "$pipe"
    # Opened both ways first: either end alone would wait for the other one.
    exec {both}<>"$pipe"
    exec {input}<"$pipe"
    exec {output}>"$pipe"
    exec {both}>&-
    rm "$pipe" # what an earlier stage has left running reads another pipe
    (
        trap '' INT TERM HUP USR1
        exec tee -a "$log" <&"$input" {input}>&- {output}>&-
    ) &
    tee=$!
    "$@" >&"$output" 2>&1 {input}>&- {output}>&- &
    exec {input}>&- {output}>&-
    pipeline_wait $! || code=$?
    pipeline_wait_briefly "$tee"
    return "$code"
}

# The exit code of a process, waiting on when a signal interrupts the wait.
pipeline_wait() {
    local code=0
    PIPELINE_CHILD="$1"
    [ "$PIPELINE_STOP" = 0 ] || pipeline_tell # a signal that came before there was a child to tell
    wait "$1" || code=$?
    while kill -0 "$1" 2>/dev/null; do
        code=0
        wait "$1" || code=$?
    done
    PIPELINE_CHILD=""
    return "$code"
}

# Wait for a process that ends by itself, unless something it listens to was left behind.
pipeline_wait_briefly() {
    local i
    for ((i = 0; i < 50; i++)); do
        kill -0 "$1" 2>/dev/null || return 0
        sleep 0.1
    done
}

# What a signal does: remember it, and pass it on to the running command.
pipeline_stop() {
    PIPELINE_STOP="$1"
    PIPELINE_TOLD=""
    pipeline_tell
}

# Once for each signal: a command may take a second one for impatience.
pipeline_tell() {
    [ -n "$PIPELINE_CHILD" ] && [ "$PIPELINE_TOLD" != "$PIPELINE_CHILD" ] || return 0
    PIPELINE_TOLD="$PIPELINE_CHILD"
    kill -s "${STOP_SIGNAL:-TERM}" "$PIPELINE_CHILD" 2>/dev/null || true
}

pipeline_show_log() {
    local log="${STAGE_LOGS:-}/$1.log"
    [ -n "${STAGE_LOGS:-}" ] && [ -f "$log" ] || return 0
    echo "---- the last 30 lines of $log" >&2
    tail -n 30 "$log" >&2
    echo "----" >&2
}
