#!/usr/bin/env bash
# A slice of a pod as a managed instance group of Compute Engine, the way for v5p, v6e and TPU7x. For v5e, which Compute
# Engine does not offer, there are tpu_vm.sh, tpu_queued.sh and gke_xpk.sh.
#
#     for verb in create install run; do bash runs/tpu_mig.sh $verb; done
#     bash runs/tpu_mig.sh logs     # also: status, stop
#     bash runs/tpu_mig.sh delete   # it costs until then
#
# All VMs of a slice come and go together. After a preemption: delete, create, install, run.
# https://docs.cloud.google.com/compute/docs/tpus/create-tpu-mig-multi-host-slice
# https://docs.cloud.google.com/tpu/docs/spot-compute
set -euo pipefail
source "$(dirname "$0")/config.sh"
source "$(dirname "$0")/hosts.sh"

MACHINE=${MACHINE:-ct6e-standard-4t}        # v6e with 4 chips a host; v5p: ct5p-hightpu-4t
TOPOLOGY=${TOPOLOGY:-8x8}                   # chips; v5p: such as 4x4x4
IMAGE_FAMILY=${IMAGE_FAMILY:-ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e}
DISTRIBUTED=(--distributed)
region=${ZONE%-*}
per_host=${MACHINE##*-}
hosts=$((${TOPOLOGY//x/*} / ${per_host%t}))
place=("--project=$PROJECT" "--zone=$ZONE")

# How the capacity is had; leave it empty for on demand. Flex-start, for up to 7 days: --provisioning-model=FLEX_START
# --max-run-duration=7d --instance-termination-action=DELETE. A reservation: --provisioning-model=RESERVATION_BOUND
# --reservation-affinity=specific --reservation=ITS_NAME --instance-termination-action=DELETE.
CAPACITY=()
if [[ -n $SPOT ]]; then CAPACITY=(--provisioning-model=SPOT --instance-termination-action=STOP); fi

create() {
    # How the chips are connected.
    gcloud compute resource-policies create workload-policy "$NAME" --project="$PROJECT" --region="$region" \
        --type=HIGH_THROUGHPUT --accelerator-topology="$TOPOLOGY" --accelerator-topology-mode=AUTO_CONNECT
    # What one host is.
    gcloud compute instance-templates create "$NAME" --project="$PROJECT" --machine-type="$MACHINE" \
        --image-project=ubuntu-os-accelerator-images --image-family="$IMAGE_FAMILY" --boot-disk-size=200GB \
        --maintenance-policy=TERMINATE --scopes=https://www.googleapis.com/auth/cloud-platform "${CAPACITY[@]}"
    # All hosts at once, or none until there are enough.
    gcloud compute instance-groups managed create "$NAME" "${place[@]}" --template="$NAME" --size="$hosts" \
        --target-size-policy-mode=bulk --default-action-on-vm-failure=do-nothing \
        --workload-policy="projects/$PROJECT/regions/$region/resourcePolicies/$NAME"
    gcloud compute instance-groups managed wait-until "$NAME" "${place[@]}" --stable
}
status() { gcloud compute instance-groups managed list-instances "$NAME" "${place[@]}"; }
instances() { gcloud compute instance-groups managed list-instances "$NAME" "${place[@]}" --format='value(instance.basename())'; }
copy() { each_host copy_to "$1"; }
on_hosts() { each_host run_on "$1"; }
copy_to() { gcloud compute scp "$2" "$1:" "${place[@]}"; }
run_on() { gcloud compute ssh "$1" "${place[@]}" --command="$2"; }
delete() {
    gcloud compute instance-groups managed delete "$NAME" "${place[@]}" --quiet
    gcloud compute instance-templates delete "$NAME" --project="$PROJECT" --quiet
    gcloud compute resource-policies delete "$NAME" --project="$PROJECT" --region="$region" --quiet
}

each_host() { # FUNCTION ARGUMENT: for all hosts at once
    local names host process processes=() failed=0
    names=$(instances)
    for host in $names; do
        "$1" "$host" "$2" &
        processes+=($!)
    done
    for process in "${processes[@]}"; do wait "$process" || failed=$((failed + 1)); done
    if [[ $failed -gt 0 || ${#processes[@]} -ne $hosts ]]; then
        echo "error: it failed on $failed of ${#processes[@]} hosts, and there should be $hosts: see bash $0 status" >&2
        exit 1
    fi
}

verb "$@"
