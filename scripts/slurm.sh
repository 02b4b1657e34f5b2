#!/bin/bash
# One run on all nodes of a SLURM job. The recipe and its options are the script's own:
#
#   sbatch --nodes=2 --gpus-per-node=8 scripts/slurm.sh paper/sppo-mistral-7b --out runs/mistral
#
# Submit it from the activated environment, with the run's folder on a file system that all nodes
# see. Two minutes before the job's time is up the run saves and stops, and the job is queued again.
# RANKS sets the ranks of a node where they are not its GPUs.
#SBATCH --job-name=sparring
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=sparring-%j.log

trap 'kill -TERM $!' TERM  # the signal comes to this shell alone
sparring run "$@" --launch.slurm --launch.processes "${RANKS:-${SLURM_GPUS_ON_NODE:-1}}" &
wait $!
wait $!  # the first one ends when the trap is called
code=$?
if [ "$code" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
