#!/usr/bin/env bash
# One process of a job: srun starts as many of these as there are GPUs. Arguments: a module and its flags.
# SLURM's numbers get the names that torch.distributed knows; MASTER_ADDR and MASTER_PORT come with the job.
set -euo pipefail
export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" WORLD_SIZE="$SLURM_NTASKS"
# The ranks of a node share its cores; each has its own data thread besides.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python -m "$@"
