"""The processes of a job: how they find each other, that they are all there and the same, and how they end together.

Every process runs the same command. Where the others are is read from the environment (Cloud TPU VMs, GKE, Slurm,
Open MPI) or given: `initialize("host:port", processes, process_id)`, or the variables `JAX_COORDINATOR_ADDRESS`,
`JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`. In a job of one process everything here does nothing.
"""

import atexit
import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn, TypeVar

import jax
from jax._src import distributed as jax_distributed  # the client of its key-value store has no public name
from jax._src.clusters import ClusterEnv  # nor has what detects clusters

from jaxft.distributed.link import FAILED, Link, ProcessError, answer_roll, call_roll, listen
from jaxft.errors import JaxftError

T = TypeVar("T")
START_TIMEOUT = 600.0  # seconds; machines of a job may start minutes apart
SHOWN = 12

_link: Link | None = None
_told: JaxftError | None = None  # an error that every process has heard of


class Place(NamedTuple):
    """Where a process stands in its job: the address of process 0, how many processes there are, and its number."""

    coordinator: str
    processes: int
    process_id: int


# Starting


def initialize(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: float = START_TIMEOUT,
) -> None:
    """Joins the processes of a job through `jax.distributed`; a single process only makes sure that the CPU devices it
    may have run one program at a time.

    Call it before anything that touches devices. A second call only checks `processes`.

    Args:
      coordinator: `host:port` of process 0; None: as the environment says.
      processes: how many processes there are. Where the environment says so too, what it must say.
      process_id: the number of this one, from 0.
      timeout: seconds to wait for the others.

    Raises:
      ProcessError: the description is incomplete or contradicts the environment, or not all processes came (the
        message says which).
    """
    global _link
    if _link is None and not jax.distributed.is_initialized():
        place = find_place(coordinator, processes, process_id, timeout)
        if place is None or place.processes == 1:
            if _cpu_devices() > 1:
                _one_program_at_a_time()
            return
        _link = _join(place, timeout)
        atexit.register(_leave_job)  # runs before JAX's own farewell, which was registered first
        _one_program_at_a_time()
        with together():
            jax.distributed.initialize(
                place.coordinator,
                place.processes,
                place.process_id,
                initialization_timeout=int(timeout),
                shutdown_timeout_seconds=60,
            )
    elif _link is None:
        _link = _join_initialized(timeout)
        if _link is not None:
            atexit.register(_leave_job)
    _require_count(processes)


def _one_program_at_a_time() -> None:
    """Programs in flight together may run in another order on another process, or take the threads that collectives of
    another device need, and then wait for each other for ever. Only the CPU's run like that."""
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def _cpu_devices() -> int:
    """How many devices this process makes of its CPU."""
    asked = re.search(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    return max(int(asked[1]) if asked else 1, jax.config.jax_num_cpu_devices)


def _require_count(processes: int | None) -> None:
    wanted = processes if processes is not None else _number("JAX_NUM_PROCESSES")
    if wanted is None:
        wanted = len(_link.roll) if _link is not None else 1
    if wanted != jax.process_count():
        raise ProcessError(
            f"{wanted} processes were expected, and the devices of {jax.process_count()} are visible on "
            f"{jax.default_backend()}: is the accelerator of every machine free, and its plugin installed?"
        )


def find_place(
    coordinator: str | None, processes: int | None, process_id: int | None, timeout: float = START_TIMEOUT
) -> Place | None:
    """What arguments and environment say about the job; None for a single process. Raises ProcessError."""
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    count = processes if processes is not None else _number("JAX_NUM_PROCESSES")
    index = process_id if process_id is not None else _number("JAX_PROCESS_ID")
    if None in (coordinator, count, index) and _in_a_job():
        found = ClusterEnv.auto_detect_unset_distributed_params(coordinator, None, index, None, None, int(timeout))
        coordinator, detected, index = found[:3]
        if detected is not None and count not in (None, detected):
            raise ProcessError(f"{count} processes were asked for, and the environment describes a job of {detected}")
        count = detected if detected is not None else count
    if coordinator is None:
        if count is not None and count > 1:
            raise ProcessError(
                f"{count} processes were asked for, but nothing says where process 0 is: give --coordinator host:port "
                "(or JAX_COORDINATOR_ADDRESS), or start them with srun, mpirun or on a TPU slice"
            )
        return None
    if count is None or index is None:
        raise ProcessError(
            f"the coordinator is {coordinator}, so the number of processes (JAX_NUM_PROCESSES or --processes) and the "
            "number of this one (JAX_PROCESS_ID or --process-id) must be given too"
        )
    if not re.fullmatch(r".+:\d+", coordinator):
        raise ProcessError(f'the coordinator is "{coordinator}": expected host:port, such as 10.0.0.2:8476')
    if not 0 <= index < count:
        raise ProcessError(f"process {index} of {count}: expected a number from 0 to {count - 1}")
    return Place(coordinator, count, index)


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise ProcessError(f'{name} = "{text}": expected a whole number') from None


def _in_a_job() -> bool:
    """Whether JAX's own detection should be asked. It queries the metadata server on machines with TPU chips, and
    complains in any Kubernetes pod, so not without a sign."""
    signs = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "MEGASCALE_COORDINATOR_ADDRESS", "OMPI_COMM_WORLD_SIZE",
             "SLURM_PROCID")  # fmt: skip
    if any(name in os.environ for name in signs):
        return True
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        return "JOB_COMPLETION_INDEX" in os.environ
    # Importing JAX sets this where it finds no TPU chips; Cloud TPU VMs say the rest through their metadata server.
    wanted = os.environ.get("JAX_PLATFORMS", "tpu")
    return "TPU_SKIP_MDS_QUERY" not in os.environ and "tpu" in wanted.split(",")


def _host_port(coordinator: str) -> tuple[str, int]:
    host, _, port = coordinator.rpartition(":")
    return host.strip("[]"), int(port)


def _join(place: Place, timeout: float) -> Link:
    host, port = _host_port(place.coordinator)
    if place.process_id:
        roll, wire = answer_roll(host, port, place.process_id, place.processes, timeout)
        return Link(place.process_id, roll, {0: wire}, (host, port))
    try:
        listener = listen(port)
    except OSError as error:
        raise ProcessError(f"process 0 cannot listen at {place.coordinator}: {error.strerror}") from error
    with listener:
        roll, wires = call_roll(listener, place.processes, timeout)
    return Link(0, roll, wires, (host, port))


def _join_initialized(timeout: float) -> Link | None:
    """The link of a program that has called `jax.distributed.initialize` itself: on a port of its own."""
    count, index = jax.process_count(), jax.process_index()
    if count == 1:
        return None
    state = jax_distributed.global_state
    host, port = _host_port(state.coordinator_address)
    if index:
        own = int(state.client.blocking_key_value_get("jaxft/port", int(timeout * 1000)))
        roll, wire = answer_roll(host, own, index, count, timeout)
        return Link(index, roll, {0: wire}, (host, port))
    with listen(0) as listener:
        state.client.key_value_set("jaxft/port", str(listener.getsockname()[1]))
        roll, wires = call_roll(listener, count, timeout)
    return Link(0, roll, wires, (host, port))


# Meeting


def set_process_timeout(seconds: float) -> None:
    """After how many seconds without a sign of life a process is taken for lost."""
    if _link is not None:
        _link.timeout = seconds


def barrier(name: str, *, timeout: float = 1800) -> None:
    """Waits for all processes. Raises ProcessError, naming those that do not come within `timeout` seconds."""
    if _link is not None:
        _link.meet(name, timeout=timeout)


def from_first(name: str, value: T, *, timeout: float = 1800) -> T:
    """Process 0's `value` (JSON), in every process."""
    return value if _link is None else _link.meet(name, value, lambda values: values[0], timeout=timeout)


def gather(name: str, value: T, *, timeout: float = 1800) -> list[T]:
    """The values (JSON) of all processes, in every process."""
    return [value] if _link is None else _link.meet(name, value, lambda values: values, timeout=timeout)


def agree(name: str, facts: Mapping[str, Any], *, timeout: float = 1800) -> None:
    """Checks that all processes have the same `facts`, a flat dict of JSON values.

    Raises:
      ProcessError: in every process, saying which one differs from process 0, in which key, and the two values.
    """
    if _link is not None:
        roll = _link.roll
        _link.meet(name, dict(facts), lambda values: _compare(name, values, roll), timeout=timeout)


def _compare(name: str, values: list[dict[str, Any]], roll: Any) -> None:
    first, lines, missing = values[0], [], "(absent)"
    for peer, own in zip(roll[1:], values[1:], strict=True):
        for key in sorted({*first, *own}):
            here, there = own.get(key, missing), first.get(key, missing)
            if here != there:
                lines.append(f"{peer}: {key} is {here!r}, in process 0 {there!r}")
    if lines:
        more = [f"... ({len(lines)} differences in all)"] if len(lines) > SHOWN else []
        raise ProcessError(f"the processes differ in {name}:\n  " + "\n  ".join([*lines[:SHOWN], *more]))


# Ending


@contextlib.contextmanager
def together() -> Iterator[None]:
    """In the body, an error of one process ends all of them, each with the reason, instead of leaving them waiting.

    An error of the runtime may be the echo of another process's end; which one it was comes through the link.
    """
    try:
        yield
    except Exception as error:
        if _link is not None and not isinstance(error, ProcessError) and error is not _told:
            if _is_echo(error):
                _link.wait_for_end()
            _link.fail(_first_line(error))
        raise


# What the runtime says of a collective that another process left; jaxlib raises some of them as ValueError.
_ECHOES = re.compile(r"(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): ")


def _is_echo(error: BaseException | None) -> bool:
    """Whether what was raised may come from a collective or barrier at which another process was missing."""
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError):
            return "RESOURCE_EXHAUSTED" not in str(error)
        if isinstance(error, ValueError) and _ECHOES.match(str(error)):
            return True
        error = error.__cause__
    return False


def _first_line(error: Exception) -> str:
    text = str(error) if isinstance(error, JaxftError) else f"{type(error).__name__}: {error}"
    return text[:1000]


def in_step(name: str, attempt: Callable[[], T]) -> T:
    """Does what may fail in one process alone; a JaxftError of any is raised in all.

    Raises:
      JaxftError: the process's own error, or, as ProcessError, what another met.
    """
    error: JaxftError | None = None
    result: Any = None
    try:
        result = attempt()
    except JaxftError as found:
        error = found
    reasons = gather(name, None if error is None else str(error))
    if error is not None:
        global _told
        _told = error
        raise error
    others = {index: reason for index, reason in enumerate(reasons) if reason is not None}
    if others and _link is not None:
        index, reason = min(others.items())
        raise ProcessError(f"{_link.roll[index]}: {reason}")
    return result


def _leave_job() -> None:
    assert _link is not None
    if _link.broken:
        leave(FAILED)
    _link.close()


def in_a_job() -> bool:
    """Whether this process is one of several that `initialize` has joined."""
    return _link is not None


def leave(code: int) -> NoReturn:
    """Ends this process at once. The orderly way out of a job of several waits for processes that may be gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
