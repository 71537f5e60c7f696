"""What a compiled program does, read from its HLO text: collectives, and which kernels attention has.

Collectives: how often each runs in a step and what a device sends. Loops count as often as they iterate; XLA's own cost
analysis counts the body of a loop once.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one kind of collective does in one call of a program.

    Attributes:
      kind: one of `KINDS`.
      count: times it runs.
      sent_bytes: that a device sends, by the algorithm that sends the least (Thakur et al. 2005): of n bytes over a
        group of p devices n (p - 1) / p for an all-gather's or all-to-all's result and a reduce-scatter's argument,
        twice that for an all-reduce, n for a permutation or broadcast.
    """

    kind: str
    count: int
    sent_bytes: int


@dataclasses.dataclass(frozen=True)
class Collectives:
    """All collectives of a program.

    Attributes:
      traffic: by kind, most bytes first.
      unknown_loops: loops with collectives in them whose number of iterations the text does not say; counted once.
    """

    traffic: tuple[Traffic, ...]
    unknown_loops: int

    @property
    def sent_bytes(self) -> int:
        """Sum over kinds."""
        return sum(each.sent_bytes for each in self.traffic)


def read_attention(text: str) -> tuple[str, ...]:
    """The implementations of `models.layers.attention.attend` that a program holds, by the names of its operations."""
    return tuple(sorted(set(re.findall(r"\battention_(xla|cudnn|splash_interpreted|splash)\b", text))))


def read_collectives(text: str, devices: int) -> Collectives:
    """Counts the collectives that one call of a program runs.

    A collective in two parts (-start and -done) counts once. So does one that the TPU compiler has spread over several
    fusions of the same channel, to overlap it with their work. An all-reduce of which its fusion keeps a slice is a
    reduce-scatter. Of the branches of a conditional the one that sends most counts.

    Args:
      text: `compiled.as_text()` of a partitioned program.
      devices: that it runs on; the size of a group that is not written out.
    """
    program = _Program(text, devices)
    counted = program.collectives(program.entry)
    totals: dict[str, list[int]] = {}
    for (kind, _), (times, sent) in counted.items():
        total = totals.setdefault(kind, [0, 0])
        total[0] += times
        total[1] += times * sent
    traffic = [Traffic(kind, count, sent) for kind, (count, sent) in totals.items()]
    return Collectives(tuple(sorted(traffic, key=lambda each: -each.sent_bytes)), len(program.unknown_loops))


@dataclasses.dataclass(frozen=True)
class _Instruction:
    """A line `name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str


# {(kind, identity): (times, bytes that a device sends each time)}
_Counted = dict[tuple[str, str], tuple[int, int]]

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)")
_OPCODE = re.compile(r"(?:^|\s)([a-z][a-z0-9\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")
_FOLLOWED = {"copy", "bitcast", "convert", "reshape", "copy-done", "copy-start", "optimization-barrier"}


class _Program:
    """The computations of an HLO module, whose lines are read when they are asked for."""

    def __init__(self, text: str, devices: int):
        self._devices = devices
        self._lines: dict[str, dict[str, str]] = {}
        self._roots: dict[str, str] = {}
        self.entry = ""
        self.unknown_loops: set[str] = set()
        computation = ""
        for line in text.splitlines():
            if found := _INSTRUCTION.match(line):
                self._lines.setdefault(computation, {})[found[2]] = found[3]
                if found[1]:
                    self._roots[computation] = found[2]
            elif found := _COMPUTATION.match(line):
                computation = found[2]
                self.entry = computation if found[1] else self.entry

    @functools.cache  # noqa: B019 (a program is read once and dropped)
    def instruction(self, computation: str, name: str) -> _Instruction:
        """Splits a line into its parts."""
        line = self._lines[computation][name]
        opcode = _OPCODE.search(line)
        if opcode is None:
            return _Instruction(name, line, "", (), "")
        depth, end = 1, opcode.end()
        while depth and end < len(line):
            depth += {"(": 1, ")": -1}.get(line[end], 0)
            end += 1
        operands = re.findall(r"%([\w.\-]+)", line[opcode.end() : end])
        return _Instruction(name, line[: opcode.start()], opcode[1], tuple(operands), line[end:])

    @functools.cache  # noqa: B019
    def collectives(self, computation: str) -> Mapping[tuple[str, str], tuple[int, int]]:
        """Everything that one run of a computation runs, in what it calls too."""
        counted: _Counted = {}
        for name, line in self._lines.get(computation, {}).items():
            opcode = _OPCODE.search(line)
            if opcode is None or not _may_count(opcode[1]):
                continue
            for identity, (times, sent) in self._of_instruction(computation, name).items():
                before, _ = counted.get(identity, (0, 0))
                spread = identity[1].startswith("channel")  # the same collective again, not another one
                counted[identity] = (max(before, times) if spread else before + times, sent)
        return counted

    def _of_instruction(self, computation: str, name: str) -> _Counted:
        instruction = self.instruction(computation, name)
        opcode, attributes = instruction.opcode, instruction.attributes
        if opcode.removesuffix("-done") in KINDS:
            return self._collective(computation, instruction)
        if opcode == "while":
            inner = {
                **self.collectives(_called(attributes, "condition")),
                **self.collectives(_called(attributes, "body")),
            }
            times = self._iterations(computation, instruction) if inner else 1
            if times is None:
                self.unknown_loops.add(f"{computation}/{name}")
                times = 1
            return {identity: (times * count, sent) for identity, (count, sent) in inner.items()}
        if opcode == "conditional":
            branches = [self.collectives(branch) for branch in _branches(attributes)]
            return dict(max(branches, key=_sent, default={}))
        called = _called(attributes, "to_apply" if opcode == "call" else "calls")
        return dict(self.collectives(called)) if called else {}

    def _collective(self, computation: str, instruction: _Instruction) -> _Counted:
        kind, shape, attributes = instruction.opcode, instruction.shape, instruction.attributes
        if kind.endswith("-done"):  # its shape is the result alone, the start's is more; the group stands at the start
            kind = kind.removesuffix("-done")
            attributes = self.instruction(computation, instruction.operands[0]).attributes
        size, group = shape_bytes(shape), group_size(attributes, self._devices)
        root = self.instruction(computation, self._roots[computation]) if computation in self._roots else None
        if kind == "all-reduce" and root and root.opcode == "dynamic-slice" and root.operands[0] == instruction.name:
            kind = "reduce-scatter"
        elif kind == "reduce-scatter":
            size *= group
        channel = re.search(r"channel_id=(\d+)", attributes)
        fused = computation != self.entry and self._is_fusion(computation)
        identity = f"channel {channel[1]}" if channel and fused else f"{computation}/{instruction.name}"
        return {(kind, identity): (1, sent_bytes(kind, size, group))}

    @functools.cached_property
    def _fusions(self) -> set[str]:
        """Names of the computations that are called by a fusion."""
        lines = (line for lines in self._lines.values() for line in lines.values())
        return {_called(line, "calls") for line in lines if " fusion(" in line}

    def _is_fusion(self, computation: str) -> bool:
        return computation in self._fusions

    def _iterations(self, computation: str, loop: _Instruction) -> int | None:
        """How often a loop runs: as XLA notes it, or from a counter that is compared with a constant."""
        if noted := re.search(r'known_trip_count"?:\s*\{\s*"?n"?:\s*"?(\d+)', loop.attributes):
            return int(noted[1])
        condition, body = _called(loop.attributes, "condition"), _called(loop.attributes, "body")
        test = self.instruction(condition, self._roots[condition])
        direction = re.search(r"direction=(\w+)", test.attributes)
        if test.opcode != "compare" or direction is None:
            return None

        def start(index: int) -> int | None:
            """The value that the loop begins with."""
            initial = self._element(computation, loop.operands[0], index)
            return self._constant(computation, initial) if initial else None

        def bound(name: str) -> int | None:
            """A side of the comparison that does not change."""
            index = self._carried(condition, name)
            return self._constant(condition, name) if index is None else start(index)

        counter = self._carried(condition, test.operands[0])
        limit = bound(test.operands[1])
        step = self._step(body, counter) if counter is not None else None
        first = start(counter) if counter is not None else None
        if limit is None or first is None or not step:
            return None
        if direction[1] in ("LE", "GE"):
            limit += 1 if step > 0 else -1
        elif direction[1] not in ("LT", "GT", "NE"):
            return None
        return max(-((first - limit) // step), 0)

    def _step(self, body: str, index: int) -> int | None:
        """What an iteration adds to a carried counter."""
        name = self._element(body, self._roots[body], index)
        update = self._source(body, name) if name else None
        if update is None or update.opcode != "add":
            return None
        for counter, amount in (update.operands, update.operands[::-1]):
            if self._carried(body, counter) == index:
                return self._constant(body, amount)
        return None

    def _source(self, computation: str, name: str) -> _Instruction | None:
        """The instruction that a value comes from, through copies."""
        while name in self._lines[computation]:
            instruction = self.instruction(computation, name)
            if instruction.opcode not in _FOLLOWED:
                return instruction
            name = instruction.operands[0]
        return None

    def _constant(self, computation: str, name: str) -> int | None:
        source = self._source(computation, name)
        if source is None or source.opcode != "constant":
            return None
        value = re.search(r"constant\((-?\d+)\)", self._lines[computation][source.name])
        return int(value[1]) if value else None

    def _carried(self, computation: str, name: str) -> int | None:
        """Which element of the computation's argument a value is."""
        source = self._source(computation, name)
        if source is None or source.opcode != "get-tuple-element":
            return None
        of = self._source(computation, source.operands[0])
        index = re.search(r"index=(\d+)", source.attributes)
        return int(index[1]) if of and of.opcode == "parameter" and index else None

    def _element(self, computation: str, name: str, index: int) -> str | None:
        """The value that became an element of a tuple."""
        source = self._source(computation, name)
        return source.operands[index] if source and source.opcode == "tuple" else None


def _may_count(opcode: str) -> bool:
    """Whether an instruction is a collective, or calls what may hold one. A start is counted where it is done."""
    calls = ("while", "conditional", "call", "fusion", "async-start", "custom-call")
    return opcode in calls or opcode.removesuffix("-done") in KINDS


def _sent(counted: Mapping[tuple[str, str], tuple[int, int]]) -> int:
    return sum(times * sent for times, sent in counted.values())


def _called(attributes: str, role: str) -> str:
    """The computation that an instruction calls, or "": `calls=%name`, or a list of one."""
    found = re.search(rf"\b{role}=\{{?%?([\w.\-]+)", attributes)
    return found[1] if found else ""


def _branches(attributes: str) -> Iterator[str]:
    """The computations of a conditional."""
    if listed := re.search(r"branch_computations=\{([^}]*)\}", attributes):
        yield from re.findall(r"%?([\w.\-]+)", listed[1])
    for role in ("true_computation", "false_computation"):
        if name := _called(attributes, role):
            yield name


def shape_bytes(shape: str) -> int:
    """Bytes of an array or a tuple of arrays, without padding: `bf16[8,128]{1,0}`, `(f32[2], s32[])`."""
    bits = 0
    for letters, digits, sizes in _ARRAY.findall(re.sub(r"\{[^{}]*\}", "", shape)):
        width = 8 if letters == "pred" else int(digits or 0)  # a token has none
        for size in filter(None, sizes.split(",")):
            width *= int(size)
        bits += width
    return -(-bits // 8)


def group_size(attributes: str, devices: int) -> int:
    """Devices that take part in one collective together, from its `replica_groups` in any of XLA's three notations."""
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\S*\))? \{([^}]*)\}", attributes):
        axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        size = 1
        for name, part in re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found[2]):
            size *= int(part or axes[name])
        return size
    return devices


def sent_bytes(kind: str, size: int, group: int) -> int:
    """Bytes that a device sends for one collective; see `Traffic`.

    Args:
      kind: one of `KINDS`.
      size: bytes of the whole array that is gathered, reduced, exchanged or sent, as one device has it.
      group: devices that take part together.
    """
    if kind in ("collective-permute", "collective-broadcast"):
        return size
    return (2 if kind == "all-reduce" else 1) * size * (group - 1) // group
