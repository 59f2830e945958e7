"""What a compiled GPU program is, read from its scheduled HLO: kernels, collectives, copies, bytes, FLOPs.

XLA's text form is read with regular expressions: it has no public parser. A kernel here is an instruction that starts one on
the device: a fusion, a library call, a copy. Bytes are those of its operands and results, where a fusion that only slices or
gathers an operand counts what it takes, and an update in place what it writes; nothing is assumed to stay in a cache.
"""

import dataclasses
import math
import re

_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
_SIZES |= {"f64": 8, "s64": 8, "u64": 8, "token": 0}
_FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "partition-id", "replica-id", "after-all"}
_FREE |= {"opt-barrier", "while", "conditional", "iota"}
_COLLECTIVE = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_HOST = ("infeed", "outfeed", "send", "recv", "send-done", "recv-done")
_MOVES = {"parameter", "bitcast", "transpose", "copy", "reshape", "tuple", "get-tuple-element"}


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    text: str

    def called(self, attribute: str) -> str | None:
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.text)
        return found and found.group(1)

    def must_call(self, attribute: str) -> str:
        """`called` of what has this attribute, as every fusion and loop has."""
        name = self.called(attribute)
        assert name is not None, self.text
        return name

    @property
    def source(self) -> str:
        """The JAX operation it came from, '' where XLA forgot."""
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found.group(1) if found else ""


def size(shape: str) -> int:
    """Bytes of a shape as HLO writes it, tuples included."""
    return sum(
        _SIZES[kind] * math.prod(map(int, filter(None, dims.split(","))))
        for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape)
    )


def _dims(shape: str) -> list[int]:
    found = re.search(r"\[([\d,]*)\]", shape)
    assert found is not None, shape
    return [int(d) for d in found.group(1).split(",") if d]


def _number(parameter: "Instruction") -> int:
    """Which of its computation's parameters it is."""
    found = re.search(r"parameter\((\d+)\)", parameter.text)
    assert found is not None, parameter.text
    return int(found.group(1))


class Program:
    """The computations of one executable."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.roots: dict[str, str] = {}
        self.entry = ""
        text = re.sub(r"/\*.*?\*/", "", text)
        for head in re.finditer(r"^(ENTRY )?%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", text, re.M | re.S):
            body: dict[str, Instruction] = {}
            for line in head.group(3).splitlines():
                parsed = _parse(line.strip())
                if parsed is not None:
                    body[parsed.name] = parsed
                    if line.strip().startswith("ROOT"):
                        self.roots[head.group(2)] = parsed.name
            self.computations[head.group(2)] = body
            if head.group(1):
                self.entry = head.group(2)
        self.entries = len(re.findall(r"^ENTRY ", text, re.M))

    def loops(self, computation: str) -> list[str]:
        """The bodies of the loops a computation runs, in order."""
        return [i.must_call("body") for i in self.computations[computation].values() if i.op == "while"]

    def within(self, computation: str) -> list[str]:
        """A computation and the bodies of all loops in it."""
        return [computation, *(c for body in self.loops(computation) for c in self.within(body))]

    def host_transfers(self) -> list[str]:
        found = []
        for body in self.computations.values():
            for i in body.values():
                target = re.search(r'custom_call_target="([^"]*)"', i.text)
                if i.op in _HOST or (target and re.search(r"callback|host", target.group(1), re.I)):
                    found.append(i.name)
        return found

    def collectives(self, computation: str) -> list[Instruction]:
        return [
            i for i in self.computations[computation].values() if any(i.op in (name, f"{name}-start") for name in _COLLECTIVE)
        ]

    def kernels(self, computation: str) -> list[Instruction]:
        def starts(i: Instruction) -> bool:
            return i.op not in _FREE and not any(i.op.startswith(name) for name in _COLLECTIVE) and not i.op.endswith("-done")

        return [i for i in self.computations[computation].values() if starts(i)]

    def layer(self, i: Instruction) -> int | None:
        """The layer a kernel or a collective belongs to: by its own source, else by what it is fused from."""
        texts = [i.source]
        if i.called("calls"):
            texts += [inner.source for inner in self.computations[i.must_call("calls")].values()]
        found = [int(n) for text in texts for n in re.findall(r"/layer_(\d+)/", text)]
        return found[0] if found else None

    def bytes(self, computation: str, i: Instruction) -> int:
        """What a kernel reads and writes."""
        body = self.computations[computation]
        if i.op != "fusion":
            if i.op == "dynamic-update-slice":
                return 2 * size(body[i.operands[1]].shape)
            if i.op in ("dynamic-slice", "gather"):
                return 2 * size(i.shape)
            return size(i.shape) + sum(size(body[o].shape) for o in i.operands if o in body)
        inner = self.computations[i.must_call("calls")]
        parameters = {_number(p): p for p in inner.values() if p.op == "parameter"}
        read = sum(_read(inner, parameters[n], size(body[o].shape)) for n, o in enumerate(i.operands) if n in parameters)
        root = inner[self.roots[i.must_call("calls")]]
        parts = [inner[o] for o in root.operands if o in inner] if root.op == "tuple" else [root]
        return read + sum(_written(inner, part) for part in parts)

    def flops(self, computation: str) -> int:
        """Of the products of a computation and the fusions it starts."""
        total = 0
        for i in self.kernels(computation):
            inner = self.computations[i.must_call("calls")] if i.op == "fusion" else {i.name: i}
            outer = inner if i.op == "fusion" else self.computations[computation]
            total += sum(_dot_flops(outer, d) for d in inner.values() if d.op == "dot" or "gemm" in d.text)
        return total

    def copies(self, computation: str) -> list[Instruction]:
        """Kernels that only move data: copies, and fusions of nothing but copies and transposes."""

        def moves(i: Instruction) -> bool:
            if i.op != "fusion":
                return i.op in ("copy", "copy-start", "transpose")
            return all(inner.op in _MOVES for inner in self.computations[i.must_call("calls")].values())

        return [i for i in self.kernels(computation) if moves(i)]


def _parse(line: str) -> Instruction | None:
    found = re.match(r"(?:ROOT )?%?([\w.\-]+) = (\([^=]*?\)|\S+) ([a-z][a-z\-]*)\((.*)$", line)
    if found is None:
        return None
    name, shape, op, rest = found.groups()
    depth, end = 1, len(rest)
    for at, c in enumerate(rest):
        depth += (c == "(") - (c == ")")
        if not depth:
            end = at
            break
    return Instruction(name, shape, op, tuple(re.findall(r"%([\w.\-]+)", rest[:end])), line)


def _users(inner: dict[str, Instruction], name: str) -> list[Instruction]:
    return [i for i in inner.values() if name in i.operands]


def _read(inner: dict[str, Instruction], value: Instruction, whole: int) -> int:
    """Bytes that a fusion reads of one of its parameters."""
    total = 0
    for user in _users(inner, value.name):
        if user.op in ("dynamic-slice", "gather", "slice") and user.operands[0] == value.name:
            total += size(user.shape)
        elif user.op == "dynamic-update-slice" and user.operands[0] == value.name:
            total += 0
        elif user.op == "bitcast":
            total += _read(inner, user, whole)
        else:
            return whole
    return min(total, whole)


def _written(inner: dict[str, Instruction], root: Instruction) -> int:
    while root.op == "bitcast" and root.operands[0] in inner:
        root = inner[root.operands[0]]
    if root.op == "dynamic-update-slice":
        return size(inner[root.operands[1]].shape)
    return size(root.shape)


def _dot_flops(inner: dict[str, Instruction], dot: Instruction) -> int:
    contracting = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.text)
    if contracting is None:
        contracting = re.search(r'"lhs_contracting_dimensions":\["?([\d",]*)"?\]', dot.text)
    assert contracting is not None, dot.text
    left = _dims(inner[dot.operands[0]].shape)
    contracted: int = math.prod(left[int(d)] for d in re.findall(r"\d+", contracting.group(1)))
    return 2 * math.prod(_dims(dot.shape)) * contracted
