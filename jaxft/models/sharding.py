"""Where activations live on the ambient mesh (`jax.set_mesh`). Without a mesh every function here is the identity.

The mesh axes are those of `jaxft.distributed`: the batch is cut over `data`, `expert` and `fsdp`, positions over
`sequence`, heads over `tensor`. An axis that does not divide a dimension is left out, so that a batch of one row runs.

In the residual stream, where there are no heads, `tensor` cuts positions, too ("Reducing Activation Recomputation in
Large Transformer Models", Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198, section 4.2.2): each device holds,
normalises and adds up its part of them. They are gathered for the projections whose outputs `tensor` divides, and the
sums of the projections whose inputs it divides are scattered.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float

from jaxft.weights.reduction import BATCH_AXES

MESH_AXES = {
    "batch": BATCH_AXES,
    "sequence": ("sequence",),
    "residual": ("sequence", "tensor"),  # positions between the projections of a layer
    "heads": ("tensor",),
    "replicas": ("data", "expert"),  # the batch, where `fsdp` divides the width instead
    "embed": ("fsdp",),
    "vocab": ("tensor", "fsdp"),
    "words": ("tensor",),  # of the table of embeddings, as it is stored
    "tokens": ("expert",),  # of a shard, where a mixture routes them
}


def mesh_axes(name: str | None, size: int) -> tuple[str, ...] | None:
    """The axes of the ambient mesh over which a dimension `name` of `size` is cut, or None where it is not."""
    mesh = jax.sharding.get_abstract_mesh()
    manual = {axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Manual}
    axes = tuple(axis for axis in MESH_AXES.get(name or "", ()) if mesh.shape.get(axis, 1) > 1 and axis not in manual)
    return axes if axes and size % math.prod(mesh.shape[axis] for axis in axes) == 0 else None


def num_shards(name: str, size: int) -> int:
    """Over how many devices of the ambient mesh a dimension is cut."""
    return math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in mesh_axes(name, size) or ())


def spec_of(shape: Sequence[int], names: Sequence[str | None]) -> PartitionSpec:
    """The PartitionSpec of an activation of `shape` whose dimensions have these names."""
    return PartitionSpec(*(mesh_axes(name, size) for name, size in zip(names, shape, strict=True)))


def constrain(x: Float[Array, "..."], *names: str | None) -> Float[Array, "..."]:
    """`x` with its layout on the ambient mesh stated, which keeps XLA from gathering activations over the batch."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return x
    return jax.lax.with_sharding_constraint(x, spec_of(x.shape, names))


def columns(x: Float[Array, "batch seq columns ..."]) -> Float[Array, "batch seq columns ..."]:
    """`x`, between projections whose outputs and inputs `tensor` divides, with its heads or channels divided so."""
    if mesh_axes("heads", x.shape[2]) is None:
        return x
    return constrain(x, "batch", "sequence", "heads", *[None] * (x.ndim - 3))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def moved(x: Float[Array, "..."], names: Sequence[str | None], back: Sequence[str | None]) -> Float[Array, "..."]:
    """`x` in the layout `names`, its gradient in the layout `back`. That of `constrain` has the layout of the value:
    what is a sum over many devices would be summed on all of them, and then cut."""
    return constrain(x, *names)


moved.defvjp(lambda x, names, back: (moved(x, names, back), None), lambda names, back, _, g: (constrain(g, *back),))

_WHOLE = ("batch", "sequence", None)


def _residual_layout(seq: int) -> tuple[str | None, ...]:
    return ("batch", "residual", None) if mesh_axes("residual", seq) else _WHOLE


def residual(x: Float[Array, "batch seq dim"]) -> Float[Array, "batch seq dim"]:
    """`x` laid out as the residual stream is."""
    return constrain(x, *_residual_layout(x.shape[1]))


def from_residual(x: Float[Array, "batch seq dim"]) -> Float[Array, "batch seq dim"]:
    """What projections read of the residual stream: gathered over `tensor`, and the gradient is scattered."""
    size = jax.sharding.get_abstract_mesh().shape
    if size.get("tensor", 1) == 1:
        return x
    x = moved(x, _WHOLE, _residual_layout(x.shape[1]))
    # Where axes other than these two divide tokens, XLA takes one for another, and gathers positions or matrices: it is
    # told of the sum first, and makes one collective of both. Otherwise it sums while it multiplies.
    is_plain = all(count == 1 for axis, count in size.items() if axis not in ("fsdp", "tensor"))
    return x if is_plain else constrain(x, *_WHOLE)


def to_residual(x: Float[Array, "batch seq dim"]) -> Float[Array, "batch seq dim"]:
    """What projections add to the residual stream: scattered over `tensor`, and the gradient is gathered."""
    if jax.sharding.get_abstract_mesh().shape.get("tensor", 1) == 1:
        return x
    return moved(x, _residual_layout(x.shape[1]), _WHOLE)


def platform() -> str:
    """The platform that is compiled for: that of the ambient mesh (which may be a topology that is not here), or
    the default backend. One of "cpu", "gpu", "tpu"."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    name = getattr(device, "platform", None) or jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name


def token_shards(batch: int, seq: int) -> tuple[Callable[[Array], Array], Callable[[Array], Array], tuple[str, ...]]:
    """How the tokens of a batch lie on the ambient mesh, for work that each device does on its own tokens.

    Returns `(spread, gather, axes)`: `spread` makes `[shards, tokens of a shard, ...]` of `[batch, seq, ...]`, with the
    shards divided over `axes`, and `gather` is its inverse.
    """
    size = jax.sharding.get_abstract_mesh().shape
    over_batch, over_seq = mesh_axes("batch", batch) or (), mesh_axes("sequence", seq) or ()
    rows, columns = (math.prod(size[axis] for axis in axes) for axes in (over_batch, over_seq))
    spare = mesh_axes("tokens", (batch // rows) * (seq // columns)) or ()
    over_experts = tuple(axis for axis in spare if axis not in over_batch)  # rows that do not divide, tokens that do
    axes = (*over_batch, *over_seq, *over_experts)
    held = (rows, batch // rows, columns, seq // columns)

    def place(x: Array, spec: PartitionSpec) -> Array:
        return jax.lax.with_sharding_constraint(x, spec) if axes else x

    def spread(x: Array) -> Array:
        x = x.reshape(*held, *x.shape[2:]).swapaxes(1, 2)
        count = rows * columns * math.prod(size[axis] for axis in over_experts)
        return place(x.reshape(count, -1, *x.shape[4:]), PartitionSpec(axes))

    def gather(x: Array) -> Array:
        x = place(x.reshape(rows * columns, -1, *x.shape[2:]), PartitionSpec((*over_batch, *over_seq)))
        return x.reshape(rows, columns, held[1], held[3], *x.shape[2:]).swapaxes(1, 2).reshape(batch, seq, *x.shape[2:])

    return spread, gather, axes
