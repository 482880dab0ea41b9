#!/usr/bin/env bash
# Ends what up.sh started, jobs too: bash tests/slurm/down.sh FOLDER
set -uo pipefail
[ $# = 1 ] || { echo "error: usage: bash tests/slurm/down.sh FOLDER" >&2; exit 2; }

export SLURM_CONF="$1/slurm.conf"
if [ -f "$1/slurmctld.pid" ]; then
    scancel --user root
    for _ in $(seq 60); do
        [ -n "$(squeue --noheader 2>/dev/null)" ] || break
        sleep 0.5
    done
fi
status=0
for daemon in slurmd slurmctld munged; do
    pid=$(cat "$1/$daemon.pid" 2>/dev/null) || continue
    kill "$pid" 2>/dev/null
    for _ in $(seq 50); do
        kill -0 "$pid" 2>/dev/null || continue 2
        sleep 0.2
    done
    echo "error: $daemon, process $pid: does not end; look into $1/$daemon.log" >&2
    status=1
done
exit $status
