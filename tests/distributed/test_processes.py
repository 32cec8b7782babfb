"""Jobs of several real processes, over loopback: they start alike, compute alike, and end together."""

import json
import os
import random
import re
import signal
import time

import jax
import numpy as np
import pytest
import yaml

from jaxft.distributed import ProcessError, initialize
from jaxft.distributed.link import FAILED, PROCESS_LOST
from jaxft.distributed.processes import Place, _is_echo, find_place
from jaxft.hub import save_pretrained
from jaxft.models import DecoderConfig, LanguageModel
from tests.distributed.job import (
    Job,
    command,
    free_port,
    light_work,
    losses,
    roll_call,
    steps_done,
    train_all,
    train_slowly,
)
from tests.training.tiny import tiny_config, write_tiny

STEPS = 16
COMMON = {
    "training": {"steps": STEPS, "learning_rate": 1e-2},
    "evaluation": {"sets": {}},
    "checkpoint": {"every": 5},
    "mesh": {"data": 2, "fsdp": 2},
}
METHODS = {
    "full": {"method": {"name": "full"}, "training": {"steps": 6, "learning_rate": 1e-2}, "checkpoint": {"every": 50}},
    "lora": {
        "method": {"name": "lora", "rank": 4},
        "training": {"steps": 6, "learning_rate": 1e-2, "accumulation": 2},
        "checkpoint": {"every": 50},
    },
    "hft": {"method": {"name": "hft", "rounds": 2}},
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def outputs(directory, tmp_path_factory):
    """The same runs on four devices of 1, 2 and 4 processes: `{count: directory of the outputs}`. HFT with four has
    its turn in the test of the kills."""
    root = tmp_path_factory.mktemp("counts")
    for count in (1, 2, 4):
        names = [name for name in METHODS if (name, count) != ("hft", 4)]
        runs = [(root / str(count) / name, COMMON | METHODS[name]) for name in names]
        with Job(root / f"logs-{count}", count, 4 // count, train_all, directory, runs) as job:
            job.finish()
    return {count: root / str(count) for count in (1, 2, 4)}


@pytest.mark.parametrize("method", METHODS)
def test_losses_do_not_depend_on_the_number_of_processes(outputs, method):
    expected = losses(outputs[1] / method)
    assert len(expected) == (COMMON | METHODS[method])["training"]["steps"] and expected[-1] < expected[0] - 0.1
    for count in (2, 4) if method != "hft" else (2,):
        np.testing.assert_allclose(losses(outputs[count] / method), expected, rtol=1e-5)
        reports = [json.loads((outputs[n] / method / "report.json").read_text()) for n in (1, count)]
        assert reports[1]["trained_parameters"] == reports[0]["trained_parameters"]


def test_told_to_stop_or_killed_it_resumes_with_another_number_of_processes(directory, outputs, tmp_path):
    output, sections = tmp_path / "run", COMMON | METHODS["hft"]

    def start(name: str, count: int) -> Job:
        return Job(tmp_path / name, count, 4 // count, train_slowly, directory, output, sections, 0.05)

    # SIGTERM to one of two: both save the same step and leave in peace.
    with start("told", 2) as job:
        job.send(1, signal.SIGTERM, lambda: steps_done(output) >= 2)
        assert job.wait() == [143, 143], job.logs()
    (step,) = re.findall(rf"stopped after step (\d+) of {STEPS} and saved .*; the same command resumes", job.log(0))
    assert (output / "checkpoints" / step).is_dir() and 2 <= int(step) < STEPS
    assert not re.search("^error:", job.log(0) + job.log(1), re.MULTILINE), job.logs()

    # Told before the first step after it resumed: it takes that step, or two, and leaves.
    with start("told again", 2) as job:
        job.send(0, signal.SIGTERM, lambda: "resuming after step" in job.log(0))
        told = max(int(step), steps_done(output))  # on a busy machine it has taken steps by now
        assert job.wait() == [143, 143], job.logs()
    (again,) = re.findall(rf"stopped after step (\d+) of {STEPS} and saved", job.log(0))
    assert int(step) < int(again) <= told + 2
    step = again

    # SIGKILL to one of four: the others end at once, and each says which one is gone.
    victim = random.SystemRandom().randrange(4)
    print("killed:", victim)
    with start("killed", 4) as job:
        job.send(victim, signal.SIGKILL, lambda: steps_done(output) >= min(int(step) + 4, STEPS - 1))
        killed = time.monotonic()
        codes = job.wait()
        assert time.monotonic() - killed < 60
    assert f"resuming after step {step}" in job.log(0)
    for rank, code in enumerate(codes):
        assert f"process {victim} (" in job.log_until(rank, "error: "), job.logs()
        # JAX aborts (SIGABRT) those who lose their coordinator, if it is faster; the sentence comes all the same.
        allowed = {-9} if rank == victim else {PROCESS_LOST, -6} if victim == 0 else {PROCESS_LOST}
        assert code in allowed, job.logs()

    with start("finished", 1) as job:
        job.finish()
    assert "resuming after step" in job.log(0)
    assert json.loads((output / "report.json").read_text())["steps"] == STEPS
    found = losses(output)
    assert len(found) == STEPS
    np.testing.assert_allclose(found, losses(outputs[1] / "hft"), rtol=1e-5)
    np.testing.assert_array_equal(found[: int(step)], losses(outputs[2] / "hft")[: int(step)])  # two processes, bitwise


def test_what_a_lost_process_makes_others_raise_is_known():
    lost = "Gloo all-reduce failed: [external/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"
    assert _is_echo(ValueError(f"UNKNOWN: {lost}"))
    assert _is_echo(jax.errors.JaxRuntimeError(f"FAILED_PRECONDITION: {lost}"))
    for own in (ValueError(lost), ValueError("INVALID_ARGUMENT: shapes"), OSError("UNKNOWN: host"),
                jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")):  # fmt: skip
        assert not _is_echo(own)


def test_processes_that_differ_do_not_start(directory, tmp_path):
    config = tiny_config(directory, tmp_path / "run", evaluation={"sets": {}}).resolved()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    arguments = ["train", str(tmp_path / "config.yaml")]
    with Job(tmp_path / "config", 2, 1, command, [[*arguments], [*arguments, "training.steps=13"]]) as job:
        assert job.wait() == [FAILED, FAILED], job.logs()
    for rank in range(2):
        assert re.search(
            r"differ in configuration or code:\s+process 1 \(.*\): config training.steps is 13, in process 0 12",
            job.log(rank),
        ), job.logs()

    # Every process reads the file of its own working directory, as machines read their own disks.
    for rank, rows in enumerate((20, 21)):
        (tmp_path / f"disk{rank}").mkdir()
        lines = (directory / "train.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / f"disk{rank}" / "train.jsonl").write_text("".join(lines[:rows]))
    own = "data.sources.0.path=/proc/self/cwd/train.jsonl"
    places = [str(tmp_path / f"disk{rank}") for rank in range(2)]
    with Job(tmp_path / "data", 2, 1, command, [[*arguments, own]] * 2, places) as job:
        assert job.wait() == [FAILED, FAILED], job.logs()
    for rank in range(2):
        assert re.search(r"differ in their files:\s+process 1 \(.*\): /proc/self/cwd/train.jsonl is", job.log(rank))

    # An error of one process is told by all.
    (tmp_path / "disk1" / "train.jsonl").unlink()
    with Job(tmp_path / "missing", 2, 1, command, [[*arguments, own]] * 2, places) as job:
        assert job.wait() == [FAILED, FAILED], job.logs()
    assert re.search(r"error: process 1 \(.*\): .*/proc/self/cwd/train.jsonl: no such file", job.log(0)), job.logs()
    assert re.search("error: .*/proc/self/cwd/train.jsonl: no such file", job.log(1)), job.logs()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


LARGE = DecoderConfig(
    model_type="llama", vocab_size=8192, hidden_size=512, intermediate_size=2048, num_layers=8, num_heads=8,
    num_kv_heads=8, head_dim=64, max_position_embeddings=64, bos_token_id=1,
    eos_token_ids=(2,),
)  # fmt: skip


def test_roll_call_meetings_and_streamed_loading(tmp_path):
    model, rng = LanguageModel(LARGE), np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.random(x.shape, np.float32), model.abstract())
    save_pretrained(tmp_path / "large", model, jax.tree.map(jax.numpy.asarray, params))
    with Job(tmp_path / "two", 2, 2, light_work, str(tmp_path)) as job:
        assert job.wait() == [FAILED, PROCESS_LOST], job.logs()
    assert 'did not come to "lunch" within 1 s' in job.log(0) and "process 1 (" in job.log(0), job.logs()
    assert "process 0 (" in job.log(1) and "only here" in job.log(1)
    assert "stops, because process 1 (" in job.log(1)
    for rank in range(2):
        grown, allowed, whole = map(int, re.search(r"grew (\d+) of (\d+), whole (\d+)", job.log(rank)).groups())
        assert grown <= allowed < 0.8 * whole, job.logs()

    with Job(tmp_path / "absent", 3, 1, roll_call, 3.0, ranks=(0, 2)) as job:
        assert job.wait() == [0, 0], job.logs()
    for rank in (0, 2):
        assert re.search(r"3 processes were expected and 2 came within 3 s. Missing: process 1. Present: process 0 \(",
                         job.log(rank)), job.logs()  # fmt: skip


# ---- finding the others ----------------------------------------------------------------------------------------------

SIGNS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID",
         "MEGASCALE_COORDINATOR_ADDRESS", "SLURM_PROCID", "SLURM_JOB_ID", "OMPI_COMM_WORLD_SIZE",
         "KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX")  # fmt: skip


@pytest.fixture
def environment(monkeypatch):
    for name in SIGNS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    return monkeypatch


def test_a_single_process_needs_nothing(environment):
    assert find_place(None, None, None) is None
    initialize()
    initialize(processes=1)
    environment.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")  # a notebook in a pod
    assert find_place(None, None, None) is None


@pytest.mark.parametrize(("flags", "is_async"), [("--xla_force_host_platform_device_count=4", False), ("", True)])
def test_cpu_devices_of_a_single_process_run_one_program_at_a_time(environment, flags, is_async):
    """A step and an evaluation in flight would take each other's threads; one device has nothing to wait for."""
    environment.setenv("XLA_FLAGS", flags)
    told = {}
    environment.setattr(jax.config, "update", told.__setitem__)
    initialize()
    assert told == ({} if is_async else {"jax_cpu_enable_async_dispatch": False})


def test_slurm_says_where_the_others_are(environment):
    found = {"SLURM_JOB_ID": "4100", "SLURM_STEP_NODELIST": "node[003-004,7]", "SLURM_NTASKS": "3",
             "SLURM_PROCID": "2", "SLURM_LOCALID": "0"}  # fmt: skip
    for name, value in found.items():
        environment.setenv(name, value)
    place = find_place(None, None, None)
    assert place is not None and place.coordinator.startswith("node003:") and place[1:] == (3, 2)
    assert find_place(None, 3, None) == place
    with pytest.raises(ProcessError, match="4 processes were asked for, and the environment describes a job of 3"):
        find_place(None, 4, None)


def test_a_coordinator_can_be_named(environment):
    assert find_place("10.0.0.2:8476", 4, 3) == Place("10.0.0.2:8476", 4, 3)
    environment.setenv("JAX_COORDINATOR_ADDRESS", "pod-0.run:8476")
    environment.setenv("JAX_NUM_PROCESSES", "2")
    environment.setenv("JAX_PROCESS_ID", "1")
    assert find_place(None, None, None) == Place("pod-0.run:8476", 2, 1)
    assert find_place(None, None, 0) == Place("pod-0.run:8476", 2, 0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("localhost:1234", None, None), "number of processes"),
        (("localhost:1234", 2, None), "number of this one"),
        (("localhost", 2, 0), "expected host:port"),
        (("localhost:1234", 2, 2), "expected a number from 0 to 1"),
        ((None, 2, 0), "nothing says where process 0 is"),
    ],
)
def test_an_incomplete_description_is_refused(environment, given, message):
    with pytest.raises(ProcessError, match=message):
        find_place(*given)


def test_a_number_that_is_none_is_refused(environment):
    environment.setenv("JAX_NUM_PROCESSES", "four")
    with pytest.raises(ProcessError, match='JAX_NUM_PROCESSES = "four"'):
        initialize()


def test_more_processes_expected_than_there_are(environment):
    environment.setenv("JAX_NUM_PROCESSES", "4")
    with pytest.raises(ProcessError, match="4 processes were asked for, but nothing says where process 0 is"):
        initialize()


def test_an_absent_coordinator_is_named(environment):
    port = free_port()
    with pytest.raises(ProcessError, match=f"process 0 did not answer at 127.0.0.1:{port} within 1 s"):
        initialize(f"127.0.0.1:{port}", 2, 1, timeout=1)
    assert os.environ.get("JAX_PROCESS_ID") is None
