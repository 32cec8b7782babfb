"""XLA compilation: what its compiler is told, the persistent cache, and a count of what was compiled."""

import functools
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxft.errors import JaxftError

logger = logging.getLogger(__name__)
Option = bool | int | float | str

# Weights are gathered beside matrix products. On v5e that is so unasked; on chips of these kinds (v5p, v6e) libtpu
# 0.0.42 does it for some shapes only (docs/planning.md). MaxText's settings for both have the same three
# (benchmarks/xla_flags_library.py, CF_FOR_ALL_GATHER).
_GATHERS_BESIDE_PRODUCTS: dict[str, Option] = {
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_enable_async_all_gather": True,
}
# What kernels multiply, the rows of experts, hides gathers, too (MaxDiffusion's scripts set the same). For v5p, whose
# chips have two cores, libtpu crashes on it.
_AND_BESIDE_KERNELS: dict[str, Option] = {"xla_tpu_enable_async_collective_fusion_with_mosaic_custom_call": True}
# Collectives run beside products, on an H100 unasked, on an A100 not; sums of gradients go on beside the next layer's.
# NVIDIA's JAX-Toolbox sets the first, and names the second for FSDP (rosetta/docs/GPU_performance.md), with two for
# gathers and scatters that made steps of 8B compute more.
_COLLECTIVES_BESIDE_PRODUCTS: dict[str, Option] = {
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_enable_pipelined_all_reduce": True,
}
OPTIONS: Mapping[str, Mapping[str, Option]] = {  # by `jax.Device.device_kind`, or how it begins
    "TPU v5 lite": _AND_BESIDE_KERNELS,
    "TPU v5": _GATHERS_BESIDE_PRODUCTS,
    "TPU v6 lite": _GATHERS_BESIDE_PRODUCTS | _AND_BESIDE_KERNELS,
    "NVIDIA": _COLLECTIVES_BESIDE_PRODUCTS,
}
# Else libtpu takes one iteration out of a loop that copies from host memory, and compiles its body twice.
_FETCHES_AHEAD: dict[str, Option] = {"xla_tpu_pipeline_memory_host_transfers": False}


def fetches_ahead(config: Any) -> bool:
    """Whether all that the step of a configuration reads of host memory is asked for an iteration before it is needed
    (`jaxft.models.rematerialization`), so that the compiler need not see to it."""
    return config.model.remat == "offload" and not config.training.offload


def compiler_options(
    mesh: Mesh,
    own: Mapping[str, Option] = {},  # noqa: B006
    *,
    ahead: bool = False,
) -> dict[str, Option]:
    """What XLA is told when it compiles a train step for the devices of `mesh`: `OPTIONS`, and `own` before them.

    `ahead` says that the step `fetches_ahead`. An option of ours that `LIBTPU_INIT_ARGS` or `XLA_FLAGS` sets is left to
    it. Names change between versions of the compiler: where it does not know one of ours, all are left out, with a
    warning.

    Raises:
        JaxftError: the compiler refuses one of `own`; says which, and why.
    """
    flags = " ".join(os.environ.get(name, "") for name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS"))
    kind = mesh.devices.flat[0].device_kind
    usual = dict(OPTIONS.get("NVIDIA" if kind.startswith("NVIDIA") else kind, {})) if mesh.size > 1 else {}
    if ahead and kind.startswith("TPU"):
        usual |= _FETCHES_AHEAD
    usual = {k: v for k, v in usual.items() if k not in own and not re.search(rf"--{k}(=|\s|$)", flags)}
    if usual and (reason := _refusal(mesh, tuple(usual.items()))):
        logger.warning("the compiler does not take the options that jaxft sets (%s): compiled without them", reason)
        usual = {}
    for name, value in own.items():
        if reason := _refusal(mesh, ((name, value),)):
            raise JaxftError(f"training.compiler_options.{name} = {value!r}: {reason}")
    return {**usual, **own}


@functools.cache
def _refusal(mesh: Mesh, options: tuple[tuple[str, Option], ...]) -> str:
    """Why the compiler does not take these options, found out on an empty program; "" if it does."""
    place = NamedSharding(mesh, PartitionSpec())
    try:
        jax.jit(lambda: 0, out_shardings=place, compiler_options=dict(options)).lower().compile()
    except (jax.errors.JaxRuntimeError, ValueError, TypeError) as error:
        return str(error).splitlines()[0]
    return ""


def enable_compilation_cache() -> str | None:
    """Keeps compiled programs in the user's cache directory, so that a second start compiles nothing.

    A directory that is configured already (`JAX_COMPILATION_CACHE_DIR`) is left as it is, and
    `JAX_ENABLE_COMPILATION_CACHE=false` turns the cache off. Returns the directory, None when there is none.
    """
    if not jax.config.jax_enable_compilation_cache:
        return None
    if jax.config.jax_compilation_cache_dir is None:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxft" / "xla"
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError:  # a read-only home directory costs compile time, not the run
            return None
        jax.config.update("jax_compilation_cache_dir", str(root))
    return jax.config.jax_compilation_cache_dir


class CompilationLog:
    """Counts the programs compiled, and how many of them came from the persistent cache, while entered.

    Attributes:
      programs: programs compiled or loaded from the cache.
      cached: how many of them were loaded from the cache.
      seconds: time spent on both, in seconds.
    """

    def __init__(self) -> None:
        self.programs = self.cached = 0
        self.seconds = 0.0

    def _duration(self, event: str, seconds: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.programs += 1
            self.seconds += seconds

    def _event(self, event: str, **_: object) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            self.cached += 1

    def __enter__(self) -> "CompilationLog":
        jax.monitoring.register_event_duration_secs_listener(self._duration)
        jax.monitoring.register_event_listener(self._event)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._duration)
        jax.monitoring.unregister_event_listener(self._event)
