"""Engine without a model, whose answers depend on the words of the question."""

import threading
from collections.abc import Sequence

from moss_audio_jax import MossAudioError, Processor
from moss_audio_jax.inference.requests import Handle, Prompt, Request
from moss_audio_jax.inputs import Mel, encode_sequence

SENTENCES = "[0.40][S01]Good morning.[1.30][1.90][S02]Is it <b>on</b>?[2.90][3.40][S01]It is.[4.40]"
# Words of a question, and the pieces of its answer; the first whose words are there.
ANSWERS = {
    "sentence-level": [SENTENCES],
    "word-level": ["[0.00]Good[0.40]", "[0.50]morning.[0.90]"],
    "Transcribe the audio.": ["Good morning. ", "Is it on?"],
    "List the sounds": ["[0.50]tone[1.30]", "[2.00]tone[2.80][3.50]tone[4.30]"],
    "backwards": ["[2.00]hum[1.00]", "[3.00]end"],
    "many": ["".join(f"[{0.01 * number:.2f}]hum[{0.01 * number + 0.01:.2f}]" for number in range(400))],
    "think": ["<think>Hm, a tone.", "</think>", "A tone."],
    "": ["<i>A</i> ", "tone."],
}


class CannedEngine:
    """Takes the place of an Engine in a Service.

    go_on: until it is set, answers to questions with "slowly" stop after their first piece, as do transcripts without
    times. handles: of all answers.
    """

    slots, max_length, closed, busy, waiting = 3, 100_000, None, 0, 0

    def __init__(self, processor: Processor):
        self._processor = processor
        self.go_on = threading.Event()
        self.handles: list[Handle] = []

    def submit(self, request: Request) -> Handle:
        return self._answer(request, request.asked)

    def submit_ids(self, request: Request, ids: Sequence[int], mels: Sequence[Mel]) -> Handle:
        return self._answer(request, self._processor.tokenizer.decode(ids).rpartition("user\n")[2])

    def _answer(self, request: Request, question: str) -> Handle:
        config, tokenizer = self._processor.config, self._processor.tokenizer
        handle = Handle(request, Prompt(encode_sequence([0], [], config)), tuple(config.eos_ids), tokenizer)
        self.handles.append(handle)
        pieces = next(pieces for words, pieces in ANSWERS.items() if words in question)
        threading.Thread(target=self._write, args=(handle, question, pieces), daemon=True).start()
        return handle

    def _write(self, handle: Handle, question: str, pieces: Sequence[str]) -> None:
        first, *rest = pieces
        self._feed(handle, first)
        if "slowly" in question or question == "Transcribe the audio.":
            self.go_on.wait(20)
        if "crash" in question:
            handle.finish("cancelled", MossAudioError("the engine has failed: restart the server"))
        for piece in rest:
            self._feed(handle, piece)
        handle.feed([self._processor.config.eos_ids[0]], [0.0], last=True)

    def _feed(self, handle: Handle, text: str) -> None:
        ids = self._processor.tokenizer.encode(text)
        handle.feed(ids, [0.0] * len(ids), last=False)

    def close(self) -> None: ...
