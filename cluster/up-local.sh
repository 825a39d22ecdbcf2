#!/usr/bin/env bash
# A Ray cluster of several nodes on this machine, without Docker, to test what will run on a real cluster.
#
#   cluster/up-local.sh up                 # starts it; prints how to reach it
#   eval "$(cluster/up-local.sh env)"      # address and token for this shell
#   cluster/up-local.sh down               # ends exactly what `up` has started
#
# Every node has its own ports and folders, like a separate machine: a file that only one node has is missing on the others.
# Token authentication is on, and the dashboard listens on loopback. Ray's other ports listen on all addresses and require the token.
# Settings, all optional, the same for up, env and down:
#   PTUNING_CLUSTER          folder of the nodes, their logs and the token; keep it short: it contains sockets (/tmp/ptuning-cluster-UID)
#   PTUNING_CLUSTER_NODES    number of nodes, including the head (2)
#   PTUNING_CLUSTER_CPUS     CPUs per node (1)
#   PTUNING_CLUSTER_PORT     the head's port, and the next one (6379)
#   PTUNING_DASHBOARD_PORT   the port that jobs are submitted to (8265)
#   PTUNING_PYTHON           Python with Ray (python3 on the PATH)
set -euo pipefail

state=${PTUNING_CLUSTER:-/tmp/ptuning-cluster-$(id -u)}
nodes=${PTUNING_CLUSTER_NODES:-2}
cpus=${PTUNING_CLUSTER_CPUS:-1}
port=${PTUNING_CLUSTER_PORT:-6379}
dashboard=${PTUNING_DASHBOARD_PORT:-8265}
python=$(command -v "${PTUNING_PYTHON:-python3}") || { echo "up-local: no ${PTUNING_PYTHON:-python3}; set PTUNING_PYTHON" >&2; exit 2; }

export PYTHONSAFEPATH=1 # no imports from the working folder

die() { echo "up-local: $*" >&2; exit 1; }

environment() {
  echo "export RAY_API_SERVER_ADDRESS=http://127.0.0.1:$dashboard RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$state/token"
}

start() { # start NAME ARGUMENTS...: a node that ends with the process whose id is in NAME.pid
  local name=$1; shift
  mkdir -p "$state/$name"
  # Port 0 selects a free port: the defaults are the same on every node. --block keeps a node's processes below one that we can end.
  # The process that runs jobs (2.60: JobSupervisor) first imports from the folder that its node was started in, so it is empty.
  (cd "$state/$name"; exec setsid "$python" -m ray.scripts.scripts start "$@" --block --num-cpus "$cpus" --temp-dir "$state/$name" --disable-usage-stats \
    --object-store-memory 200000000 --min-worker-port 0 --max-worker-port 0 \
    --node-manager-port 0 --object-manager-port 0 --dashboard-agent-listen-port 0 --dashboard-agent-grpc-port 0 \
    --metrics-export-port 0 --runtime-env-agent-port 0) >"$state/$name.log" 2>&1 </dev/null &
  echo $! >"$state/$name.pid"
}

answer() { # wait until the dashboard sees all nodes
  "$python" - "$dashboard" "$nodes" "$state" <<'PYTHON'
import json, pathlib, sys, time, urllib.request

port, nodes, state = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
headers = {"Authorization": "Bearer " + (state / "token").read_text()}
for _ in range(240):
    try:
        request = urllib.request.Request(f"http://127.0.0.1:{port}/nodes?view=summary", headers=headers)
        with urllib.request.urlopen(request, timeout=5) as reply:
            summary = json.load(reply)["data"]["summary"]
        if sum(node["raylet"].get("state") == "ALIVE" for node in summary) >= nodes:
            sys.exit(0)
    except (OSError, ValueError, KeyError):
        pass
    gone = [file.stem for file in state.glob("*.pid") if not pathlib.Path("/proc", file.read_text().strip()).exists()]
    if gone:
        sys.exit(f"{(state / gone[0]).with_suffix('.log').read_text()}\nup-local: {gone[0]} has ended")
    time.sleep(0.5)
sys.exit("up-local: the nodes did not come up in 2 minutes; is the machine busy?")
PYTHON
}

up() {
  local number tries
  compgen -G "$state/*.pid" >/dev/null && die "a cluster already exists ($state); end it with: $0 down"
  (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null && die "port $port is in use; set PTUNING_CLUSTER_PORT"
  (exec 3<>"/dev/tcp/127.0.0.1/$dashboard") 2>/dev/null && die "port $dashboard is in use; set PTUNING_DASHBOARD_PORT"
  (umask 077; mkdir -p "$state"; od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$state/token")
  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$state/token
  unset RAY_AUTH_TOKEN RAY_ADDRESS RAY_API_SERVER_ADDRESS
  # SIGINT stops training cleanly; then a job has a minute to record that it was stopped.
  export RAY_JOB_STOP_SIGNAL=SIGINT RAY_JOB_STOP_WAIT_TIME_S=60
  export RAY_ENABLE_UV_RUN_RUNTIME_ENV=0
  PATH=$(dirname "$python"):$PATH # a job's `python` is this one
  trap 'down; trap - EXIT' EXIT INT TERM # do not leave half a cluster
  start head --head --port "$port" --dashboard-host 127.0.0.1 --dashboard-port "$dashboard" --ray-client-server-port $((port + 1))
  for ((number = 1; number < nodes; number++)); do
    for ((tries = 0; tries < 240; tries++)); do # a node that starts before its head gives up
      (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null && break
      sleep 0.25
    done
    start "node$number" --address "127.0.0.1:$port"
  done
  answer
  trap - EXIT INT TERM
  echo "a cluster of $nodes nodes with $cpus CPUs each; for this shell: eval \"\$($0 env)\"" >&2
}

ours() { # the process ids of the nodes; an id may have been reused by another process
  local file pid
  for file in "$state"/*.pid; do
    [ -f "$file" ] && pid=$(cat "$file") || continue
    ps -o args= -p "$pid" 2>/dev/null | grep -q -- "$state" && echo "$pid" || true
  done
}

down() {
  local pid left tries
  for pid in $(ours); do kill "$pid" 2>/dev/null || true; done
  for ((tries = 0; tries < 25; tries++)); do [ -n "$(ours)" ] || break; sleep 0.2; done
  for pid in $(cat "$state"/*.pid 2>/dev/null); do # remaining processes belong to the session of the node
    # A worker names itself ray::WHAT and no longer shows its folder.
    for left in $(ps -o pid=,args= -s "$pid" 2>/dev/null | awk -v state="$state" 'index($0, state) || / ray::/ { print $1 }'); do
      kill -KILL "$left" 2>/dev/null || true
    done
  done
  case $state in /|"$HOME") return ;; esac
  [ -f "$state/token" ] || return 0
  # A driver runs in its own session, and writes until it notices that its node has ended.
  for ((tries = 0; tries < 50; tries++)); do rm -rf "$state" 2>/dev/null && return; sleep 0.2; done
  rm -rf "$state"
}

case ${1:-} in
  up | down) "$1" ;;
  env) [ -f "$state/token" ] || die "there is no cluster; start one with: $0 up"; environment ;;
  *) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0"; exit 2 ;;
esac
