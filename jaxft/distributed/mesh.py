"""The device mesh: five named axes, any of which may be 1."""

import logging
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh
from pydantic import BaseModel, ConfigDict, Field, model_validator

from jaxft.errors import JaxftError
from jaxft.weights.reduction import BATCH_AXES

AXES = ("data", "fsdp", "tensor", "sequence", "expert")

_logger = logging.getLogger(__name__)


class MeshError(JaxftError):
    """A mesh that the devices, or a batch that the mesh, cannot be divided into."""


class MeshConfig(BaseModel):
    """How many devices each mesh axis has. At most one axis is -1: it takes what the others leave.

    `data` is -1 unless another axis is, or unless it is set. `mesh: auto` leaves the axes to `automatic.resolve_mesh`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: int = Field(-1, description="Copies of the parameters; the batch is split over them.")
    fsdp: int = Field(1, description="Devices that share one copy of parameters and moments; splits the batch too.")
    tensor: int = Field(1, description="Devices that share every matrix product (heads, MLP columns, vocabulary).")
    sequence: int = Field(1, description="Devices that share the positions of a sequence.")
    expert: int = Field(1, description="Devices that share the experts of a mixture; splits the batch too.")
    dcn: int = Field(1, ge=1, description="Slices joined by the data-centre network. They divide the data axis.")
    auto: bool = Field(False, description="Choose the axes from model, method and devices; short: `mesh: auto`.")
    process_timeout: float = Field(
        60.0,
        ge=1,
        description="Seconds without a sign of life after which a process is taken for lost and the others stop.",
    )

    @model_validator(mode="before")
    @classmethod
    def _data_yields(cls, values: object) -> object:
        if values == "auto":
            return {"auto": True}
        if isinstance(values, dict) and "data" not in values and any(values.get(a) == -1 for a in AXES):
            return {**values, "data": values.get("dcn", 1)}
        return values

    @model_validator(mode="after")
    def _sizes(self) -> "MeshConfig":
        sizes = {axis: getattr(self, axis) for axis in AXES}
        for axis, size in sizes.items():
            if size == 0 or size < -1:
                raise ValueError(f"mesh.{axis} = {size}: expected a positive number of devices, or -1 for the rest")
        named = [f"mesh.{axis}" for axis, size in sizes.items() if size != (-1 if axis == "data" else 1)]
        if self.auto and named:
            raise ValueError(f"mesh.auto chooses the axes, and {' and '.join(named)} set some: remove one or the other")
        free = [axis for axis, size in sizes.items() if size == -1]
        if len(free) > 1:
            raise ValueError(f"mesh.{' and mesh.'.join(free)} are all -1: only one axis can take the rest")
        return self


def _sizes(config: MeshConfig, count: int) -> dict[str, int]:
    sizes = {axis: getattr(config, axis) for axis in AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    named = ", ".join(f"{axis}: {size}" for axis, size in sizes.items() if size not in (1, -1)) or "all axes 1"
    free = next((axis for axis, size in sizes.items() if size == -1), None)
    if free is None:
        if fixed != count:
            raise MeshError(
                f"the mesh ({named}) has {fixed} devices, but there are {count}; "
                f"set one axis to -1 to use all of them{_proposal(sizes, count)}"
            )
    elif count % fixed:
        raise MeshError(f"the mesh ({named}) needs a multiple of {fixed} devices, but there are {count}"
                        f"{_proposal(sizes, count)}")  # fmt: skip
    else:
        sizes[free] = count // fixed
    if sizes["data"] % config.dcn:
        raise MeshError(
            f"mesh.data = {sizes['data']} is not a multiple of mesh.dcn = {config.dcn}: "
            "the slices divide the data axis; lower fsdp, tensor, sequence or expert, or dcn"
        )
    return sizes


def _proposal(sizes: dict[str, int], count: int) -> str:
    """The nearest mesh that fits: every fixed axis lowered to a divisor of what is left, the rest to `data`."""
    left, found = count, {}
    for axis in AXES[1:]:
        wanted = max(sizes[axis], 1)
        found[axis] = max(d for d in range(1, wanted + 1) if left % d == 0)
        left //= found[axis]
    found = {"data": left, **found}
    return "; possible: {" + ", ".join(f"{a}: {n}" for a, n in found.items() if n > 1 or a == "data") + "}"


def make_mesh(config: MeshConfig = MeshConfig(), devices: Sequence[jax.Device] | None = None) -> Mesh:  # noqa: B008
    """A mesh with the axes `AXES` over `devices` (all of them by default), placed to suit the interconnect.

    Axes are `AxisType.Auto`: the compiler (GSPMD) propagates shardings from parameters and batch. With `dcn > 1`
    slices are the outer part of the data axis, so that only its collectives leave a slice.

    Raises:
        MeshError: the sizes do not fit the number of devices, or slices; the message proposes a mesh that does.
    """
    if config.auto:
        raise MeshError("mesh: auto has no axes yet: choose them with jaxft.distributed.automatic.resolve_mesh")
    devices = list(jax.devices() if devices is None else devices)
    sizes = _sizes(config, len(devices))
    shape = tuple(sizes[axis] for axis in AXES)
    types = (AxisType.Auto,) * len(AXES)
    if config.dcn == 1:
        try:
            return jax.make_mesh(shape, AXES, types, devices=devices)
        except NotImplementedError:  # no axis of the torus has the size asked for: one of them is cut
            cut = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
            return Mesh(cut, AXES, axis_types=types)
    return Mesh(_slices(shape, config.dcn, devices), AXES, axis_types=types)


def _slices(shape: tuple[int, ...], dcn: int, devices: list[jax.Device]) -> np.ndarray:
    """Devices of several slices; a slice is what the hardware says, else a process, else a run of devices."""
    inner, outer = (shape[0] // dcn, *shape[1:]), (dcn,) + (1,) * (len(shape) - 1)
    slices = {getattr(d, "slice_index", None) for d in devices}
    if len(slices) == dcn:
        try:
            found = mesh_utils.create_hybrid_device_mesh(inner, outer, devices)
        except NotImplementedError:  # as in one slice
            found = mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
        if max(inner) == math.prod(inner) and all(hasattr(d, "coords") for d in devices):
            # One axis: in lines, not in a ring, so that it has stages (`torus_stages`).
            rows = [sorted(row, key=lambda d: tuple(d.coords)) for row in found.reshape(dcn, -1)]
            found = np.asarray(rows).reshape(shape)
        return found
    if len({d.process_index for d in devices}) == dcn:
        return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, process_is_granule=True)
    if len(slices) > 1:
        raise MeshError(f"mesh.dcn = {dcn}, but the devices form {len(slices)} slices; set dcn: {len(slices)}")
    _logger.warning("the devices name no slices: mesh.dcn = %d cuts them in order", dcn)
    return np.asarray(devices).reshape(shape)


def torus_stages(mesh: Mesh, axis: str = "fsdp") -> tuple[int, ...]:
    """How many devices of a mesh axis lie along each axis of the torus, the slowest first: `(16, 16)` of 256.

    Empty for one device, and where devices have no coordinates or do not lie on a box.
    """
    at = mesh.axis_names.index(axis)
    line = np.moveaxis(mesh.devices, at, 0).reshape(mesh.devices.shape[at], -1)[:, 0]
    if len(line) < 2 or not all(hasattr(d, "coords") for d in line):
        return ()
    coords = np.array([d.coords for d in line])
    stages: list[int] = []
    stride = 1
    while stride < len(line):  # from the fastest: how far it goes in one direction
        steps = np.diff(coords[::stride], axis=0)
        turns = np.flatnonzero((steps != steps[0]).any(axis=1))
        stages.insert(0, int(turns[0]) + 1 if turns.size else len(steps) + 1)
        stride *= stages[0]
    if stride != len(line):
        return ()
    moves = [np.diff(coords.reshape(*stages, -1), axis=i).reshape(-1, coords.shape[1]) for i in range(len(stages))]
    return tuple(stages) if all((m == m[0]).all() and np.abs(m[0]).sum() == 1 for m in moves) else ()


def data_partition(mesh: Mesh) -> tuple[int, int]:
    """`(index, count)`: which of how many equal parts of the rows of a batch this process feeds.

    Processes that hold the same rows (a mesh whose tensor or sequence axis spans processes) have the same index.

    Raises:
        MeshError: the rows of processes overlap without being equal, so that no division by process exists.
    """
    order = [mesh.axis_names.index(axis) for axis in BATCH_AXES]
    rest = [i for i in range(mesh.devices.ndim) if i not in order]
    grid = mesh.devices.transpose(order + rest).reshape(math.prod(mesh.devices.shape[i] for i in order), -1)
    rows: dict[int, set[int]] = {}
    for row, devices in enumerate(grid):
        for device in devices:
            rows.setdefault(device.process_index, set()).add(row)
    groups = sorted({tuple(sorted(held)) for held in rows.values()})
    covered = [row for group in groups for row in group]
    if covered != list(range(len(grid))) or len({len(group) for group in groups}) > 1:
        raise MeshError(
            "the rows of a batch cannot be divided among the processes of this mesh; make data * fsdp * expert a "
            f"multiple of the {len(rows)} processes"
        )
    here = tuple(sorted(rows.get(jax.process_index(), ())))
    return groups.index(here), len(groups)
