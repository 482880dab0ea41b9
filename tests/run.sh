#!/usr/bin/env bash
# Sets up .venv, runs the linters and the tests.
#
#   bash tests/run.sh                        # everything but the tests marked slow
#   bash tests/run.sh -m slow                # those marked slow
#   bash tests/run.sh tests/unit -k jpeg     # any arguments of pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source requirements/install.sh dev

ruff check .
ruff format --check .
pyright
# Without arguments two files at a time: most tests keep one core busy. A file stays in one process, where its tests
# share what they set up; folders come one after the other, since the long files are in the first ones.
[ $# -gt 0 ] || set -- -n 2 --dist loadfile --no-loadscope-reorder
python -m pytest "$@"
