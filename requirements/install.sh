#!/usr/bin/env bash
# Makes .venv with what requirements/NAME.txt pins and builds the C++ extension into the tree.
#
#   source requirements/install.sh cpu     # cpu: the quickstart; dev: tests too; bench: peers too
#
# Does nothing when that has been done before and neither the pins, setup.py nor csrc/ have changed.
# Sourced by examples/quickstart.sh and tests/run.sh; afterwards the environment is active.

_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
_set="${1:-cpu}"

_python="${PYTHON:-python3}"
if ! "$_python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "error: '$_python' is not Python 3.10 or newer; install one and name it: PYTHON=python3.11 bash $0" >&2
    exit 1
fi
if [ ! -x "$_root/.venv/bin/python" ]; then
    echo "creating $_root/.venv"
    if ! "$_python" -m venv "$_root/.venv"; then
        rm -rf "$_root/.venv"
        echo "error: '$_python -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv python3-dev g++" >&2
        exit 1
    fi
fi
# shellcheck disable=SC1091
source "$_root/.venv/bin/activate"

# One stamp per set, so that the quickstart after the tests has nothing to do, and the other way round.
_wanted="$(cd "$_root" && cat requirements/*.txt setup.py $(git ls-files csrc 2>/dev/null || find csrc -type f | sort) | sha256sum)"
_stamp="$_root/.venv/installed-$_set"
if [ ! -f "$_stamp" ] || [ "$(cat "$_stamp")" != "$_wanted" ]; then
    echo "installing requirements/$_set.txt and building the C++ extension into .venv"
    # Python compiles what is imported, which is a small part of it.
    _pip() { python -m pip install --quiet --disable-pip-version-check --no-compile "$@"; }
    _pip -r "$_root/requirements/$_set.txt" || exit 1
    _pip --no-build-isolation --no-deps -e "$_root" || exit 1
    if [ "$_set" != cpu ]; then
        _pip --no-deps -r "$_root/requirements/evaluation.txt" || exit 1
        # What tests read and do not import; without it they say so and are skipped.
        _pip --no-deps --upgrade \
            --target "$_root/.venv/transformer_engine" -r "$_root/requirements/transformer_engine.txt" ||
            echo "warning: Transformer Engine's source could not be installed"
    fi
    echo "$_wanted" > "$_stamp"
fi
unset _root _set _python _wanted _stamp
unset -f _pip
