#!/usr/bin/env bash
# The paper's comparison made small: JPEG-LM, VQ transformer and pixel model, the same Llama, as much computation
# for each, on Fashion-MNIST at 32x32, compared by completions of held-out pictures. Hours on two CPU cores.
#
#   bash examples/reproduce_small.sh              # all stages, one after the other
#   bash examples/reproduce_small.sh compare      # three codecs: prompts at three ratios, from nothing, half size
#   bash examples/reproduce_small.sh sampling     # the three at other cuts of top-k and top-p
#   bash examples/reproduce_small.sh scale        # JPEG-LM in three sizes and for three lengths of training
#   bash examples/reproduce_small.sh quality      # JPEG-LM at other JPEG qualities, and without restart markers
#   bash examples/reproduce_small.sh report       # docs/results.md from what is there
#
# DATASET=photos takes crops of real colour photos at 64x64 in place of Fashion-MNIST, and wants a RUN and a REPORT of its
# own. FLOPS=1e15 trains each model of `compare` for so much computation (5e14 by default), those of `quality` for a
# quarter; NUM_SAMPLES=1000 compares so many pictures (200 by default). LAYERS, WIDTH, HEADS, LR and ROTARY_BASE are
# those of the Llama (`quality` and the smaller ones of `scale` have a shape of their own). Stopped at any moment, the
# same command goes on where it was; all is kept in runs/reproduction, or in RUN, of which each has one DATASET, one
# FLOPS and one Llama. REPORT names another file for the report.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# A training saves after Ctrl-C and ends well, and bash alone would go on with what is not trained yet.
trap 'echo "stopped; the same command goes on" >&2; exit 130' INT

STAGES=("$@")
[ ${#STAGES[@]} -gt 0 ] || STAGES=(compare sampling scale quality report)
for stage in "${STAGES[@]}"; do
    case "$stage" in
        compare | sampling | scale | quality | report) ;;
        -h | --help) sed -n '2,18s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) echo "error: $stage: is not known; use compare, sampling, scale, quality or report" >&2; exit 2 ;;
    esac
done

RUN="${RUN:-runs/reproduction}"
FLOPS="${FLOPS:-5e14}"
NUM_SAMPLES="${NUM_SAMPLES:-200}"
DATASET="${DATASET:-fashion-mnist}"
# A picture of 64x64 has up to 800 tokens of JPEG and 256 of VQ; as many tokens a step for both datasets, about.
case "$DATASET" in
    fashion-mnist) SIZE=32 LENGTH=304 BATCH=6 VQ_BATCH=32 ;;
    photos) SIZE=64 LENGTH=832 BATCH=2 VQ_BATCH=8 ;;
    *) echo "error: DATASET=$DATASET: is not known; use fashion-mnist or photos" >&2; exit 2 ;;
esac
# 8 x 128 is better with half the computation than 6 x 256 (docs/experiments.md).
LAYERS="${LAYERS:-8}" WIDTH="${WIDTH:-128}" HEADS="${HEADS:-2}" LR="${LR:-3e-3}" ROTARY_BASE="${ROTARY_BASE:-500}"
settings="DATASET=$DATASET LAYERS=$LAYERS WIDTH=$WIDTH HEADS=$HEADS LR=$LR ROTARY_BASE=$ROTARY_BASE FLOPS=$FLOPS"
# Models of other settings are others: going on from them would mix the two.
if [ "${STAGES[*]}" != report ]; then
    if [ -d "$RUN/models" ] && [ ! -f "$RUN/settings" ]; then
        echo "error: $RUN has models, and no file 'settings' that says how they were made: give another RUN" >&2
        exit 2
    fi
    before="$(cat "$RUN/settings" 2>/dev/null || echo "$settings")"
    [[ "$before" == DATASET=* ]] || before="DATASET=fashion-mnist $before" # of before there was another
    if [ "$before" != "$settings" ]; then
        echo "error: $RUN was made with $before, not with $settings: give these, or another RUN" >&2
        exit 2
    fi
    mkdir -p "$RUN"
    echo "$settings" > "$RUN/settings.tmp" && mv "$RUN/settings.tmp" "$RUN/settings"
fi

source requirements/install.sh dev
step() { echo; echo "== $*"; }
if [ "$DATASET" = photos ]; then
    source examples/photos.sh
    TRAIN="$PHOTOS/train.npy" TEST="$PHOTOS/test.npy"
else
    source examples/fashion_mnist.sh
    TRAIN="$DATA/train-images-idx3-ubyte.gz" TEST="$DATA/t10k-images-idx3-ubyte.gz"
fi

TRAIN_INPUT=(--input "$TRAIN" --geometry pad)
TEST_INPUT=(--input "$TEST" --geometry pad)
shape() { echo --num-layers "$1" --hidden-size "$2" --ffn-hidden-size $((3 * $2)) --num-attention-heads "$3"; }
read -ra SHAPE <<< "$(shape "$LAYERS" "$WIDTH" "$HEADS") --rotary-base $ROTARY_BASE"
SCHEDULE=(--seq-length "$LENGTH" --micro-batch-size "$BATCH" --global-batch-size "$BATCH" --lr "$LR" --min-lr "$(python -c "print($LR / 10)")"
    --lr-warmup-iters 100 --bf16)

# dataset NAME TOOL FLAGS...: RUN/NAME/{train,test}, from the tokenizer RUN/NAME/tokenizer.json
dataset() {
    local name="$1" tool="$2" part input
    shift 2
    for part in train test; do
        if [ ! -f "$RUN/$name/$part.json" ]; then
            step "writing the dataset $RUN/$name/$part"
            if [ "$part" = train ]; then input=("${TRAIN_INPUT[@]}"); else input=("${TEST_INPUT[@]}"); fi
            python "tools/$tool" "${input[@]}" "$@" --tokenizer "$RUN/$name/tokenizer.json" \
                --output-prefix "$RUN/$name/$part"
        fi
    done
}

# jpeg_dataset NAME FLAGS...: flags of the codec
jpeg_dataset() {
    local name="$1" codec=(--image-size "$SIZE" --remove-head "${@:2}")
    if [ ! -f "$RUN/$name/tokenizer.json" ]; then
        step "training a vocabulary of 320 entries for JPEG ${codec[*]}"
        python tools/train_tokenizer.py --codec jpeg "${TRAIN_INPUT[@]}" "${codec[@]}" --vocab-size 320 \
            --num-samples 10000 --output "$RUN/$name/tokenizer.json"
    fi
    dataset "$name" preprocess_jpeg.py "${codec[@]}"
}

# train NAME DATASET FLOPS FLAGS...: RUN/models/NAME
train() {
    local name="$1" data="$2" flops="$3" folder="$RUN/models/$1"
    shift 3
    step "training $folder"
    python tools/pretrain.py "${SHAPE[@]}" "${SCHEDULE[@]}" ${flops:+--train-flops "$flops"} "$@" \
        --train-data-path "$RUN/$data/train" --valid-data-path "$RUN/$data/test" \
        --save "$folder" --load "$folder" --save-interval 500 \
        --eval-interval 2000 --eval-iters 100 --log-interval 100
}

# evaluate NAME MODELS... -- FLAGS...: RUN/evaluations/NAME
evaluate() {
    local name="$1" models=()
    shift
    while [ "$1" != -- ]; do
        models+=("$RUN/models/$1")
        shift
    done
    shift
    step "evaluating $RUN/evaluations/$name"
    python tools/evaluate.py --load "${models[@]}" --data "$TEST" --geometry pad \
        --num-samples "$NUM_SAMPLES" --output "$RUN/evaluations/$name" "$@"
}

half="$(python -c "print($FLOPS / 2)")" quarter="$(python -c "print($FLOPS / 4)")"
CUTS=(--top-k 40 --top-p 0.9)
jpeg_dataset jpeg --quality 25
for stage in "${STAGES[@]}"; do
    case "$stage" in
        compare)
            # First, since too few FLOPS for its schedule are told by then, and not after the VQ-VAE.
            train jpeg jpeg "$FLOPS"
            if [ ! -f "$RUN/vq.json" ]; then
                step "training the VQ-VAE"
                python tools/train_vq.py "${TRAIN_INPUT[@]}" --image-size "$SIZE" --num-codes 512 --steps 2000 \
                    --batch-size "$VQ_BATCH" --num-samples 60000 --output "$RUN/vq"
            fi
            mkdir -p "$RUN/codes" "$RUN/pixels"
            cp "$RUN/vq.json" "$RUN/codes/tokenizer.tmp" && mv "$RUN/codes/tokenizer.tmp" "$RUN/codes/tokenizer.json"
            # A network sees each picture, one at a time.
            OMP_NUM_THREADS=1 dataset codes preprocess_images.py --workers 2
            if [ ! -f "$RUN/pixels/tokenizer.json" ]; then
                step "finding the colours of the pixel model"
                python tools/train_palette.py "${TRAIN_INPUT[@]}" --image-size 32 --num-colors 512 \
                    --output "$RUN/pixels/tokenizer.json"
            fi
            dataset pixels preprocess_images.py
            train vq codes "$FLOPS"
            # Of 32x32 always, as the paper's: 1,024 tokens, and 2 x 1,026 are about as many as 6 x 304.
            train pixels pixels "$FLOPS" --seq-length 1026 --micro-batch-size 2 --global-batch-size 2
            evaluate compare jpeg vq pixels -- "${CUTS[@]}" --ratios 0 0.25 0.5 0.75
            evaluate half-size jpeg vq pixels -- "${CUTS[@]}" --ratios 0.5 --half-size
            ;;
        sampling)
            # The cuts of the paper, once each: a pixel model takes long.
            evaluate sampling jpeg vq pixels -- --top-k 40 80 --top-p 0.9 1 --ratios 0 0.5 --seeds 1 --references
            ;;
        scale)
            train jpeg jpeg "$FLOPS"
            train jpeg-half jpeg "$half"
            train jpeg-quarter jpeg "$quarter"
            # The same tokens as `jpeg` for smaller models: its steps, not its computation.
            steps="$(cat "$RUN/models/jpeg/latest_checkpointed_iteration.txt")"
            # shellcheck disable=SC2046
            train jpeg-4x128 jpeg "" --train-iters "$steps" $(shape 4 128 2)
            # shellcheck disable=SC2046
            train jpeg-2x64 jpeg "" --train-iters "$steps" $(shape 2 64 1)
            evaluate scale jpeg jpeg-half jpeg-quarter jpeg-4x128 jpeg-2x64 -- "${CUTS[@]}" --ratios 0 0.5
            ;;
        quality)
            # A smaller model, which learns more of what a codec is like from so little computation.
            read -ra small <<< "--lr 4e-3 --min-lr 4e-4 $(shape 4 128 2)"
            jpeg_dataset jpeg-q10 --quality 10
            jpeg_dataset jpeg-q50 --quality 50
            jpeg_dataset jpeg-no-markers --quality 25 --restart-interval 0
            train small-q25 jpeg "$quarter" "${small[@]}"
            train small-q10 jpeg-q10 "$quarter" "${small[@]}"
            train small-q50 jpeg-q50 "$quarter" "${small[@]}"
            train small-no-markers jpeg-no-markers "$quarter" "${small[@]}"
            evaluate quality small-q25 small-q10 small-q50 small-no-markers -- "${CUTS[@]}" --ratios 0 0.5
            ;;
        report)
            python tools/report_reproduction.py --run "$RUN" --output "${REPORT:-docs/results.md}"
            ;;
    esac
done
