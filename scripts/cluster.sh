# shellcheck shell=bash
# Sourced: one cluster's settings, and everything this project writes in places that suit a cluster.
#
#   read_settings            .env.local into variables; `setting KEY [DEFAULT]` prints one
#   settle_on_scratch        the base folder and all caches below the scratch root, exported
#   load_modules             the site's modules, those that exist
#   enter_environment        .venv, without installing anything
#   settle_in                all of these, in that order
#
# .env.local (copy .env.local.example) has lines `key=value`: keys in any case, values plain or quoted, with
# or without `export`. It is read, not executed. No setting is required.

SETTING_KEYS=(email account partition qos gres nodes time mem cpus_per_task constraint
    scratch_root base_dir venv modules wandb_project wandb_entity)
PLACEHOLDER_EMAIL=your_email@msstate.edu
# Those of the cluster that this was written on; another one names its own in .env.local, or none.
DEFAULT_MODULES="spack-managed-x86-64_v3/v1.0 python/3.12.5 cuda-toolkit"

declare -A SETTINGS=()

# Fails when a value is one that SLURM or a path could not be made of, having named all of them.
read_settings() {
    local line key value shape number=0 code=0 file=.env.local
    SETTINGS=()
    [ -f "$file" ] || return 0
    while IFS= read -r line || [ -n "$line" ]; do
        number=$((number + 1))
        line="${line%$'\r'}"
        line="${line#"${line%%[![:space:]]*}"}"
        case "$line" in '' | '#'*) continue ;; esac
        line="${line#export }"
        if [[ "$line" != *=* ]]; then
            echo "warning: $file, line $number is not key=value: $line" >&2
            continue
        fi
        key="$(printf '%s' "${line%%=*}" | tr -d '[:space:]' | tr 'A-Z-' 'a-z_')"
        value="$(plain_value "${line#*=}")"
        if [[ " ${SETTING_KEYS[*]} " != *" $key "* ]]; then
            echo "warning: $file, line $number: unknown setting '$key'; the settings are:" \
                "${SETTING_KEYS[*]}" >&2
            continue
        fi
        SETTINGS["$key"]="$value"
        shape="$(shape_of_setting "$key")"
        if [ -n "$value" ] && ! [[ "$value" =~ ^(${shape%% *})$ ]]; then
            echo "error: $file, line $number: $key is '$value'; it must be ${shape#* }" >&2
            code=1
        fi
    done <"$file"
    return "$code"
}

# A pattern without spaces, and in words what it stands for.
shape_of_setting() {
    case "$1" in
    nodes) echo '[1-9][0-9]*(-[1-9][0-9]*)? a number such as 2, or a range such as 1-4' ;;
    cpus_per_task) echo '[1-9][0-9]* a number such as 16' ;;
    time) echo '([0-9]+-)?[0-9]+(:[0-5]?[0-9]){0,2}|UNLIMITED a time such as 12:00:00, 1-12:00 or 90 (minutes)' ;;
    mem) echo '[0-9]+[KMGTkmgt]? a size such as 256G' ;;
    email | account | partition | qos | gres) echo '[^[:space:]]+ one word' ;;
    scratch_root | base_dir | venv) echo '/.* a path that begins with /' ;;
    *) echo '.* anything' ;;
    esac
}

# A value without its quotes, or without spaces and comment around it; ~, $HOME and $USER are filled in.
plain_value() {
    local value="$1" quote user="${USER:-$(id -un)}"
    value="${value#"${value%%[![:space:]]*}"}"
    quote="${value:0:1}"
    if [[ "$quote" = [\"\'] && "${value:1}" = *"$quote"* ]]; then
        value="${value:1}"
        value="${value%%"$quote"*}"
    else
        value="${value%%[[:space:]]#*}"
        value="${value%"${value##*[![:space:]]}"}"
    fi
    if [ "$quote" != "'" ]; then
        value="${value/#\~/$HOME}"
        value="${value//\$\{USER\}/$user}"
        value="${value//\$USER/$user}"
        value="${value//\$\{HOME\}/$HOME}"
        value="${value//\$HOME/$HOME}"
    fi
    printf '%s' "$value"
}

setting() { printf '%s' "${SETTINGS[$1]-${2:-}}"; }

# The address for SLURM's mails: $EMAIL, else that of the settings; nothing when it is still the example's.
mail_address() {
    local address="${EMAIL:-$(setting email)}"
    [ "$address" = "$PLACEHOLDER_EMAIL" ] || printf '%s' "$address"
}

# Where large files belong: the setting, the site's $SCRATCH, or the folder that this clone lies in.
scratch_root() {
    local root
    root="$(setting scratch_root "${SCRATCH:-}")"
    printf '%s' "${root:-$(dirname "$PWD")}"
}

settle_on_scratch() {
    local root cache
    root="$(scratch_root)"
    case "$root/" in
    "$HOME"/*)
        echo "warning: caches and models go to $root, in your home; set scratch_root in .env.local" >&2 ;;
    esac
    if ! mkdir -p "$root" 2>/dev/null || [ ! -w "$root" ]; then
        echo "error: the scratch root $root cannot be written; set scratch_root in .env.local" >&2
        return 1
    fi
    cache="$root/cache"
    NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$(setting base_dir "$root/nanochat-cache")}"
    NANOCHAT_VENV="${NANOCHAT_VENV:-$(setting venv "$root/nanochat-venv")}"
    export NANOCHAT_BASE_DIR NANOCHAT_VENV
    export XDG_CACHE_HOME="$cache" TMPDIR="$cache/tmp"
    export HF_HOME="$cache/huggingface" TORCH_HOME="$cache/torch"
    export TORCHINDUCTOR_CACHE_DIR="$cache/inductor" TRITON_HOME="$cache" TRITON_CACHE_DIR="$cache/triton"
    export CUDA_CACHE_PATH="$cache/cuda" MPLCONFIGDIR="$cache/matplotlib"
    export PIP_CACHE_DIR="$cache/pip" UV_CACHE_DIR="$cache/uv" UV_PYTHON_INSTALL_DIR="$cache/uv-python"
    # With it `uv run` takes the environment as it is, instead of installing another torch into it.
    export UV_PROJECT_ENVIRONMENT="$NANOCHAT_VENV" UV_NO_SYNC=1
    export CARGO_HOME="$root/.cargo" RUSTUP_HOME="$root/.rustup"
    export TIKTOKEN_CACHE_DIR="$NANOCHAT_BASE_DIR/tiktoken"
    export WANDB_DIR="$NANOCHAT_BASE_DIR/wandb" WANDB_CACHE_DIR="$cache/wandb"
    export WANDB_CONFIG_DIR="$cache/wandb" WANDB_DATA_DIR="$cache/wandb"
    WANDB_PROJECT="$(setting wandb_project "${WANDB_PROJECT:-}")"
    WANDB_ENTITY="$(setting wandb_entity "${WANDB_ENTITY:-}")"
    export WANDB_PROJECT WANDB_ENTITY
    mkdir -p "$NANOCHAT_BASE_DIR" "$TMPDIR" "$HF_HOME" "$TORCH_HOME" "$WANDB_DIR"
}

settle_in() {
    read_settings
    load_modules
    settle_on_scratch
    enter_environment
}

# What a node without a network must not even try.
stay_offline() {
    export NANOCHAT_OFFLINE=1 HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1
    export WANDB_MODE="${WANDB_MODE:-offline}" UV_OFFLINE=1 PIP_NO_INDEX=1
}

# Module trees differ from node to node: what is not there is named and left out.
load_modules() {
    local name names srun
    names="$(setting modules "$DEFAULT_MODULES")"
    [ -n "$names" ] && [ "$(type -t module || true)" = function ] || return 0
    set +u # the functions of modules read variables that may be unset
    srun="$(command -v srun || true)"
    module purge >/dev/null 2>&1 || true
    # Where SLURM itself came as a module.
    [ -z "$srun" ] || command -v srun >/dev/null || PATH="$PATH:$(dirname "$srun")"
    for name in ${names//,/ }; do
        module load "$name" >/dev/null 2>&1 || echo "note: module $name is not on this node; going on without" >&2
    done
    set -u
}

# `.venv` is the environment on scratch, so that all install commands and all scripts mean the same one.
link_environment() {
    mkdir -p "$NANOCHAT_VENV"
    if [ -L .venv ] || [ ! -e .venv ]; then
        ln -sfn "$NANOCHAT_VENV" .venv
    elif [ ! .venv -ef "$NANOCHAT_VENV" ]; then
        echo "note: .venv is a folder of its own and is used as it is, not $NANOCHAT_VENV" >&2
        NANOCHAT_VENV="$PWD/.venv"
        export NANOCHAT_VENV UV_PROJECT_ENVIRONMENT="$NANOCHAT_VENV"
    fi
}

# Take the environment that is there; nothing is installed. SKIP_SETUP=1 takes the active Python.
enter_environment() {
    local folder
    if [ "${SKIP_SETUP:-0}" != 1 ]; then
        for folder in .venv "$NANOCHAT_VENV"; do
            if [ -x "$folder/bin/python" ]; then
                set +u
                # shellcheck disable=SC1091
                source "$folder/bin/activate"
                set -u
                export SKIP_SETUP=1
                break
            fi
        done
    fi
    python -c 'import sys, nanochat, torch; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || {
        echo "error: no environment with nanochat in it; on a node with internet run:" \
            "bash scripts/setup_environment.sh" >&2
        return 1
    }
}
