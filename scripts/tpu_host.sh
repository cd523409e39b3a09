#!/usr/bin/env bash
# One host's part of tpu_pod.sh: setup, start, status, logs, stop; and supervise, which start leaves
# running. It is copied to every host and runs there alike.
set -euo pipefail

home=$HOME/gpipe-jax      # the library
place=$HOME/gpipe-jax-run # of a run: log, status, lock, pid, and stop if it shall end
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
  # The hosts' own Python may be older than what jax needs; uv brings one.
  command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
  cd "$home"
  [[ -x $python ]] || uv venv --python 3.12 .venv
  uv pip install --quiet --python "$python" -e '.[tpu,examples,tensorboard]'
  tell ready
}

start() { # CONFIG [a.b=c ...]
  [[ -x $python ]] || fail 'not set up: run scripts/tpu_pod.sh setup'
  is_idle || fail 'a run is under way: end it first (scripts/tpu_pod.sh stop)'
  cd "$home"
  [[ ! -e $1.new ]] || mv "$1.new" "$1" # not before: a run under way starts again with its own
  "$python" -m gpipe_jax config "$@" >/dev/null # a wrong config ends here, saying why
  rm -f "$place/stop"
  # In a session of its own, with nothing of ssh's: it outlives the connection.
  setsid nohup bash scripts/tpu_host.sh supervise "$@" >>"$place/log" 2>&1 </dev/null &
  tell started
}

is_idle() { # the lock is held as long as the supervisor or the training process lives
  flock --nonblock "$place/lock" true
}

supervise() { # CONFIG [a.b=c ...]
  local code=75 began failures=0
  exec 9>"$place/lock"
  flock --nonblock 9 || fail 'a run is under way'
  while [[ ! -e $place/stop ]]; do
    began=$SECONDS code=0
    note "running since $(date -u +%FT%TZ)"
    "$python" -m gpipe_jax train "$@" &
    echo $! >"$place/pid"
    wait $! || code=$?
    rm -f "$place/pid" # the number may become another process's
    ((SECONDS - began < 600)) || failures=0
    case $code in
      0) note 'done (exit code 0)' && return ;;
      2) note 'not started again: bad input (exit code 2)' && return ;;
      75) failures=0 ;;
      *) failures=$((failures + 1)) ;;
    esac
    ((failures <= 3)) || { note "failed four times in a row (exit code $code)" && return; }
    note "ended with exit code $code"
    ((code == 75)) || sleep "${TPU_POD_PAUSE_S:-30}" # the other hosts must see it too
  done
  note "stopped (exit code $code)"
}

note() { # MESSAGE, to the status and the log
  echo "$1" >"$place/status"
  echo "--- $(date -u +%FT%TZ) $(hostname): $1"
}

status() {
  tell "$(cat "$place/status" 2>/dev/null || echo 'no run')"
}

logs() { # [--follow]
  [[ -e $place/log ]] || fail 'there is no log'
  tail -n 100 "$@" "$place/log" | sed -u "s/^/$(hostname): /"
}

stop() { # SIGTERM saves; jax.distributed may swallow it, so SIGKILL after two minutes
  local waited=0 pid signalled=''
  touch "$place/stop"
  until is_idle; do
    pid=$(cat "$place/pid" 2>/dev/null || true)
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

mkdir -p "$place"
case ${1:-} in
  setup | start | supervise | status | logs | stop) "$@" ;;
  *) fail "unknown command ${1:-}; use scripts/tpu_pod.sh" ;;
esac
