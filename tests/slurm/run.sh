#!/usr/bin/env bash
# Runs the job scripts of examples/ within a real SLURM of one node, which it starts and ends.
#
#   bash tests/slurm/run.sh              # about four minutes on two busy cores
#   bash tests/slurm/run.sh time_limit   # the end of a time limit alone, which SLURM looks for every half minute
#
# As root, with: apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge procps
# Without .venv: bash tests/run.sh makes it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if [ "$(id -u)" != 0 ]; then
    echo "error: user $(id -un): must be root, since slurmd is; start it in a container" >&2
    exit 2
fi
for program in slurmctld slurmd munged sbatch srun salloc scontrol pkill; do
    if ! command -v "$program" >/dev/null; then
        echo "error: $program: is not installed;" \
            "apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge procps" >&2
        exit 2
    fi
done
# shellcheck disable=SC1091
source .venv/bin/activate

folder=$(mktemp -d)
ended=1
finish() {
    bash tests/slurm/down.sh "$folder" || ended=0
    if [ "$1" = 0 ] && [ $ended = 1 ]; then rm -rf "$folder"; else echo "logs are in $folder" >&2; fi
}
trap 'finish $?' EXIT
trap 'exit 130' INT TERM
bash tests/slurm/up.sh "$folder"
export SLURM_CONF="$folder/slurm.conf"
python -m tests.slurm.jobs "$folder" "$@"
