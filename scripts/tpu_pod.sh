#!/usr/bin/env bash
# Train on a Cloud TPU VM or pod: run the same command on every host.
# `scripts/tpu_pod.sh help` prints the usage below.
#
# All commands use `gcloud compute tpus queued-resources`. Its ssh and scp reach every host
# (--worker=all) of every slice (--node=all), and return the exit code of a failing host. Each host
# then runs tpu_host.sh, which setup copies there with the library.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: scripts/tpu_pod.sh COMMAND NAME [options]

  create NAME --type v5litepod-16   request a TPU (a queued resource); --wait until it is ready
  setup  NAME                       copy this clone to every host and install it
  run    NAME --config FILE [a.b=c ...]
                                    start `python -m gpipe_jax train` on every host and return
  status NAME                       the state of the queued resource and of each host
  logs   NAME [--follow]            the end of every host's log
  stop   NAME                       save and end the run on every host
  delete NAME                       release the TPU; its disks are lost

  --zone Z, --project P    default: those of `gcloud config`
  --type T                 accelerator type, such as v4-32, v5litepod-16, v5p-8 or v6e-16
  --slices N               number of TPUs of this type, connected (multislice)
  --spot                   cheaper, but can be preempted
  --runtime-version V      default: the one for the type
  --dry-run                print the gcloud commands without running them

A run continues when you disconnect. It is restarted after a preemption (exit code 75), and up to
three times in succession after a failure, such as the loss of another host; but not if the config
is invalid (2). Several hosts need a shared folder: train.workdir=gs://BUCKET/RUN.
TEXT
}

fail() { # MESSAGE [EXIT CODE]
  printf 'tpu_pod.sh: %s\n' "$1" >&2
  exit "${2:-1}"
}

check() { # OPTION VALUE REGULAR-EXPRESSION RULE: refuse unusual characters
  (LC_ALL=C && [[ $2 =~ ^($3)$ ]]) || fail "$1 is $(quoted "$2"); use $4" 2
}

quoted() { # WORD ...: print one line for any shell
  local word quote="'\\''" space=''
  for word; do
    if (LC_ALL=C && [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]); then
      printf '%s%s' "$space" "$word"
    else
      printf "%s'%s'" "$space" "${word//\'/$quote}"
    fi
    space=' '
  done
}

command='' name='' zone='' project='' type='' slices=1 spot='' runtime='' config=''
dry_run='' wait='' follow='' overrides=()

parse() {
  (($# >= 2)) || { usage >&2; fail "give a command and the name of a TPU" 2; }
  command=$1 name=$2
  shift 2
  check NAME "$name" '[a-z]([-a-z0-9]{0,61}[a-z0-9])?' \
    'up to 63 lower-case letters, digits and dashes, beginning with a letter'
  reach="if hosts could not be reached, run ssh-add ~/.ssh/google_compute_engine, check that $name is \
ACTIVE (scripts/tpu_pod.sh status $name), and try again"
  while (($#)); do
    local option=$1 value=''
    case $option in
      --zone | --project | --type | --slices | --runtime-version | --config)
        (($# >= 2)) || fail "$option needs a value" 2
        value=$2
        shift
        ;;
      --*=*) # --zone=Z is --zone Z
        set -- "${option%%=*}" "${option#*=}" "${@:2}"
        continue
        ;;
    esac
    case $option in
      --zone) zone=$value ;;
      --project) project=$value ;;
      --dry-run) dry_run=yes ;;
      --type) only create && type=$value ;;
      --slices) only create && slices=$value ;;
      --runtime-version) only create && runtime=$value ;;
      --spot) only create && spot=yes ;;
      --wait) only create && wait=yes ;;
      --config) only run && config=$value ;;
      [a-z]*.*=*) only run && overrides+=("$option") ;;
      --follow) only logs && follow=yes ;;
      *) fail "unknown argument $(quoted "$option"); scripts/tpu_pod.sh help lists all" 2 ;;
    esac
    shift
  done
  [[ -z $zone ]] || check --zone "$zone" '[a-z]+-[a-z]+[0-9]+-[a-z]' 'a zone, such as us-west4-a'
  [[ -z $project ]] || check --project "$project" '[a-z][-a-z0-9.:]*' 'the ID of a project'
  [[ -z $type ]] || check --type "$type" '[a-z0-9]+-[0-9]+' 'a type, such as v5litepod-16'
  [[ -z $runtime ]] || check --runtime-version "$runtime" '[a-z0-9][-a-z0-9.]*' 'letters and digits'
  check --slices "$slices" '[1-9][0-9]{0,3}' 'a whole number from 1'
}

only() { # COMMAND: check that the current option belongs to it
  [[ $command == "$1" ]] || fail "$(quoted "$option") is an option of $1, not of $command" 2
}

step() { # ACTION REMEDY VERB ...: runs `gcloud compute tpus queued-resources VERB ...`
  local action=$1 remedy=$2 code=0
  shift 2
  local line=(gcloud compute tpus queued-resources "$@")
  [[ -z $zone ]] || line+=("--zone=$zone")
  [[ -z $project ]] || line+=("--project=$project")
  if [[ $dry_run ]]; then
    printf '%s\n' "$(quoted "${line[@]}")"
    return
  fi
  printf '+ %s\n' "$(quoted "${line[@]}")" >&2
  "${line[@]}" || code=$?
  ((code == 0)) || fail "$action failed (exit code $code): $remedy" "$code"
}

on_every_host() { # ACTION REMEDY WORD ...: tpu_host.sh WORD ... on every host
  local action=$1 remedy=$2
  shift 2
  step "$action" "$remedy; $reach" ssh "$name" --worker=all --node=all \
    --command="$(quoted bash gpipe-jax/scripts/tpu_host.sh "$@")"
}

state() { # print the queued resource's state; in a dry run only the command
  step "asking for the state of $name" \
    "create it first (scripts/tpu_pod.sh create $name), or give its --zone and --project" \
    describe "$name" '--format=value(state.state)'
}

need_active() {
  local current
  [[ ! $dry_run ]] || { state && return; }
  current=$(state) || exit
  [[ $current == ACTIVE ]] || fail "$name is $current, not ACTIVE: $(advice "$current")"
}

advice() { # STATE
  case $1 in
    FAILED | SUSPEND*) echo "delete it (scripts/tpu_pod.sh delete $name) and create it again" ;;
    *) echo "wait for it (scripts/tpu_pod.sh status $name)" ;;
  esac
}

create() {
  [[ $type ]] || fail "create needs a --type, such as --type v5litepod-16" 2
  if [[ -z $runtime ]]; then
    # https://cloud.google.com/tpu/docs/runtimes
    case $type in
      v2-* | v3-* | v4-*) runtime=tpu-ubuntu2204-base ;;
      v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
      v5p-*) runtime=v2-alpha-tpuv5 ;;
      v6e-*) runtime=v2-alpha-tpuv6e ;;
      *) fail "no runtime version is known for $type: give --runtime-version (TPUs newer than v6e \
are on GKE only: see docs/guides/gke.md)" 2 ;;
    esac
  fi
  local nodes=("--node-id=$name")
  ((slices == 1)) || nodes=("--node-count=$slices" "--node-prefix=$name")
  step "creating $name" "check quota and zones of $type, and whether $name exists already" \
    create "$name" "${nodes[@]}" "--accelerator-type=$type" "--runtime-version=$runtime" \
    ${spot:+--spot}
  [[ -z $wait ]] || wait_until_active
}

wait_until_active() {
  local current=''
  [[ ! $dry_run ]] || { state && return; }
  while [[ $current != ACTIVE ]]; do
    current=$(state) || exit
    case $current in
      FAILED | SUSPEND*) fail "$name is $current: $(advice "$current")" ;;
      ACTIVE) ;;
      *) echo "$name is $current" && sleep "${TPU_POD_POLL_S:-30}" ;;
    esac
  done
  echo "$name is ACTIVE"
}

setup() {
  local root archive paths=() path
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  for path in gpipe_jax nas configs scripts pyproject.toml README.md; do
    [[ ! -e $root/$path ]] || paths+=("$path")
  done
  need_active
  archive=${XDG_CACHE_HOME:-$HOME/.cache}/gpipe-jax/clone.tgz
  if [[ ! $dry_run ]]; then
    mkdir -p "${archive%/*}"
    tar -czf "$archive" -C "$root" --exclude=__pycache__ "${paths[@]}" ||
      fail "cannot pack $root into $archive: check the free disk space"
  fi
  step "copying to $name" "$reach" scp "$archive" "$name:gpipe-jax.tgz" --worker=all --node=all
  step "unpacking on $name" "check the free disk space; $reach" \
    ssh "$name" --worker=all --node=all \
    --command='mkdir -p gpipe-jax && tar -xzf gpipe-jax.tgz -C gpipe-jax'
  on_every_host "installing on $name" "see the messages above, and check that hosts reach PyPI" setup
}

run() {
  local file=${config##*/}
  [[ $config ]] || fail "run needs a --config, such as --config configs/transformer_48.yaml" 2
  # gcloud takes a colon for a host, and a dash for an option
  check --config "$config" '[^-:[:cntrl:]][^:[:cntrl:]]*' 'a path without colons'
  check "the name of --config" "$file" '[A-Za-z0-9_][-A-Za-z0-9_.]*' 'letters, digits, _, - and .'
  [[ -f $config ]] || fail "there is no file $config: give the path of a config" 2
  step "copying $config to $name" "run setup first (scripts/tpu_pod.sh setup $name); $reach" \
    scp "$config" "$name:gpipe-jax/configs/$file.new" --worker=all --node=all
  on_every_host "starting the run on $name" \
    "exit code 2 means that the config is invalid; stop an active run \
(scripts/tpu_pod.sh stop $name)" start "configs/$file" ${overrides[@]+"${overrides[@]}"}
  [[ $dry_run ]] || echo "started; follow it with scripts/tpu_pod.sh logs $name --follow"
}

status() {
  local current
  if [[ $dry_run ]]; then
    state
  else
    current=$(state) || exit
    echo "$name is $current"
    [[ $current == ACTIVE ]] || { advice "$current" && return; }
  fi
  on_every_host "asking the hosts of $name" "run setup first (scripts/tpu_pod.sh setup $name)" status
}

logs() {
  on_every_host "reading the logs of $name" "a log exists after the first run" logs ${follow:+--follow}
}

stop() {
  on_every_host "stopping the run on $name" \
    "it may still be running (scripts/tpu_pod.sh status $name)" stop
}

delete() { # gcloud asks first, unless it is configured not to
  step "deleting $name" "check if it still exists (scripts/tpu_pod.sh status $name)" \
    delete "$name" --force
}

case ${1:-} in
  create | setup | run | status | logs | stop | delete)
    parse "$@"
    [[ $dry_run ]] || command -v gcloud >/dev/null ||
      fail "gcloud is not installed: install the Google Cloud CLI (https://cloud.google.com/sdk)"
    "$command"
    ;;
  help | --help | -h) usage ;;
  *) usage >&2 && fail "unknown command $(quoted "${1:-}")" 2 ;;
esac
