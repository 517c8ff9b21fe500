#!/usr/bin/env bash
# The way of a released checkpoint through this port, in small: written, converted, verified, asked, converted back.
# Then a small model learns from nothing to say what is heard and when. Run by `make demo`; each command works the same
# on a released MOSS-Audio directory. Needs no network and no accelerator.
set -euo pipefail
out=${1:-demo-out}
# What step 8 is expected to print, by docs/training.md; another machine or another version of JAX rounds differently.
expected="F1 93 to 99%, onset about 27 ms, offset 28 to 77 ms"
rm -rf "$out"
mkdir -p "$out"

step() { printf '\n== %s\n' "$1"; }

step "1. A small checkpoint in the released layout (random weights, a tokenizer of bytes), and a clip of sound"
moss-audio-convert rehearse --preset tiny "$out/released"
python - "$out/clip.wav" <<'PYTHON'
import sys
import numpy as np
import soundfile

rate, seconds = 44100, 9.3
time = np.arange(int(rate * seconds)) / rate
sweep = 0.3 * np.sin(2 * np.pi * (200 * time + 60 * time**2))  # 200 Hz rising to 1.3 kHz
clicks = (np.modf(time)[0] < 0.005) * np.random.default_rng(0).normal(0, 0.3, time.shape)
soundfile.write(sys.argv[1], np.stack([sweep + clicks, sweep], axis=1), rate)
print(f"wrote {sys.argv[1]}: {seconds} s, stereo, {rate} Hz")
PYTHON

step "2. To Orbax: what a TPU mesh restores from"
moss-audio-convert to-orbax "$out/released" "$out/orbax"

step "3. Nothing changed: every tensor compared"
moss-audio-convert verify "$out/released" "$out/orbax" --no-torch

step "4. What it is made of"
moss-audio info "$out/orbax" | grep -E 'encoder:|language model:|: sum|^all'

step "5. A question about the clip (the weights are random, so the answer is noise: released weights make it text)"
moss-audio generate "$out/orbax" "$out/clip.wav" --prompt "Transcribe the audio." --max-new-tokens 40

step "6. Back to the released layout, and compared with the original bit by bit"
moss-audio-convert to-hf "$out/orbax" "$out/back"
cmp "$out/released/model.safetensors" "$out/back/model.safetensors"
echo "model.safetensors is byte-identical to the original"

step "7. A small MOSS-Audio is trained from scratch on generated sound scenes, to name sounds and their times"
# glibc would give every step's buffers back to the system and fetch them again, page by page.
MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_MMAP_THRESHOLD_=4000000000 \
    moss-audio-train run --recipe time_events --out "$out/time_events" --log-every 40

moss-audio-train plot "$out/time_events" --plot "$out/training.png"

step "8. Its answers about 200 held-out scenes"
moss-audio-train evaluate "$out/time_events" --scenes 200 --seed 1000 \
    --scenes.seconds 8 8 --scenes.events 1 4 --max-new-tokens 64 --batch-size 25 \
    --json "$out/measures.json" --predictions "$out/predictions.jsonl" --plot "$out/timelines.png"
echo "expected: $expected"
echo "some of its answers, each below the truth:"
head -n 4 "$out/predictions.jsonl" | python -c '
import json, sys
for line in map(json.loads, sys.stdin):
    print("  true     ", line["reference"])
    print("  predicted", line["prediction"])'
echo "$out/timelines.png shows four of them, with all six sounds: spectrogram, truth, prediction"
echo "$out/training.png shows the loss and the learning rate"

step "9. The trained model in the released layout, for PyTorch"
moss-audio-convert to-hf "$out/time_events" "$out/time_events-hf"
