# shellcheck shell=bash
# Sourced: the virtual environment and what is installed in it.
#
#   ensure_venv EXTRA     make .venv if it is missing, install this project with EXTRA, activate
#
# The install is skipped while pyproject.toml, the Rust sources, the compiler and the interpreter are
# those of the last install. Needs Python >= 3.10; uses uv where it is, and python -m venv with pip
# where it is not. PYTHON names another interpreter, TORCH_INDEX_URL one more package index to look for
# torch in (pip's own settings are respected as they are). SKIP_SETUP=1 uses the active Python as it is.

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: Python 3.10 or newer is needed, ${PYTHON:-python3} is $("${PYTHON:-python3}" --version 2>&1);" \
        "install one, or name it: PYTHON=/path/to/python3.11 bash $0" >&2
    return 1
}

# One line that changes when the install has to be done again.
install_fingerprint() {
    {
        cat pyproject.toml
        find rustbpe nanochat/kernels -name target -prune -o -name '*.rs' -print -o -name 'Cargo.*' -print | LC_ALL=C sort | xargs cat
        command -v cargo >/dev/null && cargo --version
        .venv/bin/python --version
    } | .venv/bin/python -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
}

install_project() {
    local extra="$1"
    local index=()
    if [ -n "${TORCH_INDEX_URL:-}" ]; then
        index=(--extra-index-url "$TORCH_INDEX_URL")
    fi
    if command -v uv >/dev/null; then
        uv pip install --python .venv/bin/python ${index[@]+"${index[@]}"} -e ".[$extra]"
    else
        .venv/bin/python -m pip install --quiet ${index[@]+"${index[@]}"} -e ".[$extra]"
    fi
}

# Whether EXTRA, or dev, which needs all that the others need, was installed from what is here now.
is_installed() {
    local now stamp
    now="$(install_fingerprint)"
    for stamp in ".venv/nanochat-$1.stamp" .venv/nanochat-dev.stamp; do
        [ "$(cat "$stamp" 2>/dev/null)" != "$now" ] || return 0
    done
    return 1
}

ensure_venv() {
    local extra="$1" python folder
    [ "${SKIP_SETUP:-0}" != 1 ] || return 0
    if [ ! -x .venv/bin/python ]; then
        if ! python="$(find_python 2>/dev/null)" && command -v uv >/dev/null; then
            python=3.12 # uv fetches one
        fi
        [ -n "$python" ] || find_python # which says what is missing
        # On a cluster .venv is a link to a folder on scratch, and venv refuses links.
        folder=.venv
        [ ! -L .venv ] || folder="$(readlink .venv)"
        echo "making $folder with $python"
        if command -v uv >/dev/null; then
            uv venv --python "$python" "$folder"
        else
            "$python" -m venv "$folder"
        fi
    fi
    if ! is_installed "$extra"; then
        echo "installing nanochat and what it needs into .venv (extra: $extra)"
        if ! command -v cargo >/dev/null; then
            echo "no cargo: the tokenizer will run in Python, and training and answers without compiled kernels: slower"
        fi
        install_project "$extra"
        install_fingerprint >".venv/nanochat-$extra.stamp"
    fi
    # activate reads variables that may be unset
    set +u
    # shellcheck disable=SC1091
    source .venv/bin/activate
    set -u
}
