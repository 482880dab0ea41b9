#!/usr/bin/env bash
# Cuts squares of 64x64 from some 40 real colour photos: those of scikit-image, scikit-learn and matplotlib, which
# requirements/dev.txt installs, and of Debian's opencv-doc, which it fetches; needs no root.
#
#   source examples/photos.sh           # sets PHOTOS, the folder of train.npy and test.npy
#
# Sourced by examples/reproduce_small.sh, in the repository's root. Squares of one photo are all in one of the two.
PHOTOS=data/photos-64
if [ ! -f "$PHOTOS/test.npy" ]; then
    if ! [ -d data/download/opencv/usr ]; then
        echo
        echo "== fetching opencv-doc (96 MB, Apache) from Debian's archive for its photos; needs no root"
        mkdir -p data/download
        if ! (cd data/download && apt-get -qq download opencv-doc 2>/dev/null) ||
            ! dpkg-deb -x data/download/opencv-doc_*.deb data/download/opencv; then
            echo "error: opencv-doc cannot be had: 'apt-get update' first, on a Debian system" >&2
            exit 2
        fi
    fi
    python examples/photo_crops.py --opencv data/download/opencv/usr/share/doc/opencv-doc --output "$PHOTOS"
fi
