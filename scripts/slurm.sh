# shellcheck shell=bash
# Sourced: what a SLURM job does around a pipeline. `run_job SCRIPT ARGUMENTS...` is all a job script says.
#
# A job has no network: the script checks first that everything it will read is there. The job ends in one
# of three ways: with 0; stopped (preempted, requeued, near its time limit), having saved, and goes back
# to the queue under the same id, to go on where it was; or with the exit code of what failed.

STOPPED_CODES=" 85 138 143 " # saved and left; ended by USR1 or TERM before it could save
MAX_RESTARTS="${MAX_RESTARTS:-200}"

run_job() {
    local code=0
    case " $* " in
    *" --dry-run "* | *" --dry_run "* | *" --list "* | *" --help "* | *" -h "*)
        LAUNCHER=srun exec bash "$@" ;;
    *" --check "*)
        settle_in
        LAUNCHER=srun exec bash "$@" ;;
    esac
    if [ -z "${SLURM_JOB_ID:-}" ]; then
        echo "error: this is a SLURM job; submit it: bash scripts/submit.sh, or without SLURM run: bash $1" >&2
        exit 2
    fi
    trap 'JOB_SIGNAL=85' USR1 # until the pipeline runs: nothing to save yet
    prepare_job
    run_and_pass_signals bash "$@" --yes --skip-done || code=$?
    end_job "$code"
}

# The environment of a job: settings, places, modules, Python, no network, and who gets the mail.
prepare_job() {
    local address
    JOB_SIGNAL=0
    mkdir -p logs
    echo "== job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, restart ${SLURM_RESTART_COUNT:-0}," \
        "$(date '+%F %T'), commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
    settle_in
    stay_offline
    export LAUNCHER=srun STOP_SIGNAL=USR1 LOCK_SECONDS="${LOCK_SECONDS:-600}" PYTHONUNBUFFERED=1
    export WANDB_RUN="${WANDB_RUN:-slurm-$SLURM_JOB_ID}"
    export STAGE_LOGS="$NANOCHAT_BASE_DIR/logs"
    address="$(mail_address)"
    if [ -n "$address" ]; then
        # A job that was submitted with plain sbatch does not know the address yet.
        scontrol update JobId="$SLURM_JOB_ID" MailUser="$address" MailType=BEGIN,END,FAIL ||
            echo "note: SLURM did not take the mail address $address" >&2
    else
        echo "note: no email in .env.local, so nobody is told when this job ends" >&2
    fi
    echo "base folder $NANOCHAT_BASE_DIR, run name $WANDB_RUN, python $(command -v python)"
}

# Run a command and hand USR1, which SLURM sends to this shell alone, on to it. TERM reaches everybody.
run_and_pass_signals() {
    local child code=0
    if [ "$JOB_SIGNAL" != 0 ]; then
        return "$JOB_SIGNAL"
    fi
    "$@" &
    child=$!
    trap 'echo "USR1: the time limit is near; saving"; kill -USR1 "$child" 2>/dev/null || true' USR1
    trap 'true' TERM
    wait "$child" || code=$?
    while kill -0 "$child" 2>/dev/null; do
        code=0
        wait "$child" || code=$?
    done
    trap '' USR1
    return "$code"
}

end_job() {
    local code="$1"
    if [ "$code" = 0 ]; then
        echo "== job $SLURM_JOB_ID is done, $(date '+%F %T')"
        exit 0
    fi
    if [ "$(job_state)" != RUNNING ]; then
        # Cancelled, or taken out by SLURM, which puts it back itself where that is due.
        echo "== job $SLURM_JOB_ID was stopped (exit code $code), $(date '+%F %T')" >&2
        exit "$code"
    fi
    if [[ "$STOPPED_CODES" = *" $code "* ]]; then
        requeue_job "it was stopped" 85
    elif ! all_nodes_answer; then
        requeue_job "a node does not answer (exit code $code)" "$code"
    fi
    echo "== job $SLURM_JOB_ID failed with exit code $code, $(date '+%F %T'); when the cause is mended," \
        "submit it again: what is finished is skipped" >&2
    exit "$code"
}

job_state() { squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T 2>/dev/null || true; }

# Back to the queue, with the same id. The exit code counts only where SLURM refuses.
requeue_job() {
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "$MAX_RESTARTS" ]; then
        echo "error: $1, and this job was restarted $SLURM_RESTART_COUNT times already" >&2
        exit "$2"
    fi
    echo "== job $SLURM_JOB_ID: $1; it goes back to the queue, $(date '+%F %T')"
    # Refused as well when SLURM was faster: then the job is not running any more.
    if ! scontrol requeue "$SLURM_JOB_ID" && [ "$(job_state)" = RUNNING ]; then
        echo "error: SLURM does not requeue this job; submit it again and it goes on" >&2
        exit "$2"
    fi
    exit 0
}

# A crashed node ends the others' training with an error before SLURM has noticed that it is gone.
all_nodes_answer() {
    [ "$SLURM_JOB_NUM_NODES" -gt 1 ] || return 0
    timeout 60 srun --overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" \
        --ntasks-per-node=1 --cpus-per-task=1 true
}
