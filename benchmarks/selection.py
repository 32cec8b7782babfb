"""What selection costs: trained parameters, gradient and optimizer bytes, step time of every method over full tuning's.

    python benchmarks/selection.py                    # all methods, writes docs/selection-costs.md
    python benchmarks/selection.py --only lift,smt    # some of them, again
    python benchmarks/selection.py --tpu v5e:2x2      # also the HBM of a chip (needs the TPU compiler, no TPU)

Each method starts from its configuration in configs/methods (the embedded model, real data) with the options below, so
selections are those of trained weights. Bytes are those of arrays: of the gradient that the compiled backward pass
returns, of the optimizer's state, and of the temporaries of the compiled step. Times alternate: a step of full tuning,
then one of the method, and the median of the ratios counts. Results are kept in benchmarks/results/selection.json.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax

from jaxft.config import load_config
from jaxft.distributed import make_mesh, shard_batch
from jaxft.errors import JaxftError
from jaxft.methods import count_trainable, get_method, methods
from jaxft.training.loop import load_base, make_step, prepare, start
from jaxft.training.state import abstract, tuned_of
from jaxft.training.step import summed_gradients

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "selection.json", ROOT / "docs" / "selection-costs.md"
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
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def open_job(name: str, stack: contextlib.ExitStack) -> dict:
    """A method ready to step, and what its arrays weigh."""
    config = load_config(ROOT / "configs" / "methods" / f"{name}.yaml", (*OPTIONS.get(name, ()), "training.steps=20"))
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    stack.enter_context(jax.set_mesh(mesh))
    job = prepare(config, mesh, config.resolved())
    params, _ = load_base(job)
    state, frozen = start(job, job.method, params)
    batch = shard_batch(next(iter(job.stream)), mesh)
    backward = jax.jit(lambda tuned, batch: summed_gradients(job.loss, tuned, batch, jax.random.key(0))[3])
    shapes = abstract(tuned_of(state, frozen)), abstract(batch)
    gradient = backward.lower(*shapes).compile().memory_analysis().output_size_in_bytes
    step = make_step(job, job.method, state).lower(abstract(state), abstract(frozen), shapes[1]).compile()
    trained = count_trainable(tuned_of(state, frozen))
    return {
        "step": step,
        "state": state,
        "frozen": frozen,
        "batch": batch,
        "row": {
            "options": [o.removeprefix("method.") for o in OPTIONS.get(name, ())],
            "trained": trained,
            "share": trained / sum(x.size for x in jax.tree.leaves(job.model.abstract())),
            "gradient_bytes": gradient,
            "optimizer_bytes": nbytes(state.opt_state),
            "temporary_bytes": step.memory_analysis().temp_size_in_bytes,
        },
    }


def timed(job: dict) -> float:
    begin = time.perf_counter()
    job["state"], _ = jax.block_until_ready(job["step"](job["state"], job["frozen"], job["batch"]))
    return time.perf_counter() - begin


def hbm(name: str, topology: str) -> float | None:
    """GiB of a chip's memory that `jaxft plan` finds; None where the method needs data before it knows its shapes."""
    command = [sys.executable, "-m", "jaxft", "plan", f"configs/methods/{name}.yaml", *OPTIONS.get(name, ())]
    done = subprocess.run([*command, "-t", topology, "--json"], cwd=ROOT, capture_output=True, text=True)
    return json.loads(done.stdout)["hbm_gib_per_chip"] if done.returncode == 0 else None


def machine() -> str:
    with contextlib.suppress(OSError):
        found = [
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ]
        return f"{found[0] if found else platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}"
    return f"{platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}"


def page(results: dict) -> str:
    rows, full = results["rows"], results["rows"]["full"]
    whole = full["gradient_bytes"] + full["optimizer_bytes"]
    tpu = f" | HBM a chip, {results['tpu']} |" if results.get("tpu") else " |"
    lines = [
        "# What selection costs",
        "",
        f"Made by `python benchmarks/selection.py` on: {results['machine']}. The embedded model, AdamW in float32, "
        f"batches of 16 x 128 tokens.",
        "",
        "Gradient and optimizer bytes and temporaries are read from the compiled step and its state and given over "
        f"full tuning's ({whole / 2**20:.1f} MiB of gradients and optimizer state, "
        f"{full['temporary_bytes'] / 2**20:.1f} MiB of temporaries); step times are medians "
        "of ratios of alternating steps. On so small a model a step is mostly "
        "the forward pass and the head, which every method pays, so times say less than on a large one.",
        "",
        f"Whatever trains 5 % or less holds at most {MOST:.0%} of full tuning's gradient and optimizer bytes: "
        "`tests/methods/selection/test_costs.py` asserts it.",
        "",
        "| method | options | trained | gradient + optimizer bytes | temporaries | step time" + tpu,
        "|---|---|---|---|---|---" + ("|---|" if results.get("tpu") else "|"),
    ]
    for name, r in sorted(rows.items(), key=lambda item: (item[0] != "full", item[0])):
        held = (r["gradient_bytes"] + r["optimizer_bytes"]) / whole
        last = f" | {r['hbm_gib']:.2f} GiB |" if r.get("hbm_gib") else (" | |" if results.get("tpu") else " |")
        lines.append(
            f"| `{name}` | {', '.join(r['options'])} | {100 * r['share']:.2f} % | {100 * held:.1f} % | "
            f"{r['temporary_bytes'] / full['temporary_bytes']:.2f} | {r['time']:.2f}{last}"
        )
    lines += [
        "",
        "`gmt`, `greentrainer`, `progressive-freezing` and `grafting` hold the state of all that they may train: the "
        "first masks gradients, the next two skip the products of what is closed (time, not memory), the last trains a "
        "score for every entry.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names of methods, joined by commas")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each method")
    parser.add_argument("--tpu", help="a topology for jaxft plan, such as v5e:2x2")
    parser.add_argument("--page", action="store_true", help="write the page from the results there are")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"rows": {}}
    wanted = [n for n in options.only.split(",") if n] or [n for n in methods() if get_method(n).family == "selection"]
    if not options.page:
        results["machine"] = machine()
        with contextlib.ExitStack() as stack:
            full = open_job("full", stack)
            for name in wanted:
                try:
                    job = open_job(name, stack)
                except JaxftError as error:  # such as experts, which the embedded model does not have
                    print(f"{name}: left out: {error}")
                    continue
                timed(full), timed(job)
                pairs = [(timed(full), timed(job)) for _ in range(options.steps)]
                row = job["row"] | {"time": statistics.median(b / a for a, b in pairs)}
                if options.tpu:
                    row["hbm_gib"] = hbm(name, options.tpu)
                    results["tpu"] = options.tpu
                results["rows"][name] = row
                held = (row["gradient_bytes"] + row["optimizer_bytes"]) / (
                    full["row"]["gradient_bytes"] + full["row"]["optimizer_bytes"]
                )
                shown = f"{100 * row['share']:8.3f} % trained, {100 * held:6.2f} % held"
                print(f"{name:28}{shown}, {row['time']:.2f} of the time", flush=True)
                if row["share"] <= 0.05 and held > MOST:
                    print(f"{name}: trains {row['share']:.2%} and holds {held:.1%}")
                RESULTS.write_text(json.dumps(results, indent=2) + "\n")
                del job
                jax.clear_caches() if len(results["rows"]) % 8 == 0 else None
    PAGE.write_text(page(results))


if __name__ == "__main__":
    main()
