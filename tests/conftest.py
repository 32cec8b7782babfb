"""What every test relies on: 8 virtual CPU devices, one compilation cache, no network."""

import contextlib
import ctypes
import gc
import os
import sys
from importlib.metadata import version
from pathlib import Path

# Before jax is imported anywhere: it reads these once. A value from outside wins, so that a GPU can be tested too.
ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    flags = (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # 8 devices on 2 busy cores may wait long for one another; by default XLA aborts the process after 40 s.
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
        # Tests compile much and compute little: half of the processor time of a compilation is LLVM's optimisation.
        "--xla_backend_optimization_level=0",
        "--xla_cpu_parallel_codegen_split_count=1",
    )
    if version("jax").startswith("0.10."):  # a third of the time of a compilation; later versions do not know it
        flags += ("--xla_cpu_use_fusion_emitters=false",)
    os.environ["XLA_FLAGS"] = " ".join(flags).strip()
# A collective holds a thread of XLA's pool for each device, and by default there are no more threads than devices: two
# collectives at once, or one beside other work, would wait for each other for ever.
os.environ.setdefault("PJRT_NPROC", "32")
# Shared by the workers of one run, by the processes that tests start, and by the next run.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

# Where `make test` puts the GPU compiler. jax looks for plugins once, when it first asks for devices.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
sys.path.append(f"{sys.prefix}/cuda")

import jax  # noqa: E402
import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

# Programs in flight compete for the threads that their collectives need: one at a time.
jax.config.update("jax_cpu_enable_async_dispatch", False)

# A first example compiles, which no deadline fits. Derandomised: a failure is one for everybody, at once.
settings.register_profile(
    "jaxft", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("jaxft")


# Compiled programs hold memory, and memory maps, of which a process may have 65,530 (vm.max_map_count): beyond that
# LLVM "cannot allocate memory" and the process ends.
MANY_MAPS, MUCH_MEMORY = 30_000, 2 * 2**30
_kept = 0  # bytes that were still held when programs were last forgotten: the TPU compiler keeps some GiB for good


def _resident() -> int:
    """Bytes of memory of this process; 0 where /proc does not say."""
    memory = Path("/proc/self/statm")
    return int(memory.read_text().split()[1]) * os.sysconf("SC_PAGESIZE") if memory.exists() else 0


def is_crowded() -> bool:
    """Whether this process should make room; False where /proc does not say."""
    maps = Path("/proc/self/maps")
    many = maps.exists() and maps.read_bytes().count(b"\n") > MANY_MAPS
    return many or _resident() > _kept + MUCH_MEMORY


def forget_compiled_programs() -> None:
    """Drops compiled programs, and gives what they held back to the system, which glibc would keep."""
    global _kept
    jax.clear_caches()
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    _kept = _resident()


@pytest.fixture(scope="module", autouse=True)
def _forget_after_a_file():
    yield
    forget_compiled_programs()


@pytest.fixture(autouse=True)
def _forget_when_crowded(request: pytest.FixtureRequest):
    yield
    if is_crowded() and not request.node.path.name == "test_conformance.py":  # which does so between its trials
        forget_compiled_programs()


# A file stays on one worker: those that take longest go first, so that none is left over for the end.
LONG = (
    "test_conformance.py",
    "test_processes.py",
    "test_resume.py",
    "test_lt_sft.py",
    "test_flax_models.py",
    "test_step.py",
    "test_sharded.py",
    "test_plan.py",
)


# What test modules import lives as long as the process: a collection would visit 0.7 million objects, for 0.7 s, and
# there is one after every file. None while they are imported, and all of it out of sight from then on.
gc.disable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:  # after the collection, and where the tests of a run with workers are handed out
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
