#!/usr/bin/env bash
# Fetches Fashion-MNIST, 70,000 real photos of clothes, from Debian's archive; needs no root.
#
#   source examples/fashion_mnist.sh    # sets DATA, the folder of its files; exits where it cannot be had
#
# Sourced by examples/quickstart.sh and examples/reproduce_small.sh, in the repository's root.
DATA=data/fashion-mnist/usr/share/datasets/fashion-mnist
if [ ! -f "$DATA/t10k-images-idx3-ubyte.gz" ]; then
    echo
    echo "== fetching dataset-fashion-mnist (31 MB, MIT) from Debian's archive; needs no root"
    if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
        echo "error: apt-get and dpkg-deb are needed to fetch the example pictures; on another system" \
            "give examples/quickstart.sh a folder of your own: bash examples/quickstart.sh path/to/pictures" >&2
        exit 2
    fi
    mkdir -p data/download
    if ! (cd data/download && apt-get -qq download dataset-fashion-mnist 2>/dev/null); then
        echo "error: apt-get could not download dataset-fashion-mnist: 'apt-get update' first, or" \
            "give examples/quickstart.sh a folder of your own: bash examples/quickstart.sh path/to/pictures" >&2
        exit 2
    fi
    dpkg-deb -x data/download/dataset-fashion-mnist_*.deb data/fashion-mnist
fi
