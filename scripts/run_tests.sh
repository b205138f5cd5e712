#!/usr/bin/env bash
# Set up .venv with the dev extra and run every check: style, types, layers, Rust tests, Python tests.
#
#   bash scripts/run_tests.sh            everything but the tests marked slow
#   bash scripts/run_tests.sh --slow     those too
#   bash scripts/run_tests.sh [--slow] -k resume      what follows goes to pytest
#
# All checks run even when one fails; the exit code is 0 only when all passed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/venv.sh
source scripts/venv.sh

MARKER="not slow"
if [ "${1:-}" = "--slow" ]; then
    MARKER="slow or not slow"
    shift
fi

ensure_venv dev

# Many small tests: a second thread per operation costs more than it brings.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Tests find their data on this machine or make it.
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
# A test that forgets to choose a folder must not meet, or touch, the user's.
NANOCHAT_BASE_DIR="$(mktemp -d)"
export NANOCHAT_BASE_DIR
trap 'rm -rf "$NANOCHAT_BASE_DIR"' EXIT

FAILED=()
check() {
    local name="$1"
    shift
    echo "== $name: $*"
    if ! "$@"; then
        FAILED+=("$name")
    fi
}

check "style" ruff check .
check "format" ruff format --check .
check "types" mypy
check "layers" lint-imports
if command -v cargo >/dev/null; then
    check "rust" cargo test --quiet --release --manifest-path rustbpe/Cargo.toml
    check "kernels" cargo test --quiet --release --manifest-path nanochat/kernels/Cargo.toml
fi
check "tests" python -m pytest -m "$MARKER" --durations=10 "$@"

if [ "${#FAILED[@]}" -gt 0 ]; then
    echo "failed: ${FAILED[*]}" >&2
    exit 1
fi
echo "all checks passed"
