"""JSON out of a checkpoint is an object of one meaning, or is refused in a sentence that names the file."""

import json
import os

import pytest

from moss_audio_jax import MossAudioError
from moss_audio_jax.storage.json_files import MAX_DEPTH, parse_json, read_json


def nested(levels: int) -> bytes:
    return b'{"a":' * levels + b"{}" + b"}" * levels


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "can't be read as JSON"),
        (b"", "can't be read as JSON"),
        (b"[1]", "must hold a JSON object, but holds a list"),
        (b'{"a": "\xff"}', "byte 7 is not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (b'{"a": 1, "b": 2, "a": 3}', "'a' stands in it more than once"),
        (b'{"x": {"a": 1, "a": 1}}', "'a' stands in it more than once"),
        (b"[" * 200_000, "nested too deeply"),
        (nested(MAX_DEPTH), f"more than {MAX_DEPTH} levels"),
        (b'{"a": ' + b"9" * 5000 + b"}", "an integer of thousands of digits"),
        (b'{"a": "\\ud800"}', "half of a surrogate pair"),
    ],
)
def test_what_is_not_one_object_is_refused(content, message, tmp_path):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(MossAudioError, match=message) as error:
        read_json(file)
    assert str(error.value).startswith(str(file)) and "\n" not in str(error.value)


def test_what_checkpoints_hold_is_read():
    content = {"a": [{"b": None}], "model_max_length": 10**30, "é": "\U0001f600", "list": list(range(1000))}
    for text in (json.dumps(content), json.dumps(content, ensure_ascii=False)):
        assert parse_json(text.encode()) == content
    assert parse_json(nested(MAX_DEPTH - 1))


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(MossAudioError, match="must be a file"):
        read_json(tmp_path / "config.json")
    with pytest.raises(MossAudioError, match="must be a file"):
        read_json(tmp_path)
    with pytest.raises(MossAudioError, match="No such file"):
        read_json(tmp_path / "absent.json")


def test_a_file_of_absurd_size_is_not_read(tmp_path):
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(MossAudioError, match="1,099,511,627,776 bytes"):
        read_json(tmp_path / "config.json")
