"""Timelines: every form is read, no text is dropped, and each format is what other programs expect."""

import csv
import io
import itertools
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

import moss_audio_jax as moss
from moss_audio_jax.__main__ import main
from moss_audio_jax.errors import MossAudioError
from moss_audio_jax.timelines.prompts import PROMPTS
from moss_audio_jax.timelines.segment import Segment
from moss_audio_jax.timelines.timeline import Timeline, joined


def rows(timeline: Timeline) -> list[tuple[float, float | None, str]]:
    return [(segment.begin, segment.end, segment.text) for segment in timeline.segments]


# Reading

FORMS = {  # text -> segments, unread
    "": ([], []),
    " \n": ([], []),
    "Nobody speaks.": ([], ["Nobody speaks."]),
    # Times around texts, as the authors ask for.
    "[0.00]hello there[2.01][2.01]the weather[4.32]": [(0.0, 2.01, "hello there"), (2.01, 4.32, "the weather")],
    "[0.00]hello[0.31][0.35]there[0.80]": [(0.0, 0.31, "hello"), (0.35, 0.8, "there")],
    "[5.2]siren[1.9]": [(5.2, 1.9, "siren")],
    "[5.2]siren": [(5.2, None, "siren")],
    "[0.48][S01]Welcome.[1.66]\n[12.26][S02]你好。[13.81]": [
        (0.48, 1.66, "[S01]Welcome."),
        (12.26, 13.81, "[S02]你好。"),
    ],
    "[0:01.5]a[1:02]\n[1:00:03,25]b[1:00:04]": [(1.5, 62.0, "a"), (3603.25, 3604.0, "b")],
    "[1.5 s]a[2秒]": [(1.5, 2.0, "a")],
    "[0.00]of ages (5-10) and 3:15[2.0]": [(0.0, 2.0, "of ages (5-10) and 3:15")],
    "Sure!\n[1]a[2]\nThat is all.": ([(1.0, 2.0, "a")], ["Sure!", "That is all."]),
    "[1]a[2][3]cut o": [(1.0, 2.0, "a"), (3.0, None, "cut o")],
    "[1][2][3]a[4]": ([(3.0, 4.0, "a")], ["[1]", "[2]"]),
    "hello[2.0]": ([], ["hello", "[2.0]"]),
    # A thought is no answer.
    "<think>at [1]x[2]</think>[3]y[4]": ([(3.0, 4.0, "y")], ["<think>at [1]x[2]</think>"]),
    "<think>at [1]x[2]": ([], ["<think>at [1]x[2]"]),
    # Lists.
    "[00:12] hello\n[00:15] there": [(12.0, None, "hello"), (15.0, None, "there")],
    "[0.0-3.1]dog[3.5 – 4.0]cat": [(0.0, 3.1, "dog"), (3.5, 4.0, "cat")],
    "1. [0.0s-3.1s] a dog\n2. [4.0s-5.0s]: a cat": [(0.0, 3.1, "a dog"), (4.0, 5.0, "a cat")],
    "Two sounds:\n- **0:00 - 0:03**: a dog\n- **[0:05-0:10]:** a car\n\nThat is all.": (
        [(0.0, 3.0, "a dog"), (5.0, 10.0, "a car")],
        ["Two sounds:", "That is all."],
    ),
    "0.0s - 3.1s: dog\n(3.1 to 4) cat": [(0.0, 3.1, "dog"), (3.1, 4.0, "cat")],
    "0:05 - a dog\n0:15 - a cat": [(5.0, None, "a dog"), (15.0, None, "a cat")],
    "A dog: [0.0-3.1]\nA cat: [4-5]": [(0.0, 3.1, "A dog"), (4.0, 5.0, "A cat")],
    "A dog (0:00-0:03)\nA cat (0:04-0:05)": [(0.0, 3.0, "A dog"), (4.0, 5.0, "A cat")],
    "Two:\nA dog: [0-3]\nA cat: [4-5]\nDone.": ([(0.0, 3.0, "A dog"), (4.0, 5.0, "A cat")], ["Two:", "Done."]),
    "Cut off:\n[0-3] a dog\n[4-5]": ([(0.0, 3.0, "a dog")], ["Cut off:", "[4-5]"]),
    "[00:00-00:05]\ntext below\nand more": [(0.0, 5.0, "text below\nand more")],
    "[00:00-00:05]\n[00:05-00:06] b": ([(5.0, 6.0, "b")], ["[00:00-00:05]"]),
    # Numbers that are no times.
    "5-10 people, at 10:30": ([], ["5-10 people, at 10:30"]),
    "[1:75]a[99999999]": ([], ["[1:75]a[99999999]"]),
    # JSON.
    '[{"start": 0.0, "end": 3.1, "caption": "a dog"}, {"start": "0:04", "text": "a cat"}]': [
        (0.0, 3.1, "a dog"),
        (4.0, None, "a cat"),
    ],
    'Here:\n```json\n[{"begin": 1, "end": 2, "label": "a", "by": "B"}, {"x": [{"y": 1}]}]\n```\nDone.': (
        [(1.0, 2.0, "a")],
        ["Here:", '{"by": "B"}', '{"x": [{"y": 1}]}', "Done."],
    ),
    '[{"start": 1, "text": "a", "text": "b"}]': ([(1.0, None, "a")], ['{"text": "b"}']),
    '[{"start": NaN, "text": "a"}]': ([], ['[{"start": NaN, "text": "a"}]']),
    "[" * 2000: ([], ["[" * 2000]),
}


@pytest.mark.parametrize("text", FORMS, ids=lambda text: text[:30])
def test_every_form_is_read(text):
    expected = FORMS[text]
    segments, unread = expected if isinstance(expected, tuple) else (expected, [])
    timeline = Timeline.parse(text)
    assert rows(timeline) == segments
    assert list(timeline.unread) == unread


MARKS = ("[1.0]", "[2]", "[0:05]", "[1-2]", "(0:01-0:02)", "3s - 4s: ", "0:07 - ", "- ", "**", "[", "]", ":")
PIECES = ("\n", "\n\n", " ", "q", "w w", "你", "[S01]", "<think>", "</think>", "```", "{", "}", '"')
FRAGMENTS = st.sampled_from(MARKS + PIECES)


@settings(max_examples=1000)
@given(st.lists(FRAGMENTS).map("".join))
def test_no_text_is_dropped(text):
    timeline = Timeline.parse(text, seconds=3.0)
    kept = "".join([*(segment.text for segment in timeline.segments), *timeline.unread])
    letters = 'qw你S`{}"k'  # which no time is written with
    assert Counter(c for c in kept if c in letters) == Counter(c for c in text if c in letters)
    assert all(segment.text.strip() for segment in timeline.segments)
    for written in (timeline.to_txt(), timeline.to_csv(), timeline.to_srt(), timeline.to_vtt(), timeline.to_audacity()):
        assert isinstance(written, str)


TEXTS = st.text("ab 你.,'\"\t<>&", min_size=1).map(lambda text: " ".join(text.split())).filter(bool)
TIMES = st.integers(0, 4_000_000).map(lambda n: n / 1000)
SEGMENTS = st.lists(st.builds(Segment, TIMES, st.none() | TIMES, TEXTS)).map(tuple)


@given(SEGMENTS)
def test_what_is_written_is_read_back(segments):
    timeline = Timeline(segments, ("no time",) if segments else (), seconds=10.0)
    assert Timeline.parse(timeline.to_txt()).segments == segments
    assert Timeline.parse(timeline.to_txt()).unread == timeline.unread
    assert Timeline.from_json(json.loads(json.dumps(timeline.to_json()))) == timeline
    stamps = "".join(
        f"[{segment.begin}]{segment.text}[{segment.end}]" for segment in segments if segment.end is not None
    )
    assert Timeline.parse(stamps).segments == tuple(segment for segment in segments if segment.end is not None)


def test_times_that_cannot_be_right_are_named():
    timeline = Timeline.parse("[5.2]siren[1.9][4.0]dog[31.0][6]a[30.05]", seconds=30.0)
    assert timeline.problems == (
        "segment 1 (siren) ends before it begins: 5.20 s to 1.90 s",
        "segment 2 (dog) begins at 4.00 s, before the segment ahead of it, at 5.20 s",
        "segment 2 (dog) has the time 31.00 s, past the end at 30.00 s",
    )
    assert Timeline.parse("[1]a[200]").problems == ()


# Clocks


def test_parts_of_a_recording_are_joined():
    first = Timeline.parse("[0.0]a[2.0][9]b[12.0]", seconds=10.0)
    second = Timeline.parse("[1.0]c[2.0] hm", seconds=5.0).shifted(10.0)
    assert rows(second) == [(11.0, 12.0, "c")] and second.seconds == 15.0
    both = joined(first, second)
    assert rows(both) == [(0.0, 2.0, "a"), (9.0, 12.0, "b"), (11.0, 12.0, "c")]
    assert (both.seconds, both.unread) == (15.0, ("hm",))
    assert both.problems == ("segment 2 (b) has the time 12.00 s, past the end at 10.00 s",)
    assert joined() == Timeline(())


def test_problems_move_with_the_clock_and_others_stay():
    timeline = Timeline.parse("[5.2]siren[1.9]", seconds=4.0)
    moved = Timeline(timeline.segments, (), (*timeline.problems, "the answer was cut off"), 4.0).shifted(60.0)
    assert moved.problems == (
        "segment 1 (siren) ends before it begins: 65.20 s to 61.90 s",
        "segment 1 (siren) has the time 65.20 s, past the end at 64.00 s",
        "the answer was cut off",
    )


# Formats

SAID = Timeline(
    (
        Segment(3661.5, 3662.0015, "[S02]one\n\ntwo --> <i>&"),
        Segment(0.0, 2.0104, '[S01]你好,\t"world"'),
        Segment(5.2, 1.9, "siren"),
        Segment(7.0, None, "click"),
        Segment(8.0, 8.0001, "tick"),
    ),
    unread=("Sure!",),
)


def test_srt():
    assert SAID.to_srt() == (
        '1\n00:00:00,000 --> 00:00:02,010\n[S01]你好, "world"\n\n'
        "2\n00:00:05,200 --> 00:00:06,200\nsiren\n\n"
        "3\n00:00:07,000 --> 00:00:08,000\nclick\n\n"
        "4\n00:00:08,000 --> 00:00:09,000\ntick\n\n"
        "5\n01:01:01,500 --> 01:01:02,002\n[S02]one two → <i>&\n"
    )
    assert Timeline(()).to_srt() == ""
    assert "100:00:00,000 --> " in Timeline((Segment(360000.0, None, "a"),)).to_srt()


def test_vtt():
    assert SAID.to_vtt() == (
        'WEBVTT\n\n00:00:00.000 --> 00:00:02.010\n<v S01>你好, "world"\n\n'
        "00:00:05.200 --> 00:00:06.200\nsiren\n\n"
        "00:00:07.000 --> 00:00:08.000\nclick\n\n"
        "00:00:08.000 --> 00:00:09.000\ntick\n\n"
        "01:01:01.500 --> 01:01:02.002\n<v S02>one two --&gt; &lt;i&gt;&amp;\n"
    )
    assert Timeline(()).to_vtt() == "WEBVTT\n"


def test_csv_and_tsv():
    with_newlines = SAID.to_csv().splitlines(keepends=True)
    assert with_newlines[0] == "begin,end,text\r\n" and with_newlines[4:] == [
        '0.00,2.0104,"[S01]你好,\t""world"""\r\n',
        "5.20,1.90,siren\r\n",
        "7.00,,click\r\n",
        "8.00,8.0001,tick\r\n",
    ]
    assert [row[2] for row in csv.reader(with_newlines)][1:] == [segment.text for segment in SAID.segments]
    assert SAID.to_tsv() == (
        'begin\tend\ttext\n3661.50\t3662.0015\t[S02]one two --> <i>&\n0.00\t2.0104\t[S01]你好, "world"\n'
        "5.20\t1.90\tsiren\n7.00\t\tclick\n8.00\t8.0001\ttick\n"
    )


def test_audacity():
    assert SAID.to_audacity() == (
        '0.000000\t2.010400\t[S01]你好, "world"\n1.900000\t5.200000\tsiren\n7.000000\t7.000000\tclick\n'
        "8.000000\t8.000100\ttick\n3661.500000\t3662.001500\t[S02]one two --> <i>&\n"
    )


def test_txt_and_json():
    assert SAID.to_txt() == (
        '[3661.50-3662.0015] [S02]one two --> <i>&\n[0.00-2.0104] [S01]你好, "world"\n[5.20-1.90] siren\n'
        "[7.00] click\n[8.00-8.0001] tick\n\nSure!\n"
    )
    assert Timeline(()).to_txt() == ""
    assert Timeline.parse("<think>hm</think>[1]a[2] ok").to_txt() == "<think>hm</think>\n\n[1.00-2.00] a\n\nok\n"
    timeline = Timeline.parse("[0.5][S01]a[0.8][5.2]siren", seconds=4.0)
    assert timeline.to_json() == {
        "seconds": 4.0,
        "segments": [
            {"begin": 0.5, "end": 0.8, "text": "[S01]a", "speaker": "S01"},
            {"begin": 5.2, "end": None, "text": "siren", "speaker": None},
        ],
        "unread": [],
        "problems": ["segment 2 (siren) has the time 5.20 s, past the end at 4.00 s"],
    }


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {},
        {"segments": 3},
        {"segments": [{"begin": 1, "text": 3}]},
        {"segments": [{"begin": None, "text": "a"}]},
        {"segments": [{"begin": float("nan"), "text": "a"}]},
        {"segments": [], "seconds": "4"},
        {"segments": [], "unread": 5},
    ],
    ids=str,
)
def test_other_json_is_refused(value):
    with pytest.raises(MossAudioError, match=r"a timeline in JSON must be as Timeline\.to_json writes it"):
        Timeline.from_json(value)


def test_the_package_exports_it():
    assert moss.Timeline is Timeline


# Pictures


def sound(seconds: float) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, round(seconds * 16000)).astype(np.float32)


def said(seconds: float, length: float, words: int) -> Timeline:
    """Segments of `length` s without a break, each of as many words."""
    rng, text = np.random.default_rng(1), []
    for begin in np.arange(0.0, seconds, length):
        spoken = " ".join("x" * rng.integers(1, 10) for _ in range(words))
        text.append(f"[{begin:.2f}]{spoken} $[{min(begin + length, seconds):.2f}]")
    return Timeline.parse("".join(text), seconds)


def shown(figures: list[Any]) -> str:
    """The texts of all segments, line by line."""
    return " ".join(text.get_text() for figure in figures for axes in figure.axes[2::3] for text in axes.texts)


PICTURED = {
    "few": (8.0, Timeline.parse("[1.0]a dog[3.0][2.0]a very long bark of a dog[2.1][7.9]the end is near[8.0]")),
    "words": (45.0, said(45.0, 0.4, 1)),
    "sentences": (130.0, said(130.0, 4.0, 12)),
    "at once": (10.0, Timeline(tuple(Segment(5.0, 5.5, f"sound {number}") for number in range(12)))),
    "unspaced": (10.0, Timeline.parse(f"[1.0]{'你好' * 100}[3.0][2.0]{'y' * 300}[3.0]")),
}


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("name", PICTURED)
def test_every_text_is_drawn_and_none_over_another(name):
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from moss_audio_jax.timelines.picture import draw_pages

    seconds, timeline = PICTURED[name]
    figures = draw_pages(sound(seconds), timeline)
    texts = Counter(shown(figures).replace(" ", ""))
    for letter, count in Counter("".join(segment.text for segment in timeline.segments).replace(" ", "")).items():
        assert texts[letter] >= count  # more if a segment is in two rows
    for figure in figures:
        figure.set_dpi(150)
        renderer = FigureCanvasAgg(figure).get_renderer()
        assert figure.get_size_inches()[1] < 32
        for axes in figure.axes[2::3]:
            boxes = [text.get_window_extent(renderer) for text in axes.texts]
            bars = [bar.get_window_extent(renderer) for bar in axes.patches]
            edge = figure.bbox.width
            assert boxes and all(box.x0 >= 0 and box.x1 <= edge for box in boxes)
            for one, other in itertools.combinations(boxes, 2):
                assert not overlap(one, other)
            assert not any(overlap(box, bar) for box in boxes for bar in bars)


def overlap(one: Any, other: Any, pixels: float = 2.0) -> bool:
    """True if two boxes share more than the space around letters."""
    return min(one.x1, other.x1) - max(one.x0, other.x0) > pixels and min(one.y1, other.y1) - max(one.y0, other.y0) > 4


def test_bars_points_and_notes():
    pytest.importorskip("matplotlib")
    from moss_audio_jax.timelines.picture import draw_pages

    text = "Sure: [1]dog[3][6.0]siren[5.0][30]late[31][7.5]click"
    (figure,) = draw_pages(sound(8.0), Timeline.parse(text, 8.0), title="a clip")
    wave, mel, segments = figure.axes
    across = segments.get_xlim()[1]
    bars = [(bar.get_x() / across * 8, bar.get_width() / across * 8, bar.get_hatch()) for bar in segments.patches]
    assert [(round(left, 6), round(width, 6), bool(hatch)) for left, width, hatch in bars] == [
        (1.0, 2.0, False),
        (5.0, 1.0, True),
    ]
    (point,) = [line for line in segments.lines if line.get_marker() == "v"]
    assert point.get_xdata()[0] / across * 8 == pytest.approx(7.5)
    assert [text.get_text() for text in segments.texts] == ["dog", "siren", "click"]
    assert [text.get_text() for text in figure.texts] == [
        "a clip",
        "seconds",
        "past the end, at 30.00 s: late",
        "not read: Sure:",
    ]
    assert mel.images[0].get_extent() == [0, 8.0, 0, 128] and wave.get_xlim() == mel.get_xlim() == (0, 8.0)


def test_what_there_is_no_room_for_is_counted():
    pytest.importorskip("matplotlib")
    from moss_audio_jax.timelines.picture import draw_pages

    (figure,) = draw_pages(sound(2.0), Timeline(tuple(Segment(1.0, 1.1, "again and again") for _ in range(500))))
    texts = [text.get_text() for text in figure.axes[2].texts]
    assert texts[-1] == f"and {500 - len(texts) + 1} more here, for which there is no room"
    (figure,) = draw_pages(sound(2.0), Timeline(()))
    assert [text.get_text() for text in figure.axes[2].texts] == ["no segment"]


def test_a_long_clip_has_rows_and_pages(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("moss_audio_jax.pictures.DOTS_PER_INCH", 40)
    from moss_audio_jax.timelines.picture import plot_timeline

    wave, timeline = sound(95.0), Timeline.parse("[0]intro[50.0][61.0]你[62.0]", 95.0)
    few = plot_timeline(tmp_path / "few.png", wave, timeline)
    assert [path.name for path in few.paths] == ["few.png"]
    assert few.missing in ("", "你")
    many = plot_timeline(tmp_path / "many.png", wave, timeline, row_seconds=5.0)
    assert [path.name for path in many.paths] == ["many-1.png", "many-2.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["few.png", "many-1.png", "many-2.png"]
    with pytest.raises(MossAudioError, match=r"row_seconds must be 0\.5 or more, not 0\.1"):
        plot_timeline(tmp_path / "a.png", wave, timeline, row_seconds=0.1)


# The command


@pytest.fixture
def clip(tmp_path) -> Path:
    soundfile.write(tmp_path / "clip.wav", sound(8.0), 16000)
    return tmp_path / "clip.wav"


@pytest.fixture
def answer(tmp_path) -> Path:
    (tmp_path / "answer.txt").write_text("Sure: [0.5][S01]Hello.[1.0][2.0]你好[1.5][9.0]late", "utf-8")
    return tmp_path / "answer.txt"


def called(*arguments: Any, monkeypatch, capsys) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `moss-audio timeline`."""
    monkeypatch.setattr(sys, "argv", ["moss-audio", "timeline", *map(str, arguments)])
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


def test_an_answer_is_converted(answer, clip, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    ends = (".json", ".srt", ".vtt", ".csv", ".tsv", ".txt", ".audacity.txt")
    files = [tmp_path / f"out{end}" for end in ends]
    options = ("--out", *files, "--plot", tmp_path / "out.png")
    code, out, err = called(answer, clip, *options, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0
    assert out == "begin   end  text\n 0.50  1.00  [S01]Hello.\n 2.00  1.50  你好\n 9.00        late\n"
    lines = err.splitlines()
    assert lines[:3] == [
        "[not read, for it has no time: Sure:]",
        "[segment 2 (你好) ends before it begins: 2.00 s to 1.50 s]",
        "[segment 3 (late) has the time 9.00 s, past the end at 8.00 s]",
    ]
    timeline = Timeline.parse(answer.read_text("utf-8"), 8.0)
    assert json.loads(files[0].read_text("utf-8")) == timeline.to_json()
    written = [file.read_bytes().decode() for file in files[1:]]
    assert written == [
        timeline.to_srt(),
        timeline.to_vtt(),
        timeline.to_csv(),
        timeline.to_tsv(),
        timeline.to_txt(),
        timeline.to_audacity(),
    ]
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    # The JSON is an answer too, and no clip is needed.
    code, again, err = called(files[0], monkeypatch=monkeypatch, capsys=capsys)
    assert (code, again) == (0, out) and err.splitlines() == lines[:3]


def test_an_answer_comes_from_a_pipe(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\ufeffNobody.".encode())))
    code, out, err = called("-", monkeypatch=monkeypatch, capsys=capsys)
    assert (code, out) == (0, "")
    assert err == "[not read, for it has no time: Nobody.]\n[the answer holds no text with a time]\n"


def test_a_checkpoint_is_asked(released, clip, tmp_path, monkeypatch, capsys):
    """Random weights: no answer has times, and all of it is reported and kept."""
    options = ("--max-new-tokens", 5, "--out", tmp_path / "a.json", "--ask", "words")
    code, out, err = called(released, clip, *options, monkeypatch=monkeypatch, capsys=capsys)
    assert (code, out) == (0, "")
    written = json.loads((tmp_path / "a.json").read_text("utf-8"))
    assert written["segments"] == [] and written["seconds"] == 8.0
    inputs = (processor := moss.load_processor(released))(PROMPTS["words"], str(clip))
    ids = moss.generate(moss.load_model(released), inputs, max_new_tokens=5)
    assert written["unread"] == [processor.decode(ids[0]).strip()]
    assert "[the answer was not finished: it was cut off after --max-new-tokens 5; give more of them]" in err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("{answer}", "--out", "{tmp}/a.doc"), "--out must end in one of .audacity.txt, .csv, .json, .srt, "),
        (("{answer}", "{clip}", "--plot", "{tmp}/a.jpg"), "--plot must end in .png, not be a.jpg: rename it"),
        (("{answer}", "--plot", "{tmp}/a.png"), "--plot must have a clip to draw: give it after the answer"),
        (("{answer}", "--prompt", "?"), "--prompt and --adapter must be given with a checkpoint, not with an answer"),
        (("{tmp}", "{clip}", "--prompt", ""), "--prompt must not be empty"),
        (("{tmp}",), "a clip must be given after the checkpoint"),
        (("{clip}", "{clip}"), "{clip} must be a checkpoint's directory or the text of an answer in UTF-8"),
        (("{tmp}/absent", "{clip}"), "{tmp}/absent"),
        (("{answer}", "{tmp}/absent.wav"), "{tmp}/absent.wav"),
        (("{answer}", "{answer}"), "{answer}"),
        (("{answer}", "--out", "{tmp}/absent/a/../b.srt", "{tmp}/b.xyz"), "--out must end in one of"),
        (("{answer}", "--out", "{answer}/a.srt"), "{answer}/a.srt must be a file that can be written"),
        (("{answer}", "{clip}", "--plot", "{tmp}/a.png", "--row-seconds", "0"), "--row-seconds must be 0.5 or more"),
    ],
    ids=str,
)
def test_mistakes_are_one_sentence_and_nothing_is_written(
    arguments, sentence, answer, clip, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("matplotlib")
    places = {"tmp": tmp_path, "answer": answer, "clip": clip}
    before = sorted(tmp_path.rglob("*"))
    given = [argument.format(**places) for argument in arguments]
    code, out, err = called(*given, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2 and not out
    assert err.startswith("error: ") and sentence.format(**places) in err and err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_picture_without_matplotlib_names_the_extra(answer, clip, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    options = ("--plot", tmp_path / "a.png")
    code, _, err = called(answer, clip, *options, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2
    assert err == "error: plots need matplotlib, which is not installed: pip install 'moss-audio-jax[plot]'\n"


def test_a_long_run_of_spaces_takes_no_time():
    begun = time.process_time()
    (segment,) = Timeline.parse(f"a{' ' * 100_000}b : [0.0-3.1]").segments
    assert segment.text.split() == ["a", "b"] and time.process_time() - begun < 2
