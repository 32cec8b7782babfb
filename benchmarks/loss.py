"""The linear cross-entropy of jaxft beside tokamax's: compiled for a chip or GPU that is not here, or timed on one.

    # not a dependency: its newest version may want another jax
    pip install --no-deps --target /tmp/tokamax tokamax immutabledict einshape qwix tensorboardx typeguard==2.13.3
    PYTHONPATH=/tmp/tokamax python benchmarks/loss.py [--topology v5e:1x1] [--tokens 2048 8192]
    PYTHONPATH=/tmp/tokamax python benchmarks/loss.py --topology h200    # for a GPU
    PYTHONPATH=/tmp/tokamax python benchmarks/loss.py --here         # times them on the first device of this machine

Without tokamax it prints the other rows alone and says so. Loss and gradients of Llama-3-8B's head (4096 x 128256,
bfloat16), undivided, for so many tokens; a table in Markdown: memory of temporaries, FLOPs, bytes read and written in
HBM, and the time of the slower of the two at the peak of the chip. Bytes of jaxft are those of the compiled program's
instructions, bodies of loops as often as they run; those of a kernel, whose inside the compiler does not show, follow
from its grid and blocks.

With `--here` steps alternate, and the median of their times is shown. On a GPU tokamax 0.0.12 has no kernel: its public
function forms all logits there, as does the third loss, which is what JAX makes of the definition.
"""

import argparse
import itertools
import math
import re
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxft.distributed import hlo
from jaxft.distributed.topology import Topology, parse_topology, topology_devices
from jaxft.training.loss import cross_entropy

DIM, VOCAB = 4096, 128256  # Llama-3-8B
ROWS = 1024  # tokens of a block of tokamax
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "copy-done", "iota")

try:
    # The public function refuses where the default device is no TPU, so that nothing could be compiled
    # ahead of time: these are the two kernels that it calls.
    from tokamax._src.ops.linear_softmax_cross_entropy_loss import (  # type: ignore[import-not-found]
        pallas_mosaic_tpu_kernel as tokamax,
    )

    MISSING = ""
except ImportError as error:
    tokamax, MISSING = None, str(error)


def jaxft_step(hidden: Any, head: Any, targets: Any, weights: Any, trained: bool, chunks: int | None = None) -> Any:
    def loss(hidden: Any, head: Any) -> Any:
        logits = lambda h: jnp.matmul(h, head)  # noqa: E731
        return cross_entropy(hidden[None], targets[None], weights[None], logits, chunks=chunks).loss

    return jax.value_and_grad(loss, argnums=(0, 1) if trained else 0)(hidden, head)


def tokamax_step(hidden: Any, head: Any, targets: Any, columns: int) -> Any:
    """Every token counts, and both gradients are computed whether the head trains or not."""
    blocks = {"b_block_size": ROWS, "h_block_size": 512, "v_block_size": columns}
    loss, log_total = tokamax.linear_softmax_cross_entropy_loss_fwd_pallas_mosaic_tpu(hidden, targets, head, **blocks)
    one = jnp.ones((), jnp.float32)
    backward = tokamax.linear_softmax_cross_entropy_loss_bwd_pallas_mosaic_tpu
    return loss, backward(one, log_total, hidden, targets, head, **blocks)


def compiled(step: Callable, topology: Topology, tokens: int) -> Any:
    """`step(hidden, head, targets, weights)` compiled for the chip."""
    mesh = Mesh(topology_devices(topology), ("chip",), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec())
    shapes = [
        ((tokens, DIM), jnp.bfloat16),
        ((DIM, VOCAB), jnp.bfloat16),
        ((tokens,), jnp.int32),
        ((tokens,), "float32"),
    ]
    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape, dtype in shapes]
    with jax.set_mesh(mesh):
        return jax.jit(step).lower(*arguments).compile()


# --- bytes ------------------------------------------------------------------------------------------------------------


def hbm_bytes(text: str) -> float:
    """Bytes of HBM that the instructions of a program read and write, bodies of loops as often as they run."""
    module = hlo.parse(text)

    def size(result: str) -> float:
        arrays = (
            (kind, [int(n) for n in dims.split(",") if n], layout) for kind, dims, layout in _ARRAY.findall(result)
        )
        return sum(hlo.num_bytes([(kind, tuple(dims))]) for kind, dims, layout in arrays if "S(1)" not in layout)

    def read(op: hlo.Instruction, scope: dict[str, hlo.Instruction]) -> float:
        """Of the operands; of those that a fusion only slices, the slices."""
        total, inner = 0.0, module.computations.get(next(iter(op.called.get("calls", ())), ""), [])
        for number, name in enumerate(op.operands):
            whole = size(scope[name].result) if name in scope else 0.0
            parameter = next((i.name for i in inner if i.opcode == "parameter" and i.arguments == str(number)), None)
            uses = [i for i in inner if parameter in i.operands] if parameter else []
            if uses and all(i.opcode == "dynamic-slice" for i in uses):
                whole = min(whole, sum(size(i.result) for i in uses))
            if uses and all(i.opcode == "dynamic-update-slice" and i.operands[0] == parameter for i in uses):
                whole = 0.0
            total += whole
        return total

    def written(op: hlo.Instruction) -> float:
        inner = module.computations.get(next(iter(op.called.get("calls", ())), ""), [op])
        by_name = {i.name: i for i in inner}
        updates = [i for i in inner if i.opcode == "dynamic-update-slice" and i.operands[1] in by_name]
        return min(size(op.result), sum(size(by_name[i.operands[1]].result) for i in updates) or math.inf)

    def total(name: str) -> float:
        scope = {i.name: i for i in module.computations[name]}
        found = 0.0
        for op in scope.values():
            if op.opcode == "while":
                found += hlo.trip_count(module, op, scope) * total(op.called["body"][0])
            elif op.opcode == "conditional":
                found += max(map(total, op.called.get("branch_computations", ())), default=0.0)
            elif op.opcode not in _FREE:
                found += read(op, scope) + written(op)
        return found

    return total(module.entry)


def tokamax_bytes(tokens: int, columns: int) -> float:
    """What tokamax's two kernels (0.0.12) move: blocks of `ROWS` tokens and `columns` words, the dimension innermost.

    Forward, the head is read once for every block of rows, the hidden states once for every block of columns. Backward
    both are read twice so (logits, then gradients), and the float32 gradients are read and written as often.
    """
    row_blocks, column_blocks = math.ceil(tokens / ROWS), math.ceil(VOCAB / columns)
    head, hidden = DIM * VOCAB, tokens * DIM
    reads = 3 * 2 * (row_blocks * head + column_blocks * hidden)
    return reads + 4 * ((2 * row_blocks - 1) * head + (2 * column_blocks - 1) * hidden)


# --- the table --------------------------------------------------------------------------------------------------------


def row(name: str, topology: Topology, tokens: int, trained: bool, step: Any, flops: float, moved: float) -> str:
    chip, stats = topology.chip, step.memory_analysis()
    seconds = max(flops / chip.flops, moved / chip.hbm_bandwidth)
    bound = "products" if flops / chip.flops > moved / chip.hbm_bandwidth else "memory"
    return (
        f"| {name} | {topology.generation} | {tokens:,} | {'trained' if trained else 'frozen'} "
        f"| {stats.temp_size_in_bytes / 2**20:,.0f} | {stats.output_size_in_bytes / 2**20:,.0f} | {flops / 1e12:.1f} "
        f"| {moved / 1e9:.1f} | {seconds * 1e3:.0f} ({bound}) |"
    )


# --- on the device of this machine ------------------------------------------------------------------------------------


def whole_step(hidden: Any, head: Any, targets: Any, weights: Any, trained: bool) -> Any:
    """All logits at once, float32 in the softmax."""

    def loss(hidden: Any, head: Any) -> Any:
        logits = jnp.matmul(hidden, head).astype(jnp.float32)
        return jnp.sum(weights * optax.softmax_cross_entropy_with_integer_labels(logits, targets))

    return jax.value_and_grad(loss, argnums=(0, 1) if trained else 0)(hidden, head)


def tokamax_here(hidden: Any, head: Any, targets: Any, weights: Any, trained: bool) -> Any:
    """tokamax's public function, which chooses for the device; every token counts."""
    from tokamax import linear_softmax_cross_entropy_loss  # type: ignore[import-not-found]

    implementation = "mosaic_tpu" if jax.default_backend() == "tpu" else "xla"
    loss = lambda h, w: linear_softmax_cross_entropy_loss(h, targets, w, implementation=implementation)  # noqa: E731
    return jax.value_and_grad(loss, argnums=(0, 1) if trained else 0)(hidden, head)


LOSSES: dict[str, Callable] = {"jaxft": jaxft_step, "whole logits": whole_step}
if tokamax is not None:
    LOSSES["tokamax"] = tokamax_here


def timed(tokens: int, dim: int, vocab: int, repeats: int) -> list[str]:
    """Rows of the table: every loss, its head trained and frozen, on the first device."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (tokens, dim), jnp.bfloat16)
    head = jax.random.normal(keys[1], (dim, vocab), jnp.bfloat16) / dim**0.5
    arguments = hidden, head, jax.random.randint(keys[2], (tokens,), 0, vocab), jnp.ones(tokens)
    rows = []
    for trained in (True, False):
        steps = {name: jax.jit(partial(s, trained=trained)).lower(*arguments).compile() for name, s in LOSSES.items()}
        found = {name: float(jax.block_until_ready(step(*arguments))[0]) for name, step in steps.items()}
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(repeats):
            for name, step in steps.items():
                start = time.perf_counter()
                jax.block_until_ready(step(*arguments))
                seconds[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        for name, step in steps.items():
            rows.append(
                f"| {name} | {tokens:,} | {'trained' if trained else 'frozen'} | {found[name] / tokens:.4f} "
                f"| {step.memory_analysis().temp_size_in_bytes / 2**20:,.0f} | {medians[name] * 1e3:.2f} "
                f"| {medians[name] / medians['jaxft']:.2f} |"
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", nargs="+", default=["v5e:1x1", "v6e:1x1"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048, 8192])
    parser.add_argument("--chunks", type=int, help="pieces of jaxft's loss; default: its own choice")
    parser.add_argument("--here", action="store_true", help="time them on the first device of this machine")
    parser.add_argument("--repeats", type=int, default=20, help="timed steps of each")
    options = parser.parse_args()
    del sys.argv[1:]  # tokamax reads them, too, and refuses what it does not know
    if tokamax is None:
        print(f"tokamax is not installed ({MISSING}): its rows are missing.\n")
    if options.here:
        print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}\n")
        print("| loss | tokens | head | loss a token | temporaries (MiB) | ms | to jaxft |")
        print("|---|---|---|---|---|---|---|")
        for tokens in options.tokens:
            print("\n".join(timed(tokens, DIM, VOCAB, options.repeats)), flush=True)
        return
    print("| loss | chip | tokens | head | temporaries (MiB) | results (MiB) | TFLOP | HBM (GB) | at best (ms) |")
    print("|---|---|---|---|---|---|---|---|---|")
    for topology in map(parse_topology, options.topology):
        for tokens in options.tokens:
            losses = LOSSES if topology.chip.is_gpu else {"jaxft": jaxft_step}
            for trained, (name, loss) in itertools.product((True, False), losses.items()):
                own = {"chunks": options.chunks} if name == "jaxft" else {}
                step = compiled(partial(loss, trained=trained, **own), topology, tokens)
                text = step.as_text()
                flops = hlo.costs(hlo.parse(text)).flops
                print(row(name, topology, tokens, trained, step, flops, hbm_bytes(text)), flush=True)
            if tokamax is not None and not topology.chip.is_gpu:
                columns = 512 if topology.generation.startswith("v5") else 2048  # its own choice for the chip
                step = compiled(lambda h, w, t, _, columns=columns: tokamax_step(h, w, t, columns), topology, tokens)
                flops = 8 * tokens * DIM * VOCAB  # four products: it computes the logits twice
                print(row("tokamax", topology, tokens, True, step, flops, tokamax_bytes(tokens, columns)), flush=True)


if __name__ == "__main__":
    main()
