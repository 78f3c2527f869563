#!/usr/bin/env bash
# A real Slurm of two nodes on one Linux machine: `two_nodes.sh FOLDER COMMAND...` runs the command on its login node.
#
# Needs root and Debian's packages slurmctld, slurmd, slurm-client and munge. Host names, network, mounts and processes
# live in namespaces of their own and end with this script; FOLDER is the file system that all nodes share.
set -euo pipefail

if [ "${TSPIN_CLUSTER_INSIDE:-}" != yes ]; then
    mkdir -p "$1"
    folder=$(cd "$1" && pwd)
    shift
    TSPIN_CLUSTER_INSIDE=yes TSPIN_CLUSTER=$folder exec unshare --net --mount --uts --pid --fork --kill-child \
        --mount-proc --propagation private bash "$0" "$@"
fi

folder=$TSPIN_CLUSTER
nodes=2
hostname login
mount -t tmpfs tmpfs /run
mkdir -p /run/netns /run/munge "$folder/log"
mount --make-private /run

{
    echo "127.0.0.1 localhost"
    echo "10.77.0.254 login"
    for i in $(seq $nodes); do echo "10.77.0.$i n$i"; done
} > "$folder/hosts"
echo "hosts: files" > "$folder/nsswitch.conf"
mount --bind "$folder/hosts" /etc/hosts
mount --bind "$folder/nsswitch.conf" /etc/nsswitch.conf

ip link set lo up
ip link add br0 type bridge
ip addr add 10.77.0.254/24 dev br0
ip link set br0 up
for i in $(seq $nodes); do
    ip netns add "n$i"
    ip link add "veth$i" type veth peer name eth0 netns "n$i"
    ip link set "veth$i" master br0 up
    ip -n "n$i" addr add "10.77.0.$i/24" dev eth0
    ip -n "n$i" link set eth0 up
    ip -n "n$i" link set lo up
done

dd if=/dev/urandom of="$folder/munge.key" bs=1024 count=1 status=none
chmod 400 "$folder/munge.key"
munged --force --key-file="$folder/munge.key" --socket="$folder/munge.sock" --pid-file="$folder/munged.pid" \
    --log-file="$folder/log/munged.log" --seed-file="$folder/munge.seed"

mkdir -p "$folder/state" "$folder/spool.n1" "$folder/spool.n2"
cat > "$folder/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=login
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.sock,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
KillWait=10
JobRequeue=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool.%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.%n.log
SchedulerParameters=sched_interval=2,bf_interval=2
NodeName=n[1-2] CPUs=2 RealMemory=4000
PartitionName=low Nodes=n[1-2] Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=10
PartitionName=high Nodes=n[1-2] MaxTime=INFINITE PriorityTier=10
CONF
export SLURM_CONF=$folder/slurm.conf

slurmctld -c
for i in $(seq $nodes); do
    nsenter --net="/run/netns/n$i" unshare --uts bash -c "hostname n$i; exec slurmd -D -N n$i" \
        > "$folder/log/slurmd.n$i.out" 2>&1 &
    echo $! > "$folder/slurmd.n$i.host_pid"
done
for _ in $(seq 300); do
    if [ "$(sinfo --noheader --states=idle --format=%D --partition=low 2>/dev/null)" = "$nodes" ]; then
        "$@"
        exit
    fi
    sleep 0.1
done
echo "the cluster did not start:" >&2
tail -n 5 "$folder"/log/* >&2
exit 1
