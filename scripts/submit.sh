#!/usr/bin/env bash
# Submit a job with the settings in .env.local, and say how to follow it.
#
#   bash scripts/submit.sh                                          scripts/speedrun.slurm
#   bash scripts/submit.sh scripts/resume_mid_sft.slurm             another job
#   bash scripts/submit.sh --time=2:00:00 --nodes=2                 SLURM's options stand before the job ...
#   bash scripts/submit.sh scripts/speedrun.slurm --from mid_train  ... and those of speedrun.sh behind it
#   bash scripts/submit.sh --dry-run                                print the sbatch line, submit nothing
#   bash scripts/submit.sh --no-check                               submit even if files are missing here
#
# Nothing is submitted that cannot run: first it is looked, in seconds, whether all files are here that the
# job will read. What is missing is named, with the command that fetches it.
# A setting replaces the job's own line, an option here replaces both. SLURM writes to the address in
# .env.local when the job begins, ends or fails, and to nobody when there is none.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/cluster.sh
source scripts/cluster.sh

JOB=scripts/speedrun.slurm
DRY_RUN=0 CHECK=1
OPTIONS=()
while [ $# -gt 0 ]; do
    case "$1" in
    *.slurm)
        JOB="$1"
        shift
        break
        ;;
    --dry-run | --dry_run) DRY_RUN=1 ;;
    --no-check | --no_check) CHECK=0 ;;
    -h | --help)
        sed -n '2,/^set -/{/^#/s/^# \{0,1\}//p}' scripts/submit.sh
        exit 0
        ;;
    -*) OPTIONS+=("$1") ;;
    *)
        echo "error: '$1' is neither an option of sbatch (--name=value) nor a .slurm file" >&2
        exit 2
        ;;
    esac
    shift
done
[ -f "$JOB" ] || {
    echo "error: there is no job script $JOB; the job scripts are:" scripts/*.slurm >&2
    exit 2
}

read_settings
KEYS=(account partition qos constraint)
# A chat needs one GPU, whatever a training job is given.
[ "$(basename "$JOB")" = chat.slurm ] || KEYS+=(gres nodes time mem cpus_per_task)
COMMAND=(sbatch --parsable)
for key in "${KEYS[@]}"; do
    value="$(setting "$key")"
    [ -z "$value" ] || COMMAND+=("--${key//_/-}=$value")
done
ADDRESS="$(mail_address)"
if [ -n "$ADDRESS" ]; then
    COMMAND+=("--mail-user=$ADDRESS" "--mail-type=BEGIN,END,FAIL")
else
    echo "note: no email in .env.local, so nobody is told when the job ends" >&2
fi
COMMAND+=(${OPTIONS[@]+"${OPTIONS[@]}"} "$JOB" "$@")

echo "${COMMAND[*]}"
[ "$DRY_RUN" = 0 ] || exit 0
command -v sbatch >/dev/null || {
    echo "error: there is no sbatch here; on a machine without SLURM run: bash speedrun.sh" >&2
    exit 1
}
if [ "$CHECK" = 1 ] && grep -q '^run_job ' "$JOB"; then
    bash "$JOB" --check "$@" || {
        echo "error: not submitted; when that is mended, submit again (or now, with --no-check)" >&2
        exit 1
    }
fi
# SLURM does not make the folder of its logs, and a job without it ends without a trace.
mkdir -p logs
ANSWER="$("${COMMAND[@]}")"
ID="${ANSWER%%;*}"
LOG="$(sed -n 's/^#SBATCH --output=//p' "$JOB")"
echo "submitted as job $ID"
echo "  in the queue:  squeue -j $ID"
echo "  its log:       tail -F ${LOG//%j/$ID}"
echo "  stop it:       scancel $ID"
