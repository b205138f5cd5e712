#!/usr/bin/env bash
# The main job: from text to a model you can talk to, on a CPU, ending in report.md.
#
#   bash scripts/local_cpu_train.sh              the quick run: the embedded world, minutes on two cores
#   bash scripts/local_cpu_train.sh --full       the long run: FineWeb-Edu, 1 to 3 hours
#   bash scripts/local_cpu_train.sh --depth=6    any size below, given as a flag instead of edited here
#
# Start it again after an interruption or a change: what is done is skipped, what was interrupted goes on.
#
#   -y, --yes       do not wait for Enter            --list          print the names of the stages
#   --only STAGE    run this stage only              --dry-run       print every command, run none
#   --from STAGE    run this stage and all after it
#
# Everything is written under $NANOCHAT_BASE_DIR (default ~/.cache/nanochat) and to ./report.md.
set -euo pipefail
CALLER_DIR="$PWD"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/venv.sh
source scripts/venv.sh
# shellcheck source=scripts/stages.sh
source scripts/stages.sh

# ---- sizes: edit them here, or give them as flags (--max_seq_len=1024 or --max-seq-len 1024) ----------

quick_sizes() {
    DATA=embedded                  # embedded, fineweb-edu, climbmix, or a folder of parquet shards
    NUM_SHARDS=8                   # training shards to generate or fetch
    MAX_CHARS=10000000             # text the tokenizer is trained on
    VOCAB_SIZE=4096

    DEPTH=4                        # layers; width = 64 x depth
    TOKEN_SHIFT=0.5                # each token also sees half of the one before it (0 = classic)
    MAX_SEQ_LEN=256                # tokens of context
    DEVICE_BATCH_SIZE=16           # rows of one forward pass
    TOTAL_BATCH_SIZE=4096          # tokens of one optimizer step
    NUM_ITERATIONS=400             # optimizer steps of pretraining
    SAVE_EVERY=100                 # steps between checkpoints: what an interruption costs at most
    EVAL_EVERY=130
    EVAL_TOKENS=65536
    CORE_MAX_PER_TASK=100          # items of each CORE task

    MID_ITERATIONS=400
    SFT_ITERATIONS=200
    SFT_DEVICE_BATCH_SIZE=16
    SFT_EXAMPLES_PER_STEP=16       # rows of a step; a row holds several conversations
    SFT_PACKING=best-fit           # rows = one conversation a row
    SFT_LR_FRACTION=0.5            # learning rates of finetuning, as a share of pretraining's

    MAX_PROBLEMS=300               # problems of each chat evaluation
    MAX_NEW_TOKENS=128             # longest answer in them
}

full_sizes() {
    DATA=fineweb-edu
    NUM_SHARDS=4
    MAX_CHARS=1000000000
    VOCAB_SIZE=65536

    DEPTH=4
    TOKEN_SHIFT=0
    MAX_SEQ_LEN=1024
    DEVICE_BATCH_SIZE=8
    TOTAL_BATCH_SIZE=8192
    BASE_MINUTES=75                # pretraining: as many steps as fit in this time ...
    TOKENS_PER_SECOND=2000         # ... at this speed
    NUM_ITERATIONS=$((BASE_MINUTES * 60 * TOKENS_PER_SECOND / TOTAL_BATCH_SIZE))
    SAVE_EVERY=50
    EVAL_EVERY=250
    EVAL_TOKENS=262144
    CORE_MAX_PER_TASK=100

    MID_ITERATIONS=400
    SFT_ITERATIONS=300
    SFT_DEVICE_BATCH_SIZE=8
    SFT_EXAMPLES_PER_STEP=32
    SFT_PACKING=rows
    SFT_LR_FRACTION=0.02

    MAX_PROBLEMS=100
    MAX_NEW_TOKENS=128
}

# ---- the stages: name, what it leaves behind in the base folder, command ------------------------------

pipeline() {
    local tag="d$DEPTH"
    stage report_reset "" \
        python -m nanochat.report reset

    # [1/5] data and tokenizer
    stage dataset "" \
        python -m nanochat.dataset --data="$DATA" -n "$NUM_SHARDS"
    stage tok_train "tokenizer/tokenizer.json" \
        python -m scripts.tok_train --data="$DATA" --max_chars="$MAX_CHARS" --vocab_size="$VOCAB_SIZE"
    evaluation tok_eval "report/tokenizer-evaluation.json" \
        python -m scripts.tok_eval

    # [2/5] base model
    training base_train "base_checkpoints/$tag/step_*/manifest.json" \
        python -m scripts.base_train --data="$DATA" --depth="$DEPTH" --max_seq_len="$MAX_SEQ_LEN" \
        --token_shift="$TOKEN_SHIFT" --final_lr_frac=0.2 \
        --device_batch_size="$DEVICE_BATCH_SIZE" --total_batch_size="$TOTAL_BATCH_SIZE" \
        --num_iterations="$NUM_ITERATIONS" --eval_every="$EVAL_EVERY" --eval_tokens="$EVAL_TOKENS" \
        --core_metric_every=-1 --sample_every=-1 --save_every="$SAVE_EVERY" --run="$WANDB_RUN"
    evaluation base_loss "report/base-model-loss.json" \
        python -m scripts.base_loss --model_tag="$tag" \
        --device_batch_size="$DEVICE_BATCH_SIZE" --split_tokens="$EVAL_TOKENS"
    evaluation base_eval "report/base-model-evaluation.json" \
        python -m scripts.base_eval --model-tag="$tag" --max-per-task="$CORE_MAX_PER_TASK" --eval="$BASE_EVAL"
    evaluation chat_eval_base "report/chat-evaluation-base.json" \
        python -m scripts.chat_eval --source=base --model-tag="$tag" \
        --max-new-tokens="$MAX_NEW_TOKENS" --max-problems="$MAX_PROBLEMS"

    # [3/5] midtraining
    training mid_train "mid_checkpoints/$tag/step_*/manifest.json" \
        python -m scripts.mid_train --model_tag="$tag" --max_seq_len="$MAX_SEQ_LEN" \
        --device_batch_size="$DEVICE_BATCH_SIZE" --total_batch_size="$TOTAL_BATCH_SIZE" \
        --num_iterations="$MID_ITERATIONS" --final_lr_frac=0.5 \
        --eval_every="$EVAL_EVERY" --eval_tokens="$EVAL_TOKENS" \
        --save_every="$SAVE_EVERY" --run="$WANDB_RUN"
    evaluation chat_eval_mid "report/chat-evaluation-mid.json" \
        python -m scripts.chat_eval --source=mid --model-tag="$tag" \
        --max-new-tokens="$MAX_NEW_TOKENS" --max-problems="$MAX_PROBLEMS"

    # [4/5] supervised finetuning
    training chat_sft "chatsft_checkpoints/$tag/step_*/manifest.json" \
        python -m scripts.chat_sft --model_tag="$tag" \
        --device_batch_size="$SFT_DEVICE_BATCH_SIZE" --target_examples_per_step="$SFT_EXAMPLES_PER_STEP" \
        --packing="$SFT_PACKING" --init_lr_frac="$SFT_LR_FRACTION" --num_iterations="$SFT_ITERATIONS" \
        --eval_every="$EVAL_EVERY" --eval_tokens="$EVAL_TOKENS" \
        --save_every="$SAVE_EVERY" --run="$WANDB_RUN"
    evaluation chat_eval_sft "report/chat-evaluation-sft.json" \
        python -m scripts.chat_eval --source=sft --model-tag="$tag" \
        --max-new-tokens="$MAX_NEW_TOKENS" --max-problems="$MAX_PROBLEMS"

    # [5/5] report
    report report "report/report.md" \
        python -m nanochat.report generate
}

# ---- what the command line says -----------------------------------------------------------------------

SIZES=(DATA NUM_SHARDS MAX_CHARS VOCAB_SIZE DEPTH MAX_SEQ_LEN DEVICE_BATCH_SIZE TOTAL_BATCH_SIZE
    NUM_ITERATIONS SAVE_EVERY EVAL_EVERY EVAL_TOKENS CORE_MAX_PER_TASK MID_ITERATIONS SFT_ITERATIONS
    SFT_DEVICE_BATCH_SIZE SFT_EXAMPLES_PER_STEP MAX_PROBLEMS MAX_NEW_TOKENS)

usage_error() {
    echo "error: $1 (see bash scripts/local_cpu_train.sh --help)" >&2
    exit 2
}

show_help() {
    sed -n '2,/^set -/{/^#/s/^# \{0,1\}//p}' scripts/local_cpu_train.sh
    echo
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

YES=0 FULL=0 DRY_RUN=0 LIST=0 ONLY="" FROM=""
OVERRIDES=()
while [ $# -gt 0 ]; do
    flag="${1%%=*}"
    case "$1" in
    -y | --yes | --full | --dry-run | --dry_run | --list | -h | --help) value="" ;;
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
    --full) FULL=1 ;;
    --dry-run | --dry_run) DRY_RUN=1 ;;
    --list) LIST=1 ;;
    --only) ONLY="$value" ;;
    --from) FROM="$value" ;;
    -h | --help)
        show_help
        exit 0
        ;;
    *)
        name="$(size_of_flag "$flag")" || usage_error "unknown flag $flag"
        [ -n "$value" ] || usage_error "$flag needs a value"
        [ "$name" = DATA ] || [[ "$value" =~ ^-?[0-9]+$ ]] ||
            usage_error "$flag needs a whole number, got '$value'"
        OVERRIDES+=("$name=$value")
        ;;
    esac
done

if [ "$FULL" = 1 ]; then full_sizes; else quick_sizes; fi
for override in ${OVERRIDES[@]+"${OVERRIDES[@]}"}; do
    printf -v "${override%%=*}" '%s' "${override#*=}"
done
# A folder was named from where the user stands.
if [ -d "$CALLER_DIR/$DATA" ]; then
    DATA="$(cd "$CALLER_DIR/$DATA" && pwd)"
fi

# A step is a whole number of forward passes of whole rows. A smaller batch first makes the passes
# smaller; what still does not divide is rounded up.
fit_batch() {
    local rows=$((TOTAL_BATCH_SIZE / MAX_SEQ_LEN)) pass asked="$TOTAL_BATCH_SIZE"
    [ "$rows" -ge 1 ] || rows=1
    [ "$DEVICE_BATCH_SIZE" -le "$rows" ] || DEVICE_BATCH_SIZE="$rows"
    pass=$((DEVICE_BATCH_SIZE * MAX_SEQ_LEN))
    TOTAL_BATCH_SIZE=$(((TOTAL_BATCH_SIZE + pass - 1) / pass * pass))
    if [ "$TOTAL_BATCH_SIZE" != "$asked" ]; then
        echo "note: a step of $asked tokens is not a whole number of passes of $DEVICE_BATCH_SIZE rows" \
            "x $MAX_SEQ_LEN tokens; using $TOTAL_BATCH_SIZE" >&2
    fi
}
for size in MAX_SEQ_LEN DEVICE_BATCH_SIZE TOTAL_BATCH_SIZE DEPTH; do
    [ "${!size}" -ge 1 ] || usage_error "$size is ${!size}; it must be at least 1"
done
fit_batch

# ---- run ----------------------------------------------------------------------------------------------

WANDB_RUN="${WANDB_RUN:-dummy}"
NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR/#\~/$HOME}"

# base_loss has measured bits per byte. The embedded world brings its own CORE tasks.
BASE_EVAL=core,sample
if [ "$DATA" != embedded ] && [ ! -f "$NANOCHAT_BASE_DIR/eval_bundle/core.yaml" ]; then
    BASE_EVAL=sample
    echo "note: no CORE tasks in $NANOCHAT_BASE_DIR/eval_bundle, so CORE is left out" >&2
fi

if [ "$DRY_RUN" = 1 ] || [ "$LIST" = 1 ]; then
    run_pipeline pipeline
    exit 0
fi

echo "nanochat: $DATA, depth $DEPTH, context $MAX_SEQ_LEN, $NUM_ITERATIONS steps of $TOTAL_BATCH_SIZE tokens"
echo "everything is written under $NANOCHAT_BASE_DIR"
if [ "$FULL" = 1 ] && [ "$DATA" = fineweb-edu ]; then
    echo "FineWeb-Edu shards are fetched if they are not there; without a network add --data=embedded" \
        "or --data=FOLDER"
fi
if [ -t 0 ] && [ "$YES" = 0 ]; then
    read -r -p "Press Enter to start, Ctrl-C to leave. "
fi

# A second run in the same folder waits for the first, or for a stage that a killed run left behind.
mkdir -p "$NANOCHAT_BASE_DIR"
if command -v flock >/dev/null; then
    exec 9>"$NANOCHAT_BASE_DIR/run.lock"
    flock -n 9 || {
        echo "another run is at work in $NANOCHAT_BASE_DIR; waiting for it to end"
        flock 9
    }
fi

SECONDS=0
ensure_venv cpu
run_pipeline pipeline

echo
if [ -n "$ONLY" ]; then
    echo "stage $ONLY is done ($SECONDS s)"
    exit 0
fi
echo "all stages are done ($((SECONDS / 60)) min $((SECONDS % 60)) s)"
echo "  the report:  report.md"
echo "  to chat:     source .venv/bin/activate && python -m scripts.chat_cli"
