#!/usr/bin/env bash
# A run of jaxft on machines that ssh reaches, without a scheduler; one process a machine, the first is the coordinator.
#
#   HOSTS="10.0.0.2 10.0.0.3" DIRECTORY=/shared/jaxft tpu/nodes.sh launch configs/llama3.1-8b-lora.yaml
#
#   launch CONFIG [KEY=VALUE]... | watch | status | stop
# DIRECTORY is a checkout with an environment in .venv, at the same place on every machine. `launch` again resumes.
set -euo pipefail

: "${HOSTS:?addresses of the machines}" "${DIRECTORY:?checkout of jaxft on them}"
PORT=${PORT:-8476}
read -ra hosts <<<"$HOSTS"

launch() {
  (($# >= 1)) || { echo "launch: which CONFIG?" >&2; return 2; }
  local quoted i
  quoted=$(printf '%q ' "$@")
  for i in "${!hosts[@]}"; do
    ssh "${hosts[$i]}" "cd $DIRECTORY || exit 1; setsid nohup .venv/bin/jaxft train $quoted --coordinator ${hosts[0]}:$PORT \
      --processes ${#hosts[@]} --process-id $i >> jaxft-$i.log 2>&1 < /dev/null & echo \$! > jaxft-$i.pid" &
  done
  wait
}

each() { # the word I in the command is the number of the machine
  local i
  for i in "${!hosts[@]}"; do
    echo "== ${hosts[$i]}"
    ssh "${hosts[$i]}" "cd $DIRECTORY || exit 1; ${1//I/$i}" || true
  done
}

watch() { ssh "${hosts[0]}" "tail -n 40 -F $DIRECTORY/jaxft-0.log"; }
status() { each 'kill -0 $(cat jaxft-I.pid) && echo running; tail -n 2 jaxft-I.log'; }
stop() { each 'kill -s TERM $(cat jaxft-I.pid)'; }

case ${1:-} in
  launch | watch | status | stop) "$@" ;;
  *) sed -n '2,8p' "${BASH_SOURCE[0]}"; exit 2 ;;
esac
