"""Thoughts are told from answers, however an answer is cut into pieces."""

import pytest

from moss_audio_jax.inference.thinking import HAND_OVER, STOP_THINKING, Piece, ThoughtPrinter, ThoughtSplitter


def split(text: str, size: int, opened: bool) -> tuple[str, str]:
    splitter = ThoughtSplitter(opened)
    pieces = [piece for start in range(0, len(text), size) for piece in splitter.feed(text[start : start + size])]
    pieces += splitter.flush()
    assert all(piece.text for piece in pieces)
    reasoning, told = ("".join(p.text for p in pieces if p.kind == kind) for kind in ("reasoning", "text"))
    return reasoning, told


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("<think>\nA dog?\n\nNo.\n</think>\n\nA cat.\n", False, ("A dog?\n\nNo.", "A cat.\n")),
        ("A dog?\n</think>\n\nA cat.", True, ("A dog?", "A cat.")),
        (" \n<think></think>A cat.", False, ("", "A cat.")),
        ("<think>\n\n</think>\n\n", False, ("", "")),
        ("<think>a < b </thin> c", False, ("a < b </thin> c", "")),
        ("<think>cut </th", False, ("cut </th", "")),
        ("<thin", False, ("", "<thin")),
        ("  A cat. <think>no</think>", False, ("", "  A cat. <think>no</think>")),
        ("", False, ("", "")),
        (f"<think>\nA dog? {HAND_OVER}A cat.", False, (f"A dog? {STOP_THINKING}", "A cat.")),
        ("<think>So</think>.5 s", False, ("So", ".5 s")),
    ],
)
def test_split(text, opened, expected, size):
    assert split(text, size, opened) == expected


@pytest.mark.parametrize(
    ("shown", "dim", "expected"),
    [
        ("show", True, "\x1b[2m<think>\nA dog? No.\n</think>\x1b[0m\n\nA cat."),
        ("show", False, "<think>\nA dog? No.\n</think>\n\nA cat."),
        ("hide", True, "A cat."),
        ("only", True, "A dog? No."),
    ],
)
def test_print(shown, dim, expected):
    printer = ThoughtPrinter(shown, dim)
    pieces = [Piece("reasoning", "A dog?"), Piece("reasoning", " No."), Piece("text", "A "), Piece("text", "cat.")]
    assert "".join(map(printer.feed, pieces)) + printer.flush() == expected
    plain = ThoughtPrinter(shown, dim)
    assert "".join(map(plain.feed, pieces[2:])) + plain.flush() == ("" if shown == "only" else "A cat.")
