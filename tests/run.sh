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
# Without arguments three files at a time, on two cores: most tests keep one busy, and some wait. A file stays in one
# process, where its tests share what they set up; the long ones come first.
[ $# -gt 0 ] || set -- -n 3 --dist loadfile --no-loadscope-reorder
python -m pytest "$@"
