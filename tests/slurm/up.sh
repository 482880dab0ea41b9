#!/usr/bin/env bash
# Starts a SLURM of one node by hand: bash tests/slurm/up.sh FOLDER; then export SLURM_CONF=FOLDER/slurm.conf.
#
# Everything is kept in FOLDER and on loopback, on free ports, so a SLURM of the machine is not touched. The node
# has two CPUs and two GPUs that are not there: what asks for GPUs is scheduled, and finds none.
set -euo pipefail
[ $# = 1 ] || { echo "error: usage: bash tests/slurm/up.sh FOLDER" >&2; exit 2; }
folder=$(mkdir -p "$1" && cd "$1" && pwd)
host=$(hostname -s)

chmod 755 "$folder"
mkdir -p "$folder"/{state,spool,munge}
head -c 128 /dev/urandom >"$folder/munge/key"
chmod 600 "$folder/munge/key"
chmod 711 "$folder/munge"
read -r control_port node_port < <(python3 -c '
import socket
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
print(*(s.getsockname()[1] for s in sockets))')

# cred_expire: a job that is queued again waits for it, two minutes by default.
# config_overrides: the node is what is written here, whatever the machine is.
# RealMemory: --mem is refused without it.
cat >"$folder/slurm.conf" <<CONF
ClusterName=tests
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$control_port
SlurmdPort=$node_port
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$folder/munge/socket,cred_expire=10
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=5,bf_interval=5
EnforcePartLimits=ALL
ReturnToService=2
KillWait=5
SlurmdParameters=config_overrides
MailProg=/bin/true
GresTypes=gpu
NodeName=$host NodeAddr=127.0.0.1 CPUs=2 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
PartitionName=tests Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
touch "$folder/gpu0" "$folder/gpu1"
echo "NodeName=$host Name=gpu File=$folder/gpu[0-1]" >"$folder/gres.conf"

munged --key-file="$folder/munge/key" --socket="$folder/munge/socket" --pid-file="$folder/munged.pid" \
    --log-file="$folder/munge/munged.log" --seed-file="$folder/munge/seed"
slurmctld -f "$folder/slurm.conf"
slurmd -f "$folder/slurm.conf"

export SLURM_CONF="$folder/slurm.conf"
for _ in $(seq 60); do
    if [ "$(sinfo --noheader --format %T 2>/dev/null)" = idle ]; then exit 0; fi
    sleep 0.5
done
echo "error: $folder: SLURM's node is not idle after 30 seconds; slurmctld.log and slurmd.log there say why" >&2
exit 1
