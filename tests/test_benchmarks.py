"""The pieces of the benchmarks: a job in its process, the peers, the pages they write."""

import importlib
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxft.distributed.topology import CHIPS, MISSING_CUDA, find_cuda_plugin
from tests.environment import xla_flags

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
MODEL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_layers": 4,
    "num_heads": 4, "num_kv_heads": 2, "head_dim": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def bench():
    """The benchmark modules, which import one another by their bare names."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        names = ("jobs", "torch_peer", "cpu", "gpu", "loss", "peers", "peer_job", "forgetting")
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(BENCHMARKS))


def job(bench, framework, method, **fields):
    return bench["jobs"].Job(framework, MODEL, method, 2, 8, rank=2, **fields)


@pytest.mark.parametrize("method", ["lora", "hft"])
def test_the_peer_trains_as_many_parameters_and_learns(bench, method):
    pytest.importorskip("torch")
    ours, facts = bench["jobs"].prepare(job(bench, "jax", method))
    theirs, peer = bench["torch_peer"].prepare(job(bench, "torch", method))
    assert facts["parameters"] == peer["parameters"] - (peer["trained_parameters"] if method == "lora" else 0)
    assert facts["trained_parameters"] == peer["trained_parameters"]
    for step in (ours, theirs):
        losses = [step() for _ in range(3)]
        assert losses[2] < losses[0]  # on one batch


def test_a_job_runs_in_its_own_process_and_says_why_it_fails(bench):
    jobs = bench["jobs"]
    with jobs.Worker(job(bench, "jax", "no such method")) as worker:
        with pytest.raises(jobs.JobFailed, match="no such method"):
            worker.ready(300)
    with jobs.Worker(job(bench, "jax", "full", threads=1)) as worker:
        assert worker.ready(300)["trained_parameters"] > 0
        found = worker.step(2, 300)
        assert len(found["wall"]) == len(found["losses"]) == 2
        assert found["peak_bytes"] > 2**20
    with jobs.Worker(job(bench, "jax", "full")) as worker:
        with pytest.raises(jobs.JobFailed, match="no answer"):
            worker.ready(0.01)


@pytest.mark.skipif(not find_cuda_plugin(), reason=MISSING_CUDA)
@pytest.mark.parametrize("method", ["lora", "hft"])
def test_the_step_of_the_gpu_benchmark_compiles_for_one_that_is_not_here(bench, method):
    gpu = bench["gpu"]
    jobs = gpu.jobs_of({"llama3.2-1b": "none"}, [method], 4, 2048, smoke=False)
    found = bench["jobs"].compile_for(jobs[f"llama3.2-1b {method} jax"], "h200")
    assert found["attention"] == "cudnn" and 1 <= found["flops"] / found["model_flops"] < 1.03
    assert found["state_bytes"] + found["temporary_bytes"] < 141e9
    assert "cudnn attention" in gpu.described(found)


def test_a_gpu_run_that_finds_no_gpu_says_so_and_the_page_says_what_is_known(bench, tmp_path):
    gpu = bench["gpu"]
    assert gpu.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert gpu.peak_flops("NVIDIA L40S") != gpu.peak_flops("NVIDIA L4")
    assert gpu.peak_flops("cpu") is None
    assert all(gpu.peak_flops(chip.target.name) == chip.flops for chip in CHIPS.values() if chip.is_gpu), "as plans say"
    missing = gpu.unusable(
        job(bench, "torch", "full", device="gpu"),
        {"failed": "RuntimeError: PyTorch has no GPU here"},
    )
    assert missing and "has no GPU" in missing
    assert gpu.unusable(job(bench, "torch", "full"), {"failed": gpu.why("RESOURCE_EXHAUSTED: ...")}) is None
    names = list(gpu.jobs_of(gpu.MODELS, list(gpu.METHODS), 4, 2048, smoke=False))
    assert len(names) == 18 and names[0] == "llama3.2-1b full jax" and names[-1] == "llama3.1-8b hft torch compiled"
    done = {"tokens_per_second": 200.0, "step_seconds": 0.1, "model_flops_utilisation": 0.5, "peak_bytes": 2**30}
    record = {
        "date": "2026-01-01", "device": "NVIDIA H200", "batch": 4, "seq_len": 2048, "dtype": "bfloat16",
        "machine": "m", "versions": {"jax": "0"}, "notes": ["torch was left out."],
        "jobs": {
            "m full jax": done | {"attention": "cudnn"}, "m full torch": done | {"tokens_per_second": 100.0},
            "m hft jax": {"failed": "does not fit in memory"},
        },
    }  # fmt: skip
    page = gpu.table(json.loads(json.dumps(record)))
    assert "| m | full | jax, cudnn attention | 200 | 2.00x | 100.0 | 50.0% | 1.00 |" in page
    assert "| m | hft | jax | does not fit in memory |" in page and "torch was left out." in page


def test_flops_of_a_job_come_from_shapes_alone(bench):
    """HFT saves the weight gradients of the frozen half, LoRA of all."""
    full, half, lora = (bench["jobs"].model_flops_of(job(bench, "jax", m)) for m in ("full", "hft", "lora"))
    assert full > half > lora > full / 2
    preset = bench["jobs"].Job("jax", "llama3.2-1b", "full", 1, 2048)
    # 1.24 billion parameters, all in matrices (the tied table is the head): 6 FLOPs each a token, and attention.
    assert bench["jobs"].model_flops_of(preset) == pytest.approx(6 * 1.236e9 * 2048, rel=0.07)


def test_losses_timed_on_this_device_agree(bench):
    rows = [row.split("|")[1:-1] for row in bench["loss"].timed(24, 32, 64, repeats=2)]
    names, heads, values = ([row[n].strip() for row in rows] for n in (0, 2, 3))
    assert names[:2] == ["jaxft", "whole logits"] and heads.count("trained") == heads.count("frozen")
    assert float(values[0]) == pytest.approx(float(values[1]), abs=1e-3)
    assert all(float(row[5]) > 0 for row in rows)


def test_ratios_are_medians_over_neighbouring_steps(bench):
    ours, theirs = {"wall": [1.0, 2.0, 30.0]}, {"wall": [2.0, 4.0, 3.0]}
    assert bench["cpu"].ratio(ours, theirs, "wall") == 0.5


def sequence_of(learned: float, forgot: float) -> dict:
    """Each of two tasks falls by `learned` when it is learned; then the first, and pretraining, rise by `forgot`."""
    start = {"a": 9.0, "b": 9.0, "python-docs": 1.0}
    middle = start | {"a": 9.0 - learned}
    end = {"a": 9.0 - learned + forgot, "b": 9.0 - learned, "python-docs": 1.0 + forgot}
    return {"tasks": ["a", "b"], "losses": [start, middle, end]}


def test_forgetting_is_compared_where_full_tuning_learned_as_much(bench):
    full = {"1e-4": (2.0, 1.0), "1e-3": (4.0, 3.0), "1e-2": (5.0, 9.0)}
    sequences = {
        "full": {rate: {seed: sequence_of(*at) for seed in "01"} for rate, at in full.items()},
        "hft": {
            "1e-3": {"0": sequence_of(3.0, 1.5), "1": sequence_of(4.0, 2.5)},  # full forgets 2 and 3 there
            "1e-2": {"0": sequence_of(3.0, 1.5), "1": sequence_of(6.0, 2.5)},  # more than full learns at any rate
        },
    }
    found = bench["forgetting"].at_equal_learning({"sequences": sequences})
    assert set(found) == {("hft", 1e-3)}
    learned, row = found["hft", 1e-3]
    assert learned == 3.5 and row == {"forgot_tasks": (0.5, 0.0), "forgot_pretraining": (0.5, 0.0)}


def test_a_peer_is_counted_as_jaxft_is_and_says_why_it_fails(bench, tmp_path, monkeypatch, capfd):
    donated = jax.jit(lambda x, y: (x + 1, y.sum()), donate_argnums=0)
    shape = jax.ShapeDtypeStruct((256, 1024), jnp.float32)
    monkeypatch.setattr(sys, "__stdout__", sys.stdout)
    seconds = {"compile_seconds": 2.0, "compile_cpu_seconds": 3.0}
    bench["peer_job"].report(donated.lower(shape, shape).compile(), seconds, "as it comes", ("no-such-package",))
    found = json.loads(capfd.readouterr().out)
    assert found["memory_gib"]["arguments"] == 2 * 2**20 / 2**30
    assert found["memory_gib"]["results"] < 2**10 / 2**30  # the donated array is written in place
    assert found["hbm_gib"] == sum(found["memory_gib"].values())
    assert found["versions"]["no-such-package"] == "not installed" and found["versions"]["jax"] == jax.__version__

    peers = bench["peers"]
    monkeypatch.setattr(peers, "HERE", tmp_path)
    (tmp_path / "peer_tunix.py").write_text(f"import sys\nprint('noise')\nprint({json.dumps(json.dumps(found))})")
    (tmp_path / "peer_maxtext.py").write_text("raise ValueError(f'no {__import__(\"sys\").argv[1]} here')")
    assert peers.compile_peer("tunix", "full", ("llama3",), Path(sys.executable)) == found
    failed = peers.compile_peer("maxtext", "lora", (), Path(sys.executable))
    assert failed == {"failed": "ValueError: no lora here"}

    runs = [{"compile_seconds": n, "compile_cpu_seconds": n, "versions": "jax 0"} for n in (1.0, 2.0)]
    ours = [found | {"hbm_gib": found["hbm_gib"] / 2} | run for run in runs]
    rows = {"tunix full": found | {"jaxft": ours[0]}, "maxtext full": failed | {"jaxft": ours[1]}}
    page = peers.section(rows)
    assert "| jaxft | full | **0.00** (0.00 + 0.00 + 0.00) | 2 (2) |  |  | configs/llama3.1-8b-full.yaml;" in page
    assert "| no-such-package not installed | full |" in page and "| 2 (3) | 1 (1) | 2.00, 3.00 | as it comes;" in page
    assert "| maxtext | full | | | | | failed: ValueError: no lora here |" in page
    assert peers.section({}) == ""


def test_processes_can_be_started_where_no_flags_are_set(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")
    assert xla_flags(4) == "--xla_force_host_platform_device_count=4"
    monkeypatch.setenv("XLA_FLAGS", "--a=1 --xla_force_host_platform_device_count=8 --b=2")
    assert xla_flags(2).split() == ["--a=1", "--b=2", "--xla_force_host_platform_device_count=2"]
