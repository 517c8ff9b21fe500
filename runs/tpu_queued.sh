#!/usr/bin/env bash
# Queued resources, the older way to a TPU of any size, and the way to v5e pods: a request that waits for its turn. With
# SLICES above 1 it asks for that many at once, for one run (tpu_multislice.sh).
#
#     for verb in create install run; do bash runs/tpu_queued.sh $verb; done
#     bash runs/tpu_queued.sh logs     # also: status, stop
#     bash runs/tpu_queued.sh delete   # it costs until then
#
# After a preemption (`status` says SUSPENDED): delete, create, install, run; the run resumes from its newest checkpoint.
# https://docs.cloud.google.com/tpu/docs/queued-resources
set -euo pipefail
source "$(dirname "$0")/config.sh"
source "$(dirname "$0")/hosts.sh"

ACCELERATOR=${ACCELERATOR:-v5litepod-16}     # gcloud compute tpus accelerator-types list --zone=$ZONE
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}      # v6e: v2-alpha-tpuv6e; v5p: v2-alpha-tpuv5
DISTRIBUTED=(--distributed)
place=("--project=$PROJECT" "--zone=$ZONE")
nodes=(--node-id="$NAME")
if [[ $SLICES -gt 1 ]]; then nodes=(--node-count="$SLICES" --node-prefix="$NAME"); fi

create() {
    gcloud compute tpus queued-resources create "$NAME" "${place[@]}" "${nodes[@]}" \
        --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" \
        --scopes=https://www.googleapis.com/auth/cloud-platform ${SPOT:+--spot}
    local state=""
    until [[ $state == ACTIVE ]]; do # may take long: Ctrl-C leaves the request in the queue, and `status` shows it
        state=$(status)
        echo "$state"
        if [[ $state == FAILED || $state == SUSPENDED ]]; then
            echo "error: the request ended as $state: see gcloud compute tpus queued-resources describe $NAME ${place[*]}" >&2
            exit 1
        fi
        if [[ $state != ACTIVE ]]; then sleep 30; fi
    done
}
status() { gcloud compute tpus queued-resources describe "$NAME" "${place[@]}" --format='value(state.state)'; }
copy() { gcloud compute tpus queued-resources scp "$1" "$NAME:" "${place[@]}" --node=all --worker=all; }
on_hosts() { gcloud compute tpus queued-resources ssh "$NAME" "${place[@]}" --node=all --worker=all --command="$1"; }
delete() { gcloud compute tpus queued-resources delete "$NAME" "${place[@]}" --force --quiet; }

verb "$@"
