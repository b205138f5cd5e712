#!/usr/bin/env bash
# Set up everything on a cluster that does not need data: folders and caches on scratch, the Python
# environment and what goes into it. Once, on a node with internet. Can be repeated.
#
#   bash scripts/setup_environment.sh       .venv is there afterwards
#   source scripts/setup_environment.sh     the same, and this shell is in it, with all variables set
#
# Settings come from .env.local. Everything lies below the scratch root: the environment in nanochat-venv, of
# which .venv is a link, so that `uv sync --extra gpu` and `pip install -e '.[gpu]'` mean the same one.
if [ "${BASH_SOURCE[0]}" != "$0" ]; then
    # Sourced: what may fail runs in a shell of its own, then this one takes over the result.
    if bash "${BASH_SOURCE[0]}" "$@"; then
        cd "$(dirname "${BASH_SOURCE[0]}")/.." || return 1
        # shellcheck source=scripts/cluster.sh
        source scripts/cluster.sh
        read_settings
        load_modules
        settle_on_scratch && enter_environment
    fi
    return
fi
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/cluster.sh
source scripts/cluster.sh
# shellcheck source=scripts/venv.sh
source scripts/venv.sh

read_settings
load_modules
settle_on_scratch
mkdir -p logs
if [ "${SKIP_SETUP:-0}" != 1 ]; then
    link_environment
    ensure_venv "${1:-gpu}"
fi
enter_environment

echo
echo "environment:    $(command -v python), $(python --version)"
echo "base folder:    $NANOCHAT_BASE_DIR"
echo "caches:         $XDG_CACHE_HOME"
if command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus 2>/dev/null; then
    python scripts/test_gpu.py
else
    echo "no GPU on this node; on one that has some, python scripts/test_gpu.py checks them"
fi
[ -n "$(mail_address)" ] || echo "no email in .env.local: cp .env.local.example .env.local, and set it"
echo "next:           bash scripts/download_data.sh"
