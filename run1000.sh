#!/usr/bin/env bash
# The main job: from text to a model you can talk to, on eight GPUs (d32), ending in report.md.
#
#   bash run1000.sh                        all of it: 33 to 42 hours on eight H100
#   screen -S training bash run1000.sh     the same, and you may log out
#   WANDB_RUN=name bash run1000.sh         with metrics in Weights & Biases
#   bash run1000.sh --depth=26             any size below, given as a flag instead of edited here
#
# Start it again after an interruption or a change: what is done is skipped, what was interrupted goes on.
# It takes the GPUs it finds, one process each; a step has the same number of tokens on any number.
#
# Everything is written under $NANOCHAT_BASE_DIR (default ~/.cache/nanochat) and to ./report.md.
set -euo pipefail
CALLER_DIR="$PWD"
cd "$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=scripts/main_job.sh
source scripts/main_job.sh

# ---- sizes: edit them here, or give them as flags (--max_seq_len=1024 or --max-seq-len 1024) ----------

d32_sizes() {
    DEVICES=gpu                    # one process for each GPU
    DATA=fineweb-edu               # embedded, fineweb-edu, climbmix, or a folder of parquet shards
    TASKS=public                   # conversations and questions: embedded, public, or auto = public if here
    FIRST_SHARDS=16                # training shards for the tokenizer: 4e9 characters; the rest comes meanwhile
    NUM_SHARDS=800                 # 740 would do: 37.6e9 tokens x 4.8 characters / 250e6 a shard
    MAX_CHARS=4000000000           # text the tokenizer is trained on
    VOCAB_SIZE=65536

    DEPTH=32                       # layers; width = 64 x depth
    TOKEN_SHIFT=0                  # each token also sees that share of the one before it (0 = classic)
    VALUE_EMBEDDINGS=0             # 1 = every other layer also reads the token itself
    PACKING=stream                 # how documents fill rows: stream, shuffled, best-fit (data-pipeline.md)
    MAX_SEQ_LEN=2048               # tokens of context
    DEVICE_BATCH_SIZE=8            # rows of one forward pass: as many as fit in 80 GB of GPU memory
    TOTAL_BATCH_SIZE=524288        # tokens of one optimizer step
    NUM_ITERATIONS=-1              # optimizer steps of pretraining; -1 = 20 tokens a parameter (71,680)
    FINAL_LR=0                     # learning rate at the end of it, as a share
    SAVE_EVERY=250                 # steps between checkpoints: what a crash costs at most
    EVAL_EVERY=250
    EVAL_TOKENS=10485760
    BPB_LIMIT=1.5                  # bits per byte that the base model may end with; 0 = fewer than by guessing
    SPIKE_LIMIT=2                  # nats the loss may rise and stay; 0 = any
    CORE_EVERY=2000                # steps between CORE scores while training; -1 = none
    SAMPLE_EVERY=2000
    CORE_MAX_PER_TASK=-1           # items of each CORE task; -1 = all

    MID_ITERATIONS=-1              # -1 = once through the conversations
    MID_FINAL_LR=0
    SFT_ITERATIONS=-1
    SFT_DEVICE_BATCH_SIZE=4
    SFT_EXAMPLES_PER_STEP=32       # rows of a step
    SFT_PACKING=rows               # one conversation a row
    SFT_LR_FRACTION=0.02           # learning rates of finetuning, as a share of pretraining's

    MAX_PROBLEMS=-1                # problems of each chat evaluation; -1 = all
    MAX_NEW_TOKENS=512             # longest answer in them
}

# At the end the page to talk to the model, if somebody is at the terminal and did not say --yes.
CHAT_AFTERWARDS=1
main_job d32_sizes "$@"
