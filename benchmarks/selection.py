"""What selection costs: trained parameters, gradient and optimizer bytes, step time of every method over full tuning's.

    python benchmarks/selection.py                         # all methods, writes benchmarks/results/selection.md
    python benchmarks/selection.py --only shira,smt        # some of them, again
    python benchmarks/selection.py --tpu ""                # without the TPU compiler

Each method starts from its configuration in configs/methods (the embedded model, real data) with the options below, so
selections are those of trained weights. Bytes are those of arrays: of the gradient that the backward pass returns, of
the optimizer's state, and of the temporaries of the step compiled for this machine. The same step, compiled for a chip
of a TPU (no TPU is needed), gives its HBM. Times alternate: a step of full tuning, then one of the method, and the
median of the ratios counts. Results are kept in benchmarks/results/selection.json.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxft.config import RunConfig, load_config
from jaxft.distributed import make_mesh, shard_batch
from jaxft.distributed.topology import compiler, parse_topology, topology_devices
from jaxft.methods import count_trainable, get_method, methods
from jaxft.training.loop import Job, load_base, make_step, prepare, start
from jaxft.training.state import abstract, tuned_of
from jaxft.training.step import summed_gradients

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "selection.json"
PAGE = RESULTS.with_suffix(".md")
FIVE = "method.budget=0.05"
# Where a method has a budget, 5 % of its candidates; where it counts otherwise, what comes near. Others as they come.
OPTIONS: dict[str, tuple[str, ...]] = {
    "apet": ("method.count=132000",),
    "lift-principal-weights": (FIVE,),
    "lt-sft": (FIVE, "method.search_steps=20"),
    "paca": ("method.rank=10",),
    "pivotal-parameters-tuning": (FIVE, "method.search_steps=20"),
    "s2ft": ("method.channels=0.05", "method.heads=0.05", "method.head_dim=1"),
    "sara": (FIVE, "method.nuclear=0"),
    "select": (FIVE, "method.granularity=row", "method.rounds=1"),
    "shira": ("method.rank=10",),
    "smt": (FIVE, "method.size=16", 'method.on="@linear"', "method.batches=8"),
    "spiel": (FIVE,),
    "spt": (FIVE, "method.rank=4"),
    "freezeasguard": ("method.frozen=0.95", "method.guard_steps=5"),
}
MOST = 0.15  # of full tuning's gradient and optimizer bytes, for what trains 5 % or less


def nbytes(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def config_of(name: str, *overrides: str) -> RunConfig:
    return load_config(ROOT / "configs" / "methods" / f"{name}.yaml", (*overrides, "training.steps=20"))


def open_job(config: RunConfig, stack: contextlib.ExitStack, topology: str = "") -> dict:
    """A method ready to step, and what its arrays weigh."""
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    stack.enter_context(jax.set_mesh(mesh))
    job = prepare(config, mesh, config.resolved())
    params, _ = load_base(job)
    state, frozen = start(job, job.method, params)
    batch = shard_batch(next(iter(job.stream)), mesh)
    gradient = jax.eval_shape(
        lambda tuned, batch: summed_gradients(job.loss, tuned, batch, jax.random.key(0))[3],
        tuned_of(state, frozen),
        batch,
    )
    step = make_step(job, job.method, state).lower(abstract(state), abstract(frozen), abstract(batch)).compile()
    trained = count_trainable(tuned_of(state, frozen))
    return {
        "step": step,
        "state": state,
        "frozen": frozen,
        "batch": batch,
        "row": {
            "model": config.model.path,
            "trained": trained,
            "share": trained / sum(x.size for x in jax.tree.leaves(job.model.abstract())),
            "gradient_bytes": nbytes(gradient),
            "optimizer_bytes": nbytes(state.opt_state),
            "temporary_bytes": step.memory_analysis().temp_size_in_bytes,
            "hbm_bytes": hbm(job, (state, frozen, batch), topology) if topology else None,
        },
    }


def timed(job: dict) -> float:
    begin = time.perf_counter()
    job["state"], _ = jax.block_until_ready(job["step"](job["state"], job["frozen"], job["batch"]))
    return time.perf_counter() - begin


def hbm(job: Job, arguments: tuple, topology: str) -> int:
    """Bytes of memory of a chip that the step needs, by the TPU compiler: with the very cut that runs here."""
    mesh = make_mesh(job.config.mesh, topology_devices(parse_topology(topology)))
    everywhere = NamedSharding(mesh, PartitionSpec())
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere), arguments)
    with jax.set_mesh(mesh):
        stats = make_step(job, job.method, shapes[0]).lower(*shapes).compile().memory_analysis()
    results = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return stats.argument_size_in_bytes + results + stats.temp_size_in_bytes


def machine() -> str:
    """The machine, and whether it is shared: by the load that others put on it."""
    model = platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    load = os.getloadavg()[0]
    shared = f"; the machine was shared (load {load:.1f} at the start)" if load > 0.5 else ""
    return f"{model}, {os.cpu_count()} cores, jax {jax.__version__}{shared}"


def page(results: dict) -> str:
    rows, full, tpu = results["rows"], results["rows"]["full, nano"], results.get("tpu")
    whole = full["gradient_bytes"] + full["optimizer_bytes"]
    columns = ["method", "options", "trained", "gradient + optimizer bytes", "temporaries", "step time"]
    lines = [
        "# What selection costs",
        "",
        f"Made by `python benchmarks/selection.py` on: {results['machine']}. The embedded model, AdamW in float32, "
        "batches of 16 x 128 tokens.",
        "",
        "Bytes and times are those of full tuning in the same run times the figure. Full tuning holds "
        f"{whole / 2**20:.1f} MiB of gradients and optimizer state and {full['temporary_bytes'] / 2**20:.1f} MiB of "
        "temporaries. Step times are medians of ratios of alternating steps. On so small a model a step is mostly "
        "the forward pass and the head, which every method pays, so times say less than on a large one.",
        *([f"HBM is what the TPU compiler needs for the same step on one chip ({tpu}), in MiB."] if tpu else []),
        "",
        f"Whatever trains 5 % or less holds at most {MOST:.0%} of full tuning's gradient and optimizer bytes: "
        "`tests/methods/selection/test_costs.py` asserts it.",
        "",
        "| " + " | ".join([*columns, *(["HBM"] if tpu else [])]) + " |",
        "|---" * (len(columns) + bool(tpu)) + "|",
    ]
    for name, r in sorted(rows.items(), key=lambda item: (not item[0].startswith("full, "), item[0])):
        base = rows[f"full, {r['model']}"]
        cells = [
            f"`{name}`",
            ", ".join(r["options"]),
            f"{100 * r['share']:.2f} %",
            f"{100 * held(r, base):.1f} %",
            f"{r['temporary_bytes'] / base['temporary_bytes']:.2f}",
            f"{r['time']:.2f}",
            *([f"{r['hbm_bytes'] / 2**20:.1f}" if r["hbm_bytes"] else ""] if tpu else []),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "`gmt`, `greentrainer`, `ist`, `progressive-freezing`, `grafting` and `r-amt` hold the state of all that they "
        "may train: the first masks gradients, the next three skip the products of what is closed (time, not memory), "
        "the last two train a score for every entry. `esft` is measured on the embedded mixture of experts.",
        "",
    ]
    return "\n".join(lines)


def held(row: dict, full: dict) -> float:
    """Gradient and optimizer bytes over those of full tuning."""
    of = lambda r: r["gradient_bytes"] + r["optimizer_bytes"]  # noqa: E731
    return of(row) / of(full)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names of methods, joined by commas")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each method")
    parser.add_argument("--tpu", default="v5e:1x1", help="a topology of one chip; empty: without the TPU compiler")
    parser.add_argument("--page", action="store_true", help="write the page from the results there are")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"rows": {}}
    wanted = [n for n in options.only.split(",") if n] or [n for n in methods() if get_method(n).family == "selection"]
    wanted = [n for n in wanted if n != "full"]
    if not options.page:
        tpu = options.tpu if compiler() else ""
        results |= {"machine": machine(), "tpu": tpu}
        with contextlib.ExitStack() as stack:
            baselines: dict[str, dict] = {}  # full tuning of each model: experts need one that has them
            for name in wanted:
                begin, config = time.perf_counter(), config_of(name, *OPTIONS.get(name, ()))
                model = config.model.path
                if model not in baselines:
                    baselines[model] = open_job(config_of(name, "method=full"), stack, tpu)
                    results["rows"][f"full, {model}"] = baselines[model]["row"] | {"options": [], "time": 1.0}
                full, job = baselines[model], open_job(config, stack, tpu)
                timed(full), timed(job)
                pairs = [(timed(full), timed(job)) for _ in range(options.steps)]
                row = job["row"] | {"time": statistics.median(b / a for a, b in pairs)}
                results["rows"][name] = row | {"options": [o.removeprefix("method.") for o in OPTIONS.get(name, ())]}
                print(
                    f"{name:28}{100 * row['share']:8.3f} % trained, {100 * held(row, full['row']):6.2f} % held, "
                    f"{row['time']:.2f} of the time; measured in {time.perf_counter() - begin:.0f} s",
                    flush=True,
                )
                RESULTS.write_text(json.dumps(results, indent=2) + "\n")
                del job
                if len(results["rows"]) % 8 == 0:
                    jax.clear_caches()
    PAGE.write_text(page(results))
    rows = results["rows"]
    over = [n for n, r in rows.items() if r["share"] <= 0.05 and held(r, rows[f"full, {r['model']}"]) > MOST]
    if over:
        sys.exit(f"these train 5 % or less and hold more than {MOST:.0%}: {', '.join(over)}")


if __name__ == "__main__":
    main()
