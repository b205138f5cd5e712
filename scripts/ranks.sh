# shellcheck shell=bash
# Sourced: how a command runs on all devices. `choose_launcher cpu|gpu` sets
#
#   LAUNCH      the words in front of a module's name
#   NUM_RANKS   processes, over all machines
#
# On a CPU one process. On GPUs one process each, started by torchrun; in a job (LAUNCHER=srun) by srun, on
# all nodes, with the numbers that SLURM gives.

# shellcheck disable=SC2034  # LAUNCH is read in stages.sh
choose_launcher() {
    local gpus
    if [ "$1" = cpu ]; then
        NUM_RANKS=1 LAUNCH=(python -m)
        return
    fi
    export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
    if [ "${LAUNCHER:-}" = srun ]; then
        launch_with_srun
        return
    fi
    gpus="${NPROC_PER_NODE:-$(count_gpus)}"
    NUM_RANKS="${gpus/#0/8}" # nothing to count here: as on the machine that the sizes are for
    LAUNCH=(torchrun --standalone --nproc_per_node="$NUM_RANKS" -m)
    # Time to write the checkpoint of a large model after a signal; torchrun's own default is 30 s.
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}"
}

count_gpus() {
    { nvidia-smi --list-gpus 2>/dev/null || true; } | grep -c '^GPU' || true
}

# shellcheck disable=SC2034
# Without the variables, outside of a job, what a dry run prints is what one node with eight GPUs would do.
launch_with_srun() {
    local nodes="${SLURM_JOB_NUM_NODES:-1}" gpus="${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}" cpus
    if [ -z "$gpus" ]; then
        gpus="$(count_gpus)"
        [ -n "${SLURM_JOB_ID:-}" ] || gpus=8
        [ "$gpus" != 0 ] || gpus=1
    fi
    NUM_RANKS=$((nodes * gpus))
    cpus=$((${SLURM_CPUS_ON_NODE:-16} / gpus))
    # --wait: when one rank has ended the others have this many seconds. All save together and end
    # together; only a rank that has lost another one silently is cut off.
    LAUNCH=(srun --nodes="$nodes" --ntasks="$NUM_RANKS" --ntasks-per-node="$gpus"
        --cpus-per-task="$((cpus > 1 ? cpus : 1))" --wait=120 --export=ALL bash scripts/rank.sh)
    export MASTER_PORT="${MASTER_PORT:-$((20000 + (${SLURM_JOB_ID:-0} + ${SLURM_RESTART_COUNT:-0}) % 20000))}"
    export MASTER_ADDR="${MASTER_ADDR:-$(first_node_address "$nodes")}"
}

# The sizes are for GPUs of 80 GB. Smaller ones get fewer rows a pass, and more passes.
fit_memory() {
    local mib rows="$1"
    mib="$({ nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null || true; } |
        sort -n | head -n 1)"
    while [ -n "$mib" ] && [ "$rows" -gt 1 ] && [ $((rows * 70000)) -gt $(($1 * mib)) ]; do
        rows=$(((rows + 1) / 2))
    done
    echo "$rows"
}

# Where rank 0 listens: SLURM's address of the job's first node, which need not be a name that resolves.
first_node_address() {
    local first
    if [ "$1" = 1 ]; then
        echo 127.0.0.1
        return
    fi
    first="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
    scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p'
}

# End with one line when training on GPUs was asked for where there are none.
require_devices() {
    [ "$1" = gpu ] && [ "${LAUNCHER:-}" != srun ] && [ -z "${NPROC_PER_NODE:-}" ] || return 0
    [ "$(count_gpus)" -ge 1 ] || {
        echo "error: $JOB_SCRIPT trains on NVIDIA GPUs and nvidia-smi finds none here; on a CPU run" \
            "scripts/local_cpu_train.sh, or say how many processes to start: NPROC_PER_NODE=1" >&2
        exit 1
    }
}
