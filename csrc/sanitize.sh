#!/usr/bin/env bash
# Builds the C++ with sanitizers, away from the tree, and runs the tests that fuzz it. Needs GCC.
#
#   bash csrc/sanitize.sh                    # addresses and undefined behaviour
#   bash csrc/sanitize.sh thread             # data races
#   bash csrc/sanitize.sh address,undefined -m slow -k jpeg_fuzz     # arguments of pytest: more of the fuzzing
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
sanitizers=${1:-address,undefined}
root=$PWD
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT

flags="-g -fsanitize=$sanitizers -fno-sanitize-recover=all"
CFLAGS=$flags CXXFLAGS=$flags LDFLAGS=$flags python setup.py -q build --build-base "$build/base" --build-lib "$build/lib"

# The interpreter is not built with the sanitizers, so their libraries have to be there before it starts.
preload=$(gcc -print-file-name=libstdc++.so.6)
for name in ${sanitizers//,/ }; do
  case $name in
    address) preload="$(gcc -print-file-name=libasan.so) $preload" ;;
    undefined) preload="$preload $(gcc -print-file-name=libubsan.so)" ;;
    thread) preload="$(gcc -print-file-name=libtsan.so) $preload" ;;
  esac
done
tests=(test_bpe.py test_tokenizer.py)
# libgomp is not built with the thread sanitizer, which so sees none of its barriers and calls every loop a race.
if [ "$sanitizers" != thread ]; then
  tests+=(test_kernels.py test_paged_attention.py test_row_attention.py test_packed_linear.py)
  tests+=(test_jpeg_scan.py test_jpeg_format.py test_jpeg_grammar.py test_jpeg_fuzz.py)
fi
cd "$build/lib"
LD_PRELOAD=$preload PYTHONPATH=$build/lib:$root PYTHONMALLOC=malloc \
  ASAN_OPTIONS=detect_leaks=0 TSAN_OPTIONS=ignore_noninstrumented_modules=1 \
  python -m pytest -c "$root/pyproject.toml" --rootdir "$root" -p no:cacheprovider -o timeout=1200 --capture=no \
  "${tests[@]/#/$root/tests/unit/}" "${@:2}"
