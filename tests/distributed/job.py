"""Jobs of several processes on this machine, each forked from a server that has imported everything already."""

import atexit
import contextlib
import gc
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.cli import main
from jaxft.data import TrainBatches
from jaxft.distributed import (
    MeshConfig,
    ProcessError,
    agree,
    barrier,
    from_first,
    gather,
    in_step,
    initialize,
    make_mesh,
    tree_shardings,
)
from jaxft.errors import JaxftError
from jaxft.hub import load_model, load_pretrained
from jaxft.training import read_metrics, train
from tests.environment import xla_flags
from tests.training.tiny import IMPORTED_BY_RUNS, tiny_config

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.distributed.job", *IMPORTED_BY_RUNS])


class Job:
    """`count` processes of `devices` CPU devices each, started with `target(rank, *arguments)`.

    Each one's output is in `<directory>/<rank>.log`.
    """

    def __init__(self, directory: Path, count: int, devices: int, target: Callable, *arguments: Any, ranks=None):
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.count = directory, count
        port = free_port()
        self.processes = {
            rank: _context.Process(
                target=_enter, args=(directory / f"{rank}.log", port, count, rank, devices, target, *arguments)
            )
            for rank in (range(count) if ranks is None else ranks)
        }
        for process in self.processes.values():
            process.start()

    def log(self, rank: int) -> str:
        path = self.directory / f"{rank}.log"
        return path.read_text() if path.exists() else ""

    def log_until(self, rank: int, text: str, timeout: float = 10) -> str:
        """The log of a process that has ended, once its sentinel has had its say."""
        deadline = time.monotonic() + timeout
        while text not in self.log(rank) and time.monotonic() < deadline:
            time.sleep(0.02)
        return self.log(rank)

    def logs(self) -> str:
        return "\n".join(f"--- {rank}\n{self.log(rank)[-4000:]}" for rank in self.processes)

    def wait(self, timeout: float = 500) -> list[int | None]:
        """The exit codes, after all have ended."""
        deadline = time.monotonic() + timeout
        for process in self.processes.values():
            process.join(max(deadline - time.monotonic(), 0.01))
        codes = [process.exitcode for process in self.processes.values()]
        self.kill()
        assert None not in codes, f"still running after {timeout} s: {codes}\n{self.logs()}"
        return codes

    def finish(self, timeout: float = 500) -> None:
        codes = self.wait(timeout)
        assert codes == [0] * len(codes), f"{codes}\n{self.logs()}"

    def send(self, rank: int, number: int, when: Callable[[], bool], timeout: float = 500) -> None:
        """Sends a signal to one process as soon as `when()`."""
        deadline = time.monotonic() + timeout
        while not when():
            assert all(p.is_alive() for p in self.processes.values()) and time.monotonic() < deadline, self.logs()
            time.sleep(0.002)
        os.kill(self.processes[rank].pid, number)

    def kill(self) -> None:
        for process in self.processes.values():
            if process.is_alive():
                process.kill()
                process.join()

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def steps_done(output: Path) -> int:
    path = output / "metrics.jsonl"
    return path.read_bytes().count(b"grad_norm") if path.exists() else 0


def _enter(log: Path, port: int, count: int, rank: int, devices: int, target: Callable, *arguments: Any) -> None:
    gc.freeze()  # a collection would write to all that was imported, and so copy the memory that is shared
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["XLA_FLAGS"] = xla_flags(devices)  # read at the first use of a device
    os.environ |= {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(rank),
    }
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(line_buffering=True)
    try:
        target(rank, *arguments)
    finally:
        atexit._run_exitfuncs()  # as at the end of a program of its own; multiprocessing leaves them out


def losses(output: Path) -> list[float]:
    """Of the steps of a run, in the order in which they were taken."""
    return [record["loss"] for record in read_metrics(output / "metrics.jsonl") if "loss" in record]


def train_all(_rank: int, directory: Path, runs: Sequence[tuple[Path, dict[str, Any]]]) -> None:
    """Several runs, one after the other, in the same job."""
    for output, sections in runs:
        train(tiny_config(directory, output, **sections))


def train_slowly(rank: int, directory: Path, output: Path, sections: dict[str, Any], seconds: float) -> None:
    """A run whose steps take `seconds` or longer, so that a signal can meet it."""
    following = TrainBatches.__next__

    def after_a_while(self: TrainBatches) -> Any:
        time.sleep(seconds)
        return following(self)

    TrainBatches.__next__ = after_a_while
    train_all(rank, directory, [(output, sections)])


def command(rank: int, arguments: Sequence[Sequence[str]], places: Sequence[str] | None = None) -> None:
    """The command line of each process, as a shell would start it in the directory `places[rank]`."""
    if places is not None:
        os.chdir(places[rank])
    main(list(arguments[rank]))


def roll_call(rank: int, timeout: float) -> None:
    """Joins the others and prints why that failed."""
    try:
        initialize(timeout=timeout)
    except ProcessError as error:
        print(f"{rank}: {error}")


def light_work(rank: int, directory: str) -> None:
    """Everything that needs processes and no training, in one job of two."""
    initialize()
    assert from_first("a", [rank]) == [0] and gather("b", rank) == [0, 1]
    agree("c", {"x": 1})

    def only_here() -> int:
        if rank == 0:
            raise JaxftError("only here")
        return rank

    try:
        in_step("d", only_here)
    except JaxftError as error:
        print(error)
        assert isinstance(error, ProcessError) == (rank == 1)
    else:
        raise AssertionError
    load_streamed(Path(directory))
    barrier("before lunch")
    if rank == 0:
        try:
            barrier("lunch", timeout=1)
        except ProcessError as error:
            print(error)
    else:  # never comes: it is ended
        time.sleep(100)


def load_streamed(directory: Path) -> None:
    """Loads a model of about 170 MB of which half belongs to this process, and prints how far the memory grew."""
    model = load_model(directory / "large")
    mesh = make_mesh(MeshConfig(fsdp=-1))
    shardings = tree_shardings(model.abstract(jnp.float32), model.logical_axes(), mesh)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _memory("VmRSS")
    _, params = load_pretrained(directory / "large", dtype=jnp.float32, sharding=shardings)
    jax.block_until_ready(params)
    leaves = jax.tree.leaves(params)
    here = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
    whole = sum(leaf.nbytes for leaf in leaves)
    allowed = here + max(leaf.nbytes for leaf in leaves) + 16 * 2**20
    print(f"grew {_memory('VmHWM') - before} of {allowed}, whole {whole}")


def _memory(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)
