#!/usr/bin/env bash
# Several TPU slices in one run. Each holds a whole copy of the parameters, cut over its own chips, and between slices,
# over the data centre's network, only gradients are summed: `--mesh.replica` is a multiple of the slices (config.sh sets
# it), and the batch is shared by all. The verbs are those of tpu_queued.sh; on GKE: SLICES=2 bash runs/gke_xpk.sh.
#
#     SLICES=2 ACCELERATOR=v5litepod-64 bash runs/tpu_multislice.sh create
#
# https://docs.cloud.google.com/tpu/docs/multislice-introduction
set -euo pipefail
export SLICES=${SLICES:-2}
exec bash "$(dirname "$0")/tpu_queued.sh" "$@"
