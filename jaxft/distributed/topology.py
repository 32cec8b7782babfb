"""TPU and GPU topologies by name, without either: devices to compile for, and what a chip of each kind can do.

Compilation ahead of time needs a compiler only: for TPUs the `libtpu` wheel, for GPUs JAX's CUDA plugin. See `compiler`
and `find_cuda_plugin` for where they may be.
"""

import dataclasses
import importlib
import importlib.util
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from jaxft.errors import JaxftError, nearest

GIB = 2**30


# What the compiler leaves to programs of a TPU: it refuses a v5e program above 15.75 GiB of the 16.
RESERVED_HBM = GIB // 4
# Of a GPU's memory, which JAX takes at once: `jaxft` sets this where the user does not. The rest is for CUDA and NCCL.
GPU_MEMORY_FRACTION = 0.9
MEMORY_FRACTION_VARIABLE = "XLA_PYTHON_CLIENT_MEM_FRACTION"


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak figures of one TPU chip or GPU.

    flops: bf16 multiply-adds counted as two, per second. hbm_bytes: memory. hbm_bandwidth: bytes per second.
    link_bandwidth: bytes per second of one link to other chips, one way. links: of a chip; of a TPU two for each
    dimension of the torus, of a GPU those to the switch of its node. network_bandwidth: bytes per second of one chip to
    other slices or nodes, one way. source: where the figures are published. target: of a GPU, what XLA wants to know of
    it.
    """

    generation: str
    flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    links: int
    network_bandwidth: float
    source: str
    target: "GpuTarget | None" = None

    @property
    def is_gpu(self) -> bool:
        return self.target is not None

    @property
    def usable_bytes(self) -> int:
        """Memory that a program may have."""
        if not self.is_gpu:
            return self.hbm_bytes - RESERVED_HBM
        return int(self.hbm_bytes * float(os.environ.get(MEMORY_FRACTION_VARIABLE) or GPU_MEMORY_FRACTION))

    @property
    def ring_bandwidth(self) -> float:
        """Bytes that a chip sends a second in a collective: of a TPU in both directions of one ring of links, of a GPU
        over all links."""
        return self.link_bandwidth * (self.links if self.is_gpu else 2)


@dataclasses.dataclass(frozen=True)
class GpuTarget:
    """A GPU as XLA's compiler sees it. Bytes of memory on the chip, `cores` are streaming multiprocessors."""

    name: str
    capability: int
    cores: int
    floats_per_core: int
    clock_ghz: float
    l2_bytes: int
    shared_bytes_per_core: int


_DOCS = "https://cloud.google.com/tpu/docs/"
_NVIDIA = "https://www.nvidia.com/en-us/data-center/"
_SLICE_NETWORK = 6.25e9  # 200 Gbit/s of a host of four chips
# Interconnect of TPUs is published per chip and for both directions together (v5e: 1600 Gbit/s over 4 links), as is
# that of GPUs (H100: 900 GB/s over 18). The network of GPUs is that of NVIDIA's DGX machines, an adapter for each GPU.
# What XLA wants to know of GPUs, memory included, stands in its own table, openxla/xla, xla/backends/gpu/target_config.
CHIPS = {
    "v4": Chip("v4", 275e12, 32 * GIB, 1228e9, 50e9, 6, _SLICE_NETWORK, _DOCS + "v4"),
    "v5e": Chip("v5e", 197e12, 16 * GIB, 819e9, 50e9, 4, _SLICE_NETWORK, _DOCS + "v5e"),
    "v5p": Chip("v5p", 459e12, 95 * GIB, 2765e9, 100e9, 6, _SLICE_NETWORK, _DOCS + "v5p"),
    "v6e": Chip("v6e", 918e12, 32 * GIB, 1640e9, 100e9, 4, _SLICE_NETWORK, _DOCS + "v6e"),
    "a100-40gb": Chip(
        "a100-40gb", 312e12, 42331013120, 1555e9, 25e9, 12, 25e9, _NVIDIA + "a100",
        GpuTarget("NVIDIA A100-SXM4-40GB", 8, 108, 64, 1.41, 41943040, 167936),
    ),
    "a100": Chip(
        "a100", 312e12, 85100068864, 2039e9, 25e9, 12, 25e9, _NVIDIA + "a100",
        GpuTarget("NVIDIA A100-SXM4-80GB", 8, 108, 64, 1.41, 41943040, 167936),
    ),
    "h100": Chip(
        "h100", 989e12, 84942979072, 3352e9, 25e9, 18, 50e9, _NVIDIA + "h100",
        GpuTarget("NVIDIA H100 80GB HBM3", 9, 132, 128, 1.98, 52428800, 233472),
    ),
    "h200": Chip(
        "h200", 989e12, 151397597184, 4800e9, 25e9, 18, 50e9, _NVIDIA + "h200",
        GpuTarget("NVIDIA H200", 9, 132, 128, 1.98, 52428800, 233472),
    ),
    "b200": Chip(
        "b200", 2250e12, 191514411008, 7672e9, 50e9, 18, 50e9, _NVIDIA + "dgx-b200",
        GpuTarget("NVIDIA B200", 10, 148, 128, 1.965, 132644864, 233472),
    ),
}  # fmt: skip
MOST_GPUS = 8  # of a node

_SLICES = {
    "v4": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x12", "8x8x16", "8x16x16"),
    "v5e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": (
        "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16",
        "16x16x24",
    ),
    "v6e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
}  # fmt: skip
MOST_CHIPS = 2**16  # the compiler describes each of them, in memory that a mistyped number of slices would exhaust
_CORES_PER_CHIP = {"v4": 2, "v5p": 2}  # by which Google counts the size in a name such as v5p-128


class TopologyError(JaxftError):
    """A topology that does not exist, or that cannot be compiled for here."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """`slices` TPU slices, each a torus of chips of `shape`; or as many nodes of `shape[0]` GPUs."""

    generation: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        return CHIPS[self.generation]

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def layout(self) -> str:
        """The shape of one slice as the compiler wants it, `4x4`."""
        return "x".join(map(str, self.shape))

    def __str__(self) -> str:
        return (f"{self.slices}*" if self.slices > 1 else "") + f"{self.generation}:{self.layout}"


def parse_topology(name: str) -> Topology:
    """`v5e:4x4`, `v5p:4x4x4`; `4*v5e:16x16` is four slices; `v5e-16` and `v5p-128` are Google's names for sizes.
    `h100:8` are the eight GPUs of a node, `4*h100:8` four such nodes, `h100` is one GPU.

    Raises:
        TopologyError: an unknown generation or shape, with the nearest that exist.
    """
    found = re.fullmatch(r"(?:(\d+)\*)?([a-z0-9]+(?:-\d+gb)?)(?:[:-]([0-9x]+))?", name.strip().lower())
    generation = found[2] if found else name
    generation = {"v5litepod": "v5e", "v6": "v6e", "v5": "v5p"}.get(generation, generation)
    if not found or generation not in CHIPS:
        raise TopologyError(
            f'unknown topology "{name}": expected GENERATION:SHAPE such as v5e:4x4 or h100:8; generation: '
            f"{nearest(generation, CHIPS)}"
        )
    slices, size = int(found[1] or 1), found[3] or ""
    if CHIPS[generation].is_gpu:
        if not (size or "1").isdigit() or not 1 <= int(size or 1) <= MOST_GPUS:
            raise TopologyError(
                f'{generation} has no topology "{size}": expected 1 to {MOST_GPUS} GPUs of a node, such as '
                f"{generation}:{MOST_GPUS}; 2*{generation}:{MOST_GPUS} are two nodes"
            )
        find_cuda_plugin()  # jax has not started yet, perhaps
        return _checked(name, Topology(generation, (int(size or 1),), slices))
    known = {s: math.prod(map(int, s.split("x"))) for s in _SLICES[generation]}
    if size.isdigit():
        chips = int(size) // _CORES_PER_CHIP.get(generation, 1)
        shapes = [s for s, n in known.items() if n == chips]
        if not shapes:
            sizes = [f"{generation}-{n * _CORES_PER_CHIP.get(generation, 1)}" for n in known.values()]
            closest = min(sizes, key=lambda s: abs(int(s.split("-")[1]) - int(size)))
            raise TopologyError(f'no topology "{name}": nearest is {closest}. Valid: {", ".join(dict.fromkeys(sizes))}')
        size = shapes[0]
    dimensions = tuple(map(int, size.split("x"))) if re.fullmatch(r"\d+(x\d+)+", size) else ()
    rank = 3 if CHIPS[generation].links == 6 else 2
    if size not in known and not (rank == 3 == len(dimensions) and all(d > 0 and d % 4 == 0 for d in dimensions)):
        chips = math.prod(dimensions) if dimensions else 0
        closest = min(known, key=lambda s: (abs(known[s] - chips), abs(len(s) - len(size))))
        raise TopologyError(
            f'{generation} has no topology "{size}": nearest is {generation}:{closest}. Valid: {", ".join(known)}'
            + (", and larger shapes whose sides are multiples of 4" if rank == 3 else "")
        )
    return _checked(name, Topology(generation, dimensions, slices))


def _checked(name: str, topology: Topology) -> Topology:
    if topology.slices < 1:
        raise TopologyError(f'topology "{name}" has no slices: expected at least 1')
    if topology.num_chips > MOST_CHIPS:
        most = MOST_CHIPS // math.prod(topology.shape)
        raise TopologyError(
            f'topology "{name}" has {topology.num_chips:,} chips: expected at most {MOST_CHIPS:,}'
            + (f", such as {dataclasses.replace(topology, slices=most)}" if most else "")
        )
    return topology


COMPILER_VARIABLES = ("JAXFT_LIBTPU", "TPU_LIBRARY_PATH")
MISSING = 'the TPU compiler is not installed: pip install "jaxft[tpu]", or set JAXFT_LIBTPU to a libtpu.so'


def compiler() -> Path | None:
    """The file of the TPU compiler, `libtpu.so`, or None where there is none. Looked for in this order:

    1. the file named by `JAXFT_LIBTPU`, or by `TPU_LIBRARY_PATH`, which jax itself reads;
    2. the package `libtpu` of the environment (`pip install "jaxft[tpu]"`): right on a TPU, but where there is none
       jax tries to start one whenever it starts, unless `JAX_PLATFORMS` names others;
    3. a folder `tpu` of the environment, which only compilation ahead of time looks into (`make test` fills it:
       `pip install --target .venv/tpu -r requirements/tpu.txt`).

    Raises:
        TopologyError: a variable names a file that does not exist.
    """
    for variable in COMPILER_VARIABLES:
        if named := os.environ.get(variable):
            if not Path(named).is_file():
                raise TopologyError(f"{variable}={named} is no file: expected the path of a libtpu.so")
            return Path(named)
    found = importlib.util.find_spec("libtpu")
    folders = [*(found.submodule_search_locations or () if found else ()), f"{sys.prefix}/tpu/libtpu"]
    return next((file for folder in folders if (file := Path(folder) / "libtpu.so").is_file()), None)


@contextmanager
def _loading(library: Path) -> Iterator[None]:
    """jax loads the TPU compiler from `library` meanwhile, and at no other time."""
    # The compiler asks a cloud machine's metadata server what it runs on, for minutes where there is none, warns where
    # nobody says what (whatever is said), and refuses to be loaded by two processes of one machine. None of this
    # concerns compilation.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    jax.devices()  # what is here starts first: once the compiler is loaded, jax would try to start a TPU with it
    before = os.environ.get("TPU_LIBRARY_PATH")
    os.environ["TPU_LIBRARY_PATH"] = str(library)
    try:
        yield
    finally:
        if before is None:
            del os.environ["TPU_LIBRARY_PATH"]
        else:
            os.environ["TPU_LIBRARY_PATH"] = before


CUDNN_VERSION = 91000  # that of GPUs that are not here
CUDA_PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
MISSING_CUDA = (
    "the GPU compiler, JAX's CUDA plugin, is not installed: pip install jax-cuda13-plugin=={version}, which is enough "
    'to compile, or "jaxft[cuda]" with all that a GPU needs'
)


def find_cuda_plugin() -> bool:
    """Whether JAX's CUDA plugin is there, which has the compiler for GPUs; compiling needs nothing else of CUDA.

    It is a package of the environment, or lies in a folder `cuda` of it (`make test` fills it), which is then put on
    the path: beside jax, the plugin alone would make jax complain of the rest of CUDA wherever it starts. jax looks for
    plugins once, when it first asks for devices, so that this comes before.
    """
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # of libraries that compiling does not need
    folder = Path(sys.prefix, "cuda")
    if not any(map(_is_installed, CUDA_PLUGINS)) and folder.is_dir() and str(folder) not in sys.path:
        sys.path.append(str(folder))
        importlib.invalidate_caches()
    return any(map(_is_installed, CUDA_PLUGINS))


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # nor is its parent
        return False


def _target_text(chip: Chip) -> str:
    """XLA's description of a GPU, a `GpuTargetConfigProto` as text. What all of these GPUs have alike stands here."""
    target = chip.target
    assert target is not None
    major, minor = divmod(CUDNN_VERSION, 10000)
    extension = "ACCELERATED_FEATURES" if target.capability >= 9 else "NONE"
    return f"""
        gpu_device_info {{
          threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
          thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          shared_memory_per_block: 49152 shared_memory_per_block_optin: {target.shared_bytes_per_core - 1024}
          shared_memory_per_core: {target.shared_bytes_per_core} l2_cache_size: {target.l2_bytes}
          core_count: {target.cores} fpus_per_core: {target.floats_per_core} clock_rate_ghz: {target.clock_ghz}
          memory_bandwidth: {int(chip.hbm_bandwidth)} device_memory_size: {chip.hbm_bytes}
          cuda_compute_capability {{ major: {target.capability} feature_extension: {extension} }}
        }}
        platform_name: "CUDA" device_description_str: "{target.name}"
        dnn_version_info {{ major: {major} minor: {minor // 100} }}
    """


def topology_devices(topology: Topology) -> list[jax.Device]:
    """Devices of a topology: they can be compiled for, and nothing else.

    Raises:
        TopologyError: the compiler is not installed, or does not know the topology.
    """
    try:
        description = _gpu_description(topology) if topology.chip.is_gpu else _tpu_description(topology)
    except TopologyError:
        raise
    except (RuntimeError, ValueError) as error:
        raise TopologyError(f"the compiler refuses {topology}: {str(error).splitlines()[0]}") from error
    return list(description.devices)


def _tpu_description(topology: Topology) -> Any:
    library = compiler()
    if library is None:
        raise TopologyError(MISSING)
    from jax.experimental import topologies

    options: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if math.prod(topology.shape) < 4:  # a single chip of a host of four
        options["chips_per_host_bounds"] = (*topology.shape, *(1,) * (3 - len(topology.shape)))
    with _loading(library):
        name = f"{topology.generation}:{topology.layout}"
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options)


def _gpu_description(topology: Topology) -> Any:
    if not find_cuda_plugin():
        raise TopologyError(MISSING_CUDA.format(version=jax.__version__))
    from jax.experimental import topologies

    layout = f"{topology.slices}x1x{topology.layout}"  # nodes, processes of a node, GPUs of a process
    return topologies.get_topology_desc(layout, "cuda", topology=layout, target_config=_target_text(topology.chip))


@contextmanager
def assumed_cudnn(devices: Iterable[jax.Device]) -> Iterator[None]:
    """Meanwhile jax writes calls of cuDNN for GPUs of a topology as it would on them.

    When it traces such a call it asks the cuDNN and the GPU that are here for their versions, although the program only
    names what is to be called. There is no public way to tell it.
    """
    from jax._src.cudnn import fused_attention_stablehlo as library

    kind = next(iter(devices)).device_kind
    target = next((chip.target for chip in CHIPS.values() if chip.target and chip.target.name == kind), None)
    if target is None or any(device.platform == "gpu" for device in jax.local_devices()):
        yield
        return
    asked = library.check_cudnn_version, library.check_compute_capability
    library.check_cudnn_version = lambda: CUDNN_VERSION
    library.check_compute_capability = lambda least: target.capability >= float(least)
    try:
        yield
    finally:
        library.check_cudnn_version, library.check_compute_capability = asked
