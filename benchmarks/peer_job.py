"""The job that peer_*.py compile, and what they report: one line of JSON. Runs with the interpreter of any peer.

Nothing of jaxft is imported here: these files run in environments that do not have it.
"""

import json
import os
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

GIB = 2**30
TOPOLOGY, CHIPS = "v5e:4x4", 16
BATCH, SEQ_LEN, RANK = 16, 2048, 16
LEARNING_RATE, B2, WEIGHT_DECAY = 1e-5, 0.95, 0.01
LLAMA = {  # Llama-3.1-8B
    "layers": 32, "vocab": 128256, "width": 4096, "hidden": 14336, "heads": 32, "kv_heads": 8, "head_dim": 128,
    "rope_theta": 500_000, "norm_eps": 1e-5,
}  # fmt: skip


def prepare() -> None:
    """Say to jax and the TPU compiler, before either starts, that there is no TPU and none to be asked for."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def topology_devices() -> list[Any]:
    """The 16 chips, which can be compiled for and nothing else."""
    from jax.experimental import topologies

    return list(topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY).devices)


class Clock:
    """Wall seconds and CPU seconds of this process since it was made."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        return {
            "compile_seconds": time.perf_counter() - self.wall,
            "compile_cpu_seconds": time.process_time() - self.cpu,
        }


def report(compiled: Any, seconds: dict[str, float], settings: str, packages: tuple[str, ...], **more: Any) -> None:
    """Print what a compiled step needs of a chip, counted as `jaxft plan` counts it."""
    stats = compiled.memory_analysis()
    results = stats.output_size_in_bytes - stats.alias_size_in_bytes
    memory = {"arguments": stats.argument_size_in_bytes, "results": results, "temporaries": stats.temp_size_in_bytes}
    found = {
        "hbm_gib": sum(memory.values()) / GIB,
        "memory_gib": {purpose: size / GIB for purpose, size in memory.items()},
        "code_gib": stats.generated_code_size_in_bytes / GIB,
        **seconds,
        "versions": {name: _version(name) for name in (*packages, "jax", "libtpu")},
        "settings": settings,
        **more,
    }
    print(json.dumps(found), file=sys.__stdout__, flush=True)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
