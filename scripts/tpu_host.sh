#!/usr/bin/env bash
# Run tpu_pod.sh's commands on one host: setup, start, status, logs and stop; and supervise, which
# start leaves running. setup copies this file to every host.
set -euo pipefail

home=$HOME/gpipe-jax      # the library
state=$HOME/gpipe-jax-run # of a run: log, status, lock, pid; and the file stop, which ends it
python=$home/.venv/bin/python

fail() { # MESSAGE
  printf '%s: %s\n' "$(hostname)" "$1" >&2
  exit 1
}

tell() { # MESSAGE
  printf '%s: %s\n' "$(hostname)" "$1"
}

setup() {
  export PATH="$HOME/.local/bin:$PATH"
  # The hosts' own Python may be too old for jax; uv installs one.
  command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
  cd "$home"
  [[ -x $python ]] || uv venv --python 3.12 .venv
  uv pip install --quiet --python "$python" -e '.[tpu,examples,tensorboard]'
  tell ready
}

start() { # CONFIG [a.b=c ...]
  [[ -x $python ]] || fail 'not set up: run scripts/tpu_pod.sh setup'
  is_idle || fail 'a run is active: end it first (scripts/tpu_pod.sh stop)'
  cd "$home"
  [[ ! -e $1.new ]] || mv "$1.new" "$1" # only now: an active run restarts with its own config
  "$python" -m gpipe_jax config "$@" >/dev/null # an invalid config ends here, with its errors
  rm -f "$state/stop"
  # In its own session, without ssh's descriptors: it outlives the connection.
  setsid nohup bash scripts/tpu_host.sh supervise "$@" >>"$state/log" 2>&1 </dev/null &
  tell started
}

is_idle() { # the supervisor and the training process hold the lock
  flock --nonblock "$state/lock" true
}

supervise() { # CONFIG [a.b=c ...]
  local code=75 began failures=0
  exec 9>"$state/lock"
  flock --nonblock 9 || fail 'a run is active'
  while [[ ! -e $state/stop ]]; do
    began=$SECONDS code=0
    note "running since $(date -u +%FT%TZ)"
    "$python" -m gpipe_jax train "$@" &
    echo $! >"$state/pid"
    wait $! || code=$?
    rm -f "$state/pid" # another process may get this number
    ((SECONDS - began < 600)) || failures=0
    case $code in
      0) note 'done (exit code 0)' && return ;;
      2) note 'not restarted: bad input (exit code 2)' && return ;;
      75) failures=0 ;;
      *) failures=$((failures + 1)) ;;
    esac
    ((failures <= 3)) || { note "failed four times in succession (exit code $code)" && return; }
    note "ended with exit code $code"
    ((code == 75)) || sleep "${TPU_POD_PAUSE_S:-30}" # the other hosts must notice too
  done
  note "stopped (exit code $code)"
}

note() { # MESSAGE, to the status and the log
  echo "$1" >"$state/status"
  echo "--- $(date -u +%FT%TZ) $(hostname): $1"
}

status() {
  tell "$(cat "$state/status" 2>/dev/null || echo 'no run')"
}

logs() { # [--follow]
  [[ -e $state/log ]] || fail 'there is no log yet'
  tail -n 100 "$@" "$state/log" | sed -u "s/^/$(hostname): /"
}

stop() { # SIGTERM saves; jax.distributed may swallow it, so SIGKILL after two minutes
  local waited=0 pid signalled=''
  touch "$state/stop"
  until is_idle; do
    pid=$(cat "$state/pid" 2>/dev/null || true)
    if [[ $pid && $pid != "$signalled" ]]; then
      kill -TERM "$pid" 2>/dev/null || true
      signalled=$pid
    fi
    ((waited != ${TPU_POD_STOP_S:-120})) || kill -KILL "$pid" 2>/dev/null || true
    waited=$((waited + 1))
    sleep 1
  done
  status
}

mkdir -p "$state"
case ${1:-} in
  setup | start | supervise | status | logs | stop) "$@" ;;
  *) fail "unknown command ${1:-}; use scripts/tpu_pod.sh" ;;
esac
