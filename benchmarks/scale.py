"""The tables of docs/scale.md: what jobs need on TPUs and GPUs, read from train steps compiled ahead of time.

    python benchmarks/scale.py                  # compile the rows that have no result yet, write docs/scale.md
    python benchmarks/scale.py --only 70b       # only rows whose name contains it
    python benchmarks/scale.py --again          # compile all rows again

A row takes one to two minutes on two idle cores and needs the TPU compiler (`pip install "jaxft[tpu]"`), no TPU; one of
GPUs takes some seconds and needs the GPU compiler (docs/planning.md), no GPU.
Results are kept in benchmarks/results/scale.json, one row at a time, so an interrupted run goes on where it stopped.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import peers

from jaxft.distributed.topology import compiler

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "scale.json"
PAGE = ROOT / "docs" / "scale.md"
MASTERS = ("model.param_dtype=float32", "model.frozen_dtype=bfloat16")  # of what trains; the rest stays bfloat16
SMALL = ("model.path=preset:qwen3-0.6b",)
EXPERTS = ("model.path=preset:qwen3-30b-a3b", "data.batch_size=64", "mesh=auto")
TILES = "model.attention=splash:128x128"
KEPT = "model.remat=attention"
LONG = ("data.seq_len=131072", "data.batch_size=8", "mesh=auto")
LARGEST = ("model.path=preset:llama3.1-405b", "data.batch_size=512", "data.seq_len=8192", "mesh={fsdp: 256, tensor: 8}")

# name: (configuration, topology, overrides, the most GiB a chip it should need)
ROWS: dict[str, tuple[str, str, tuple[str, ...], float | None]] = {
    "8b full": ("llama3.1-8b-full", "v5e:4x4", (), 6.0),
    "8b hft": ("llama3.1-8b-hft", "v5e:4x4", (), 4.3),
    "8b lora": ("llama3.1-8b-lora", "v5e:4x4", (), 3.2),
    "8b shira": ("llama3.1-8b-lora", "v5e:4x4", ("method={name: shira}",), None),
    "8b prompt-tuning": ("llama3.1-8b-lora", "v5e:4x4", ("method={name: prompt-tuning}",), None),
    "8b full, moments in host memory": ("llama3.1-8b-full", "v5e:4x4", ("training.offload=[optimizer]",), None),
    "8b hft, moments and frozen layers in host memory": (
        "llama3.1-8b-hft", "v5e:4x4", ("training.offload=[optimizer, frozen]",), None,
    ),
    "8b lora, frozen layers in host memory": ("llama3.1-8b-lora", "v5e:4x4", ("training.offload=[frozen]",), None),
    "8b full, float32 masters": ("llama3.1-8b-full", "v5e:4x4", MASTERS, None),
    "8b full, float32 masters, moments in host memory": (
        "llama3.1-8b-full", "v5e:4x4", (*MASTERS, "training.offload=[optimizer]"), None,
    ),
    "8b hft, float32 masters": ("llama3.1-8b-hft", "v5e:4x4", MASTERS, None),
    "8b lora, float32 masters": ("llama3.1-8b-lora", "v5e:4x4", MASTERS, None),
    "70b hft": ("llama3.1-70b-hft", "v5e:16x16", (), 10.0),
    "70b full": ("llama3.1-70b-full", "v5p:4x8x8", (), None),
    "70b lora": ("llama3.1-70b-lora", "v5e:8x16", (), None),
    "70b hft, 2 slices": (
        "llama3.1-70b-hft", "2*v5e:16x16", ("mesh.data=2", "mesh.dcn=2", "data.batch_size=512"), None,
    ),
    "8b full, 2 slices": ("llama3.1-8b-full", "2*v5e:4x4", ("mesh.data=2", "mesh.dcn=2", "data.batch_size=32"), None),
    "qwen3 0.6b full": ("llama3.1-8b-full", "v5e:2x4", SMALL, None),
    "qwen3 0.6b lora": ("llama3.1-8b-lora", "v5e:2x4", SMALL, None),
    "qwen3 0.6b lora, small tiles": ("llama3.1-8b-lora", "v5e:2x4", (*SMALL, TILES), None),
    "qwen3 0.6b lora, attention kept": ("llama3.1-8b-lora", "v5e:2x4", (*SMALL, KEPT), None),
    "qwen3 30b-a3b full": ("llama3.1-8b-full", "v5e:8x8", EXPERTS, None),
    "qwen3 30b-a3b full, small tiles": ("llama3.1-8b-full", "v5e:8x8", (*EXPERTS, TILES), None),
    "qwen3 30b-a3b full, attention kept": ("llama3.1-8b-full", "v5e:8x8", (*EXPERTS, KEPT), None),
    "qwen3 30b-a3b lora": ("llama3.1-8b-lora", "v5e:8x8", EXPERTS, None),
    "qwen3 30b-a3b lora, small tiles": ("llama3.1-8b-lora", "v5e:8x8", (*EXPERTS, TILES), None),
    "qwen3 30b-a3b lora, attention kept": ("llama3.1-8b-lora", "v5e:8x8", (*EXPERTS, KEPT), None),
    "8b lora, rows of 131,072": ("llama3.1-8b-lora", "v5p:4x4x4", LONG, None),
    "8b lora, rows of 131,072, attention kept": ("llama3.1-8b-lora", "v5p:4x4x4", (*LONG, KEPT), None),
    "8b full, tensor 4": ("llama3.1-8b-full", "v5e:4x4", ("mesh={fsdp: 4, tensor: 4}",), None),
    "8b lora, tensor 4": ("llama3.1-8b-lora", "v5e:4x4", ("mesh={fsdp: 4, tensor: 4}",), None),
    "70b full, tensor 4": ("llama3.1-70b-full", "v5p:4x8x8", ("mesh={fsdp: 64, tensor: 4}",), None),
    "405b full, tensor 8": ("llama3.1-70b-full", "v5p:8x16x16", LARGEST, None),
    "70b hft, 16 slices": (
        "llama3.1-70b-hft", "16*v5e:16x16", ("mesh.data=16", "mesh.dcn=16", "data.batch_size=4096"), None,
    ),
}  # fmt: skip

# One job on more and more chips, each with a row of 2048 tokens.
LADDER: dict[str, tuple[str, str, tuple[str, ...], float | None]] = {
    f"8b {method}, {slices * chips:,} chips": (
        f"llama3.1-8b-{method}",
        f"{f'{slices}*' if slices > 1 else ''}v5e:{slice_}",
        ("mesh=auto", f"data.batch_size={slices * chips}"),
        None,
    )
    for method in ("full", "hft")
    for slices, slice_, chips in (
        (1, "4x4", 16),
        (1, "8x8", 64),
        (1, "16x16", 256),
        (4, "16x16", 256),
        (16, "16x16", 256),
    )
}

MIXTURE = ("model.path=preset:qwen3-30b-a3b", "mesh=auto")
GPUS: dict[str, tuple[str, str, tuple[str, ...], float | None]] = {
    "gpu 1b full": ("llama3.1-8b-full", "h200", ("model.path=preset:llama3.2-1b", "mesh=auto"), None),
    "gpu 8b full, one GPU": ("llama3.1-8b-full", "h200", ("mesh=auto",), None),
    "gpu 8b lora, one GPU": ("llama3.1-8b-lora", "h100", ("mesh=auto",), None),
    "gpu 8b full": ("llama3.1-8b-full", "h100:8", ("mesh=auto",), None),
    "gpu 8b hft": ("llama3.1-8b-hft", "h100:8", ("mesh={fsdp: 8}",), None),
    "gpu 8b lora": ("llama3.1-8b-lora", "h100:8", ("mesh={fsdp: 8}",), None),
    "gpu 8b lora, a copy on each GPU": ("llama3.1-8b-lora", "h100:8", ("mesh=auto",), None),
    "gpu 8b lora, A100": ("llama3.1-8b-lora", "a100:8", ("mesh={fsdp: 8}",), None),
    "gpu 8b lora, B200": ("llama3.1-8b-lora", "b200:8", ("mesh={fsdp: 8}",), None),
    "gpu 8b shira": ("llama3.1-8b-lora", "h100:8", ("method={name: shira}", "mesh={fsdp: 8}"), None),
    "gpu 8b prompt-tuning": ("llama3.1-8b-lora", "h100:8", ("method={name: prompt-tuning}", "mesh={fsdp: 8}"), None),
    "gpu 8b full, tensor 2": ("llama3.1-8b-full", "h100:8", ("mesh={fsdp: 4, tensor: 2}",), None),
    "gpu 8b full, 2 nodes": ("llama3.1-8b-full", "2*h100:8", ("mesh={fsdp: 16}",), None),
    "gpu 8b full, 2 nodes, a copy on each": (
        "llama3.1-8b-full", "2*h100:8", ("mesh={data: 2, dcn: 2, fsdp: 8}",), None,
    ),
    "gpu 8b lora, rows of 32,768, sequence 2": (
        "llama3.1-8b-lora", "h100:8", ("mesh={fsdp: 4, sequence: 2}", "data.seq_len=32768", "data.batch_size=8"), None,
    ),
    "gpu 70b lora": ("llama3.1-70b-lora", "h200:8", ("mesh=auto", "data.batch_size=64"), None),
    "gpu 70b full, 8 nodes": ("llama3.1-70b-full", "8*h200:8", ("mesh={fsdp: 64}", "data.batch_size=64"), None),
    "gpu gemma3 4b lora": ("llama3.1-8b-lora", "h100:8", ("model.path=preset:gemma3-4b", "mesh=auto"), None),
    "gpu qwen3 30b-a3b lora": ("llama3.1-8b-lora", "h100:8", MIXTURE, None),
    "gpu qwen3 30b-a3b full": ("llama3.1-8b-full", "h200:8", MIXTURE, None),
    "gpu mixtral 8x7b lora": ("llama3.1-8b-lora", "h100:8", ("model.path=preset:mixtral-8x7b", "mesh=auto"), None),
}  # fmt: skip
ALL = ROWS | LADDER | GPUS


def compile_row(config: str, topology: str, overrides: tuple[str, ...]) -> dict:
    """`jaxft plan --json` of one row, in a process of its own: what it allocated is free afterwards."""
    command = [sys.executable, "-m", "jaxft", "plan", f"configs/{config}.yaml", *overrides, "-t", topology, "--json"]
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}  # a cached program would compile in no time
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--again", action="store_true", help="compile rows that have a result too")
    parser.add_argument("--page", action="store_true", help="write the page from the results there are")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name, (config, topology, overrides, _) in ALL.items():
        if options.page or options.only not in name or (name in results and not options.again):
            continue
        print(f"{name}: {config} on {topology} ...", flush=True)
        found = compile_row(config, topology, overrides)
        results[name] = found | {"date": datetime.date.today().isoformat(), "versions": versions(name in GPUS)}
        print(f"  {found['hbm_gib_per_chip']:.2f} GiB a chip, compiled in {found['compile_seconds']:.0f} s", flush=True)
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(page(results, peers.kept()))


def versions(is_gpu: bool) -> str:
    """The packages that decide the figures; compilers may lie in folders of their own."""
    library, names = compiler(), ("jax", "jax-cuda13-plugin" if is_gpu else "libtpu")
    beside = [f"{sys.prefix}/cuda", *([str(library.parent.parent)] if library else [])]
    found = {d.name: d.version for d in distributions(path=[*beside, *sys.path]) if d.name in names}
    return ", ".join(f"{package} {found.get(package, 'unknown')}" for package in names)


HEAD = """# Scale

What jobs need on TPUs, by XLA's own TPU compiler, without a TPU: each row is the train step that `jaxft train` would
run, compiled ahead of time by `jaxft plan`. Written by `python benchmarks/scale.py`; do not edit.

- **HBM**: GiB a chip: arguments, results not written in place, temporaries. *state* is what lives between steps
  (parameters, moments), *temporary* the rest. AdamW; per-layer recomputation; parameters divided over all chips (FSDP).
- **host**: GiB of host memory for a chip (`training.offload`, `remat: offload`), not in HBM. Copies are not timed.
- **FLOPs**: of the compiled step over the least the method needs (forward, gradients of activations, gradients of the
  weights that train, what is recomputed), loops counted as often as they run. Attention computes whole tiles, of 256
  positions by 256 keys where heads share keys and of 512 x 512 elsewhere, of which the diagonal ones are half masked;
  that weighs most in small models and in mixtures of experts. *small tiles*: `model.attention=splash:128x128`
  ([Tiles of attention](planning.md#tiles-of-attention)); *attention kept*: `model.remat=attention`
  ([What is recomputed](planning.md#what-is-recomputed)); *tensor*: heads and columns divided over so many chips, FSDP
  over the rest.
- **sent**: GiB one chip sends a step; *hidden*: the part of it that runs beside matrix products.
- **best**: roofline, every unit at its peak: milliseconds a step and model FLOPs utilisation. A bound, no forecast.
- **cautious**: the same if a product hides no more than is sent while it lasts, where *best* takes all that is sent
  beside any product for hidden.
- **compile**: seconds on the machine of that day, and of CPU time. Another one of two cores took three times as long.
- 70b hft keeps the inputs of its layers in host memory (`remat: offload`), 5 GiB a chip.
- Everything is bfloat16 unless the row says that what trains has float32 masters and moments.
"""
COLUMNS = """
| job | chips | tokens | HBM (goal) | state | temporary | host | FLOPs | sent | hidden | best | cautious | compile |
|---|---|---|---|---|---|---|---|---|---|---|---|---|
"""


def page(results: dict, beside: dict) -> str:
    """The Markdown page of all rows that have a result, and of other libraries (`peers.kept`)."""
    missing = [name for name in ALL if name not in results]
    notes = [f"\nCompiled with {'; '.join(sorted({r['versions'] for r in results.values()}))}."] if results else []
    for day in sorted({row["date"] for row in results.values()}):
        names = [name for name in ALL if results.get(name, {}).get("date") == day]
        notes.append(f"\nOf {day}: {'; '.join(names)}.")
    if missing:
        notes.append(f"\nNot compiled yet: {'; '.join(missing)}.")
    gpus = table(GPUS, results)
    return (
        HEAD + COLUMNS + table(ROWS, results) + "\n".join(notes) + "\n" + ladder(results)
        + (GPU_HEAD + COLUMNS.replace("chips", "GPUs") + gpus if gpus else "") + peers.section(beside)
    )  # fmt: skip


def table(rows: dict[str, tuple[str, str, tuple[str, ...], float | None]], results: dict) -> str:
    """The lines of those that have a result."""
    lines = []
    for name, (_, topology, _, goal) in rows.items():
        row = results.get(name)
        if row is None:
            continue
        memory = row["memory_gib"]
        state = memory["trained"] + memory["frozen"] + memory["optimizer"]
        best, waits = row["roofline"], sum(row.get("host_gib", {}).values())
        host = f"{waits:.2f}" if waits else ""
        lines.append(
            f"| {name.removeprefix('gpu ')} | {topology} | {row['tokens_per_step'] // 1024}k | "
            f"**{row['hbm_gib_per_chip']:.2f}**"
            f"{f' ({goal:g})' if goal else ''}{'' if row['fits'] else ', does not fit'} | {state:.2f} | "
            f"{memory['temporaries'] + memory['results']:.2f} | {host} | "
            + (
                f"{row['flops_ratio']:.3f} | {sum(row['collective_bytes'].values()) / 2**30:.1f} | "
                f"{row['collective_share_overlapped']:.0%} | {best['step_seconds'] * 1e3:,.0f} ms, {best['mfu']:.0%} | "
                f"{best['cautious_step_seconds'] * 1e3:,.0f} ms | "
                if best
                else "| | | | | "
            )
            + f"{row['compile_seconds']:.0f} ({row['compile_cpu_seconds']:.0f}) |\n"
        )
    return "".join(lines)


GPU_HEAD = """
## GPUs

The same by XLA's GPU compiler, without a GPU ([GPUs](planning.md#gpus)): columns as above. A GPU sends over all of its
NVLinks; of several nodes each GPU has a network adapter of 400 Gbit/s. Attention is cuDNN's; what it needs besides,
and what autotuning would change on a GPU, is not known here. None of these programs has run.
"""

LADDER_HEAD = """
## From 16 to 4,096 chips

One job, a row of 2,048 tokens a chip, on more and more chips: what a chip holds and sends should not grow.

| job | chips | HBM | state | temporary | sent | hidden | network | best | cautious |
|---|---|---|---|---|---|---|---|---|---|
"""


def ladder(results: dict) -> str:
    """The section of the jobs of `LADDER` that have a result."""
    lines = []
    for name, (_, topology, _, _) in LADDER.items():
        if (row := results.get(name)) is None or row["roofline"] is None:
            continue
        memory, best = row["memory_gib"], row["roofline"]
        state = memory["trained"] + memory["frozen"] + memory["optimizer"]
        lines.append(
            f"| {name} | {topology} | **{row['hbm_gib_per_chip']:.2f}** | {state:.2f} | "
            f"{memory['temporaries'] + memory['results']:.2f} | {sum(row['collective_bytes'].values()) / 2**30:.1f} | "
            f"{row['collective_share_overlapped']:.0%} | {best['network_seconds'] * 1e3:,.0f} ms | "
            f"{best['step_seconds'] * 1e3:,.0f} ms, {best['mfu']:.0%} | "
            f"{best['cautious_step_seconds'] * 1e3:,.0f} ms |"
        )
    return LADDER_HEAD + "\n".join(lines) + "\n" if lines else ""


if __name__ == "__main__":
    main()
