#!/usr/bin/env bash
# Fetch everything that a job will read, train the tokenizer, and prove that nothing is missing: GPU nodes
# have no internet. On a node that has, after scripts/setup_environment.sh.
#
#   bash scripts/download_data.sh                   for speedrun.sh: 240 shards, about 24 GB
#   bash scripts/download_data.sh --num-shards=800  flags are those that speedrun.sh will be given
#
# What is there already is not fetched again. Ends with 0 only when the job can run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/cluster.sh
source scripts/cluster.sh
settle_in
mkdir -p logs

# The stages of the job that can be done here; it will find them done. No GPU is needed for these.
export NPROC_PER_NODE="${NPROC_PER_NODE:-8}"
bash speedrun.sh --yes --until shards "$@"
bash speedrun.sh --check "$@"
echo "everything is in $NANOCHAT_BASE_DIR; next: bash scripts/submit.sh"
