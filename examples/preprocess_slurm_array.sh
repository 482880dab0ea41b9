#!/usr/bin/env bash
# Preprocesses a large collection of pictures with the tasks of a SLURM array; run it from the project's folder.
#
#   sbatch --array=0-63 --cpus-per-task=16 examples/preprocess_slurm_array.sh \
#       --input shards.txt --tokenizer tokenizer.json --output-prefix data/train --max-skipped 1%
#
# All arguments go to tools/preprocess_jpeg.py, or with CODEC=avc to tools/preprocess_avc.py. Task i does the
# i-th part with a worker for each CPU; the task that ends last writes PREFIX.json. Tasks that were killed, by
# their time limit too, go on where they were when they are submitted again: the whole array, or some of it with
# SHARDS, the number of tasks, given:
#
#   SHARDS=64 sbatch --array=3,17 --cpus-per-task=16 examples/preprocess_slurm_array.sh ...
#
# Name the inputs as tar files, or as a list of paths: searching a folder is done by every task anew.
#SBATCH --job-name=preprocess
#SBATCH --array=0-63
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=preprocess-%A-%a.log
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
if [ -f .venv/bin/activate ]; then
    # shellcheck disable=SC1091
    source .venv/bin/activate
fi
if [ -z "${SLURM_ARRAY_TASK_ID:-}" ]; then
    echo "error: SLURM_ARRAY_TASK_ID is not set; submit with sbatch --array=0-N, or run tools/preprocess_${CODEC:-jpeg}.py" >&2
    exit 2
fi
# Part of an array does not know how large the whole was.
if [ -z "${SHARDS:-}" ] &&
    { [ "$SLURM_ARRAY_TASK_MIN" != 0 ] || [ $((SLURM_ARRAY_TASK_MAX + 1)) != "$SLURM_ARRAY_TASK_COUNT" ]; }; then
    echo "error: --array=$SLURM_ARRAY_TASK_MIN-$SLURM_ARRAY_TASK_MAX with $SLURM_ARRAY_TASK_COUNT tasks: must be" \
        "0 to N; to run some tasks again, say of how many: SHARDS=64 sbatch --array=3,17 ..." >&2
    exit 2
fi

exec python "tools/preprocess_${CODEC:-jpeg}.py" "$@" \
    --shard "$SLURM_ARRAY_TASK_ID/${SHARDS:-$SLURM_ARRAY_TASK_COUNT}" --workers "${SLURM_CPUS_PER_TASK:-1}"
