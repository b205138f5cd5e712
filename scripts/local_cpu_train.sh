#!/usr/bin/env bash
# The main job: from text to a model you can talk to, on a CPU, ending in report.md.
#
#   bash scripts/local_cpu_train.sh              the quick run: the embedded world, minutes on two cores
#   bash scripts/local_cpu_train.sh --full       the long run: FineWeb-Edu, 1 to 3 hours
#   bash scripts/local_cpu_train.sh --depth=6    any size below, given as a flag instead of edited here
#   bash scripts/local_cpu_train.sh --int8=1     training in 8-bit integers (CPUs with AMX or AVX-512 BF16)
#
# Start it again after an interruption or a change: what is done is skipped, what was interrupted goes on.
#
# Everything is written under $NANOCHAT_BASE_DIR (default ~/.cache/nanochat) and to ./report.md.
set -euo pipefail
CALLER_DIR="$PWD"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/main_job.sh
source scripts/main_job.sh

# ---- sizes: edit them here, or give them as flags (--max_seq_len=1024 or --max-seq-len 1024) ----------

quick_sizes() {
    DEVICES=cpu                    # one process
    DATA=embedded                  # embedded, fineweb-edu, climbmix, or a folder of parquet shards
    TASKS=auto                     # conversations and questions: embedded, public, or auto = public if here
    FIRST_SHARDS=8                 # training shards for the tokenizer; the rest comes meanwhile
    NUM_SHARDS=8                   # training shards to generate or fetch
    MAX_CHARS=10000000             # text the tokenizer is trained on
    VOCAB_SIZE=4096

    DEPTH=4                        # layers; width = 64 x depth
    TOKEN_SHIFT=0.5                # each token also sees half of the one before it (0 = none)
    VALUE_EMBEDDINGS=1             # every other layer also reads the token itself (0 = none)
    PACKING=stream                 # how documents fill rows: stream, shuffled, best-fit (data-pipeline.md)
    MAX_SEQ_LEN=256                # tokens of context
    DEVICE_BATCH_SIZE=8            # rows of one forward pass
    TOTAL_BATCH_SIZE=2048          # tokens of one optimizer step
    NUM_ITERATIONS=1050            # optimizer steps of pretraining
    FINAL_LR=0.2                   # learning rate at the end of it, as a share
    SAVE_EVERY=200                 # steps between checkpoints: what an interruption costs at most
    EVAL_EVERY=525
    EVAL_TOKENS=65536
    BPB_LIMIT=0                    # bits per byte that the base model may end with; 0 = fewer than by guessing
    SPIKE_LIMIT=8                  # nats the loss may rise and stay; 0 = any. 3.5 when the lessons end
    CORE_EVERY=-1                  # steps between CORE scores while training; -1 = none
    SAMPLE_EVERY=0                 # steps between samples while training; 0 = at the end only, -1 = none
    CORE_MAX_PER_TASK=100          # items of each CORE task

    MID_ITERATIONS=200
    MID_FINAL_LR=1
    SFT_ITERATIONS=480
    SFT_DEVICE_BATCH_SIZE=16
    SFT_EXAMPLES_PER_STEP=16       # rows of a step; a row holds several conversations
    SFT_PACKING=best-fit           # rows = one conversation a row
    SFT_LR_FRACTION=1              # learning rates of finetuning, as a share of pretraining's

    MAX_PROBLEMS=300               # problems of each chat evaluation
    MAX_NEW_TOKENS=128             # longest answer in them
}

full_sizes() {
    DEVICES=cpu
    DATA=fineweb-edu
    TASKS=auto
    FIRST_SHARDS=4
    NUM_SHARDS=4
    MAX_CHARS=1000000000
    VOCAB_SIZE=65536

    DEPTH=4
    TOKEN_SHIFT=0.5
    VALUE_EMBEDDINGS=1
    PACKING=shuffled               # the text has no order to keep, unlike the embedded lessons
    MAX_SEQ_LEN=1024
    DEVICE_BATCH_SIZE=8
    TOTAL_BATCH_SIZE=8192
    BASE_MINUTES=75                # pretraining: as many steps as fit in this time ...
    TOKENS_PER_SECOND=2000         # ... at this speed
    NUM_ITERATIONS=$((BASE_MINUTES * 60 * TOKENS_PER_SECOND / TOTAL_BATCH_SIZE))
    FINAL_LR=0.2
    SAVE_EVERY=50
    EVAL_EVERY=250
    EVAL_TOKENS=262144
    BPB_LIMIT=0
    SPIKE_LIMIT=2
    CORE_EVERY=-1
    SAMPLE_EVERY=0                 # steps between samples while training; 0 = at the end only, -1 = none
    CORE_MAX_PER_TASK=100

    MID_ITERATIONS=400
    MID_FINAL_LR=0.5
    SFT_ITERATIONS=300
    SFT_DEVICE_BATCH_SIZE=8
    SFT_EXAMPLES_PER_STEP=32
    SFT_PACKING=rows
    SFT_LR_FRACTION=0.02

    MAX_PROBLEMS=100
    MAX_NEW_TOKENS=128
}

main_job quick_sizes "$@"
