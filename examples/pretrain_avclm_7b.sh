#!/usr/bin/env bash
# Pretrains the paper's AVC-LM: Llama-2 7B, 32,768 tokens, on 4 nodes of 8 GPUs. Run it from the project's folder.
#
#   DATA=data/avc sbatch examples/pretrain_avclm_7b.sh
#
# It is pretrain_jpeglm_7b.sh with another preset: the same arrays and variables, said there, and CP=2.
#SBATCH --job-name=avclm-7b
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

# 32,768 tokens: TP=2 alone does not fit 80 GB, and with CP=2 sends less than TP=4 (docs/parallelism.md).
export PRESET="${PRESET:-avclm-7b}" TP="${TP:-2}" CP="${CP:-2}"
SCRIPT="$(dirname "${BASH_SOURCE[0]}")/pretrain_jpeglm_7b.sh"
if [ ! -f "$SCRIPT" ]; then # sbatch runs a copy of this file, elsewhere
    SCRIPT="${SLURM_SUBMIT_DIR:-$PWD}/examples/pretrain_jpeglm_7b.sh"
fi
if [ ! -f "$SCRIPT" ]; then
    echo "error: $SCRIPT: is not there; submit from the project's folder" >&2
    exit 2
fi
# exec keeps the process that SLURM sends its signal to.
exec bash "$SCRIPT" "$@"
