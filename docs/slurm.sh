#!/usr/bin/env bash
# Eight workers of one study, one GPU each. From the root of a checkout that all nodes see, after `make .venv/ready`:
#   export CTBPRN_STORAGE=postgresql://me@server/studies    # the password in ~/.pgpass
#   sbatch docs/slurm.sh tune -p n_trials 400 -p n_steps 2000 -p n_replicas 8
#   sbatch docs/slurm.sh confirm -p n_seed_runs 1000    # when tune has ended
# The same command again goes on; n_trials is the study's total, however many workers there are.
#SBATCH --job-name=ctbprn
#SBATCH --array=0-7
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --output=runs/%x-%a.log
set -euo pipefail
: "${CTBPRN_STORAGE:?set it to the URL of the database that all workers share}"
notebook="${1:?tune or confirm}"
shift

# SLURM sets CUDA_VISIBLE_DEVICES to the task's own GPU; exec, so that its TERM reaches papermill
exec .venv/bin/papermill --no-progress-bar --log-output \
    "notebooks/${notebook}.ipynb" "runs/${notebook}-${SLURM_ARRAY_TASK_ID:?this is a job array}.ipynb" \
    -p study_name flagship -p device cuda "$@"
