"""Other libraries beside jaxft: train steps of the same job, compiled ahead of time for the same TPU topology.

    python benchmarks/peers.py                  # make the environments, compile what has no result, write the page
    python benchmarks/peers.py --only maxtext   # only rows whose name contains it
    python benchmarks/peers.py --again          # compile all rows again

Llama-3.1-8B shapes, 16 x 2048 tokens, bfloat16, AdamW, on v5e:4x4; full tuning, and LoRA of rank 16 on all seven
projections. Every library has an environment of its own (2 to 9 GB, Python 3.12 or 3.13), the TPU compiler included,
and no TPU is needed. Before each row jaxft's own job is compiled, so that both saw the machine in the same state. A row
takes one to four minutes on two idle cores. Results are kept in benchmarks/results/peers.json, one row at a time.
"""

import argparse
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "peers.json"
JOBS = {"full": "llama3.1-8b-full", "lora": "llama3.1-8b-lora"}

# What pip installs for each library: its newest release with the jax and the TPU compiler that go with it. MaxText asks
# for its lowest requirements to be installed; EasyDeL does not import without torch and pillow.
REQUIREMENTS = {
    "tunix": ("google-tunix==0.1.7", "jax==0.10.2", "jaxlib==0.10.2", "libtpu==0.0.42.1"),
    "maxtext": ("maxtext[tpu]==0.2.5", "jax==0.11.1", "jaxlib==0.11.1", "libtpu==0.0.46.3", "flax==0.12.9"),
    "easydel": ("easydel[torch]==0.3.0", "pillow", "jax==0.9.2", "jaxlib==0.9.2", "libtpu==0.0.37"),
}
# name: (library, job, further arguments of its script)
ROWS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "tunix full, splash attention": ("tunix", "full", ("qwen2",)),
    "tunix full": ("tunix", "full", ("llama3",)),
    "maxtext full": ("maxtext", "full", ()),
    "easydel full": ("easydel", "full", ()),
    "tunix lora, splash attention": ("tunix", "lora", ("qwen2",)),
    "tunix lora": ("tunix", "lora", ("llama3",)),
    "maxtext lora": ("maxtext", "lora", ()),
    "easydel lora": ("easydel", "lora", ()),
}
NO_CACHE = {"JAX_ENABLE_COMPILATION_CACHE": "false"}  # a cached program would compile in no time


def environment(library: str, folder: Path, python: str | None) -> Path:
    """The interpreter of a library's environment, made anew where it has other packages than REQUIREMENTS names."""
    home, wanted = folder / library, "\n".join(REQUIREMENTS[library])
    stamp, interpreter = home / "requirements.txt", home / "bin" / "python"
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"{library}: installing {', '.join(REQUIREMENTS[library])} into {home} ...", flush=True)
        subprocess.run([python or recent_python(), "-m", "venv", "--clear", str(home)], check=True)
        subprocess.run([str(interpreter), "-m", "pip", "install", "--quiet", *REQUIREMENTS[library]], check=True)
        stamp.write_text(wanted)
    return interpreter


def compile_peer(library: str, job: str, arguments: tuple[str, ...], interpreter: Path) -> dict[str, Any]:
    """What benchmarks/peer_LIBRARY.py printed, or why it failed."""
    command = [str(interpreter), str(HERE / f"peer_{library}.py"), job, *arguments]
    done = subprocess.run(command, env=os.environ | NO_CACHE, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        return {"failed": next((line for line in reversed(said) if "Error" in line), said[-1])}
    return json.loads(done.stdout.strip().splitlines()[-1])


def compile_ours(job: str) -> dict[str, Any]:
    """The same job in jaxft, of `jaxft plan --json`."""
    command = [sys.executable, "-m", "jaxft", "plan", f"configs/{JOBS[job]}.yaml", "-t", "v5e:4x4", "--json"]
    done = subprocess.run(command, cwd=HERE.parent, env=os.environ | NO_CACHE, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr.strip().splitlines()[-1]}")
    found = json.loads(done.stdout)
    return {
        "hbm_gib": found["hbm_gib_per_chip"],
        "memory_gib": {
            "arguments": sum(found["memory_gib"][name] for name in ("trained", "frozen", "optimizer", "batch")),
            "results": found["memory_gib"]["results"],
            "temporaries": found["memory_gib"]["temporaries"],
        },
        "compile_seconds": found["compile_seconds"],
        "compile_cpu_seconds": found["compile_cpu_seconds"],
        "trained_parameters": found["trained_parameters"],
    }


def recent_python() -> str:
    """An interpreter that all libraries support."""
    for name in (sys.executable, "python3.12", "python3.13"):
        path = shutil.which(name)
        asked = "import sys; sys.exit(not (3, 12) <= sys.version_info[:2] <= (3, 13))"
        if path and subprocess.run([path, "-c", asked], capture_output=True).returncode == 0:
            return path
    raise SystemExit("no Python 3.12 or 3.13 here: name one with --python")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--again", action="store_true", help="compile rows that have a result too")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    parser.add_argument("--environments", type=Path, default=cache / "jaxft" / "peers", help="where they are, or go")
    parser.add_argument("--python", help="interpreter the environments are made with: 3.12 or 3.13")
    options = parser.parse_args()
    import scale  # which imports this module for the page it writes

    results = kept()
    for name, (library, job, arguments) in ROWS.items():
        if options.only not in name or (name in results and not options.again):
            continue
        interpreter = environment(library, options.environments.resolve(), options.python)
        print(f"{name} ...", flush=True)
        ours = compile_ours(job) | {"versions": scale.versions()}
        theirs = compile_peer(library, job, arguments, interpreter)
        results[name] = theirs | {"jaxft": ours, "date": datetime.date.today().isoformat()}
        print("  " + (theirs.get("failed") or f"{figures(theirs)}; jaxft {figures(ours)}"), flush=True)
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    scale.PAGE.write_text(scale.page(json.loads(scale.RESULTS.read_text()), results))


def kept() -> dict[str, Any]:
    """Results by row, as benchmarks/results/peers.json has them."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def figures(found: dict[str, Any]) -> str:
    return f"{found['hbm_gib']:.2f} GiB, {_seconds(found)} s"


HEAD = """
## Beside other libraries

Train steps of other libraries for the same job (Llama-3.1-8B, 16 x 2048 tokens a step, everything bfloat16, AdamW; LoRA
of rank 16 on all seven projections) on v5e:4x4, compiled ahead of time from shapes, each with the jax and the TPU
compiler that go with it, and with those of its own settings that need least memory. `python benchmarks/peers.py` writes
the figures.

- **HBM**: GiB a chip, counted as above; in brackets: state that lives between steps and the batch, results not written
  in place, temporaries.
- **compile**: tracing and compiling the step, wall seconds, and CPU seconds in brackets. The machine was not always
  idle: *jaxft then* is jaxft's own job, compiled right before; its own row is the median. *times jaxft*: HBM, and CPU
  seconds of the two neighbours. jaxft and MaxText scan over the layers, tunix and EasyDeL compile each of the 32.
- tunix's Llama module has no splash attention; its Qwen2 module, which adds biases to queries, keys and values, has.
  MaxText's `train_compile` adds no adapters to the model; they are added as its fine-tuning trainer does.

| library | job | HBM | compile | jaxft then | times jaxft | settings |
|---|---|---|---|---|---|---|
"""


def section(results: dict[str, Any]) -> str:
    """The Markdown section of docs/scale.md: jaxft's row and those of the others, by job."""
    lines = []
    for job in JOBS:
        rows = {name: row for name, row in results.items() if name in ROWS and ROWS[name][1] == job}
        if not rows:
            continue
        ours = [row["jaxft"] for row in rows.values()]
        times = ("compile_seconds", "compile_cpu_seconds")
        middle = {key: statistics.median(run[key] for run in ours) for key in times}
        settings = f"configs/{JOBS[job]}.yaml; {ours[-1]['versions']}"
        lines.append(_line("jaxft", job, ours[-1] | middle, " | ", settings))
        for name in ROWS:
            if name not in rows:
                continue
            row = rows[name]
            if "failed" in row:
                lines.append(f"| {ROWS[name][0]} | {job} | | | | | failed: {row['failed'].replace('|', ' ')} |")
                continue
            versions = dict(row["versions"])
            library = " ".join(next(iter(versions.items())))
            with_versions = ", ".join(f"{package} {versions[package]}" for package in ("jax", "libtpu"))
            memory = row["hbm_gib"] / row["jaxft"]["hbm_gib"]
            cpu = row["compile_cpu_seconds"] / row["jaxft"]["compile_cpu_seconds"]
            beside = f"{_seconds(row['jaxft'])} | {memory:.2f}, {cpu:.2f}"
            lines.append(_line(library, job, row, beside, f"{row['settings']}; {with_versions}"))
    return HEAD + "\n".join(lines) + "\n" if lines else ""


def _seconds(row: dict[str, Any]) -> str:
    return f"{row['compile_seconds']:.0f} ({row['compile_cpu_seconds']:.0f})"


def _line(library: str, job: str, row: dict[str, Any], beside: str, settings: str) -> str:
    parts = " + ".join(f"{row['memory_gib'][name]:.2f}" for name in ("arguments", "results", "temporaries"))
    return f"| {library} | {job} | **{row['hbm_gib']:.2f}** ({parts}) | {_seconds(row)} | {beside} | {settings} |"


if __name__ == "__main__":
    main()
