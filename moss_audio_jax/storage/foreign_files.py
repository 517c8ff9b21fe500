"""Recognizes files that were given by mistake, by their first bytes: a Git LFS pointer, a web page, a sound."""

import re
from collections.abc import Callable

from moss_audio_jax.storage.paths import AnyPath, to_path

SOUND = "a sound, not the file that was asked for"

_HEAD_BYTES = 512
_HEADS: tuple[tuple[Callable[[bytes], bool], str], ...] = (
    (
        lambda head: head.startswith(b"version https://git-lfs.github.com/spec/"),
        "a pointer of Git LFS, not the file itself: run `git lfs pull` in its repository, or fetch it with "
        "`hf download`",
    ),
    (
        lambda head: re.match(rb"\s*<(!doctype\s+html|html|head|\?xml)", head, re.IGNORECASE) is not None,
        "a web page, not the file itself: fetch it again with `hf download`, after `hf auth login` if it is gated",
    ),
    (
        lambda head: head.startswith((b"Entry not found", b"Access to model", b"Invalid username or password")),
        "the answer of a server that refused the file: fetch it again with `hf download`",
    ),
    (
        lambda head: head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")),
        "a pickle of PyTorch, which is never read here: save the model with `save_pretrained` as safetensors",
    ),
    (lambda head: head.startswith(b"GGUF"), "of llama.cpp (GGUF), which this port does not read: fetch safetensors"),
    (
        lambda head: head.startswith((b"ID3", b"fLaC", b"OggS")) or (head[:4] == b"RIFF" and head[8:12] == b"WAVE"),
        SOUND,
    ),
)


def foreign_content(file: AnyPath) -> str:
    """Says what a file is and what to do, if its first bytes show that it is not what was asked for; else empty."""
    try:
        with to_path(file).open("rb") as opened:
            head = opened.read(_HEAD_BYTES)
    except OSError:
        return ""
    return next((what for matches, what in _HEADS if matches(head)), "")
