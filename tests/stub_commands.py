"""Stand-ins for the commands of the main job: what they print, leave behind and answer to signals.

`install(folder)` writes a `python` that records each command and leaves the files that the real one
would leave, in milliseconds; a training "run" takes steps that a signal can interrupt. Variables:
STUB_LOG (what ran, one line each), STUB_FAIL (part of a command that shall fail), STUB_CODE (with
which exit code), STUB_STEPS (of a training run, 0.1 s each), STUB_REAL (a module that is not
pretended), STUB_SLEEP (seconds of a chat evaluation).
"""

import sys
from pathlib import Path

# Everything but the record of stages is pretended.
PYTHON = r"""#!/usr/bin/env bash
if [ "${2:-}" = scripts.run_state ] || [ "${2:-}" = "${STUB_REAL:-}" ]; then exec {python} "$@"; fi
[ "$1" = -m ] || exit 0
shift
printf -v words ' %q' "$@"
echo "${RANK:-0}/${WORLD_SIZE:-1}$words" >>"$STUB_LOG"
if [ -n "${STUB_FAIL:-}" ] && [[ "$*" = *"$STUB_FAIL"* ]]; then
    for i in $(seq 40); do echo "line $i of the error"; done
    exit "${STUB_CODE:-7}"
fi
base="$NANOCHAT_BASE_DIR"
checkpoint() {
    local steps="${STUB_STEPS:-2}" counter="$base/$1.steps" step=0 stop=0
    mkdir -p "$base/$1_checkpoints/d20/step_000001"
    [[ "$arguments" = *--resume* ]] && [ -f "$counter" ] && step="$(cat "$counter")"
    trap 'stop=1' TERM USR1
    while [ "$step" -lt "$steps" ]; do
        step=$((step + 1))
        sleep 0.1
        if [ "${RANK:-0}" = 0 ]; then echo "$step" >"$counter"; fi
        if [ "$stop" = 1 ]; then echo "saved at $step"; exit 85; fi
    done
    echo "weights" >"$base/$1_checkpoints/d20/step_000001/manifest.json"
}
section() { mkdir -p "$base/report"; echo "{}" >"$base/report/$1"; }
arguments="$*"
case "$*" in
scripts.tok_train*) mkdir -p "$base/tokenizer"; echo "{}" >"$base/tokenizer/tokenizer.json" ;;
scripts.tok_eval*) section tokenizer-evaluation.json ;;
scripts.base_train*) checkpoint base ;;
scripts.base_loss*) section base-model-loss.json ;;
scripts.base_eval*) section base-model-evaluation.json ;;
scripts.mid_train*) checkpoint mid ;;
scripts.chat_sft*) checkpoint chatsft ;;
scripts.chat_eval*)
    # As Python does: end at once, with the signal's number.
    trap 'exit 143' TERM
    trap 'exit 138' USR1
    sleep "${STUB_SLEEP:-0}" &
    wait $!
    name="${2#--source=}"; section "chat-evaluation-$name.json" ;;
"nanochat.report generate") section report.md ;;
esac
"""
TORCHRUN = """#!/usr/bin/env bash
while [ "$1" != -m ]; do shift; done
exec python "$@"
"""
NVIDIA_SMI = """#!/usr/bin/env bash
case "$*" in
*memory.total*) for i in $(seq "${STUB_GPUS:-8}"); do echo "${STUB_GPU_MIB:-81559}"; done ;;
*) for i in $(seq "${STUB_GPUS:-8}"); do echo "GPU $i: stub"; done ;;
esac
"""


def install(folder: Path) -> Path:
    """Write the stand-ins; returns the folder to put first on PATH."""
    folder.mkdir(parents=True)
    python = PYTHON.replace("{python}", sys.executable)
    for name, text in (("python", python), ("torchrun", TORCHRUN), ("nvidia-smi", NVIDIA_SMI)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder
