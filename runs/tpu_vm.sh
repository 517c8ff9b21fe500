#!/usr/bin/env bash
# One TPU VM, with all chips on one host: by default a v5e of 8 chips, on which LoRA of the 8B fits (docs/tpu.md).
#
#     for verb in create install run; do bash runs/tpu_vm.sh $verb; done
#     bash runs/tpu_vm.sh logs     # also: status, stop
#     bash runs/tpu_vm.sh delete   # it costs until then
#
# After a preemption (`status` says PREEMPTED): delete, create, install, run; the run resumes from its newest checkpoint.
# https://docs.cloud.google.com/sdk/gcloud/reference/compute/tpus/tpu-vm
set -euo pipefail
source "$(dirname "$0")/config.sh"
source "$(dirname "$0")/hosts.sh"

ACCELERATOR=${ACCELERATOR:-v5litepod-8}      # gcloud compute tpus accelerator-types list --zone=$ZONE
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}      # v6e: v2-alpha-tpuv6e; v5p: v2-alpha-tpuv5
DISTRIBUTED=()
place=("--project=$PROJECT" "--zone=$ZONE")

create() {
    gcloud compute tpus tpu-vm create "$NAME" "${place[@]}" --accelerator-type="$ACCELERATOR" --version="$RUNTIME" \
        --scopes=https://www.googleapis.com/auth/cloud-platform ${SPOT:+--spot}
}
status() { gcloud compute tpus tpu-vm describe "$NAME" "${place[@]}" --format='value(state)'; }
copy() { gcloud compute tpus tpu-vm scp "$1" "$NAME:" "${place[@]}" --worker=all; }
on_hosts() { gcloud compute tpus tpu-vm ssh "$NAME" "${place[@]}" --worker=all --command="$1"; }
delete() { gcloud compute tpus tpu-vm delete "$NAME" "${place[@]}" --quiet; }

verb "$@"
