#!/usr/bin/env bash
# One run of jaxft on Cloud TPU VMs, through queued resources: one slice or several.
#
#   NAME=llama ZONE=us-west4-a TYPE=v5litepod-16 BUCKET=gs://my-bucket tpu/vm.sh up configs/llama3.1-8b-lora.yaml
#
#   create             ask for the machines and wait until they are there
#   install            copy this checkout to every machine and install it
#   launch CONFIG [KEY=VALUE]...   start the run on every machine (the same command resumes it)
#   watch              follow the log of the first machine
#   status             state of the machines, and of the run on each
#   stop               SIGTERM: all processes save the same step and end
#   resume CONFIG [KEY=VALUE]...   what the run needs to go on: new machines if they were taken away, a new start if not
#   supervise CONFIG [KEY=VALUE]...   resume until the run is finished, looking once a minute
#   collect [DIRECTORY]   copy logs and reports here
#   delete             give the machines back
#   up CONFIG [KEY=VALUE]...   create, install, launch
set -euo pipefail

: "${NAME:?name of the queued resource}" "${ZONE:?zone, such as us-west4-a}"
TYPE=${TYPE:-v5litepod-16}         # accelerator type of a slice
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite} # TPU software version that belongs to it
SLICES=${SLICES:-1}
SPOT=${SPOT:-0}                    # 1: spot machines, which may be taken away at any time
PROJECT=${PROJECT:-}
BUCKET=${BUCKET:-}                 # gs://..., where checkpoints go: all machines must see it, and it outlives them
PYTHON_VERSION=${PYTHON_VERSION:-3.12}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

qr() {
  local verb=$1
  shift
  gcloud compute tpus queued-resources "$verb" "$@" --zone="$ZONE" ${PROJECT:+--project="$PROJECT"}
}

everywhere() { qr ssh "$NAME" --node=all --worker=all --command="$1"; }
first() { qr ssh "$NAME" --node=0 --worker=0 --command="$1"; }
state() { qr describe "$NAME" --format='value(state.state)' 2>/dev/null || echo ABSENT; }

create() {
  local nodes=(--node-id="$NAME") spot=()
  ((SLICES == 1)) || nodes=(--node-count="$SLICES" --node-prefix="$NAME")
  ((SPOT == 0)) || spot=(--spot)
  qr create "$NAME" "${nodes[@]}" --accelerator-type="$TYPE" --runtime-version="$RUNTIME" ${spot[@]+"${spot[@]}"}
  local now
  until now=$(state) && [[ $now == ACTIVE ]]; do
    echo "$(date +%T) $NAME is $now"
    [[ $now != FAILED && $now != SUSPENDED && $now != ABSENT ]] || return 1
    sleep 30
  done
}

install() {
  local archive
  archive=$(mktemp --suffix=.tar.gz)
  git -C "$here" archive --format=tar.gz --output="$archive" HEAD
  qr scp "$archive" "$NAME:jaxft.tar.gz" --node=all --worker=all
  rm -f "$archive"
  everywhere "set -e; rm -rf jaxft; mkdir jaxft; tar -xzf jaxft.tar.gz -C jaxft
    command -v ~/.local/bin/uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
    test -d jaxft-env || ~/.local/bin/uv venv --quiet --python $PYTHON_VERSION jaxft-env
    ~/.local/bin/uv pip install --quiet --python jaxft-env/bin/python './jaxft[tpu]'
    jaxft-env/bin/jaxft --version"
}

launch() {
  (($# >= 1)) || { echo "launch: which CONFIG?" >&2; return 2; }
  : "${BUCKET:?gs:// address for checkpoints}"
  local quoted
  quoted=$(printf '%q ' "$@")
  # The exit code is kept: 0 finished, 2 an error that will come again, anything else can be resumed.
  everywhere "cd jaxft || exit 1; rm -f ~/jaxft.exit; setsid nohup bash -c \
    '~/jaxft-env/bin/jaxft train $quoted output=\$HOME/run checkpoint.directory=$BUCKET/$NAME & \
     echo \$! > ~/jaxft.pid; wait \$!; echo \$? > ~/jaxft.exit' >> ~/jaxft.log 2>&1 < /dev/null &"
}

watch() { first "tail -n 40 -F jaxft.log"; }

status() {
  echo "machines: $(state)"
  everywhere 'echo "$(hostname): $(if test -f jaxft.exit; then echo "ended with $(cat jaxft.exit)"; else
    kill -0 "$(cat jaxft.pid)" 2>/dev/null && echo running || echo "not started"; fi)"'
}

stop() { everywhere 'kill -TERM "$(cat jaxft.pid)"'; }

resume() {
  local now
  now=$(state)
  if [[ $now != ACTIVE ]]; then
    echo "$NAME is $now: asking for new machines"
    [[ $now == ABSENT ]] || delete
    create
    install
  fi
  launch "$@"
}

supervise() {
  local code
  while true; do
    if [[ $(state) != ACTIVE ]]; then
      resume "$@" || sleep 60
      continue
    fi
    code=$(first 'cat jaxft.exit 2>/dev/null || true' 2>/dev/null || true)
    case ${code//[[:space:]]/} in
      "") ;; # running, or the machine does not answer just now
      0) echo "finished"; return 0 ;;
      2) echo "an error that will come again:" >&2; first 'tail -n 20 jaxft.log'; return 2 ;;
      *) echo "$(date +%T) ended with $code: resuming"; resume "$@" ;;
    esac
    sleep 60
  done
}

collect() {
  local to=${1:-$here/outputs/$NAME}
  mkdir -p "$to"
  qr scp "$NAME:run" "$to" --recurse --node=0 --worker=0
  qr scp "$NAME:jaxft.log" "$to" --node=0 --worker=0
  echo "logs and reports are in $to, checkpoints in ${BUCKET:-the bucket}/$NAME"
}

delete() { qr delete "$NAME" --force --quiet; }

up() { create && install && launch "$@"; }

case ${1:-} in
  create | install | launch | watch | status | stop | resume | supervise | collect | delete | up) "$@" ;;
  *) sed -n '2,18p' "${BASH_SOURCE[0]}"; exit 2 ;;
esac
