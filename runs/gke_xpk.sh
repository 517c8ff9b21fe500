#!/usr/bin/env bash
# On Google Kubernetes Engine, by xpk (pip install xpk; it needs gcloud and kubectl): a cluster with SLICES slices, on
# which any number of runs may queue. Kubernetes starts the run again after a preemption, by itself.
#
#     bash runs/gke_xpk.sh create   # the cluster, once
#     bash runs/gke_xpk.sh run      # what is committed here, on every host
#     bash runs/gke_xpk.sh logs     # also: status; stop, which saves first
#     bash runs/gke_xpk.sh delete   # the cluster: it costs until then
#
# https://github.com/AI-Hypercomputer/xpk/tree/main/docs/usage
set -euo pipefail
source "$(dirname "$0")/config.sh"

TPU=${TPU:-v6e-64}                          # as xpk names them, with the chips or cores: v5litepod-16, v5p-128
CLUSTER=${CLUSTER:-moss-cluster}
place=("--cluster=$CLUSTER" "--project=$PROJECT" "--zone=$ZONE")
if [[ -n $SPOT ]]; then CAPACITY=--spot; else CAPACITY=--on-demand; fi

case ${1:-} in
create)
    xpk cluster create "${place[@]}" --tpu-type="$TPU" --num-slices="$SLICES" "$CAPACITY"
    ;;
run)
    shift
    committed=$(mktemp -d)
    git -C "$REPO" archive HEAD | tar -x -C "$committed"
    # Exit code 75 is `moss-audio-train run` preempted, or another host lost: begin again, from the newest checkpoint.
    # xpk sends SIGTERM to the shell of the command, which `exec` makes the run itself.
    xpk workload create "${place[@]}" --workload="$NAME" --tpu-type="$TPU" --num-slices="$SLICES" \
        --base-docker-image=python:3.12 --script-dir="$committed" \
        --max-restarts=50 --restart-on-exit-codes=75 --termination-grace-period-seconds=300 \
        --command="pip install --quiet -e .[tpu] && exec $(printf '%q ' "${TRAIN[@]}" --distributed "$@")"
    ;;
status)
    xpk workload list "${place[@]}" --filter-by-job="$NAME"
    ;;
logs)
    kubectl logs --selector="xpk.google.com/workload=$NAME" --prefix --tail=40
    echo "a line for every step: gcloud storage cat $RUN/metrics.jsonl"
    ;;
stop)
    xpk workload delete "${place[@]}" --workload="$NAME"
    ;;
delete)
    xpk cluster delete "${place[@]}"
    ;;
*)
    echo "error: bash $0 create | run [OPTION ...] | status | logs | stop | delete, not ${1:-nothing}" >&2
    exit 2
    ;;
esac
