# shellcheck shell=bash
# Sourced: the main job, from a script's sizes to report.md. `main_job DEFAULT_SIZES "$@"` does it all.
#
# What is the same on a laptop and on eight GPUs is here; scripts/local_cpu_train.sh, speedrun.sh and
# run1000.sh hold what is different: functions that set the variables in SIZES and DEVICES (cpu or gpu).
# A script that has a function full_sizes understands --full.
#
# From the environment: NANOCHAT_BASE_DIR, WANDB_RUN, DRY_RUN=1, SKIP_SETUP=1 (see venv.sh),
# NPROC_PER_NODE (processes on this machine, instead of one per GPU), LAUNCHER=srun (see ranks.sh).

# shellcheck source=scripts/venv.sh
source scripts/venv.sh
# shellcheck source=scripts/stages.sh
source scripts/stages.sh
# shellcheck source=scripts/ranks.sh
source scripts/ranks.sh

# What a flag may set; --max-seq-len and --max_seq_len both set MAX_SEQ_LEN.
SIZES=(DATA TASKS FIRST_SHARDS NUM_SHARDS MAX_CHARS VOCAB_SIZE DEPTH TOKEN_SHIFT VALUE_EMBEDDINGS PACKING MAX_SEQ_LEN DEVICE_BATCH_SIZE
    TOTAL_BATCH_SIZE NUM_ITERATIONS FINAL_LR SAVE_EVERY EVAL_EVERY EVAL_TOKENS BPB_LIMIT CORE_EVERY SAMPLE_EVERY CORE_MAX_PER_TASK
    MID_ITERATIONS MID_FINAL_LR SFT_ITERATIONS SFT_DEVICE_BATCH_SIZE SFT_EXAMPLES_PER_STEP SFT_PACKING
    SFT_LR_FRACTION SPIKE_LIMIT RL_ITERATIONS INT8 MAX_PROBLEMS MAX_NEW_TOKENS)
RL_ITERATIONS=0 # steps of reinforcement learning, which is left out unless a flag asks for it
INT8=0          # 1 = training multiplies in 8-bit integers, on CPUs with AMX or AVX-512 BF16

# ---- the stages: name, what it leaves behind in the base folder, command ------------------------------

pipeline() {
    local tag="d$DEPTH" first="$NUM_SHARDS" limit=() packed=() valued=() rounded=()
    local shards=(python -m nanochat.dataset --data="$DATA" -n "$NUM_SHARDS")
    stage report_reset "" \
        python -m nanochat.report reset

    # [1/5] data and tokenizer: a few shards for the tokenizer, and the rest while it is trained
    if comes_from_network "$DATA" && [ "$FIRST_SHARDS" -lt "${NUM_SHARDS/#-1/9999}" ]; then
        # The same text for the tokenizer, however far the rest has come.
        first="$FIRST_SHARDS" limit=(--num_files="$FIRST_SHARDS")
    fi
    if [ "$TASKS" = public ]; then
        # Shards, and all conversations and questions that later stages read.
        stage dataset "" \
            python -m scripts.assets prefetch --all --data="$DATA" -n "$first"
    else
        stage dataset "" \
            python -m nanochat.dataset --data="$DATA" -n "$first"
    fi
    [ "$first" = "$NUM_SHARDS" ] || ahead shards "${shards[@]}"
    stage tok_train "tokenizer/tokenizer.json" \
        python -m scripts.tok_train --data="$DATA" --max_chars="$MAX_CHARS" --vocab_size="$VOCAB_SIZE" \
        ${limit[@]+"${limit[@]}"}
    evaluation tok_eval "report/tokenizer-evaluation.json" \
        python -m scripts.tok_eval
    files shards "" \
        "${shards[@]}"

    # [2/5] base model. Left out where it is the default: runs from before this choice go on.
    [ "$PACKING" = stream ] || packed=(--packing="$PACKING")
    [ "$VALUE_EMBEDDINGS" = 0 ] || valued=(--value_embeddings=1)
    [ "$INT8" = 0 ] || rounded=(--int8=1)
    training base_train "base_checkpoints/$tag/step_*/manifest.json" \
        ranks scripts.base_train --data="$DATA" --depth="$DEPTH" --max_seq_len="$MAX_SEQ_LEN" \
        --token_shift="$TOKEN_SHIFT" ${valued[@]+"${valued[@]}"} ${packed[@]+"${packed[@]}"} \
        ${rounded[@]+"${rounded[@]}"} \
        --final_lr_frac="$FINAL_LR" \
        --device_batch_size="$DEVICE_BATCH_SIZE" --total_batch_size="$TOTAL_BATCH_SIZE" \
        --num_iterations="$NUM_ITERATIONS" --eval_every="$EVAL_EVERY" --eval_tokens="$EVAL_TOKENS" \
        --core_metric_every="$CORE_EVERY" --sample_every="$SAMPLE_EVERY" --save_every="$SAVE_EVERY" \
        --spike_limit="$SPIKE_LIMIT" --bpb_limit="$BPB_LIMIT" --run="$WANDB_RUN"
    evaluation base_loss "report/base-model-loss.json" \
        ranks scripts.base_loss --model_tag="$tag" \
        --device_batch_size="$DEVICE_BATCH_SIZE" --split_tokens="$EVAL_TOKENS"
    evaluation base_eval "report/base-model-evaluation.json" \
        ranks scripts.base_eval --model-tag="$tag" --max-per-task="$CORE_MAX_PER_TASK" --eval="$BASE_EVAL"
    evaluation chat_eval_base "report/chat-evaluation-base.json" \
        ranks scripts.chat_eval --source=base --model-tag="$tag" --tasks="$TASKS" \
        --max-new-tokens="$MAX_NEW_TOKENS" --max-problems="$MAX_PROBLEMS"

    # [3/5] midtraining
    training mid_train "mid_checkpoints/$tag/step_*/manifest.json" \
        ranks scripts.mid_train --model_tag="$tag" --tasks="$TASKS" --max_seq_len="$MAX_SEQ_LEN" \
        ${rounded[@]+"${rounded[@]}"} \
        --device_batch_size="$DEVICE_BATCH_SIZE" --total_batch_size="$TOTAL_BATCH_SIZE" \
        --num_iterations="$MID_ITERATIONS" --final_lr_frac="$MID_FINAL_LR" \
        --eval_every="$EVAL_EVERY" --eval_tokens="$EVAL_TOKENS" \
        --save_every="$SAVE_EVERY" --spike_limit="$SPIKE_LIMIT" --run="$WANDB_RUN"
    evaluation chat_eval_mid "report/chat-evaluation-mid.json" \
        ranks scripts.chat_eval --source=mid --model-tag="$tag" --tasks="$TASKS" \
        --max-new-tokens="$MAX_NEW_TOKENS" --max-problems="$MAX_PROBLEMS"

    # [4/5] supervised finetuning
    training chat_sft "chatsft_checkpoints/$tag/step_*/manifest.json" \
        ranks scripts.chat_sft --model_tag="$tag" --tasks="$TASKS" ${rounded[@]+"${rounded[@]}"} \
        --device_batch_size="$SFT_DEVICE_BATCH_SIZE" --target_examples_per_step="$SFT_EXAMPLES_PER_STEP" \
        --packing="$SFT_PACKING" --init_lr_frac="$SFT_LR_FRACTION" --num_iterations="$SFT_ITERATIONS" \
        --eval_every="$EVAL_EVERY" --eval_tokens="$EVAL_TOKENS" \
        --save_every="$SAVE_EVERY" --spike_limit="$SPIKE_LIMIT" --run="$WANDB_RUN"
    evaluation chat_eval_sft "report/chat-evaluation-sft.json" \
        ranks scripts.chat_eval --source=sft --model-tag="$tag" --tasks="$TASKS" \
        --max-new-tokens="$MAX_NEW_TOKENS" --max-problems="$MAX_PROBLEMS"

    if [ "$RL_ITERATIONS" -gt 0 ]; then
        training chat_rl "chatrl_checkpoints/$tag/step_*/manifest.json" \
            ranks scripts.chat_rl --model_tag="$tag" --tasks="$TASKS" --num_iterations="$RL_ITERATIONS" \
            ${rounded[@]+"${rounded[@]}"} \
            --device_batch_size="$DEVICE_BATCH_SIZE" --max_new_tokens="$MAX_NEW_TOKENS" \
            --eval_examples="$MAX_PROBLEMS" --save_every="$SAVE_EVERY" --run="$WANDB_RUN"
        evaluation chat_eval_rl "report/chat-evaluation-rl.json" \
            ranks scripts.chat_eval --source=rl --model-tag="$tag" --tasks="$TASKS" \
            --max-new-tokens="$MAX_NEW_TOKENS" --max-problems="$MAX_PROBLEMS"
    fi

    # [5/5] report
    report report "report/report.md" \
        python -m nanochat.report generate
}

main_job() {
    local default_sizes="$1"
    shift
    read_arguments "$default_sizes" "$@"
    if [ "$DEVICES" = gpu ] && [ "$DEVICE_BATCH_SIZE_ASKED" = 0 ]; then
        DEVICE_BATCH_SIZE="$(fit_memory "$DEVICE_BATCH_SIZE")"
    fi
    choose_launcher "$DEVICES"
    fit_batches
    settle_places
    learn_pipeline pipeline
    if [ "$DRY_RUN" = 1 ] || [ "$LIST" = 1 ]; then
        run_pipeline pipeline
        return
    fi
    if [ "$CHECK" = 1 ]; then
        ensure_venv "$DEVICES"
        require_int8
        check_files
        return
    fi
    require_devices "$DEVICES"
    announce
    take_turns
    SECONDS=0
    ensure_venv "$DEVICES"
    require_int8
    if [ "${NANOCHAT_OFFLINE:-0}" = 1 ]; then
        check_files || exit 1
    fi
    run_pipeline pipeline
    echo
    finish_pipeline
    echo "in $((SECONDS / 60)) min $((SECONDS % 60)) s"
    if [ -z "$ONLY$UNTIL" ]; then
        echo "  the report:  report.md"
        echo "  to chat:     source .venv/bin/activate && python -m scripts.chat_cli"
        echo "  as a page:   source .venv/bin/activate && python -m scripts.chat_web"
        open_chat
    fi
}

# What training cannot have is said before the first stage, not behind the tokenizer.
require_int8() {
    [ "$INT8" = 0 ] || python -c 'import sys; from nanochat import int8; sys.exit(int8.lacking_kernels())'
}

# Serve the page where a script has CHAT_AFTERWARDS=1 and somebody is there to talk.
open_chat() {
    [ "${CHAT_AFTERWARDS:-0}" = 1 ] && [ -t 0 ] && [ "$YES" = 0 ] || return 0
    exec 9>&- # the next run need not wait for the end of the conversation
    exec python -m scripts.chat_web
}

# ---- what the command line says -----------------------------------------------------------------------

JOB_SCRIPT="$(basename "${BASH_SOURCE[1]}")"
[ -f "$JOB_SCRIPT" ] || JOB_SCRIPT="scripts/$JOB_SCRIPT"

usage_error() {
    echo "error: $1 (see bash $JOB_SCRIPT --help)" >&2
    exit 2
}

show_help() {
    sed -n '2,/^set -/{/^#/s/^# \{0,1\}//p}' "$JOB_SCRIPT"
    cat <<'END'

  -y, --yes       do not wait for Enter            --list          print the names of the stages
  --only STAGE    run this stage only              --dry-run       print every command, run none
  --from STAGE    run this stage and all after it  --until STAGE   run nothing after this stage
  --skip-done     with --only and --from: a stage that is done is not run again
  --check         say whether all files are here that come from a network or, with --from, from a stage before

END
    echo "Sizes: ${SIZES[*]}" | tr '[:upper:]' '[:lower:]' | fold -s -w 100
}

# Print the variable that a flag such as --max-seq-len sets; fails for an unknown one.
size_of_flag() {
    local wanted name
    wanted="$(printf '%s' "${1#--}" | tr 'a-z-' 'A-Z_')"
    for name in "${SIZES[@]}"; do
        if [ "$name" = "$wanted" ]; then
            echo "$name"
            return
        fi
    done
    return 1
}

read_arguments() {
    local sizes="$1" flag value name override overrides=()
    shift
    YES=0 DRY_RUN="${DRY_RUN:-0}" LIST=0 ONLY="" FROM="" UNTIL="" SKIP_DONE=0 CHECK=0
    DEVICE_BATCH_SIZE_ASKED=0
    while [ $# -gt 0 ]; do
        flag="${1%%=*}"
        case "$1" in
        -y | --yes | --full | --dry-run | --dry_run | --list | --skip-done | --skip_done | --check | -h | --help)
            value="" ;;
        --*=*) value="${1#*=}" ;;
        --*)
            [ $# -ge 2 ] || usage_error "$1 needs a value"
            value="$2"
            shift
            ;;
        *) usage_error "unknown argument '$1'" ;;
        esac
        shift
        case "$flag" in
        -y | --yes) YES=1 ;;
        --full)
            declare -F full_sizes >/dev/null || usage_error "$JOB_SCRIPT has one set of sizes, no --full"
            sizes=full_sizes
            ;;
        --dry-run | --dry_run) DRY_RUN=1 ;;
        --list) LIST=1 ;;
        --check) CHECK=1 ;;
        --only) ONLY="$value" ;;
        --from) FROM="$value" ;;
        --until) UNTIL="$value" ;;
        --skip-done | --skip_done) SKIP_DONE=1 ;;
        -h | --help)
            show_help
            exit 0
            ;;
        *)
            name="$(size_of_flag "$flag")" || usage_error "unknown flag $flag"
            [ -n "$value" ] || usage_error "$flag needs a value"
            check_size "$name" "$flag" "$value"
            overrides+=("$name=$value")
            [ "$name" != DEVICE_BATCH_SIZE ] || DEVICE_BATCH_SIZE_ASKED=1
            ;;
        esac
    done
    "$sizes"
    for override in ${overrides[@]+"${overrides[@]}"}; do
        printf -v "${override%%=*}" '%s' "${override#*=}"
    done
    for name in FIRST_SHARDS MAX_SEQ_LEN DEVICE_BATCH_SIZE TOTAL_BATCH_SIZE DEPTH SFT_DEVICE_BATCH_SIZE \
        SFT_EXAMPLES_PER_STEP; do
        [ "${!name}" -ge 1 ] || usage_error "$name is ${!name}; it must be at least 1"
    done
    [ "$INT8" = 0 ] || [ "$DEVICES" = cpu ] || usage_error "--int8 is for CPUs; leave it out here"
}

check_choice() {
    local flag="$1" value="$2"
    shift 2
    [[ " $* " = *" $value "* ]] || usage_error "$flag is '$value'; it may be one of: $*"
}

check_size() {
    case "$1" in
    DATA) ;;
    TASKS) check_choice "$2" "$3" embedded public auto ;;
    VALUE_EMBEDDINGS | INT8) check_choice "$2" "$3" 0 1 ;;
    PACKING) check_choice "$2" "$3" stream shuffled best-fit ;;
    SFT_PACKING) check_choice "$2" "$3" stream rows best-fit ;;
    TOKEN_SHIFT | *_LIMIT | *_LR | *_FRACTION)
        [[ "$3" =~ ^[0-9]*\.?[0-9]+$ ]] || usage_error "$2 needs a number, got '$3'" ;;
    *) [[ "$3" =~ ^-?[0-9]+$ ]] || usage_error "$2 needs a whole number, got '$3'" ;;
    esac
}

# ---- before the first stage ---------------------------------------------------------------------------

# A step is a whole number of passes of whole rows on every device. Passes are made as even as possible
# and no larger than asked for; a step that still does not divide is rounded up.
fit_batches() {
    local asked="$TOTAL_BATCH_SIZE" rows=$(((TOTAL_BATCH_SIZE + MAX_SEQ_LEN - 1) / MAX_SEQ_LEN))
    fit_rows "$rows" "$DEVICE_BATCH_SIZE"
    DEVICE_BATCH_SIZE="$FIT_PASS" TOTAL_BATCH_SIZE=$((FIT_ROWS * MAX_SEQ_LEN))
    if [ "$TOTAL_BATCH_SIZE" != "$asked" ]; then
        echo "note: a step of $asked tokens is not a whole number of passes of rows of $MAX_SEQ_LEN tokens" \
            "on $NUM_RANKS device(s); using $TOTAL_BATCH_SIZE" >&2
    fi
    asked="$SFT_EXAMPLES_PER_STEP"
    fit_rows "$SFT_EXAMPLES_PER_STEP" "$SFT_DEVICE_BATCH_SIZE"
    SFT_DEVICE_BATCH_SIZE="$FIT_PASS" SFT_EXAMPLES_PER_STEP="$FIT_ROWS"
    if [ "$SFT_EXAMPLES_PER_STEP" != "$asked" ]; then
        echo "note: $asked rows of a finetuning step do not divide by $NUM_RANKS device(s);" \
            "using $SFT_EXAMPLES_PER_STEP" >&2
    fi
}

# Set FIT_PASS, the rows of one pass on one device, and FIT_ROWS, those of a step, from those wanted.
fit_rows() {
    local per_rank=$((($1 + NUM_RANKS - 1) / NUM_RANKS)) passes
    passes=$(((per_rank + $2 - 1) / $2))
    FIT_PASS=$(((per_rank + passes - 1) / passes))
    FIT_ROWS=$((FIT_PASS * passes * NUM_RANKS))
}

settle_places() {
    WANDB_RUN="${WANDB_RUN:-dummy}"
    NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
    export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR/#\~/$HOME}"
    # A folder or file was named from where the user stands.
    [[ "$DATA" = /* ]] || [ ! -e "$CALLER_DIR/$DATA" ] || DATA="$CALLER_DIR/$DATA"
    # The embedded world brings its own conversations and questions, and its own CORE tasks.
    [ "$DATA" != embedded ] || TASKS=embedded
    BASE_EVAL=core,sample # base_loss measures bits per byte
    OPTIONAL_ASSETS=()
    if [ "$DATA" != embedded ] && [ "$TASKS" != public ] &&
        [ ! -f "$NANOCHAT_BASE_DIR/eval_bundle/core.yaml" ]; then
        BASE_EVAL=sample CORE_EVERY=-1
        OPTIONAL_ASSETS=(--allow-missing=eval-bundle)
        echo "note: no CORE tasks in $NANOCHAT_BASE_DIR/eval_bundle, so CORE is left out" >&2
    fi
}

comes_from_network() { [ "$1" != embedded ] && [ ! -e "$1" ]; }

# Fail in seconds, before any GPU time, when something that the stages will read is not here.
check_files() {
    check_pipeline pipeline && check_assets
}

check_assets() {
    python -m scripts.assets check --offline --all --data="$DATA" --tasks="$TASKS" -n "$NUM_SHARDS" \
        ${OPTIONAL_ASSETS[@]+"${OPTIONAL_ASSETS[@]}"} || {
        echo "error: files are missing that the stages need; on a machine with internet run:" \
            "bash scripts/download_data.sh" >&2
        return 1
    }
}

announce() {
    local steps="$NUM_ITERATIONS steps"
    [ "$NUM_ITERATIONS" -ge 0 ] || steps="as many steps as the model's size asks for"
    echo "nanochat: $DATA, depth $DEPTH, context $MAX_SEQ_LEN, $steps of $TOTAL_BATCH_SIZE tokens," \
        "$NUM_RANKS process(es)"
    echo "everything is written under $NANOCHAT_BASE_DIR"
    if [ "$DATA" = fineweb-edu ] && [ "${NANOCHAT_OFFLINE:-0}" != 1 ]; then
        echo "FineWeb-Edu shards are fetched if they are not there; without a network add --data=embedded" \
            "or --data=FOLDER"
    fi
    if [ -t 0 ] && [ "$YES" = 0 ]; then
        read -r -p "Press Enter to start, Ctrl-C to leave. "
    fi
}

# A second run in the same folder waits for the first, or for a stage that a killed run left behind: for ever,
# or LOCK_SECONDS where waiting costs.
take_turns() {
    local code=0
    mkdir -p "$NANOCHAT_BASE_DIR"
    command -v flock >/dev/null || return 0
    exec 9>"$NANOCHAT_BASE_DIR/run.lock"
    flock --nonblock --conflict-exit-code 75 9 || code=$?
    if [ "$code" = 75 ]; then
        echo "another run is at work in $NANOCHAT_BASE_DIR; waiting for it to end"
        flock ${LOCK_SECONDS:+--timeout "$LOCK_SECONDS"} 9 || {
            echo "error: it has not ended in $LOCK_SECONDS s; use another NANOCHAT_BASE_DIR" >&2
            exit 1
        }
    elif [ "$code" != 0 ]; then
        echo "note: this file system has no locks; do not start two runs in $NANOCHAT_BASE_DIR" >&2
    fi
}
