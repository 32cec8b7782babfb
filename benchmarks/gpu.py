"""Fine-tuning on one GPU beside PyTorch, unattended, in under eight minutes: `python benchmarks/gpu.py`.

Llama-3.2-1B and Llama-3.1-8B with random weights, tuned in full, by HFT and by LoRA, in jaxft and in transformers with
peft (`torch_peer.py`): tokens a second, model FLOPs utilisation, peak memory. Weights, activations and moments are
bfloat16 and LoRA's factors float32, in both. Each job is a process with a time limit, and what is known is written
after every job to `benchmarks/results/gpu-DEVICE.json` and `.md`, so that a run that is cut short leaves its figures.

    python benchmarks/gpu.py                          # needs jax[cuda13]; the peer is left out where torch has no CUDA
    python benchmarks/gpu.py --models llama3.2-1b --methods lora --minutes 3
    python benchmarks/gpu.py --smoke                  # the same on a CPU with tiny shapes, in a minute: does it run?
    python benchmarks/gpu.py --compile-for h200       # jaxft's steps compiled for a GPU that is not here: do they fit?
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

from jobs import FOLDER, Job, JobFailed, Worker, compile_for, model_flops_of

# Dense bfloat16 (float32 accumulation) TFLOP/s, from NVIDIA's data sheets. Where those name the rate "with sparsity"
# it is halved. The first name that is part of the device's kind counts.
PEAK_TFLOPS = {
    "B200": 2250,  # HGX B200, "Blackwell architecture" data sheet
    "GH200": 989,  # "GH200 Grace Hopper Superchip" data sheet
    "H200 NVL": 835,  # "H200 Tensor Core GPU" data sheet, as is the next
    "H200": 989,
    "H100 PCIe": 756,  # "H100 Tensor Core GPU" data sheet, as are the next two
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,  # "A100 Tensor Core GPU" data sheet
    "L40S": 362,  # "L40S GPU" data sheet
    "L4": 121,  # "L4 Tensor Core GPU" data sheet
    "A10G": 70,  # Amazon EC2 G5: the A10 of its data sheet (125) with a lower power limit
    "A10": 125,  # "A10 Tensor Core GPU" data sheet
    "RTX 4090": 165,  # "Ada GPU architecture" whitepaper, appendix A
    "RTX 3090": 71,  # "GA102 GPU architecture" whitepaper, appendix A
}
METHODS = ("full", "lora", "hft")
MODELS = {"llama3.2-1b": "none", "llama3.1-8b": "block"}  # and what their backward pass recomputes
TINY = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_layers": 4,
    "num_heads": 4, "num_kv_heads": 2, "head_dim": 16,
}  # fmt: skip
WARM_UP = 2


def peak_flops(device: str) -> float | None:
    """FLOPs a second of a device kind, None for one that is not in the table."""
    return next((1e12 * rate for name, rate in PEAK_TFLOPS.items() if name in device), None)


def jobs_of(models: dict[str, Any], methods: list[str], batch: int, seq_len: int, smoke: bool) -> dict[str, Job]:
    """The jobs by name, in the order in which they run: what matters most first, since time may run out."""
    found = {}
    for compiled in (False,) if smoke else (False, True):  # compiling takes a minute a job: last
        for model, remat in models.items():
            for method in methods:
                for framework in ("torch",) if compiled else ("jax", "torch"):
                    name = f"{model} {method} {framework}{' compiled' if compiled else ''}"
                    found[name] = Job(
                        framework, TINY if smoke else model, method, batch, seq_len,
                        device="cpu" if smoke else "gpu", dtype="float32" if smoke else "bfloat16", remat=remat,
                        compile=compiled, rank=4 if smoke else 16,
                    )  # fmt: skip
    return found


def run(job: Job, steps: int, limit: float, log: Path) -> dict[str, Any]:
    """The figures of one job, or `{"failed": why}`, after at most `limit` seconds."""
    end = time.monotonic() + limit
    # Nearly all of the memory, so that what does not fit is the model's doing; the process has the device to itself.
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    with Worker(job, environment=environment, log=log) as worker:
        try:
            facts = worker.ready(limit)
            first = worker.step(WARM_UP, max(end - time.monotonic(), 1))
            # As many steps as fit in half of what is left, so that a slow one still gives a figure.
            left = max(end - time.monotonic(), 0.0) / 2
            count = max(1, min(steps, int(left / max(first["wall"][-1], 1e-3))))
            timed = worker.step(count, max(end - time.monotonic(), 1))
        except JobFailed as error:
            return {"failed": why(str(error))}
    seconds = statistics.median(timed["wall"])
    flops, peak = model_flops_of(job), peak_flops(facts["device"])
    return facts | {
        "steps": count,
        "first_step_seconds": first["wall"][0],
        "step_seconds": seconds,
        "tokens_per_second": job.batch * job.seq_len / seconds,
        "model_flops": flops,
        "model_flops_utilisation": flops / seconds / peak if peak else None,
        "peak_bytes": timed["peak_bytes"],
        "loss": timed["losses"][-1],
    }


def why(message: str) -> str:
    """A failure in one sentence: lack of memory has many spellings."""
    memory = ("RESOURCE_EXHAUSTED", "OutOfMemory", "out of memory", "status -9")
    return "does not fit in memory" if any(spelling in message for spelling in memory) else message


def table(record: dict[str, Any]) -> str:
    """The Markdown page of a record."""
    peak = peak_flops(record["device"] or "")
    of_peak = (
        f"utilisation is of {peak / 1e12:,.0f} TFLOP/s (dense bfloat16)" if peak else "its peak is not in the table"
    )
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
        f"# {record['device']}, {record['date']}\n",
        f"Written by `python benchmarks/gpu.py`; do not edit. {record['batch']} x {record['seq_len']} tokens a step, "
        f"random weights, AdamW, {record['dtype']}; {record['machine']}; {versions}.\n",
        "FLOPs are those the method needs (forward pass, gradients of activations, gradients of the weights that "
        f"train, nothing recomputed); {of_peak}. Peak memory: of the device's allocator (of the process on a CPU).",
        "\n| model | method | framework | tokens/s | to torch | step ms | MFU | peak GiB | compile s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    jobs = record["jobs"]
    for name, found in jobs.items():
        model, method, *framework = name.split(" ")
        head = f"| {model} | {method} | {' '.join(framework)} | "
        if "failed" in found:
            lines.append(head + f"{found['failed']} | | | | | |")
            continue
        peers = [jobs.get(f"{model} {method} torch{kind}", {}) for kind in ("", " compiled")]
        best = max((p["tokens_per_second"] for p in peers if "tokens_per_second" in p), default=None)
        ratio = f"{found['tokens_per_second'] / best:.2f}x" if best and framework == ["jax"] else ""
        share = found["model_flops_utilisation"]
        compile_seconds = found.get("compile_seconds")
        if "attention" in found:
            head = f"{head[:-3]}, {found['attention']} attention | "
        lines.append(
            head + f"{found['tokens_per_second']:,.0f} | {ratio} | {1e3 * found['step_seconds']:,.1f} | "
            f"{'' if share is None else f'{share:.1%}'} | {found['peak_bytes'] / 2**30:.2f} | "
            f"{'' if compile_seconds is None else f'{compile_seconds:.0f}'} |"
        )
    if record["notes"]:
        lines += ["", *record["notes"]]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="names of jaxft.models.presets")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=20, help="timed steps of a job, if its time allows")
    parser.add_argument("--minutes", type=float, default=7.5, help="no job starts or goes on after so long")
    parser.add_argument("--limit", type=float, default=90, help="the most seconds one job may take")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on a CPU: whether it runs, not how fast")
    parser.add_argument("--compile-for", metavar="GPU", help="only compile, for one that jaxft plan knows")
    parser.add_argument("--results", type=Path, default=FOLDER / "results", help="where the figures go")
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"  # this process only counts FLOPs; the device is for those it starts
    end = time.monotonic() + 60 * options.minutes
    models = {"tiny": "none"} if options.smoke else {m: MODELS.get(m, "block") for m in options.models}
    batch, seq_len = (2, 16) if options.smoke else (options.batch, options.seq_len)
    if options.compile_for:
        for name, job in jobs_of(models, options.methods, batch, seq_len, options.smoke).items():
            if job.framework == "jax":
                print(f"{name}: {described(compile_for(job, options.compile_for))}", flush=True)
        return
    record: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": None, "batch": batch, "seq_len": seq_len, "dtype": "float32" if options.smoke else "bfloat16",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "versions": {}, "jobs": {}, "notes": [],
    }  # fmt: skip
    options.results.mkdir(parents=True, exist_ok=True)
    absent: dict[str, str] = {}  # frameworks that cannot run here, and why
    for name, job in jobs_of(models, options.methods, batch, seq_len, options.smoke).items():
        if job.framework in absent:
            continue
        left = end - time.monotonic()
        if left < (1 if options.smoke else 15):
            record["jobs"][name] = {"failed": "not run: the time was up"}
        else:
            print(f"{name} ...", end=" ", flush=True)
            log = options.results / "gpu-job.log"
            begin = time.monotonic()
            found = run(job, 2 if options.smoke else options.steps, min(left, options.limit), log)
            found["seconds"] = round(time.monotonic() - begin, 1)
            if missing := unusable(job, found):
                absent[job.framework] = missing
                record["notes"].append(f"{job.framework} was left out: {missing}.")
                print(missing, flush=True)
            else:
                record["jobs"][name] = found
                print(found.get("failed") or f"{found['tokens_per_second']:,.0f} tokens/s", flush=True)
            if "device" in found:
                record["device"] = record["device"] or found["device"]
                record["versions"] |= found.pop("versions")
            log.unlink(missing_ok=True)
        if not record["jobs"]:
            continue
        stem = "gpu-smoke" if options.smoke else f"gpu-{(record['device'] or 'none').replace(' ', '-')}"
        (options.results / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")
        (options.results / f"{stem}.md").write_text(table(record))
    print(table(record) if record["jobs"] else "Nothing ran here.")


def described(found: dict[str, Any]) -> str:
    """What is known of a step that was compiled and has not run."""
    gib = (found["state_bytes"] + found["temporary_bytes"]) / 2**30
    return (
        f"{gib:.2f} GiB ({found['temporary_bytes'] / 2**30:.2f} of them temporary), {found['flops'] / 1e12:.1f} TFLOP, "
        f"{found['flops'] / found['model_flops']:.3f} times those of the model, {found['attention']} attention, "
        f"compiled in {found['compile_seconds']:.0f} s"
    )


def unusable(job: Job, found: dict[str, Any]) -> str | None:
    """Why a framework cannot run here at all, if that is why the job failed."""
    message = found.get("failed", "")
    signs = (
        "ModuleNotFoundError",
        "ImportError",
        "has no GPU",
        f"not on {job.device}",
        "initialize backend",
    )
    return message if any(sign in message for sign in signs) else None


if __name__ == "__main__":
    main()
