#!/usr/bin/env bash
# A run of jaxft on GKE through XPK (pip install xpk), which makes the cluster and writes the JobSet.
#
#   CLUSTER=tuning NAME=llama TYPE=v5litepod-16 ZONE=us-west4-a PROJECT=my-project BUCKET=gs://my-bucket \
#     IMAGE=us-docker.pkg.dev/my-project/jaxft/jaxft:latest tpu/xpk.sh launch configs/llama3.1-8b-lora.yaml
#
#   create | launch CONFIG [KEY=VALUE]... | watch | list | stop | delete
# To resume, launch again under the same NAME after `stop`: the checkpoints are in the bucket.
set -euo pipefail

: "${CLUSTER:?name of the cluster}" "${PROJECT:?project}" "${ZONE:?zone}"
TYPE=${TYPE:-v5litepod-16}
SLICES=${SLICES:-1}
where=(--cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE")

create() { xpk cluster create "${where[@]}" --tpu-type="$TYPE" --num-slices="$SLICES"; }

launch() {
  : "${NAME:?name of the run}" "${IMAGE:?image built from tpu/Dockerfile}" "${BUCKET:?gs:// address for checkpoints}"
  (($# >= 1)) || { echo "launch: which CONFIG?" >&2; return 2; }
  # 75: another process was lost, 134: JAX noticed first, 143: told to stop. All resume from the latest checkpoint.
  xpk workload create "${where[@]}" --workload="$NAME" --tpu-type="$TYPE" --num-slices="$SLICES" \
    --docker-image="$IMAGE" --max-restarts=20 --restart-on-exit-codes=75,134,143 \
    --command="jaxft train $(printf '%q ' "$@") output=/tmp/run checkpoint.directory=$BUCKET/$NAME mesh.dcn=$SLICES"
}

watch() { kubectl logs --follow --selector="jobset.sigs.k8s.io/jobset-name=${NAME:?name of the run}" --tail=20 --max-log-requests=64; }
list() { xpk workload list "${where[@]}"; }
stop() { xpk workload delete "${where[@]}" --workload="${NAME:?name of the run}"; }
delete() { xpk cluster delete "${where[@]}"; }

case ${1:-} in
  create | launch | watch | list | stop | delete) "$@" ;;
  *) sed -n '2,9p' "${BASH_SOURCE[0]}"; exit 2 ;;
esac
