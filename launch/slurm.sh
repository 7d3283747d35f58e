#!/usr/bin/env bash
# Trains on the nodes of a SLURM cluster, one process for each GPU:  sbatch launch/slurm.sh [--flags of diffax.main]
# Call it in the repository, which like the workdir must lie where all nodes see it. Not tried on a cluster yet.
#
# Two minutes before the end of the time, and at a preemption, every process gets a signal; they save and exit with 75, and
# the job is queued again and goes on.
#SBATCH --job-name=diffax --output=diffax_%j.log --open-mode=append --requeue --signal=TERM@120
#
# ---- edit these two lines -------------------------------------------------------------------------------------------
#SBATCH --partition=gpu --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8 --time=24:00:00
ARGUMENTS=(--config=adm_imagenet_64 --stage=base --config.base.net.dtype=bfloat16 --workdir=runs/adm_imagenet_64)
# ---------------------------------------------------------------------------------------------------------------------
set -euo pipefail

# SLURM runs a copy of this script from elsewhere.
source "${SLURM_SUBMIT_DIR:-.}/launch/setup_env.sh"
setup_env cuda

# JAX reads from SLURM's variables who takes part, and which GPU of the node is whose.
code=0
srun --kill-on-bad-exit=0 "$venv/bin/python" -P -m diffax.main "${ARGUMENTS[@]}" --coordinator=auto "$@" || code=$?
if [ "$code" -eq 75 ]; then
  echo "diffax: stopped and saved; queued again"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
