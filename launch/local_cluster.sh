#!/usr/bin/env bash
# A real Ray cluster of several nodes on this one machine, each node with processes of its own: for
# trying out what will run on many machines, and for several GPUs in one machine.
#
#   bash launch/local_cluster.sh start [--nodes 2] [--cpus 1] [--gpus 0] [--store-mib 256]
#   bash launch/local_cluster.sh status
#   bash launch/local_cluster.sh stop
#
# --cpus, --gpus and --store-mib (memory of Ray's object store) are of each node. PORT=6379 and
# DASHBOARD_PORT=8265 choose other ports, GHOST_DIST_CLUSTER=DIR another folder for token and logs.
#
# Token authentication is on. Only the dashboard, which takes jobs, listens on 127.0.0.1 alone;
# Ray's other ports listen on every interface, whatever address a node is given.

set -euo pipefail

state=${GHOST_DIST_CLUSTER:-/tmp/ghost-dist-ray-$UID} # short: Ray's socket names end at 107 bytes
port=${PORT:-6379}
dashboard_port=${DASHBOARD_PORT:-8265}
wait_s=120
here=$(dirname "${BASH_SOURCE[0]}")

fail() {
  echo "error: $*" >&2
  exit 1
}

main() {
  local action=${1:-}
  [ $# -eq 0 ] || shift
  case $action in
    start) start "$@" ;;
    status) status ;;
    stop) stop ;;
    *) fail "say start, status or stop: bash launch/local_cluster.sh start --nodes 2 --cpus 4" ;;
  esac
}

start() {
  nodes=2 cpus=1 gpus=0 store_mib=256
  while [ $# -gt 0 ]; do
    [[ ${2:-} =~ ^[0-9]+$ ]] || fail "$1 needs a whole number"
    case $1 in
      --nodes) nodes=$2 ;;
      --cpus) cpus=$2 ;;
      --gpus) gpus=$2 ;;
      --store-mib) store_mib=$2 ;;
      *) fail "unknown option $1" ;;
    esac
    shift 2
  done
  ((nodes > 0)) || fail "--nodes must be at least 1"
  ((store_mib >= 75)) || fail "--store-mib must be at least 75, which is Ray's own limit"
  if ! command -v ray >/dev/null; then # no environment with Ray is active: use that of the checkout
    extras=cluster
    # shellcheck source=launch/environment.sh
    source "$here/environment.sh"
  fi
  check_gpus
  make_state
  write_environment
  # shellcheck disable=SC1091
  source "$state/env"
  local address=$RAY_ADDRESS
  unset RAY_ADDRESS # 'ray start --head' would take it for the cluster to join

  trap end_nodes EXIT # a cluster that is half there helps nobody
  ray_start 0 --head --port="$port" --ray-client-server-port=$((port + 1)) \
    --include-dashboard=true --dashboard-host=127.0.0.1 --dashboard-port="$dashboard_port"
  wait_for 1 "$address"
  local number
  for ((number = 1; number < nodes; number++)); do
    # One log monitor is enough for a host: two would show every line of a worker twice.
    ray_start "$number" --address="$address" --include-log-monitor=false
    # One after the other: of two nodes of a host that register at the same moment, one waits in
    # vain for the head's answer (seen with Ray 2.60).
    wait_for $((number + 1)) "$address"
  done
  trap - EXIT

  cat <<TEXT
Ray runs at $address: $nodes nodes, each with $cpus CPUs and $gpus GPUs. Logs: $state

In every shell that uses it:   source $state/env
then, for example:             ray status
                               ghost-dist recover CONFIG --set cluster.address=auto
                               ghost-dist submit CONFIG --address $dashboard
To stop it, and nothing else:  bash launch/local_cluster.sh stop
TEXT
}

# Every node is one 'ray start --block': it ends its own processes when it is told to stop, and the
# kernel ends them should it be killed. 'ray stop' would end every Ray of this user.
ray_start() {
  local number=$1 environment=()
  shift
  ((gpus == 0)) || environment=("CUDA_VISIBLE_DEVICES=$(gpus_of "$number")")
  # Port 0 is any free one: by default all nodes of a host would ask for the same port of the
  # dashboard's agent and the same range for workers.
  env "${environment[@]}" setsid ray start "$@" --block --disable-usage-stats \
    --temp-dir="$state/ray" --num-cpus="$cpus" --num-gpus="$gpus" \
    --object-store-memory=$((store_mib * 1024 * 1024)) \
    --dashboard-agent-listen-port=0 --min-worker-port=0 --max-worker-port=0 \
    </dev/null >"$state/node-$number.log" 2>&1 &
  echo $! >>"$state/pids"
}

# The GPUs of one node. Ray numbers a node's GPUs from the first one that it sees, so two nodes of a
# host would both give away number 0.
gpus_of() {
  visible_gpus | tail -n +$(($1 * gpus + 1)) | head -n "$gpus" | paste -sd, -
}

visible_gpus() {
  if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
    tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES"
  elif command -v nvidia-smi >/dev/null; then
    nvidia-smi --query-gpu=index --format=csv,noheader
  fi
}

check_gpus() {
  local found
  found=$(visible_gpus | wc -l)
  ((nodes * gpus <= found)) ||
    fail "$nodes nodes of $gpus GPUs need $((nodes * gpus)) GPUs, this machine shows $found"
}

make_state() {
  if [ -e "$state" ]; then
    [ -O "$state" ] || fail "$state is another user's. Set GHOST_DIST_CLUSTER."
    [ -z "$(running)" ] || fail "a cluster of this script runs already; stop it first"
    rm -rf "$state"
  fi
  mkdir -m 700 "$state" || fail "cannot make $state"
}

# The token is Ray's own and readable by this user alone. It lies in the folder of this cluster, so
# that no other Ray of the user changes its mind: Ray looks for one in the home folder.
write_environment() {
  (
    umask 077
    unset RAY_AUTH_TOKEN RAY_AUTH_TOKEN_PATH
    HOME=$state ray get-auth-token --generate >/dev/null 2>"$state/token.log"
  ) || fail "ray get-auth-token --generate: $(cat "$state/token.log")"
  cat >"$state/env" <<TEXT
unset RAY_AUTH_TOKEN
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$state/.ray/auth_token
export RAY_ADDRESS=127.0.0.1:$port
TEXT
}

wait_for() {
  local wanted=$1 address=$2 deadline=$((SECONDS + wait_s)) alive=0
  while :; do
    # Connecting is the check: it needs the token, the head and a node. Ray tries for ever to reach a
    # head that has ended.
    read -r alive dashboard < <(timeout 30 python - "$address" 2>/dev/null <<'PY' || echo 0 -
import sys
import ray

context = ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
print(sum(node["Alive"] for node in ray.nodes()), f"http://{context.dashboard_url}")
PY
    )
    ((alive < wanted)) || return 0
    [ "$(running | wc -l)" -eq "$(wc -l <"$state/pids")" ] || {
      tail -n 15 "$state"/node-*.log >&2
      fail "a node ended while it started; see above"
    }
    ((SECONDS < deadline)) || fail "$alive of $wanted nodes after $wait_s s; see $state/node-*.log"
    sleep 1
  done
}

# The recorded processes that are still ours; a number may long be another process.
running() {
  local pid
  [ -f "$state/pids" ] || return 0
  while read -r pid; do
    ! tr '\0' '\n' 2>/dev/null <"/proc/$pid/cmdline" | grep -qxF -- "--temp-dir=$state/ray" ||
      echo "$pid"
  done 2>/dev/null <"$state/pids"
}

status() {
  [ -n "$(running)" ] || fail "no cluster of this script runs"
  # shellcheck disable=SC1091
  source "$state/env"
  ray status
}

stop() {
  [ -f "$state/pids" ] || fail "no cluster of this script runs"
  end_nodes
  echo "stopped; logs stay in $state until the next start"
}

end_nodes() {
  local pid deadline=$((SECONDS + 20))
  for pid in $(running | tac); do # the head last
    kill -TERM "$pid" 2>/dev/null || true
  done
  while [ -n "$(running)" ] && ((SECONDS < deadline)); do sleep 0.5; done
  for pid in $(running); do
    kill -KILL "$pid" 2>/dev/null || true
  done
  rm -rf "$state/pids" "$state/env" "$state/.ray"
}

main "$@"
