# What is rented and what runs on it, for the scripts beside this file, which source it. Change it here or outside:
#
#     export PROJECT=my-project ZONE=us-west4-a BUCKET=gs://my-bucket
#     bash runs/tpu_vm.sh create
#
# shellcheck shell=bash disable=SC2034 # the scripts use what is set here

need() { # VARIABLE EXAMPLE MEANING
    if [[ -z ${!1:-} ]]; then
        echo "error: $1 is not set: export $1=$2 ($3)" >&2
        exit 2
    fi
}
need PROJECT my-project "the Google Cloud project that pays"
need ZONE us-west4-a "a zone that has this TPU: gcloud compute tpus locations list"
need BUCKET gs://my-bucket "of Cloud Storage, in the zone's region: data, checkpoints, compiled programs"

NAME=${NAME:-moss}              # of what is rented, and of the run
RECIPE=${RECIPE:-finetune_lora} # docs/training.md has them all
MODEL=${MODEL:-$BUCKET/moss-8b} # what `moss-audio-convert to-orbax` wrote, copied there
DATA=${DATA:-$BUCKET/shards}    # what `moss-audio-train prepare` wrote, or a manifest
SLICES=${SLICES:-1}             # TPUs in one run, each with a whole copy of the parameters: tpu_multislice.sh, gke_xpk.sh
SPOT=${SPOT:-}                  # yes: spare capacity, which costs less and may be taken away at any time
REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# The run: the same on every host, and the same again after a preemption, when it resumes from its newest checkpoint.
# `run` of each script appends what it is given, so: bash runs/tpu_vm.sh run --optimizer.total-steps 2000
RUN=$BUCKET/runs/$NAME
TRAIN=(
    env "JAX_COMPILATION_CACHE_DIR=$BUCKET/compiled"
    moss-audio-train run
    --recipe "$RECIPE"
    --out "$RUN"
    --model.checkpoint "$MODEL"
    --mixture.conversations.paths "$DATA"
    --mesh.replica "$SLICES"
    --workers 8
)
