#!/usr/bin/env bash
# cluster.sh - a real Slurm cluster of several nodes on one Debian machine, for tests.
#
#   up [N]        install what is missing, start N nodes (default 4); a second call is a no-op
#   down          stop exactly the processes and namespaces that `up` made (logs stay)
#   env           print exports: eval "$(cluster.sh env)", then sbatch, squeue, ... work
#   exec CMD...   run CMD on the head (login) node of the cluster
#   fault NODE power|slurmd|link    power loss / dead daemon / network partition
#   fault head slurmctld            a dead controller
#   heal NODE     undo any of these
#   hide NODE DIR [SIZE]   show NODE an empty DIR of its own, as on a disk that nodes don't share, or on a small one
#                 (until it is powered off, or shown)
#   show NODE DIR undo that
#   in NODE CMD...  run CMD on a node
#   can           can it be brought up here? Says why not.
#
# Mode netns (default, needs root): every node is its own network, UTS, PID and mount
# namespace with its own address, hostname, /etc/hosts, /dev/shm and process table, on a
# bridge with no uplink: nothing that runs there can send a packet out of this machine.
# Mode plain (SLURM_CLUSTER_MODE=plain): no namespaces, N slurmd's on N ports of 127.0.0.1.
# Clusters with different SLURM_CLUSTER_DIR stand side by side.
set -euo pipefail

RUN=${SLURM_CLUSTER_DIR:-/tmp/rm_scale_cluster}      # an absolute path
MODE=${SLURM_CLUSTER_MODE:-netns}
GPUS=${SLURM_CLUSTER_GPUS:-8}                 # fake GPUs a node
CPUS=${SLURM_CLUSTER_CPUS:-64}                # declared cores a node (even number), may exceed the real ones
MEM=${SLURM_CLUSTER_MEM:-512000}              # declared MB a node, likewise
NET=${SLURM_CLUSTER_NET:-10.67.0}             # /24 inside the namespaces only
SILENT=${SLURM_CLUSTER_SILENT:-10}            # SlurmdTimeout: a node silent for about 2 to 3 times as long is down
EXTRA=${SLURM_CLUSTER_EXTRA:-}                # a file of slurm.conf lines to append (a later value wins;
                                              # if it names partitions, the default one is left out)
SELF=$(readlink -f "$0")
PFX=rms$(printf %s "$RUN" | cksum | cut -c1-5) # names of our network namespaces
export SLURM_CONF=$RUN/slurm.conf

say() { echo "cluster: $*" >&2; }
die() { say "$*"; exit 1; } # says it and ends

# --- processes: a pid file holds "pid starttime", so a reused pid is never signalled -------
starttime() { sed -n 's/.*) //; /^[ZX]/!p' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20; } # none for a zombie
pid_of() { cut -d' ' -f1 "$RUN/pid/$1" 2>/dev/null; }
alive() {
  local p s
  read -r p s 2>/dev/null <"$RUN/pid/$1" || return 1
  [ -n "$s" ] && [ "$(starttime "$p")" = "$s" ]
}
close_inherited() { # what a daemon keeps open nobody else can lock, unmount or read to its end
  local fd
  for fd in "/proc/$BASHPID/fd"/*; do
    fd=${fd##*/}
    if [ "$fd" -gt 2 ]; then eval "exec $fd>&-"; fi
  done
}
spawn() { # NAME CMD... : in the background, in its own session, with a pid file
  local name=$1; shift
  (close_inherited; exec setsid "$@") </dev/null >>"$RUN/log/$name.out" 2>&1 &
  echo "$! $(starttime $!)" >"$RUN/pid/$name"
}
stop() { # NAME SIGNAL
  local p i
  if alive "$1"; then
    p=$(pid_of "$1"); kill -"$2" "$p" 2>/dev/null || :
    for i in $(seq 100); do alive "$1" || break; sleep 0.1; done
    if alive "$1"; then kill -KILL "$p" 2>/dev/null || :; sleep 0.2; fi
  fi
  rm -f "$RUN/pid/$1"
}
until_ok() { # SECONDS CMD... : poll
  local end=$((SECONDS + $1)); shift
  until "$@" >/dev/null 2>&1; do [ "$SECONDS" -lt "$end" ] || return 1; sleep 0.2; done
}
nodes() { local i; for i in $(seq "$(cat "$RUN/n")"); do echo "node$i"; done; }
netns() { [ "$(cat "$RUN/mode")" = netns ]; }

# --- installation --------------------------------------------------------------------------
install_packages() {
  local need=()
  command -v munged >/dev/null || need+=(munge)
  command -v slurmctld >/dev/null || need+=(slurmctld)
  command -v slurmd >/dev/null || need+=(slurmd)
  command -v sbatch >/dev/null || need+=(slurm-client)
  command -v ip >/dev/null || need+=(iproute2)
  [ ${#need[@]} -gt 0 ] || return 0
  [ "$(id -u)" = 0 ] || die "missing ${need[*]}: run as root"
  say "installing ${need[*]}"
  # No daemon of the packages' own may start: their init scripts are kept quiet meanwhile.
  local rc=/usr/sbin/policy-rc.d made=
  [ -e $rc ] || { printf '#!/bin/sh\nexit 101\n' >$rc; chmod 755 $rc; made=1; }
  { apt-get update -q && DEBIAN_FRONTEND=noninteractive \
      apt-get install -qy --no-install-recommends "${need[@]}"; } >"$RUN/log/apt.log" 2>&1 ||
    { tail -20 "$RUN/log/apt.log" >&2; [ -z "$made" ] || rm -f $rc; die "apt-get failed"; }
  [ -z "$made" ] || rm -f $rc
}

# --- configuration -------------------------------------------------------------------------
write_config() {
  local n=$1 i ctl
  if netns; then ctl="head($NET.254)"; else ctl="$(hostname -s)(127.0.0.1)"; fi
  {
    cat <<CONF
ClusterName=mini
SlurmctldHost=$ctl
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it may start again (default 120 s)
AuthInfo=socket=$RUN/munge/socket,cred_expire=5
StateSaveLocation=$RUN/state
SlurmdSpoolDir=$RUN/spool/%n
SlurmctldPidFile=$RUN/spool/slurmctld.pid
SlurmdPidFile=$RUN/spool/%n.pid
SlurmctldLogFile=$RUN/log/slurmctld.log
SlurmdLogFile=$RUN/log/slurmd.%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$RUN/log/jobcomp.log
MpiDefault=none
MailProg=/bin/true
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=5,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1000
SlurmdParameters=config_overrides
GresTypes=gpu
JobRequeue=1
ReturnToService=2
SlurmdTimeout=$SILENT
SlurmctldTimeout=10
MessageTimeout=10
BatchStartTimeout=10
InactiveLimit=0
KillWait=5
MinJobAge=3600
CONF
    for i in $(seq "$n"); do
      if netns; then printf 'NodeName=node%s NodeAddr=%s.%s' "$i" "$NET" "$i"
      else printf 'NodeName=node%s NodeHostname=%s NodeAddr=127.0.0.1 Port=%s' "$i" "$(hostname -s)" $((17000 + i)); fi
      echo " CPUs=$CPUS Boards=1 SocketsPerBoard=2 CoresPerSocket=$((CPUS / 2)) ThreadsPerCore=1 RealMemory=$MEM Gres=gpu:$GPUS State=UNKNOWN"
    done
    if [ -n "$EXTRA" ]; then cat "$EXTRA"; fi
    if [ -z "$EXTRA" ] || ! grep -qi '^ *PartitionName' "$EXTRA"; then
      echo "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=00:10:00 State=UP"
    fi
  } >"$SLURM_CONF"
  # Copies of /dev/null stand for the GPUs; their trailing numbers become CUDA_VISIBLE_DEVICES.
  # (Where mknod is refused, plain files do too: slurmd logs an error and goes on.)
  for i in $(seq 0 $((GPUS - 1))); do
    [ -e "$RUN/dev/fakegpu$i" ] || mknod "$RUN/dev/fakegpu$i" c 1 3 2>/dev/null || : >"$RUN/dev/fakegpu$i"
  done
  echo "Name=gpu File=$RUN/dev/fakegpu[0-$((GPUS - 1))]" >"$RUN/gres.conf"
  { echo "127.0.0.1 localhost"; echo "::1 localhost"
    echo "$NET.254 head"; for i in $(seq "$n"); do echo "$NET.$i node$i"; done; } >"$RUN/hosts"
  rm -rf "${RUN:?}/bin"; mkdir -p "$RUN/bin"
  if netns; then # commands for the host: each steps over to the head node
    cat >"$RUN/bin/.to-head" <<WRAP
#!/bin/sh
read -r pid _ 2>/dev/null <$RUN/pid/head || { echo "\${0##*/}: the Slurm cluster in $RUN is down" >&2; exit 1; }
exec nsenter --net=/run/netns/$PFX.head -t "\$pid" -u -m --wdns="\$PWD" -- "/usr/bin/\${0##*/}" "\$@"
WRAP
    chmod 755 "$RUN/bin/.to-head"
    for i in /usr/bin/{sacct,sacctmgr,salloc,sattach,sbatch,sbcast,scancel,scontrol,sdiag,sinfo,sprio,squeue,srun,sstat,strigger}; do
      [ ! -x "$i" ] || ln -s .to-head "$RUN/bin/${i##*/}"
    done
  fi
}

# --- network (all of it inside namespaces of our own) --------------------------------------
make_network() {
  local n=$1 i h=$PFX.head d
  ip netns add "$h"
  ip -n "$h" link set lo up
  ip -n "$h" link add br0 type bridge
  ip -n "$h" addr add "$NET.254/24" dev br0
  ip -n "$h" link set br0 up
  for i in $(seq "$n"); do
    d=$PFX.node$i
    ip netns add "$d"
    ip -n "$d" link set lo up
    ip -n "$d" link add eth0 type veth peer name "port$i" netns "$h"
    ip -n "$d" addr add "$NET.$i/24" dev eth0
    ip -n "$d" link set eth0 up
    ip -n "$h" link set "port$i" master br0 up
  done
}
drop_network() {
  local ns
  for ns in $(ip netns list 2>/dev/null | cut -d' ' -f1 | grep "^$PFX\." || :); do ip netns del "$ns"; done
}

# --- nodes ---------------------------------------------------------------------------------
in_node() { # NODE CMD... : in all four namespaces of a node (its init is the holder's only child)
  local init; init=$(cut -d' ' -f1 "/proc/$(pid_of "$1")/task/$(pid_of "$1")/children"); shift
  nsenter -t "$init" -n -u -m -p -- "$@"
}
in_head() { if netns; then nsenter -t "$(pid_of head)" -n -u -m --wdns="$PWD" -- "$@"; else "$@"; fi; }
start_controller() { if netns; then spawn slurmctld nsenter -t "$(pid_of head)" -n -u -m -- slurmctld -D; else spawn slurmctld slurmctld -D; fi; }
start_node() {
  mkdir -p "$RUN/spool/$1"
  if netns; then
    rm -f "$RUN/spool/$1.pid"
    spawn "$1" nsenter --net="/run/netns/$PFX.$1" unshare --uts --mount --pid --fork --kill-child \
      --mount-proc --propagation private bash "$SELF" _node_init "$1"
  else
    spawn "$1" slurmd -D -N "$1"
  fi
}
cmd__node_init() { # pid 1 of a node: starts slurmd, then only reaps what is left to it
  trap : TERM INT HUP
  hostname "$1"
  mount --bind "$RUN/hosts" /etc/hosts
  mount --bind "$RUN/empty" "$RUN/bin"
  mount -t tmpfs -o mode=1777 shm /dev/shm
  slurmd -N "$1" || exit 1
  sleep infinity &
  while :; do wait -n || :; done
}
cmd__head_init() {
  hostname head
  mount --bind "$RUN/hosts" /etc/hosts
  mount --bind "$RUN/empty" "$RUN/bin"
  exec sleep infinity
}
hosts_line() { # plain mode only: names resolve through one marked line of /etc/hosts
  local rest; rest=$(grep -v "# $PFX\$" /etc/hosts || :)
  { echo "$rest"; if [ "$1" = add ]; then echo "127.0.0.1 $(nodes | tr '\n' ' ')# $PFX"; fi; } >"$RUN/hosts.new"
  cat "$RUN/hosts.new" >/etc/hosts
}
leftovers() { # plain mode only: steps of ours that outlived a killed slurmd, told by their environment
  local d e
  for d in /proc/[0-9]*; do
    e=$(cat "$d/environ" 2>/dev/null | tr '\0' '\n')
    grep -qxF "SLURM_CONF=$SLURM_CONF" <<<"$e" || continue
    if [ "$(cat "$d/comm")" = slurmstepd ] || grep -q '^SLURMD_NODENAME=' <<<"$e"; then echo "${d#/proc/}"; fi
  done
}
all_idle() { alive slurmctld || return 0; [ "$(in_head sinfo -h -N -o '%N %t' | sort -u | grep -c ' idle$')" = "$(cat "$RUN/n")" ]; }
whole() { # is everything that up starts alive?
  local x
  alive munged && alive slurmctld || return 1
  ! netns || alive head || return 1
  for x in $(nodes); do alive "$x" || return 1; done
}

# --- commands ------------------------------------------------------------------------------
cmd_up() {
  local n=${1:-4} x t0=$SECONDS
  [[ $n =~ ^[1-9][0-9]*$ ]] && [ "$n" -le 200 ] || die "up [N]: N from 1 to 200"
  [ "$(id -u)" = 0 ] || die "needs root"
  [[ $RUN = /* ]] && [ ${#RUN} -le 55 ] || die "$RUN must be absolute and at most 55 bytes long (slurmstepd's sockets lie under it; such a path ends at 107)"
  if [ -f "$SLURM_CONF" ] && [ "$(cat "$RUN/n")/$(cat "$RUN/mode")" = "$n/$MODE" ] && whole && until_ok 5 in_head scontrol ping; then
    say "already up: $n nodes, mode $MODE"; return
  fi
  [ ! -e "$RUN/n" ] || cmd_down
  mkdir -p "$RUN"/{log,pid,state,spool,munge,dev,empty}
  rm -rf "$RUN"/state/* "$RUN"/spool/* "$RUN"/log/*
  install_packages
  echo "$n" >"$RUN/n"; echo "$MODE" >"$RUN/mode"
  write_config "$n"
  # munge: a daemon, key and socket of our own; a Unix socket serves every namespace
  chown munge: "$RUN/munge"; chmod 755 "$RUN/munge"
  head -c 128 /dev/urandom >"$RUN/munge/key"; chown munge: "$RUN/munge/key"; chmod 400 "$RUN/munge/key"
  spawn munged setpriv --reuid munge --regid munge --clear-groups munged --foreground --num-threads=10 \
    --key-file="$RUN/munge/key" --socket="$RUN/munge/socket" --pid-file="$RUN/munge/pid" \
    --seed-file="$RUN/munge/seed" --log-file="$RUN/munge/log"
  until_ok 10 munge --socket="$RUN/munge/socket" -n || { cat "$RUN/log/munged.out" >&2; die "munged did not start"; }
  if netns; then
    make_network "$n"
    spawn head nsenter --net="/run/netns/$PFX.head" unshare --uts --mount --propagation private bash "$SELF" _head_init
    # shellcheck disable=SC2016 # expands in the namespace
    until_ok 5 in_head sh -c '[ "$(hostname)" = head ] && grep -q " head$" /etc/hosts'
  else
    hosts_line add
  fi
  start_controller
  for x in $(nodes); do start_node "$x"; done
  if ! until_ok 60 all_idle || ! alive slurmctld; then
    in_head sinfo -N -l >&2 || :
    tail -n 5 "$RUN"/log/*.log >&2
    die "not every node came up"
  fi
  say "up: $n nodes, mode $MODE, $((SECONDS - t0)) s"
}
cmd_down() {
  local x
  if [ -e "$RUN/n" ]; then
    if ! netns && alive slurmctld; then # without PID namespaces a step would outlive its slurmd
      scancel -u root >/dev/null 2>&1 || :
      # shellcheck disable=SC2016
      until_ok 15 sh -c '[ -z "$(squeue -h 2>/dev/null)" ]' || say "jobs still listed"
    fi
    stop slurmctld TERM
    for x in $(nodes); do if netns; then stop "$x" KILL; else stop "$x" TERM; fi; done
    if netns; then stop head TERM; else hosts_line drop; for x in $(leftovers); do kill -KILL "$x" 2>/dev/null || :; done; fi
    stop munged TERM
  fi
  drop_network
  # bin/ stays: its commands now say that the cluster is down.
  rm -rf "$SLURM_CONF" "$RUN/n" "$RUN/mode" "$RUN/state" "$RUN/spool" "$RUN/munge/socket"
  say down
}
cmd_env() {
  [ -f "$SLURM_CONF" ] || die "not up"
  echo "export SLURM_CLUSTER_DIR='$RUN' SLURM_CONF='$SLURM_CONF'"
  echo "case \":\$PATH:\" in *':$RUN/bin:'*) ;; *) export PATH='$RUN/bin':\"\$PATH\" ;; esac"
}
cmd_exec() { [ -f "$SLURM_CONF" ] || die "not up"; in_head "$@"; }
cmd_fault() {
  case $2 in
    slurmctld) stop slurmctld KILL ;;
    power) netns || die "netns mode only"; stop "$1" KILL ;;
    link) netns || die "netns mode only"; ip -n "$PFX.$1" link set eth0 down ;;
    slurmd) if netns; then in_node "$1" sh -c "kill -9 \$(cat $RUN/spool/$1.pid)"; else stop "$1" KILL; fi ;;
    *) die "fault NODE power|slurmd|link, or fault head slurmctld" ;;
  esac
}
cmd_heal() {
  if [ "$1" = head ]; then
    alive slurmctld || start_controller
    until_ok 60 in_head scontrol ping || die "slurmctld did not start"
    return
  fi
  if netns; then ip -n "$PFX.$1" link set eth0 up; fi
  if ! alive "$1"; then start_node "$1"
  elif netns; then (close_inherited; in_node "$1" sh -c "kill -0 \$(cat $RUN/spool/$1.pid) 2>/dev/null || slurmd -N $1"); fi
}
cmd_hide() { # NODE DIR [SIZE]
  netns || die "netns mode only"
  in_node "$1" mount -t tmpfs ${3:+-o "size=$3"} none "$2"
}
cmd_show() { # NODE DIR
  in_node "$1" umount --lazy "$2"
}
cmd_in() { in_node "$@"; }
cmd_can() {
  local missing=()
  [ "$(id -u)" = 0 ] || die "can't: not root"
  unshare --net --uts --mount --pid --fork true 2>/dev/null || die "can't: namespaces are refused here"
  for x in munged slurmctld slurmd sbatch ip; do command -v $x >/dev/null || missing+=("$x"); done
  [ ${#missing[@]} -eq 0 ] || command -v apt-get >/dev/null || die "can't: ${missing[*]} missing, and no apt-get to install them"
}

case ${1:-} in
  up | down | fault | heal | hide | show) mkdir -p "$RUN"; exec 9>"$RUN/.lock"; flock -w 120 9 || die "locked" ;;
  env | exec | in | can | _node_init | _head_init) ;;
  *) sed -n '2,23s/^# \{0,1\}//p' "$SELF"; exit 2 ;;
esac
c=$1; shift
"cmd_$c" "$@"
