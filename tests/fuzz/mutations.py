"""Small damages to a file, by its kind: bytes, JSON, safetensors. Each is drawn from a `random.Random` alone."""

import json
import random
from collections.abc import Callable
from typing import Any

OUTSIDE = "outside"  # a directory beside each checkpoint, which nothing may open
NAMES = (
    f"../{OUTSIDE}/model.safetensors",
    f"../{OUTSIDE}",
    f"../../{OUTSIDE}/params",
    f"x/../../{OUTSIDE}/config.json",
    "..",
    ".",
    "/etc/hostname",
    "/dev/zero",
    "~/x",
    "file:///etc/hostname",
    "a/b",
    "con\\x",
    "model.safetensors",
    "x" * 300,
)
# Values as JSON writes them, among them what Python reads and JSON forbids.
NUMBERS = (
    *("0", "1", "-1", "2", "3", "5", "7", "8", "16", "64", "510", "511", "512", "1.0", "2.0", "0.5", "-0.0", "1e-45"),
    *("1e-400", "1e308", "1e999", "-1e999", "NaN", "Infinity", "-Infinity", "1e18", "99999", "1048576"),
    *(str(2**power + add) for power in (31, 32, 63, 64, 128) for add in (-1, 0)),
    *("-2147483649", "-9223372036854775809", "9" * 400, "1" + "0" * 5000, "-" + "7" * 4301),
)
TEXTS = (
    *(
        '""',
        '" "',
        '"x"',
        '"0"',
        '"1"',
        '"-1"',
        '"1.5"',
        '"null"',
        '"\\ud800"',
        '"\\udfff x"',
        '"\\u0000"',
        '"\\u00e9"',
    ),
    *('"\\u0130"', '"(a+)+$"', '"(.*.*)*x"', '"("', '"[a-"', '"\\\\p{L}+"', '".*"', '"<|im_end|>"', '"<|im_start|>"'),
    *('"all-linear"', '"int64"', '"F32"', '"bfloat16"', '"np.ndarray"', '"jax.Array"', '"LORA"', '"None"', '"a b"'),
    *(json.dumps(name) for name in NAMES),
    '"' + "y" * 70_000 + '"',
)
OTHERS = (
    *("null", "true", "false", "[]", "{}", "[[]]", "[null]", "[0]", "[1.5]", "[true]", '["x"]', "[2147483648]", "[-1]"),
    *('{"a": 1}', '{"content": null}', '{"content": "x", "special": 1}', '{"": {"": []}}', "[[0, 8], [0, 8]]"),
    *("[" * 50 + "]" * 50, "[" * 990 + "]" * 990, "[" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000),
    "[" + "0," * 5000 + "0]",
)
VALUES = (NUMBERS, NUMBERS, TEXTS, OTHERS)  # how often each kind is drawn
KEYS = ("eos_token_id", "head_dim", "rope_parameters", "n_window", "temperature", "top_p", "top_k", "weight_map")
KEYS += ("added_tokens_decoder", "use_ocdbt", "step", "evaluated", "type", "pattern", "special", "content", "")
_HOLE = "\ufff0hole"

Mutation = Callable[[random.Random, bytes], bytes]


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """One to three changes of single bytes or stretches."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(data) + 1)
        to = min(len(data), at + rng.choice((1, 1, 2, 4, 8, 100)))
        other = data[rng.randrange(len(data) + 1) :][: rng.choice((1, 4, 16))]
        data = rng.choice(
            (
                lambda a=at, t=to, d=data: d[:a] + d[t:],
                lambda a=at, d=data: d[:a],
                lambda a=at, t=to, d=data: d[:a] + d[a:t] * 2 + d[t:],
                lambda a=at, d=data, o=other: d[:a] + o + d[a + len(o) :],
                lambda a=at, d=data, r=rng: d[:a] + r.randbytes(r.choice((1, 1, 2, 8))) + d[a + 1 :],
                lambda a=at, d=data, r=rng: (
                    d[:a] + bytes([d[a] ^ 1 << r.randrange(8)]) + d[a + 1 :] if a < len(d) else d
                ),
                lambda a=at, d=data, r=rng: (
                    d[:a] + r.choice((b"\xff", b"\x00" * 8, b"\xff" * 8, b'"', b"{", b"\n")) + d[a:]
                ),
            )
        )()
    return data


def mutate_encoding(rng: random.Random, data: bytes) -> bytes:
    """Another encoding of a text, nothing, or rubbish in its place."""
    return rng.choice(
        (
            lambda: b"\xef\xbb\xbf" + data,
            lambda: data.decode("utf-8", "replace").encode("utf-16"),
            lambda: data.decode("utf-8", "replace").encode("utf-32"),
            lambda: b"",
            lambda: b"null",
            lambda: b"[]",
            lambda: b"\x00" * 64,
            lambda: b"<!DOCTYPE html><html></html>",
            lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
            lambda: data + data,
            lambda: data.replace(b"\n", b"\r\n"),
            lambda: b"[" * 200_000,
        )
    )()


def mutate_json(rng: random.Random, data: bytes) -> bytes:
    """One or two keys or values are replaced, removed, doubled, renamed or swapped."""
    root = json.loads(data)
    raw: list[str] = []
    for _ in range(rng.choice((1, 1, 1, 2))):
        _change(rng, root, raw)
    text = json.dumps(root, ensure_ascii=rng.random() < 0.5)
    for number, value in enumerate(raw):
        hole = f"{_HOLE}{number}"
        for spelled in (json.dumps(hole), json.dumps(hole, ensure_ascii=False)):
            text = text.replace(spelled, value)
    return text.encode("utf-8", "surrogatepass")


def _change(rng: random.Random, root: Any, raw: list[str]) -> None:
    """Changes a container in place; a value of VALUES is left as a hole, and appended to `raw`."""
    containers = [found for found in _containers(root) if found]
    if not containers:
        return
    # Deep ones outnumber the others.
    node = rng.choice(containers[: rng.choice((1, 4, len(containers)))])
    key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
    action = rng.random()
    if action < 0.65:
        raw.append(rng.choice(rng.choice(VALUES)))
        node[key] = f"{_HOLE}{len(raw) - 1}"
    elif action < 0.72:
        del node[key]
    elif action < 0.79:
        other = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        node[key], node[other] = node[other], node[key]
    elif action < 0.86:
        other_node = rng.choice(containers)
        node[key] = json.loads(
            json.dumps(rng.choice(list(other_node.values() if isinstance(other_node, dict) else other_node)))
        )
    elif action < 0.93 or not isinstance(node, dict):
        raw.append(rng.choice(rng.choice(VALUES)))
        hole = f"{_HOLE}{len(raw) - 1}"
        if isinstance(node, dict):
            node[rng.choice((*KEYS, *NAMES))] = hole
        else:
            node.insert(key, hole)
    elif action < 0.97:
        node[rng.choice((*KEYS, *NAMES, f"{key}x", "\ud800", "9" * 30, "-1", "1.5"))] = node.pop(key)
    else:  # the same key twice
        raw.append(json.dumps(key) + ": " + json.dumps(node[key]) + ", " + json.dumps(key))
        node[f"{_HOLE}{len(raw) - 1}"] = node.pop(key)


def _containers(node: Any) -> list[Any]:
    """Breadth first."""
    found = [node]
    for container in found:
        inside = container.values() if isinstance(container, dict) else container
        found += [value for value in inside if isinstance(value, (dict, list))]
    return found


def mutate_safetensors(rng: random.Random, data: bytes) -> bytes:
    """The header as JSON, its length, or any byte."""
    length = int.from_bytes(data[:8], "little")
    header, tensors = data[8 : 8 + length], data[8 + length :]
    kind = rng.random()
    if kind < 0.7:
        header = mutate_json(rng, header)
        header += b" " * (-len(header) % 8)
        return len(header).to_bytes(8, "little") + header + tensors
    if kind < 0.8:
        wrong = rng.choice((0, 1, length - 1, length + 1, len(data), 2**31, 2**63, 2**64 - 1, 100_000_001))
        return max(wrong, 0).to_bytes(8, "little") + data[8:]
    if kind < 0.9:
        header = mutate_bytes(rng, header)
        return len(header).to_bytes(8, "little") + header + tensors
    return mutate_bytes(rng, data)


def mutate_lines(rng: random.Random, data: bytes) -> bytes:
    """merges.txt: lines are removed, doubled, swapped or replaced."""
    lines = data.split(b"\n")
    at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    odd = (
        b"a",
        b"a b c",
        b" ",
        b"\xc4\xa0 \xc4\xa0",
        b"zz yy",
        b"\xff \xfe",
        b"a\xc2\x85b c",
        b"\xe2\x80\xa8 x",
        b"a\tb",
        b"#version: 1",
    )
    kind = rng.randrange(4)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines[at], lines[other] = lines[other], lines[at]
    elif kind == 2:
        lines.insert(at, lines[other])
    else:
        lines[at] = rng.choice(odd)
    return b"\n".join(lines)


# How often each is drawn for a kind of file.
JSON_FILE: tuple[Mutation, ...] = (mutate_json,) * 8 + (mutate_bytes, mutate_encoding)
BINARY_FILE: tuple[Mutation, ...] = (mutate_bytes,) * 9 + (mutate_encoding,)
LINES_FILE: tuple[Mutation, ...] = (mutate_lines,) * 6 + (mutate_bytes, mutate_bytes, mutate_encoding)
SAFETENSORS_FILE: tuple[Mutation, ...] = (mutate_safetensors,) * 9 + (mutate_encoding,)
