"""What a compiled program does, read from its optimised HLO text: FLOPs with loop trip counts, and collectives.

XLA's own cost analysis counts the body of a loop once; a step that scans over layers needs it counted as often as it
runs. The text is what `jax.stages.Compiled.as_text()` returns: one device's program, instructions in scheduled order.
"""

import dataclasses
import functools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

DTYPE_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8, "u64": 8,
    "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "f8e4m3fn": 1, "f8e5m2": 1, "f8e4m3": 1, "f4e2m1fn": 0.5, "c64": 8,
}  # fmt: skip
BESIDE = ("async-start", "call-start", "fusion-start")  # run a computation beside what follows, until their done
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")

_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+[a-z]*)?)\[([\d,<=]*)\]")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|branch_computations|true_computation|false_computation)=(\{[^}]*\}|%?[\w.\-]+)"
)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO. `result` is its type as text, `operands` names, `attributes` the text after them."""

    name: str
    opcode: str
    result: str
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    is_root: bool

    @functools.cached_property
    def called(self) -> dict[str, tuple[str, ...]]:
        """The computations it calls, by role (`calls`, `body`, `condition`, `branch_computations`, ...)."""
        return {
            role: tuple(n.strip().lstrip("%") for n in names.strip("{}").split(","))
            for role, names in _CALLED.findall(self.attributes)
        }

    @property
    def op_name(self) -> str:
        """Where in the JAX program it comes from."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """`(dtype, dimensions)` of the arrays of its result."""
        return arrays(self.result)


@dataclasses.dataclass(frozen=True)
class Module:
    """The computations of a program by name, each a list of instructions in scheduled order."""

    computations: dict[str, list[Instruction]]
    entry: str


def arrays(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """`(dtype, dimensions)` of every array in a type."""
    return [
        (dtype, tuple(int(d.lstrip("<=")) for d in dims.split(",") if d))
        for dtype, dims in _ARRAY.findall(text)
        if dtype in DTYPE_BYTES
    ]


def num_bytes(shapes: list[tuple[str, tuple[int, ...]]]) -> float:
    return sum(DTYPE_BYTES[dtype] * math.prod(dims) for dtype, dims in shapes)


def _balanced(text: str, start: int) -> int:
    """The position after the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i + 1
    raise ValueError(f"unbalanced parentheses in HLO: {text[start : start + 80]}")


def parse(text: str) -> Module:
    """Read HLO text. Raises ValueError if it has no entry computation."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None or not line.startswith(" "):
            head = _COMPUTATION.match(line)
            if head:
                current = computations[head[2]] = []
                entry = head[2] if head[1] else entry
            continue
        found = _INSTRUCTION.match(line)
        if not found:
            continue
        rest = line[found.end() :]
        end = _balanced(rest, 0) if rest.startswith("(") else rest.index(" ")
        result, rest = rest[:end], rest[end:].lstrip()
        opened = rest.index("(")
        closed = _balanced(rest, opened)
        arguments = rest[opened + 1 : closed - 1]
        current.append(
            Instruction(
                name=found[2],
                opcode=rest[:opened],
                result=result,
                operands=tuple(re.findall(r"%([\w.\-]+)", arguments)),
                arguments=arguments,
                attributes=rest[closed:],
                is_root=bool(found[1]),
            )
        )
    if not entry:
        raise ValueError("the text is no HLO module: it has no ENTRY computation")
    return Module(computations, entry)


# --- trip counts ------------------------------------------------------------------------------------------------------


class OpenLoopError(ValueError):
    """A loop that counts up to a number which is data."""


def trip_count(module: Module, loop: Instruction, caller: dict[str, Instruction]) -> int:
    """How often the body of a `while` runs: what XLA noted, else `limit - start` of its counter.

    Raises OpenLoopError where the limit is data, ValueError for a loop that counts in no way we can read.
    """
    noted = re.search(r'known_trip_count\D*?"?n"?\D*?(\d+)', loop.attributes)
    if noted:
        return int(noted[1])
    condition = {i.name: i for i in module.computations[loop.called["condition"][0]]}
    root = next(i for i in condition.values() if i.is_root)
    compared = [_through_copies(condition, name) for name in root.operands]
    if root.opcode == "fusion":
        inner = {i.name: i for i in module.computations[root.called["calls"][0]]}
        parameters = {i.name: compared[int(i.arguments)] for i in inner.values() if i.opcode == "parameter"}
        root = next(i for i in inner.values() if i.is_root)
        compared = [parameters.get(n) or inner[n] for n in root.operands]
    limit = next((int(i.arguments) for i in compared if i.opcode == "constant"), None)
    counter = next((i for i in compared if i.opcode == "get-tuple-element"), None)
    direction = re.search(r"direction=(\w+)", root.attributes)
    if root.opcode == "compare" and [i.opcode for i in compared] == ["get-tuple-element"] * 2:
        raise OpenLoopError(f"{loop.name} ({loop.op_name}) runs as often as its data say")
    if limit is None or counter is None or root.opcode != "compare" or direction is None:
        raise ValueError(f"cannot read the trip count of {loop.name} ({loop.op_name})")
    index = _tuple_index(counter)
    initial = caller.get(loop.operands[0])
    start = _through_copies(caller, initial.operands[index]) if initial and initial.opcode == "tuple" else None
    first = int(start.arguments) if start is not None and start.opcode == "constant" else 0
    step = _step(module, loop.called["body"][0], index)
    if step is None:
        raise ValueError(f"cannot read the step of the counter of {loop.name} ({loop.op_name})")
    return -(-(limit - first + (direction[1] == "LE")) // step)


def _step(module: Module, name: str, index: int) -> int | None:
    """What a computation adds to element `index` of its tuple: more than 1 in loops that XLA unrolled."""
    scope = {i.name: i for i in module.computations[name]}
    root = next(i for i in scope.values() if i.is_root)
    if root.opcode != "tuple":
        return None
    element = _through_copies(scope, root.operands[index])
    if element.opcode == "get-tuple-element" and scope[element.operands[0]].opcode == "fusion":
        inner = scope[element.operands[0]].called["calls"][0]
        return _step(module, inner, _tuple_index(element))
    if element.opcode == "fusion":
        scope = {i.name: i for i in module.computations[element.called["calls"][0]]}
        element = next(i for i in scope.values() if i.is_root)
    if element.opcode != "add":
        return None
    added = [_through_copies(scope, name) for name in element.operands]
    return next((int(i.arguments) for i in added if i.opcode == "constant"), None)


def _tuple_index(op: Instruction) -> int:
    """Which element of its operand a `get-tuple-element` takes."""
    found = re.search(r"index=(\d+)", op.attributes)
    if found is None:
        raise ValueError(f"{op.name} ({op.opcode}) takes no element of a tuple")
    return int(found[1])


def _through_copies(scope: dict[str, Instruction], name: str) -> Instruction:
    found = scope[name]
    while found.opcode in ("copy", "bitcast", "convert", "copy-done", "copy-start") and found.operands:
        found = scope[found.operands[0]]
    return found


# --- costs ------------------------------------------------------------------------------------------------------------


def dot_flops(op: Instruction, scope: dict[str, Instruction]) -> float:
    """FLOPs of a `dot`: two for every multiply-add."""
    lhs = scope[op.operands[0]].shapes[0][1]
    dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.attributes)
    contracted = math.prod(lhs[int(d)] for d in dims[1].split(",") if d) if dims else 1
    return 2 * math.prod(op.shapes[0][1]) * contracted


def convolution_flops(op: Instruction, scope: dict[str, Instruction]) -> float:
    """FLOPs of a `convolution`, which is how the TPU compiler writes matrix products. Padding costs nothing."""
    labels = re.search(r"dim_labels=([\w?]+)_([\w?]+)->([\w?]+)", op.attributes)
    if labels is None:
        raise ValueError(f"cannot read the dimension labels of {op.name} ({op.op_name})")
    lhs_labels, rhs_labels, out_labels = labels.groups()
    lhs, rhs = (dict(zip(labels, scope[o].shapes[0][1], strict=True))
                for labels, o in zip((lhs_labels, rhs_labels), op.operands, strict=False))  # fmt: skip
    out = dict(zip(out_labels, op.shapes[0][1], strict=True))
    window = re.search(r"window=\{([^}]*)\}", op.attributes)
    fields = dict(f.split("=") for f in window[1].split()) if window else {}
    spatial = sorted(d for d in lhs_labels if d.isdigit())

    def field(name: str, default: str) -> list[str]:
        return fields[name].split("x") if name in fields else [default] * len(spatial)

    valid = 1
    for d, stride, pad, holes, dilation in zip(
        spatial, field("stride", "1"), field("pad", "0_0"), field("lhs_dilate", "1"), field("rhs_dilate", "1"),
        strict=True,
    ):  # fmt: skip
        low, base, size = int(pad.split("_")[0]), int(holes), lhs[d]
        last = (size - 1) * base
        positions = (o * int(stride) + k * int(dilation) - low for o in range(out[d]) for k in range(rhs[d]))
        valid *= sum(0 <= p <= last and p % base == 0 for p in positions)
    return 2 * out["b"] * out["f"] * rhs["i"] * valid


Kernels = Callable[[Instruction, list[tuple[str, tuple[int, ...]]]], float]
"""`(custom call, shapes of its operands) -> FLOPs`, for kernels whose inside HLO does not show."""


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective that a program runs `times` times (on average, inside conditionals).

    kind: the HLO opcode; a reduce-scatter written as all-reduce and slice counts as reduce-scatter.
    bytes_sent: by one device, each time. result: types. groups: the devices that take part together, by their places
    in the mesh; empty for all.
    is_async: runs beside computation by its form (a start and a done). overlapped: matrix products run in between.
    hidden: the part that is sent while they last (see `costs`). in_conditional: whether it runs only if a predicate
    says so.
    """

    kind: str
    bytes_sent: float
    result: list[tuple[str, tuple[int, ...]]]
    groups: list[list[int]]
    times: float
    is_async: bool
    overlapped: bool
    hidden: float
    in_conditional: bool
    op_name: str

    @property
    def total_bytes(self) -> float:
        return self.bytes_sent * self.times

    @property
    def group(self) -> int:
        """How many devices take part together; 0 for all."""
        return len(self.groups[0]) if self.groups else 0


@dataclasses.dataclass(frozen=True)
class Costs:
    """Costs of one run of a program on one device.

    flops: of matrix products and known kernels; conditionals at the share given. least_flops, most_flops: if every
    conditional takes its cheaper, its dearer branch. kernels: calls of custom kernels by name. unread: computations
    with collectives that are run in a way not known here; they are not in `collectives`. open_loops: loops that run as
    often as the data ask, by name; nothing in them is counted.
    """

    flops: float
    least_flops: float
    most_flops: float
    collectives: list[Collective]
    kernels: dict[str, float]
    unread: tuple[str, ...]
    open_loops: tuple[str, ...] = ()

    def bytes_by_kind(self) -> dict[str, float]:
        """Bytes one device sends in a run, by kind of collective."""
        total: dict[str, float] = defaultdict(float)
        for c in self.collectives:
            total[c.kind] += c.total_bytes
        return dict(sorted(total.items()))

    def full_gathers(self, limit: float) -> list[Collective]:
        """All-gathers whose result has an array above `limit` bytes (say, the largest matrix of one layer)."""
        return [c for c in self.collectives if c.kind == "all-gather" and max(num_bytes([a]) for a in c.result) > limit]


def costs(
    module: Module,
    *,
    taken: float = 1.0,
    kernels: Kernels = lambda call, operands: 0.0,
    flops_meanwhile: Callable[[Collective], float] = lambda collective: 0.0,
) -> Costs:
    """FLOPs and collectives of a program, bodies of loops counted as often as they run.

    Args:
        taken: how often a conditional takes the branch with more FLOPs (for a `Split`, the share of layers that train).
        kernels: FLOPs of custom calls.
        flops_meanwhile: what a device could compute while it sends what a collective sends each time. A product hides
            as much of the collectives it runs beside as is sent meanwhile; with 0, all of them.
    """

    @functools.cache
    def flops(name: str, share: float) -> float:
        scope = {i.name: i for i in module.computations[name]}
        return sum(own(i, scope) + inside(i, scope, share) for i in scope.values())

    def own(op: Instruction, scope: dict[str, Instruction]) -> float:
        if op.opcode == "dot":
            return dot_flops(op, scope)
        if op.opcode == "convolution":
            return convolution_flops(op, scope)
        if op.opcode == "custom-call":
            return kernels(op, [s for o in op.operands if o in scope for s in scope[o].shapes])
        return 0.0

    def inside(op: Instruction, scope: dict[str, Instruction], share: float) -> float:
        return sum(t * flops(n, share) for n, t in parts(op, scope, share))

    def parts(op: Instruction, scope: dict[str, Instruction], share: float) -> Iterator[tuple[str, float]]:
        """The computations an instruction runs, and how often."""
        if op.opcode == "while":
            yield op.called["body"][0], runs_of(op, scope)
        elif op.opcode == "conditional":
            branches = branches_of(op)
            dearest = max(branches, key=lambda n: flops(n, 1.0))
            for name in branches:
                yield name, share if name == dearest else (1 - share) / max(len(branches) - 1, 1)
        elif op.opcode in ("fusion", "call", *BESIDE):
            yield from ((n, 1) for n in op.called.get("calls", ()) + op.called.get("to_apply", ()))

    def runs_of(loop: Instruction, scope: dict[str, Instruction]) -> int:
        try:
            return trip_count(module, loop, scope)
        except OpenLoopError:
            open_loops[loop.name] = None
            return 0

    def branches_of(op: Instruction) -> list[str]:
        names = op.called.get("branch_computations")
        return list(names or op.called["true_computation"] + op.called["false_computation"])

    found: list[Collective] = []
    calls: dict[str, float] = defaultdict(float)
    read = set[str]()
    open_loops: dict[str, None] = {}

    @functools.cache
    def collectives(name: str) -> dict[int, Collective]:
        """Those of a computation, without what it calls, by where they are."""
        instructions, sending = module.computations[name], dict[int, Collective]()
        scope = {i.name: i for i in instructions}
        for position, op in enumerate(instructions):
            kind = op.opcode.removesuffix("-start")
            if kind in COLLECTIVES and (not _chain(op) or _starts_chain(instructions)):
                kind = "reduce-scatter" if "all-reduce-scatter" in name and kind == "all-reduce" else kind
                sending[position] = _collective(op, kind, scope)
        return sending

    @functools.cache
    def sent(name: str) -> float:
        """FLOPs that hide all that a computation sends, with what it calls."""
        scope = {i.name: i for i in module.computations[name]}
        within = sum(sent(called) * count for op in scope.values() for called, count in parts(op, scope, taken))
        return within + sum(map(flops_meanwhile, collectives(name).values()))

    def windows(name: str) -> dict[int, Window]:
        """What runs beside other instructions of a computation, by where it starts."""
        instructions, own_ones = module.computations[name], collectives(name)
        scope = {i.name: i for i in instructions}
        found, chains = dict[int, Window](), dict[str, list[int]]()
        for position, op in enumerate(instructions):
            called = [part for part, _ in parts(op, scope, taken)]
            if op.opcode in BESIDE or (op.opcode.endswith("-start") and position in own_ones):
                needed = flops_meanwhile(own_ones[position]) if position in own_ones else sum(map(sent, called))
                found[position] = Window(needed, range(position + 1, _done(instructions, position)))
            elif op.opcode == "fusion" and (started := chains_from(called)):
                chains |= dict.fromkeys(started, steps := list[int]())
                found[position] = Window(sum(map(sent, called)), steps)
            else:
                for chain in frozenset[str]().union(*map(chains_in, called)) & chains.keys():
                    chains[chain].append(position)
        return found

    def chains_from(names: list[str]) -> set[str]:
        """The gathers that computations start."""
        starts = [module.computations[name] for name in names if _starts_chain(module.computations[name])]
        return {chain for instructions in starts for op in instructions if (chain := _chain(op))}

    @functools.cache
    def chains_in(name: str) -> frozenset[str]:
        """The gathers of which a computation, or one that it calls, is a part."""
        instructions = module.computations[name]
        scope = {i.name: i for i in instructions}
        inner = (chains_in(called) for op in instructions for called, _ in parts(op, scope, 1.0))
        return frozenset(c for op in instructions if (c := _chain(op))).union(*inner)

    @functools.cache
    def beside(name: str) -> tuple[dict[int, float | None], float]:
        """Of what runs beside others in a computation the part that these hide, and the FLOPs that hide nothing."""
        instructions = module.computations[name]
        scope = {i.name: i for i in instructions}
        products = [own(op, scope) + inside(op, scope, taken) for op in instructions]
        unused = [
            own(op, scope) + sum(n * beside(part)[1] for part, n in parts(op, scope, taken)) for op in instructions
        ]
        return _hidden(windows(name), products, unused)

    def visit(name: str, times: float, conditional: bool, is_async: bool, around: float | None) -> None:
        """`is_async`: of a computation that runs beside others; `around`, the part of what it sends that these hide."""
        read.add(name)
        instructions = module.computations[name]
        scope = {i.name: i for i in instructions}
        hidden, _ = beside(name)
        for position, one in collectives(name).items():
            share = hidden.get(position, around)
            one = dataclasses.replace(
                one, times=times, in_conditional=conditional, is_async=is_async or position in hidden
            )
            found.append(dataclasses.replace(one, overlapped=share is not None, hidden=share or 0.0))
        for position, op in enumerate(instructions):
            if op.opcode == "custom-call" and own(op, scope):
                calls[re.sub(r"\.\d+$", "", op.name)] += times
            for called, count in parts(op, scope, taken):
                inner = conditional or op.opcode == "conditional"
                visit(called, times * count, inner, is_async or position in hidden, hidden.get(position, around))

    visit(module.entry, 1.0, False, False, None)
    unread = tuple(
        name
        for name, instructions in module.computations.items()
        if name not in read and any(i.opcode.removesuffix("-start") in COLLECTIVES for i in instructions)
    )
    total, least, most = (flops(module.entry, share) for share in (taken, 0.0, 1.0))
    return Costs(total, least, most, found, dict(calls), unread, tuple(open_loops))


class Window(NamedTuple):
    """What runs beside other instructions of a computation, in FLOPs that hide it, and which these are."""

    needed: float
    steps: Sequence[int]


def _chain(op: Instruction) -> str | None:
    """Of a gather that is spread over several fusions the name of all its parts, of which the first counts."""
    found = re.search(r'chain_id="?(\w+)', op.attributes)
    return found and found[1]


def _starts_chain(instructions: list[Instruction]) -> bool:
    return any('"AsyncCollectiveStart"' in i.attributes for i in instructions)


def _done(instructions: list[Instruction], position: int) -> int:
    """Where what starts at `position` is waited for; the end if it is not."""
    names = {instructions[position].name}
    for at, op in enumerate(instructions[position + 1 :], position + 1):
        if names & set(op.operands):
            if op.opcode.endswith("-done"):
                return at
            if op.opcode.endswith("-update"):
                names.add(op.name)
    return len(instructions)


def _hidden(
    windows: Mapping[int, Window], products: Sequence[float], unused: Sequence[float]
) -> tuple[dict[int, float | None], float]:
    """The part of each window that passes while products run, one window after the other (None where there are no
    products), and what hides none.

    `products` are the FLOPs of each step, `unused` those beside which nothing is sent in what the step calls. They go
    to what is waited for first.
    """
    needed = {start: window.needed for start, window in windows.items()}
    left, met, rest = dict(needed), set[int](), 0.0
    for step, flops in enumerate(unused):
        if products[step]:
            inside = (start for start, window in windows.items() if step in window.steps)
            for start in sorted(inside, key=lambda start: windows[start].steps[-1]):
                met.add(start)
                used = min(left[start], flops)
                left[start] -= used
                flops -= used
        rest += flops
    shares = {s: (1 - left[s] / needed[s] if needed[s] else 1.0) if s in met else None for s in windows}
    return shares, rest


def _collective(op: Instruction, kind: str, scope: dict) -> Collective:
    """A collective that runs once, and nothing beside it."""
    result = op.shapes
    if op.opcode.endswith("-start") and op.opcode != "all-reduce-start":
        # A start returns (operands, results, contexts): the results are the second half of the arrays that are data.
        data = [a for a in result if len(a[1]) > 0]
        result = data[len(data) // 2 :]
    operands = [s for o in op.operands if o in scope for s in scope[o].shapes]
    groups = replica_groups(op.attributes)
    group = len(groups[0]) if groups else 0
    share = (group - 1) / group if group else 1.0
    sent = {
        "all-gather": share * num_bytes(result),
        "all-reduce": 2 * share * num_bytes(result),
        "reduce-scatter": share * num_bytes(operands),
        "collective-permute": num_bytes(result),
    }.get(kind, share * num_bytes(result))
    return Collective(kind, sent, result, groups, 1.0, False, False, 0.0, False, op.op_name)


def replica_groups(attributes: str) -> list[list[int]]:
    """Which devices exchange something with each other; empty where it does not say (all with all)."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? *\{([^}]*)\}", attributes):
        shape: list[int] = []  # the parts of all axes
        inside: list[int] = []  # which of these the devices of a group span
        named = [(a, int(m or 1), int(n or 0)) for a, m, n in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", mesh[3])]
        for axis, text in re.findall(r"'([^']+)'=(\d+)", mesh[1]):
            size = int(text)
            spans = [(major, major * (count or size)) for name, major, count in named if name == axis]
            cuts = sorted({1, size, *(cut for span in spans for cut in span)})
            for low, high in zip(cuts, cuts[1:], strict=False):
                shape.append(high // low)
                if any(first <= low and high <= last for first, last in spans):
                    inside.append(len(shape) - 1)
        ids = _devices(mesh[2] or f"[{math.prod(shape)}]").reshape(shape)
        ids = np.moveaxis(ids, inside, range(-len(inside), 0)) if inside else ids[..., None]
        return ids.reshape(-1, math.prod(shape[i] for i in inside)).tolist()
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        return _devices(iota[2]).reshape(-1, int(iota[1])).tolist()
    explicit = re.search(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}", attributes)
    found = re.findall(r"\{([\d,]+)\}", explicit[1]) if explicit else []
    return [[int(n) for n in group.split(",")] for group in found]


def _devices(text: str) -> np.ndarray:
    """A list of devices: `[2,8]T(1,0)`, those of a grid in another order, or each by its number."""
    found = re.match(r"\[([\d,]+)\](?:T\(([\d,]+))?", text)
    if not found:
        return np.array([int(n) for n in re.findall(r"\d+", text)])
    sizes, order = ([int(n) for n in part.split(",")] if part else None for part in found.groups())
    assert sizes is not None
    return np.arange(math.prod(sizes)).reshape(sizes).transpose(order).reshape(-1)
