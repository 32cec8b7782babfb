"""Step time and memory on a CPU: every method against full tuning and against PyTorch with peft.

    python benchmarks/cpu.py                        # full, LoRA and HFT; writes benchmarks/results/cpu.{json,md}
    python benchmarks/cpu.py --threads 2 --keep-memory
    python benchmarks/cpu.py --methods all --no-torch      # every registered method, with its example options
    python benchmarks/cpu.py --methods full hft --dim 512 --layers 8 --vocab 512 --batch 2 --seq-len 64 \\
        --results benchmarks/results/cpu-few-tokens        # where weight gradients and the optimizer are most of a step

Both frameworks train the same Llama (random weights, float32, AdamW, clipping), each in a process of
its own with the same number of cores. The processes take turns step by step, so that whatever else the machine does
falls on all of them, and ratios are medians over pairs of neighbouring steps. Where cores are shared with other work,
believe the processor time, with one thread: with more, PyTorch's threads wait for one another in busy loops, which
counts as work.

`--keep-memory` tells the C library's allocator, for both frameworks, to keep what is freed. By default it returns large
buffers to the system after every step, which hands them out again page by page and zeroed: a fifth of a step.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import statistics
from pathlib import Path
from typing import Any

from jobs import FOLDER, Job, JobFailed, Worker

KEEP_MEMORY = {
    "MALLOC_ARENA_MAX": "1",  # other arenas than the first cannot hold a buffer of more than 64 MiB
    "MALLOC_MMAP_THRESHOLD_": str(2**33),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
}
PEER = ("full", "lora", "hft")  # the methods that torch_peer.py knows
CLOCKS = ("processor", "wall")
SECONDS = 600  # the most a step, or the building of one, may take


class Turns:
    """Processes that take turns. Each stays until `end`; those that fail have `failed` among their figures."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self.workers: dict[str, Worker] = {}
        self.facts: dict[str, dict[str, Any]] = {}

    def start(self, name: str, job: Job) -> None:
        """Start a process, wait until its step is built, and make two steps that do not count."""
        worker = Worker(job, environment=self.environment)
        try:
            self.facts[name] = worker.ready(SECONDS)
            worker.step(2, SECONDS)
            self.workers[name] = worker
        except JobFailed as error:
            self.facts[name] = {"failed": str(error)}
            worker.close()

    def end(self, name: str) -> None:
        """End a process and forget it."""
        self.facts.pop(name, None)
        if worker := self.workers.pop(name, None):
            worker.close()

    def measure(self, rounds: int) -> dict[str, dict[str, Any]]:
        """Facts, seconds of each step (by clock) and peak memory of all that run."""
        found = {name: {**facts, **{clock: [] for clock in CLOCKS}} for name, facts in self.facts.items()}
        for _ in range(rounds):
            for name, worker in self.workers.items():
                step = worker.step(1, SECONDS)
                for clock in CLOCKS:
                    found[name][clock] += step[clock]
                found[name]["peak_bytes"] = step["peak_bytes"]
        return found


def ratio(these: dict[str, Any], those: dict[str, Any], clock: str) -> float:
    """The median of the ratios of neighbouring steps."""
    return statistics.median(a / b for a, b in zip(these[clock], those[clock], strict=True))


def methods_of(names: list[str], rank: int) -> dict[str, dict[str, Any]]:
    """Options by method. `all`: every registered method, with the options of its example."""
    if names != ["all"]:
        return {name: {"rank": rank} if name == "lora" else {} for name in names}
    from jaxft.methods.registry import methods

    return {entry.id: dict(entry.example) for entry in methods().values()}


def row(method: str, found: dict[str, dict[str, Any]]) -> str:
    """One line of the table."""
    ours, full, peer = found["jax"], found["full"], found.get("torch", {})
    if "failed" in ours:
        return f"| {method} | {ours['failed']} | | | | | | | | | |"
    median = {clock: 1e3 * statistics.median(ours[clock]) for clock in CLOCKS}
    cells = [
        method,
        f"{ours['trained_parameters'] / 1e6:.3f}",
        f"{median['processor']:.0f}",
        f"{median['wall']:.0f}",
        f"{ratio(ours, full, 'processor'):.2f}",
        f"{(ours['gradient_bytes'] + ours['optimizer_bytes']) / 2**20:.0f}",
        f"{(ours['state_bytes'] + ours['temporary_bytes']) / 2**20:.0f}",
        f"{ours['peak_bytes'] / 2**20:.0f}",
    ]
    if "processor" in peer:
        cells += [f"**{ratio(ours, peer, 'processor'):.2f}**", f"{ratio(ours, peer, 'wall'):.2f}"]
        cells += [f"{peer['peak_bytes'] / 2**20:.0f}"]
    else:
        cells += [peer.get("failed", ""), "", ""]
    return f"| {' | '.join(cells)} |"


def page(record: dict[str, Any]) -> str:
    """The Markdown page of a record."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
        f"# Steps on a CPU, {record['date']}\n",
        "Written by `python benchmarks/cpu.py`; do not edit. "
        f"{record['machine']}; {versions}; {record['threads']} thread(s); "
        f"{'freed memory kept' if record['keep_memory'] else 'the default allocator'}.",
        f"A Llama of {record['model']}; {record['batch']} x {record['seq_len']} tokens, float32, AdamW, "
        f"recomputing {record['remat']}.\n",
        "Medians over alternating steps. *Trained*, in millions. *cpu*: processor time; *to full*, *to torch*: of "
        "processor time unless it says wall; below 1 is faster. *held MiB*: gradient and optimizer "
        "state; *step MiB*: arguments and temporaries of the compiled step; *peak MiB*: of the process, "
        "compilation included.\n",
        "| method | trained | cpu ms | wall ms | to full | held MiB | step MiB | peak MiB | to torch "
        "| to torch, wall | torch's peak MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join(lines + [row(method, found) for method, found in record["methods"].items()]) + "\n"


def cpu_name() -> str:
    """The processor's name, where Linux tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(PEER))
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--remat", default="none", choices=("none", "block"))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=8, help="timed steps of each process")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep-memory", action="store_true")
    parser.add_argument("--torch", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--results", type=Path, default=FOLDER / "results" / "cpu", help="path without an extension")
    options = parser.parse_args()
    heads = max(options.dim // 64, 1)
    model = {
        "vocab_size": options.vocab, "hidden_size": options.dim, "intermediate_size": 3 * options.dim,
        "num_layers": options.layers, "num_heads": heads, "num_kv_heads": max(heads // 2, 1),
        "head_dim": options.dim // heads,
    }  # fmt: skip
    environment = KEEP_MEMORY if options.keep_memory else {}
    record: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{cpu_name()}, {os.cpu_count()} cores", "versions": {},
        "threads": options.threads, "keep_memory": options.keep_memory, "model": model,
        "batch": options.batch, "seq_len": options.seq_len, "remat": options.remat, "methods": {},
    }  # fmt: skip
    options.results.parent.mkdir(parents=True, exist_ok=True)

    def job(framework: str, method: str, chosen: dict[str, Any] | None = None) -> Job:
        return Job(
            framework, model, method, options.batch, options.seq_len,
            remat=options.remat, threads=options.threads, rank=options.rank, options=chosen,
        )  # fmt: skip

    turns = Turns(environment)
    try:
        turns.start("full", job("jax", "full"))
        for method, chosen in methods_of(options.methods, options.rank).items():
            if method != "full":
                turns.start("jax", job("jax", method, chosen))
            if options.torch and method in PEER:
                turns.start("torch", job("torch", method))
            found = turns.measure(options.rounds)
            found.setdefault("jax", found["full"])
            for facts in found.values():
                record["versions"] |= facts.pop("versions", {})
            record["methods"][method] = found
            print(row(method, found), flush=True)
            options.results.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
            options.results.with_suffix(".md").write_text(page(record))
            turns.end("jax")
            turns.end("torch")
    finally:
        for name in list(turns.workers):
            turns.end(name)
    print(page(record))


os.environ.setdefault("JAX_PLATFORMS", "cpu")

if __name__ == "__main__":
    main()
