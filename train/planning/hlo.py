"""Collectives, matmuls and HBM traffic of a compiled program, read from the text of its optimized HLO.

What is in a loop counts once per iteration (XLA's own cost analysis counts the body once). On TPU an all-gather
may be compiled to an all-reduce over zeros; it is reported as an all-reduce. Between slices there is no collective in
the program of one slice: it sends to and receives from Megascale on its host, and the instruction names Megascale's
operation.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2}
_BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "f8e4m3fn": 1, "f8e5m2": 1}
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<shape>.+?) (?P<opcode>[a-z][a-z\-]*)\((?P<rest>.*)$")
_ARRAY = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations)=(?:\{([^}]*)\}|%?([\w.\-]+))")
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_PARTITIONS = re.compile(r"\bnum_partitions=(\d+)")
_TRANSFER = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_TARGET = re.compile(r'_xla_megascale_target="\{([^}]*)\}')
_CONSTANT = re.compile(r"s32\[\]\S* constant\((\d+)\)")


@dataclass(frozen=True)
class Collective:
    """One collective instruction.

    payload: bytes on one device: the result of an all-gather, the operand of a reduce-scatter; for other kinds operand
        and result have the same size.
    devices: size of a group. times: executions per run of the program. shapes: of the results.
    groups: of devices that exchange with each other, as positions in the mesh.
    between_slices: over the data-center network; `devices` then counts slices.
    """

    kind: str
    name: str
    shapes: tuple[str, ...]
    payload: float
    devices: int
    times: int
    groups: tuple[tuple[int, ...], ...] = ()
    between_slices: bool = False

    @property
    def sent(self) -> float:
        """Bytes that a device sends per run with ring algorithms; an all-reduce goes around twice."""
        rounds = {"all-reduce": 2.0, "collective-permute": 1.0}.get(self.kind, 1.0)
        share = 1.0 if self.kind == "collective-permute" else (self.devices - 1) / self.devices
        return self.times * rounds * share * self.payload


def collectives(hlo: str, devices: int) -> list[Collective]:
    """Returns all collectives of a program.

    devices: size of the mesh, for instructions without groups. The program's own `num_partitions` (the devices of its
        slice) takes precedence.
    """
    if stated := _PARTITIONS.search(hlo[: hlo.find("\n")]):
        devices = int(stated[1])
    found: list[Collective] = []
    moved: set[tuple[str, int]] = set()
    for _, operation, times in _executed(dict(_computations(hlo))):
        kind = _kind(operation)
        if kind == "send" and _TRANSFER.search(operation["rest"]):
            found.append(_between_slices(operation, times))
        if kind in KINDS:
            # A collective overlapped with matmuls is in each fusion that advances it, with the same channel.
            channel = _CHANNEL.search(operation["rest"])
            if channel is None or (channel[1], times) not in moved:
                found.append(_collective(operation, kind, devices, times))
            if channel is not None:
                moved.add((channel[1], times))
    return found


def matmul_flops(hlo: str) -> float:
    """Returns FLOPs of the matmuls and convolutions that a device executes, 2 per multiply-add.

    On TPU a matmul is a convolution, which may have a window that touches one element at each position. A kernel
    (splash attention) is a custom call, in which nothing is counted.
    """
    computations = dict(_computations(hlo))
    total = 0
    for name, operation, times in _executed(computations):
        if operation["opcode"] in ("dot", "convolution"):
            shapes = {other["name"]: _dimensions(other["shape"]) for other in computations[name][1]}
            # Operands: `%a, %b` or, with their shapes, `f32[2,3]{1,0} %a, f32[3]{0} %b`.
            left, right, *_ = (shapes[operand] for operand in re.findall(r"%([\w.\-]+)", operation["rest"])[:2])
            count = _dot if operation["opcode"] == "dot" else _convolution
            total += times * 2 * count(operation["rest"], left, right, _dimensions(operation["shape"]))
    return float(total)


def hbm_bytes_in_loops(hlo: str) -> float:
    """Returns bytes that the loops of a TPU program read from and write to HBM, each instruction once.

    Arrays in a core's own memory, which have a memory space in their layout, don't count. A gather counts the rows that
    it returns, any other instruction its whole operands, also where it reads a part of them.
    """
    computations = dict(_computations(hlo))
    inlined = set(re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", hlo))
    total = 0.0
    for name, (is_entry, operations) in computations.items():
        if is_entry or name in inlined:
            continue
        shapes = {operation["name"]: operation["shape"] for operation in operations}
        for operation in operations:
            opcode, rest = operation["opcode"], operation["rest"]
            if opcode in _MOVING_NOTHING or opcode.endswith("-done"):
                continue
            fused = re.search(r"calls=%?([\w.\-]+)", rest)
            gathers = fused is not None and any(part["opcode"] == "gather" for part in computations[fused[1]][1])
            read = [] if gathers else [shapes.get(operand, "") for operand in _operands(rest)]
            written = [] if opcode.endswith("-start") else [operation["shape"]]
            total += sum(_bytes_of(_IN_HBM.findall(shape)) for shape in [*read, *written] if shape[:1] != "(")
    return total


_MOVING_NOTHING = ("parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "constant")
# An array whose layout, such as {1,0:T(8,128)(2,1)}, names no memory space.
_IN_HBM = re.compile(rf"\b({'|'.join(_BYTES)})\[([0-9,]*)\](?!\{{[^}}]*S\([0-9]\))")


def _operands(rest: str) -> list[str]:
    return re.findall(r"%([\w.\-]+)", rest.partition("), ")[0])


def _dimensions(shape: str) -> tuple[int, ...]:
    array = _ARRAY.search(shape)
    return tuple(map(int, filter(None, array[2].split(",")))) if array else ()


def _dot(rest: str, left: tuple[int, ...], right: tuple[int, ...], result: tuple[int, ...]) -> int:
    """Returns multiply-adds. The result has every axis of both operands but the contracted ones."""
    contracted = re.search(r"lhs_contracting_dims=\{([0-9,]+)\}", rest)
    return math.prod(result) * (math.prod(left[axis] for axis in _integers(contracted[1])) if contracted else 1)


def _convolution(rest: str, *shapes: tuple[int, ...]) -> int:
    """Returns multiply-adds, without those by padding and by the holes of a dilation.

    Reads `window={size=3x8 stride=2x1 pad=1_1x7_7 lhs_dilate=1x8}, dim_labels=b01f_01io->b01f`; numbers are axes of
    space.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", rest)
    assert labels is not None
    of_left, of_right, of_result = (
        dict(zip(names, shape, strict=True)) for names, shape in zip(labels.groups(), shapes, strict=True)
    )
    window = re.search(r"window=\{([^}]*)\}", rest)
    given = dict(re.findall(r"(\w+)=(\S+)", window[1] if window else ""))
    count = of_result["b"] * of_result["f"] * of_right["i"]
    for axis in sorted(filter(str.isdecimal, of_left)):
        stride, holes, spread = (
            int(given[option].split("x")[int(axis)]) if option in given else 1
            for option in ("stride", "lhs_dilate", "rhs_dilate")
        )
        before = int(given["pad"].split("x")[int(axis)].split("_")[0]) if "pad" in given else 0
        touched = np.arange(of_result[axis])[:, None] * stride + np.arange(of_right[axis]) * spread - before
        count *= int(((touched >= 0) & (touched % holes == 0) & (touched // holes < of_left[axis])).sum())
    return count


def _kind(operation: re.Match) -> str:
    return operation["opcode"].removesuffix("-start")


_Computations = dict[str, tuple[bool, list[re.Match]]]


def _executed(computations: _Computations) -> Iterator[tuple[str, re.Match, int]]:
    """Yields each operation with the name of its computation, and how often a run of the program executes it.

    A computation that is called from two places comes twice. The reductions that collectives apply are left out.
    """

    def visit(name: str, times: int) -> Iterator[tuple[str, re.Match, int]]:
        for operation in computations[name][1]:
            yield name, operation, times
            if _kind(operation) in KINDS:
                continue
            called = re.findall(r"[\w.\-]+", " ".join(map(" ".join, _CALLED.findall(operation["rest"]))))
            loops = times
            if operation["opcode"] == "while":
                loops *= _trips(computations, operation["rest"])
            for callee in called:
                if callee in computations:
                    yield from visit(callee, loops)

    return visit(next(name for name, (is_entry, _) in computations.items() if is_entry), 1)


def _computations(hlo: str) -> Iterator[tuple[str, tuple[bool, list[re.Match]]]]:
    name, is_entry, operations = "", False, []
    for line in hlo.splitlines():
        if head := _COMPUTATION.match(line):
            name, is_entry, operations = head["name"], head["entry"] is not None, []
        elif line == "}":
            yield name, (is_entry, operations)
        elif operation := _OPERATION.match(line):
            operations.append(operation)


def _trips(computations: _Computations, rest: str) -> int:
    """Iterations of a loop: JAX's scans count from 0 to the one integer constant in their condition."""
    condition = re.search(r"condition=%?([\w.\-]+)", rest)
    assert condition is not None
    lines = [operation.string for operation in computations[condition[1]][1]]
    bounds = [int(bound) for line in lines for bound in _CONSTANT.findall(line)]
    return max(bounds, default=1)


def _collective(operation: re.Match, kind: str, devices: int, times: int) -> Collective:
    arrays = [(dtype, dims) for dtype, dims in _ARRAY.findall(operation["shape"]) if dtype in _BYTES]
    if operation["opcode"].endswith("-start") and kind != "all-reduce":
        arrays = [array for array in arrays if array[1]]  # drop semaphores
        arrays = arrays[len(arrays) // 2 :]  # the first half are the operands
    groups = _rings(operation["rest"]) if kind == "collective-permute" else _groups(operation["rest"], devices)
    size = max(map(len, groups))
    given = _bytes_of(arrays)
    payload = given * size if kind == "reduce-scatter" else given
    shapes = tuple(f"{dtype}[{dims}]" for dtype, dims in arrays)
    return Collective(kind, operation["name"], shapes, payload, size, times, groups)


def _bytes_of(arrays: list[tuple[str, str]]) -> float:
    return sum(_BYTES[dtype] * math.prod(map(int, filter(None, dims.split(",")))) for dtype, dims in arrays)


def _between_slices(operation: re.Match, times: int) -> Collective:
    """Reads an instruction such as `send(%x), ..._megascale_target="{1,2}x{0:3}",..._transfer_type="ALL_REDUCE"`.

    The target is slices 1 and 2 (a longer range is written `{1:2}`), and in each of them devices 0 to 3.
    """
    transfer, target = _TRANSFER.search(operation["rest"]), _TARGET.search(operation["rest"])
    assert transfer is not None
    slices = 2
    if target is not None:
        bounds = [part.split(":") for part in target[1].split(",")]
        slices = sum(int(part[-1]) - int(part[0]) + 1 for part in bounds)
    kind = transfer[1].lower().replace("_", "-")
    array = next(found for found in _ARRAY.findall(operation["shape"]) if found[0] in _BYTES)
    payload = _bytes_of([array]) * (slices if kind == "all-gather" else 1)
    return Collective(
        kind, operation["name"], (f"{array[0]}[{array[1]}]",), payload, slices, times, between_slices=True
    )


def _groups(rest: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """Reads `replica_groups={{0,1},{2,3}}`, `[2,4]<=[4,2]T(1,0)` or `mesh['a'=2,'b'=4] {'b'}`; else all devices."""
    if listed := re.search(r"replica_groups=\{(\{[0-9,{}]+\})\}", rest):
        return tuple(tuple(map(int, group.split(","))) for group in re.findall(r"\{([0-9,]+)\}", listed[1]))
    if iota := re.search(r"replica_groups=\[([0-9,]+)\]<=\[([0-9,]+)\](?:T\(([0-9,]+)\))?", rest):
        shape, reshaped, order = (None if part is None else _integers(part) for part in iota.groups())
        assert shape is not None and reshaped is not None
        ids = np.arange(math.prod(reshaped)).reshape(reshaped).transpose(order).reshape(-1, shape[-1])
        return tuple(map(tuple, ids.tolist()))
    if named := re.search(r"replica_groups=\S*mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest):
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        taken = [axis for axis in sizes if f"'{axis}'" in named[2]]
        order = [axis for axis in sizes if axis not in taken] + taken
        ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        ids = ids.transpose([list(sizes).index(axis) for axis in order])
        return tuple(map(tuple, ids.reshape(-1, math.prod(sizes[axis] for axis in taken)).tolist()))
    return (tuple(range(devices)),)


def _rings(rest: str) -> tuple[tuple[int, ...], ...]:
    """Groups of a collective-permute: devices connected by `source_target_pairs={{0,1},{1,2},{2,0}}`."""
    chains: list[set[int]] = []
    pairs = re.search(r"source_target_pairs=\{([0-9,{}]*)\}", rest)
    assert pairs is not None
    for pair in re.findall(r"\{(\d+),(\d+)\}", pairs[1]):
        chain = set(map(int, pair))
        touching = [other for other in chains if other & chain]
        chains = [other for other in chains if other not in touching] + [chain.union(*touching)]
    return tuple(tuple(sorted(chain)) for chain in chains)


def _integers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))
