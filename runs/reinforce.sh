#!/usr/bin/env bash
# From labelled clips to a better model by reward: a small model is trained from scratch until it answers some of the
# questions about times that the labels know the answers to, then `reinforce` trains it by the rewards of its answers.
# Ends with both evaluations and curves. docs/reinforce.md has the figures. Took 24 minutes on one CPU core.
#
#   runs/reinforce.sh [OUT [STEPS]]
#
# STEPS: shorter trainings, to try the script.
set -euo pipefail
out=${1:-reward-out}
steps=${2:-}
mkdir -p "$out"

step() { printf '\n== %s\n' "$1"; }

step "Labelled clips: what sounds in them, and when"
scenes() { # scenes OUT COUNT SEED
    [ -e "$out/$1/manifest.jsonl" ] || moss-audio-train scenes "$out/$1" --count "$2" --seed "$3" \
        --scenes.seconds 4 4 --scenes.events 1 2
}
scenes labelled 4000 1
scenes test 400 2

# glibc would give every step's buffers back to the system and fetch them again, page by page.
export MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_MMAP_THRESHOLD_=4000000000

step "Supervised: timelines, and among them one in five a question about times"
moss-audio-train run --recipe time_events --out "$out/start" --steps "${steps:-200}" \
    --mixture.timelines.paths "$out/labelled/manifest.jsonl" --mixture.timelines.objectives events \
    --mixture.timelines.share 0.8 \
    --mixture.questions.paths "$out/labelled/manifest.jsonl" --mixture.questions.objectives time_qa \
    --mixture.questions.share 0.2 \
    --mixture.easy-scenes.share 0 --mixture.scenes.share 0 --mixture.full-scenes.share 0 \
    --optimizer.schedule cosine --optimizer.total-steps 10000 --optimizer.final-fraction 1

step "By reward: questions about times alone"
moss-audio-train reinforce --recipe reward_times --out "$out/rewarded" --init "$out/start" --rewards correct=1 \
    --data "$out/labelled/manifest.jsonl" --questions.objectives time_qa --questions.scenes 0 \
    --eval-data "$out/test/manifest.jsonl" --validation.objectives time_qa \
    ${steps:+--optimizer.total-steps "$steps" --optimizer.warmup-steps 1}

step "The same test, before and after"
for run in start rewarded; do
    echo "$run"
    moss-audio-train evaluate "$out/$run" --data "$out/test/manifest.jsonl" --objectives time_qa \
        --max-new-tokens 8 --batch-size 200 --json "$out/$run.json" | tail -n 3
done
moss-audio-train plot "$out/rewarded" --plot "$out/rewarded.png"
