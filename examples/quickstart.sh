#!/usr/bin/env bash
# From a folder of real pictures to generated pictures, on a CPU, in minutes.
#
#   bash examples/quickstart.sh                  # real photos of clothes (Fashion-MNIST, from Debian's archive)
#   bash examples/quickstart.sh --long           # the same, a deeper model and 13,000 steps
#   bash examples/quickstart.sh path/to/pictures # your own
#
# Sets up .venv, trains a vocabulary, writes datasets, trains jpeglm-tiny, generates, and ends with
# runs/quickstart/report.md. What is there already is used again; a run that was stopped goes on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# A training saves after Ctrl-C and ends well, and bash alone would go on with what is not trained yet.
trap 'echo "stopped; the same command goes on" >&2; exit 130' INT

PICTURES="" LONG=""
for argument in "$@"; do
    case "$argument" in
        --long) LONG=1 ;;
        -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 0 ;;
        -*) echo "error: $argument: is not known; the only flag is --long" >&2; exit 2 ;;
        *) PICTURES="$argument" ;;
    esac
done
if [ -n "$PICTURES" ] && [ ! -d "$PICTURES" ]; then
    echo "error: $PICTURES: is no folder; give one that holds pictures" >&2
    exit 2
fi

source requirements/install.sh cpu
RUN="runs/quickstart${PICTURES:+-$(basename "$PICTURES")}${LONG:+-long}"
mkdir -p "$RUN"
step() { echo; echo "== $*"; }

# The same pictures, the same tokens: 32x32, quality 25, without the head, which is constant.
CODEC_ARGS=(--image-size 32 --quality 25 --remove-head)
if [ -n "$PICTURES" ]; then
    TRAIN_INPUT=(--input "$PICTURES" --subset train --hold-out 0.1)
    TEST_INPUT=(--input "$PICTURES" --subset test --hold-out 0.1)
else
    # shellcheck source=examples/fashion_mnist.sh
    source examples/fashion_mnist.sh
    CODEC_ARGS+=(--geometry pad)
    TRAIN_INPUT=(--input "$DATA/train-images-idx3-ubyte.gz")
    TEST_INPUT=(--input "$DATA/t10k-images-idx3-ubyte.gz")
fi

if [ ! -f "$RUN/tokenizer.json" ]; then
    step "training a vocabulary of 320 entries"
    python tools/train_tokenizer.py --codec jpeg "${TRAIN_INPUT[@]}" "${CODEC_ARGS[@]}" \
        --vocab-size 320 --num-samples 10000 --output "$RUN/tokenizer.json"
fi
for name in train test; do
    if [ ! -f "$RUN/data/$name.json" ]; then
        step "writing the dataset $RUN/data/$name"
        if [ "$name" = train ]; then INPUT=("${TRAIN_INPUT[@]}"); else INPUT=("${TEST_INPUT[@]}"); fi
        python tools/preprocess_jpeg.py "${INPUT[@]}" "${CODEC_ARGS[@]}" \
            --tokenizer "$RUN/tokenizer.json" --output-prefix "$RUN/data/$name"
    fi
done

step "training jpeglm-tiny (TensorBoard: tensorboard --logdir $RUN/tensorboard)"
TRAINING_ARGS=(--preset jpeglm-tiny --train-iters 4500)
if [ -n "$LONG" ]; then
    # The 8 x 128 of docs/experiments.md, with twice the steps that it has there.
    TRAINING_ARGS+=(--num-layers 8 --hidden-size 128 --ffn-hidden-size 384 --num-attention-heads 2
        --rotary-base 500 --train-iters 13000 --lr 3e-3 --min-lr 3e-4)
fi
python tools/pretrain.py "${TRAINING_ARGS[@]}" \
    --train-data-path "$RUN/data/train" --valid-data-path "$RUN/data/test" \
    --save "$RUN/checkpoint" --load "$RUN/checkpoint" --save-interval 500 \
    --eval-interval 1000 --eval-iters 100 --log-interval 50 --tensorboard-dir "$RUN/tensorboard" --sample-interval 500

SAMPLING_ARGS=(--load "$RUN/checkpoint" --top-k 40 --top-p 0.9)
newer_than_checkpoint() { [ "$1" -nt "$RUN/checkpoint/latest_checkpointed_iteration.txt" ]; }
if ! newer_than_checkpoint "$RUN/samples/samples.json"; then
    step "generating 64 pictures from nothing"
    python tools/generate.py "${SAMPLING_ARGS[@]}" --num-samples 64 --output "$RUN/samples"
fi
if ! newer_than_checkpoint "$RUN/completions/samples.json"; then
    step "completing held-out pictures from their upper half"
    python tools/generate.py "${SAMPLING_ARGS[@]}" --prompt-data-path "$RUN/data/test" --num-prompts 8 \
        --prompt-ratio 0.5 --num-samples 6 --output "$RUN/completions"
fi

step "report"
python tools/report.py --run "$RUN"
