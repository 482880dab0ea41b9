#!/usr/bin/env bash
# Pretrains the paper's JPEG-LM, Llama-2 7B at 12,288 tokens, on 4 nodes of 8 GPUs. Run it in the project's folder.
#
#   DATA=data/jpeg sbatch examples/pretrain_jpeglm_7b.sh               # a job of its own
#   DATA=data/jpeg bash examples/pretrain_jpeglm_7b.sh                 # all nodes of an allocation, as of salloc
#   DATA=data/jpeg GPUS_PER_NODE=2 bash examples/pretrain_jpeglm_7b.sh # one node without SLURM
#   DATA=data/jpeg sbatch --nodes=8 examples/pretrain_jpeglm_7b.sh --lr 2e-4    # last flags win
#   DATA=x PRINT=1 GPUS_PER_NODE=8 bash examples/pretrain_jpeglm_7b.sh # only prints the command
#
# Variables: DATA, or TRAIN_DATA and VALID_DATA; PRESET, TP, PP, CP, VP, FP8, RECOMPUTE, SEED, SAVE, SAVE_INTERVAL,
# GPUS_PER_NODE, MASTER_PORT, VENV. MODEL_ARGS="..." replaces an array below, EXTRA_MODEL_ARGS="..." adds to it. docs/slurm.md
# explains all.
# Ten minutes before its time limit a job saves, and is queued again unless it has made all steps.
#SBATCH --job-name=jpeglm-7b
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

fail() { # value, rule, remedy
    echo "error: $1: $2; $3" >&2
    exit 2
}

# Runs a command in the background and waits for it; the signals of a stop call $STOP with its pid. bash runs
# traps only between commands, and `wait` returns early for them.
wait_for() {
    "$@" &
    local pid=$! status=0
    trap 'stopped=USR1; $STOP "$pid"' USR1
    trap 'stopped=TERM; $STOP "$pid"' TERM INT HUP
    while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done
    wait "$pid" || status=$?
    trap - USR1 TERM INT HUP
    return "$status"
}

# One torchrun, on each node. Only its workers are told to stop, and they save: torchrun itself would kill them
# 30 seconds after a signal, which can be less than a step.
on_node() {
    STOP=stop_workers
    wait_for ignoring_stops "$@"
}
ignoring_stops() {
    trap '' USR1 INT
    exec "$@"
}
stop_workers() { pkill -TERM -P "$1" || true; }

if [ "${1:-}" = --on-node ]; then # what srun starts below
    shift
    on_node "$@"
    exit
fi

# sbatch runs a copy of this file, elsewhere.
PROJECT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [ ! -f "$PROJECT/tools/pretrain.py" ]; then
    PROJECT="${SLURM_SUBMIT_DIR:-$PWD}"
fi
if [ ! -f "$PROJECT/tools/pretrain.py" ]; then
    fail "$PROJECT" "has no tools/pretrain.py" "submit from the project's folder"
fi
cd "$PROJECT"
if [ -f "${VENV:-.venv}/bin/activate" ]; then
    # shellcheck disable=SC1091
    source "${VENV:-.venv}/bin/activate"
elif [ -n "${VENV:-}" ]; then
    fail "VENV=$VENV" "has no bin/activate" "name the folder of a virtual environment, or leave it out for .venv"
fi
command -v pkill >/dev/null || fail "pkill" "is not on PATH" "install procps"
if ! python -c 'from importlib.util import find_spec
import megatron_codec.flags
assert find_spec("torch") and find_spec("megatron.core")' 2>/dev/null; then
    fail "python ($(command -v python || echo "none on PATH"))" "cannot import megatron_codec and what it needs" \
        "make .venv with: source requirements/install.sh cpu, or name another environment with VENV"
fi

# array NAME words...: makes the array NAME of the variable NAME's words if it is set, else of these; then come
# EXTRA_NAME's.
array() {
    local name=$1 extra="EXTRA_$1" words=()
    shift
    if [ -n "${!name:-}" ]; then read -ra words <<<"${!name}"; else words=("$@"); fi
    local more=()
    read -ra more <<<"${!extra:-}"
    unset "$name" # it comes from the environment as a string
    declare -ga "$name"
    local -n target=$name
    # shellcheck disable=SC2034
    target=("${words[@]}" "${more[@]}")
}

PRESET="${PRESET:-jpeglm-7b}"
SAVE="${SAVE:-runs/$PRESET}"
TP="${TP:-2}" PP="${PP:-1}" # of 32 GPUs: DP = 32 / (TP x PP x CP) = 16; why, is in docs/parallelism.md
CP="${CP:-1}" VP="${VP:-1}"

# The preset has the shape, and batch, steps, learning rate and bf16 (megatron_codec/presets.py). RECOMPUTE=full
# computes activations twice, for GPUs of 40 GB.
array MODEL_ARGS --preset "$PRESET"
# FP8=hybrid is for GPUs from Hopper on, with the scales that NVIDIA trains with; without, bf16.
PRECISION=()
if [ -n "${FP8:-}" ]; then
    PRECISION=(
        --fp8-format "$FP8" --fp8-recipe delayed --fp8-amax-history-len 1024 --fp8-amax-compute-algo max
    )
fi
array TRAINING_ARGS \
    --seed "${SEED:-1234}" --recompute-granularity "${RECOMPUTE:-None}" "${PRECISION[@]}"
SEQUENCE_PARALLEL=()
if [ "$TP" != 1 ]; then SEQUENCE_PARALLEL=(--sequence-parallel); fi
array MODEL_PARALLEL_ARGS \
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" "${SEQUENCE_PARALLEL[@]}" \
    --context-parallel-size "$CP" --num-virtual-stages-per-pipeline-rank "$VP" \
    --overlap-grad-reduce --overlap-param-gather
if [ -n "${TRAIN_DATA:-}" ]; then
    array DATA_ARGS --train-data-path "$TRAIN_DATA" ${VALID_DATA:+--valid-data-path "$VALID_DATA"}
else
    array DATA_ARGS ${DATA:+--data-path "$DATA"}
fi
array LOGGING_ARGS --log-interval 10 --eval-interval 1000 --eval-iters 10 --tensorboard-dir "$SAVE/tensorboard"
# The first time the folder is empty; a job that is queued again goes on.
CHECKPOINT_ARGS=(--save "$SAVE" --load "$SAVE" --save-interval "${SAVE_INTERVAL:-250}")
ARGS=(
    "${MODEL_ARGS[@]}" "${TRAINING_ARGS[@]}" "${MODEL_PARALLEL_ARGS[@]}" "${DATA_ARGS[@]}" "${LOGGING_ARGS[@]}"
    "${CHECKPOINT_ARGS[@]}" "$@"
)
case " ${ARGS[*]} " in
    *" --data-path"* | *" --train-data-path"* | *" --mock-data "*) ;;
    *) fail "DATA" "is not set" "make a dataset with tools/preprocess_jpeg.py and give its prefix: DATA=data/jpeg" ;;
esac

NODES="${SLURM_JOB_NUM_NODES:-1}"
if [ -z "${GPUS_PER_NODE:-}" ]; then
    GPUS_PER_NODE="${SLURM_GPUS_ON_NODE:-${SLURM_GPUS_PER_NODE:-}}"
    GPUS_PER_NODE="${GPUS_PER_NODE##*:}" # of a100:8
    if [ -z "$GPUS_PER_NODE" ]; then GPUS_PER_NODE="$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)"; fi
    if [ "$GPUS_PER_NODE" = 0 ]; then GPUS_PER_NODE=1; fi
fi
if [[ ! "$GPUS_PER_NODE" =~ ^[1-9][0-9]*$ ]]; then
    fail "GPUS_PER_NODE=$GPUS_PER_NODE" "must be a number above 0" "leave it out, and they are counted"
fi
WORLD=$((NODES * GPUS_PER_NODE))

# Whether the flags fit so many processes is said once, here, and not by each of them.
python - "$WORLD" "${ARGS[@]}" <<'PYTHON'
import sys
from megatron_codec.errors import run_tool
from megatron_codec.flags import parse_pretrain
world = int(sys.argv[1])
run_tool(lambda: parse_pretrain(sys.argv[2:], world).check(world))
PYTHON

# Whether the latest checkpoint is of the last step. What cannot be told counts as no: a run that has finished
# says so when it is started again, and ends.
finished() {
    python - "${ARGS[@]}" <<'PYTHON'
import pathlib, sys
from megatron_codec.flags import parse_pretrain
config = parse_pretrain(sys.argv[1:])
training = config.training
done = pathlib.Path(config.checkpoint.save, "latest_checkpointed_iteration.txt").read_text()
in_iterations = not training.steps_depend_on_data
sys.exit(not (in_iterations and int(done) >= training.train_iters))
PYTHON
}

# Sequence parallelism and the overlaps need one queue of kernels, as in Megatron-LM.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONUNBUFFERED=1

TORCHRUN=(torchrun --nproc-per-node "$GPUS_PER_NODE" --signals-to-handle "SIGTERM,SIGHUP,SIGQUIT")
if [ -n "${SLURM_JOB_ID:-}" ]; then
    HEAD_NODE="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
    if [ -z "$HEAD_NODE" ]; then
        fail "SLURM_JOB_NODELIST=$SLURM_JOB_NODELIST" "names no node" "start inside an allocation"
    fi
    PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}"
    TORCHRUN+=(
        --nnodes "$NODES" --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$HEAD_NODE:$PORT"
    )
    # --export: also where the job was submitted with another one. --cpu-bind: a task may use all CPUs of the job.
    LAUNCH=(
        srun --nodes "$NODES" --ntasks "$NODES" --ntasks-per-node 1 --export ALL --cpu-bind none
        --kill-on-bad-exit=1 bash examples/pretrain_jpeglm_7b.sh --on-node
    )
else
    TORCHRUN+=(--standalone)
    LAUNCH=()
fi
COMMAND=("${LAUNCH[@]}" "${TORCHRUN[@]}" tools/pretrain.py "${ARGS[@]}")
if [ -n "${PRINT:-}" ]; then
    printf '%q ' "${COMMAND[@]}"
    echo
    exit
fi
if [ ${#LAUNCH[@]} = 0 ]; then
    on_node "${COMMAND[@]}"
    exit
fi

# srun hands USR1 on to its tasks; TERM would make it kill them.
hand_on() { kill -USR1 "$1" || true; }
STOP=hand_on stopped="" status=0
wait_for "${COMMAND[@]}" || status=$?
if [ "$stopped" = USR1 ] && [ "$status" = 0 ] && ! finished; then
    echo "job $SLURM_JOB_ID was asked to stop before its last step, and is queued again"
    scontrol requeue "$SLURM_JOB_ID" || fail "job $SLURM_JOB_ID" "cannot be queued again" "submit it once more"
fi
exit "$status"
