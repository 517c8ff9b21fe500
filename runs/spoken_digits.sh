#!/usr/bin/env bash
# Real speech with times: a small model is trained from scratch to transcribe strings of spoken digits, with the start
# and end of every word. Two runs: with the data set's own test recordings left out, and with one speaker left out too.
# Ends with a table of both and a picture. docs/speech.md has the figures. Needs two CPU cores for three quarters of an hour.
#
#   runs/spoken_digits.sh [OUT [DATA [STEPS]]]
#
# DATA: a clone of the Free Spoken Digit Dataset (CC BY-SA 4.0), which is fetched if it is not there.
# STEPS: a shorter training, to try the script.
set -euo pipefail
out=${1:-digits-out}
data=${2:-$out/free-spoken-digit-dataset}
steps=${3:-}
speaker=theo
mkdir -p "$out"

step() { printf '\n== %s\n' "$1"; }

if [ ! -d "$data" ]; then
    step "The recordings: six people, each of ten digits fifty times"
    git clone --depth 1 https://github.com/Jakobovski/free-spoken-digit-dataset "$data"
fi

step "Test strings: of the test recordings of all speakers, and of all recordings of $speaker"
scenes() { # scenes OUT GLOB: 300 strings of the recordings that match
    [ -e "$out/$1/manifest.jsonl" ] || moss-audio-train scenes "$out/$1" --count 300 --seed 1000 \
        --scenes.clips "$data/recordings" --scenes.clips-only "$2" --scenes.label-from '{label}_{voice}_*' \
        --scenes.label-names 0=zero 1=one 2=two 3=three 4=four 5=five 6=six 7=seven 8=eight 9=nine \
        --scenes.clips-except 7_theo_36.wav 9_theo_16.wav \
        --scenes.seconds 2 12 --scenes.events 1 8 --scenes.pause 0.05 0.7 \
        --scenes.level-db -18 -3 --scenes.background-db -60 -40 --scenes.tasks words
}
scenes test '*_[0-4].wav'
scenes unseen "*_${speaker}_*.wav"

# glibc would give every step's buffers back to the system and fetch them again, page by page.
export MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_MMAP_THRESHOLD_=4000000000
train() { # train RUN [OPTION...]
    moss-audio-train run --recipe spoken_digits --out "$out/$1" --mixture.clips "$data/recordings" --log-every 100 \
        ${steps:+--optimizer.total-steps "$steps" --optimizer.warmup-steps 1 --optimizer.decay-steps 1} "${@:2}"
}
evaluate() { # evaluate RUN TEST
    moss-audio-train evaluate "$out/$1" --data "$out/$2/manifest.jsonl" --objectives transcribe_words \
        --max-new-tokens 160 --batch-size 25 --json "$out/$1-$2.json" --plot "$out/$1-$2.png" | tail -n 1 >"$out/$1-$2.txt"
}

step "Training on all speakers"
train all_speakers
evaluate all_speakers test

step "Training without $speaker"
train "without_$speaker" --mixture.clips-except "*_${speaker}_*"
evaluate "without_$speaker" test
evaluate "without_$speaker" unseen

step "Words and times"
for result in all_speakers-test "without_$speaker-test" "without_$speaker-unseen"; do
    printf '%-24s %s\n' "$result" "$(sed 's/.*transcribe_words *//' "$out/$result.txt")"
done
echo "$out/all_speakers-test.png shows four of the strings: spectrogram, truth, answer"
