"""TPU topologies by name, without a TPU: devices to compile for, and what a chip of each generation can do.

Compilation ahead of time needs the TPU compiler only, which is the `libtpu` wheel. See `compiler` for where it may be.
"""

import dataclasses
import importlib.util
import math
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from jaxft.errors import JaxftError, nearest

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak figures of one chip.

    flops: bf16 multiply-adds counted as two, per second. hbm_bytes: memory. hbm_bandwidth: bytes per second.
    link_bandwidth: bytes per second of one inter-chip link, one way. links: of a chip, two for each dimension of the
    torus. source: where the figures are published.
    """

    generation: str
    flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    links: int
    source: str


_DOCS = "https://cloud.google.com/tpu/docs/"
# Interconnect is published per chip and for both directions together (v5e: 1600 Gbit/s over 4 links).
CHIPS = {
    "v4": Chip("v4", 275e12, 32 * GIB, 1228e9, 50e9, 6, _DOCS + "v4"),
    "v5e": Chip("v5e", 197e12, 16 * GIB, 819e9, 50e9, 4, _DOCS + "v5e"),
    "v5p": Chip("v5p", 459e12, 95 * GIB, 2765e9, 100e9, 6, _DOCS + "v5p"),
    "v6e": Chip("v6e", 918e12, 32 * GIB, 1640e9, 100e9, 4, _DOCS + "v6e"),
}
# What the compiler leaves to programs: it refuses a v5e program above 15.75 GiB of the 16.
RESERVED_HBM = GIB // 4

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
    """`slices` TPU slices, each a torus of chips of `shape`."""

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

    Raises:
        TopologyError: an unknown generation or shape, with the nearest that exist.
    """
    found = re.fullmatch(r"(?:(\d+)\*)?([a-z0-9]+)(?:[:-]([0-9x]+))?", name.strip().lower())
    generation = found[2] if found else name
    generation = {"v5litepod": "v5e", "v6": "v6e", "v5": "v5p"}.get(generation, generation)
    if not found or generation not in CHIPS:
        raise TopologyError(
            f'unknown topology "{name}": expected GENERATION:SHAPE such as v5e:4x4; generation: '
            f"{nearest(generation, CHIPS)}"
        )
    slices, size = int(found[1] or 1), found[3] or ""
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
    if slices < 1:
        raise TopologyError(f'topology "{name}" has no slices: expected at least 1')
    topology = Topology(generation, dimensions, slices)
    if topology.num_chips > MOST_CHIPS:
        most = MOST_CHIPS // math.prod(dimensions)
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


def topology_devices(topology: Topology) -> list[jax.Device]:
    """Devices of a topology: they can be compiled for, and nothing else.

    Raises:
        TopologyError: the TPU compiler is not installed, or does not know the topology.
    """
    library = compiler()
    if library is None:
        raise TopologyError(MISSING)
    from jax.experimental import topologies

    options: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if math.prod(topology.shape) < 4:  # a single chip of a host of four
        options["chips_per_host_bounds"] = (*topology.shape, *(1,) * (3 - len(topology.shape)))
    try:
        with _loading(library):
            description = topologies.get_topology_desc(
                platform="tpu", topology_name=f"{topology.generation}:{topology.layout}", **options
            )
    except (RuntimeError, ValueError) as error:
        raise TopologyError(f"the TPU compiler refuses {topology}: {str(error).splitlines()[0]}") from error
    return list(description.devices)
