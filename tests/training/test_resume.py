"""A run killed at any moment and started again ends bit by bit like one that was never interrupted."""

import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jaxft.checkpoint import Checkpointer
from jaxft.training import Interrupted, read_metrics, train
from tests.training.run_tiny import log, start
from tests.training.tiny import tiny_config, write_tiny

STEPS = 60
SECTIONS = {
    "hft": {"method": {"name": "hft", "rounds": 3, "optimizer_state": "carry"}},
    "lora": {"method": {"name": "lora", "rank": 4}},
}
COMMON = {
    "training": {"steps": STEPS, "learning_rate": {"name": "cosine", "peak": 1e-2}},
    "checkpoint": {"every": 3},
    "mesh": {"data": 1},
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def finish(process, output: Path) -> str:
    process.join(120)
    assert process.exitcode == 0, log(output)[-3000:]
    return log(output)


def steps_done(output: Path) -> int:
    path = output / "metrics.jsonl"
    return path.read_bytes().count(b"grad_norm") if path.exists() else 0


def has_checkpoint(output: Path) -> bool:
    return any(path.name.isdigit() for path in (output / "checkpoints").glob("*"))


def has_unfinished_save(output: Path) -> bool:
    return any("tmp" in entry.name for entry in (output / "checkpoints").glob("*"))


def send_when(process, output: Path, ready: Callable[[], bool], number: int) -> int:
    deadline = time.monotonic() + 120
    while not ready() and process.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    assert process.is_alive(), log(output)[-3000:]
    os.kill(process.pid, number)
    process.join(60)
    return process.exitcode


def outcome(output: Path) -> tuple[dict, dict, list]:
    """The checksums and arrays of the last checkpoint, and all that was measured that depends on the numbers only."""
    import orbax.checkpoint as ocp

    with Checkpointer(output / "checkpoints") as checkpointer:
        assert checkpointer.steps()[-1] == STEPS
        leaves = checkpointer.record(STEPS)["leaves"]
        stored = [name for name, leaf in leaves.items() if leaf["stored"]]
        as_numpy = ocp.args.PyTreeRestore(
            restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray) for name in stored}
        )
        arrays = checkpointer.manager.restore(STEPS, args=ocp.args.Composite(arrays=as_numpy))["arrays"]
    timing = ("second", "memory")
    records = [
        {k: v for k, v in r.items() if not any(t in k for t in timing)} for r in read_metrics(output / "metrics.jsonl")
    ]
    return leaves, {name: np.asarray(x) for name, x in arrays.items()}, records


@pytest.mark.parametrize("method", ["hft", "lora"])
def test_killed_runs_end_as_one_never_interrupted(directory, tmp_path, method):
    reference, killed = tmp_path / "reference", tmp_path / "killed"
    sections = COMMON | SECTIONS[method]
    whole = start(directory, reference, sections)
    seed = random.SystemRandom().randrange(2**32)
    print("seed of the moments of the kills:", seed)
    rng = random.Random(seed)

    first = rng.randint(1, 20)
    assert (
        send_when(start(directory, killed, sections), killed, lambda: steps_done(killed) >= first, signal.SIGKILL) == -9
    )
    interrupted_save = False
    for _ in range(3):  # the rename may win the race against the signal
        if not interrupted_save:
            # Leftovers of the kill before are removed when the run starts, so what shows after new steps is new.
            before = steps_done(killed)

            def moment(before: int = before) -> bool:
                begun = steps_done(killed) > before + 3 and has_unfinished_save(killed)
                return begun and has_checkpoint(killed)  # with none, a run starts again from the beginning

            assert send_when(start(directory, killed, sections), killed, moment, signal.SIGKILL) == -9
            interrupted_save = has_unfinished_save(killed)
    assert interrupted_save
    if method == "hft":
        again = min(steps_done(killed) + rng.randint(1, 8), STEPS - 5)
        process = start(directory, killed, sections)
        assert send_when(process, killed, lambda: steps_done(killed) >= again, signal.SIGTERM) == 143
        assert "the same command resumes" in log(killed)
    assert "resuming after step" in finish(start(directory, killed, sections), killed)
    finish(whole, reference)

    expected_leaves, expected_arrays, expected_records = outcome(reference)
    leaves, arrays, records = outcome(killed)
    assert leaves == expected_leaves
    assert arrays.keys() == expected_arrays.keys() and len(arrays) > 10
    for name, array in arrays.items():
        assert array.tobytes() == expected_arrays[name].tobytes(), name
    assert records == expected_records
    assert [r["step"] for r in records if "loss" in r] == list(range(1, STEPS + 1))
    report, expected = (json.loads((d / "report.json").read_text()) for d in (killed, reference))
    assert report["learned"] == expected["learned"] and report["forgot"] == expected["forgot"]
    is_drawn = [name for name in leaves if name.endswith(("is_trainable", "slot", "index"))]
    assert bool(is_drawn) == (method == "hft")
    # What LoRA leaves frozen is the base and is not in the checkpoint; HFT moves trained layers there, so they are.
    frozen = {name: leaf["stored"] for name, leaf in leaves.items() if name.startswith("frozen.layers.attn")}
    assert frozen and all(stored == (method == "hft") for stored in frozen.values())


def test_sigterm_saves_and_the_run_resumes_on_another_mesh(directory, tmp_path, capsys):
    sections = {"training": {"steps": 30, "learning_rate": 1e-2}, "checkpoint": {"every": 1000}}
    whole = train(tiny_config(directory, tmp_path / "whole", **sections, mesh={"data": 8}))

    def terminate():
        while steps_done(tmp_path / "moved") < 5:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=terminate)
    thread.start()
    with pytest.raises(Interrupted) as stopped:
        train(tiny_config(directory, tmp_path / "moved", **sections, mesh={"data": 8}))
    thread.join()
    assert stopped.value.code == 143
    assert "the same command resumes" in str(stopped.value)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    step = steps_done(tmp_path / "moved")
    assert 5 <= step < 30 and str(tmp_path / "moved" / "checkpoints" / str(step)) in str(stopped.value)
    capsys.readouterr()
    moved = train(tiny_config(directory, tmp_path / "moved", **sections, mesh={"fsdp": 2, "tensor": 4}))
    assert f"resuming after step {step}" in capsys.readouterr().out
    assert moved.learned == pytest.approx(whole.learned, rel=1e-4)
    losses = [
        [r["loss"] for r in read_metrics(tmp_path / n / "metrics.jsonl") if "loss" in r] for n in ("whole", "moved")
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
