"""Weights whose rows are divided over many chips: gathered, and their gradients summed, in stages.

A chip that holds some rows of a weight `[d_in, d_out]` wants all of them for a product, and of the sum over all chips
of `x.T @ g` it wants its rows. On groups that span several axes of a torus XLA's TPU compiler (libtpu 0.0.42) makes
the sum an all-reduce of the whole matrix, of which each chip throws most away; on three axes (v4, v5p), and for small
matrices on many chips, the gather becomes an all-reduce of pieces padded with zeros. Either sends twice the bytes.
Along one axis of the torus after the other, both stay what they are. Up to 32 chips XLA gathers and sums while it
multiplies (collective matrix products), which is better still and left to it; not so where other chips have a copy,
which is summed too, nor for the matrices of experts, which kernels multiply (`jaxft.weights.ragged`). Tokens that
many chips exchange go in the same stages.
"""

import contextlib
import functools
import math
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float

BATCH_AXES = ("data", "expert", "fsdp")  # the mesh axes over which the rows of a batch are divided
FEWEST = 64  # chips from which on products of rows with one matrix go in stages, where there is one copy of it
SMALL = 2**18  # bytes of a matrix on one chip up to which so many gather it in stages
Stages = tuple[int, ...]
_STAGES: ContextVar[Stages | None] = ContextVar("stages", default=())


@contextlib.contextmanager
def scattered_in(stages: Stages | None) -> Iterator[None]:
    """What is differentiated inside sums gradients of weights in `stages`: how many chips of the axis `fsdp` of the
    ambient mesh lie along each axis of the torus, the slowest first. Without any XLA decides. None says that over
    `fsdp` lie the columns of the weights inside, not their rows."""
    token = _STAGES.set(stages)
    try:
        yield
    finally:
        _STAGES.reset(token)


def _divides_rows(d_in: int) -> bool:
    """Whether the ambient mesh divides the rows of weights `[..., d_in, d_out]` over `fsdp`, and only them."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return False
    size = mesh.shape
    return size.get("fsdp", 1) > 1 and size.get("tensor", 1) == 1 and d_in % size["fsdp"] == 0


def stages_of(d_in: int) -> Stages:
    """The stages for weights `[..., d_in, d_out]`; none where their rows do not divide over the ambient mesh, or where
    `tensor` divides them, too."""
    stages = _STAGES.get()
    if not stages or not _divides_rows(d_in):
        return ()
    return stages if jax.sharding.get_abstract_mesh().shape["fsdp"] == math.prod(stages) else ()


def stages_for(x: Float[Array, "... d_in"]) -> Stages:
    """The stages for the gradient of a weight that `x` is multiplied with; none where XLA decides.

    XLA decides on few chips, and unless `x` is `[batch, seq, d_in]` and divides over the ambient mesh.
    """
    stages, size = stages_of(x.shape[-1]), jax.sharding.get_abstract_mesh().shape
    is_only_copy = all(size[axis] == 1 for axis in ("data", "expert", "sequence")) if stages else True
    if (is_only_copy and math.prod(stages) < FEWEST) or x.ndim != 3:
        return ()
    rows = math.prod(size[axis] for axis in BATCH_AXES)
    return stages if x.shape[0] % rows == 0 and x.shape[1] % size["sequence"] == 0 else ()


def gathered(
    w: Float[Array, "*groups d_in d_out"], stages: Stages, groups: tuple[str, ...] = ()
) -> Float[Array, "*groups d_in d_out"]:
    """All rows of `w`, which are divided over `fsdp`: in `stages` where there are three of them, or where many
    chips hold little each.

    The first dimension stays divided over the mesh axes `groups`.
    """
    is_small = w.size * w.dtype.itemsize <= math.prod(stages) * SMALL
    if len(stages) < 3 and (math.prod(stages) < FEWEST or not is_small):
        return w
    rows = w.ndim - 2

    def local(part: Array) -> Array:
        for chips in reversed(list(_groups(stages))):
            part = lax.all_gather(part, "fsdp", axis_index_groups=chips, axis=rows, tiled=True)
        return part

    leading = (groups or None, *[None] * (rows - 1)) if rows else ()
    spec, whole = PartitionSpec(*leading, "fsdp"), PartitionSpec(*leading)
    return jax.shard_map(local, in_specs=spec, out_specs=whole, check_vma=False)(w)


def scattered(part: Float[Array, "*groups d_in d_out"], stages: Stages) -> Float[Array, "*groups rows d_out"]:
    """The rows of a chip of the sum over `fsdp` of what each chip has, where `fsdp` is a manual axis."""
    if part.ndim == 3 and len(part) == 1:  # behind a dimension of one, libtpu would sum by all-reduce
        return scattered(part[0], stages)[None]
    rows = part.ndim - 2
    for groups in _groups(stages) if stages else (None,):
        part = lax.psum_scatter(part, "fsdp", scatter_dimension=rows, axis_index_groups=groups, tiled=True)
    return part


def division(x: Float[Array, "... d_in"]) -> Stages | None:
    """How `divided_gradient` divides the gradient of a weight that `x` is multiplied with; None where it does not."""
    return None if _STAGES.get() is None or not _divides_rows(x.shape[-1]) else stages_for(x)


def divided_gradient(
    x: Float[Array, "*rows d_in"], g: Float[Array, "*rows d_out"], stages: Stages | None
) -> Float[Array, "d_in d_out"]:
    """`weight_gradient` for those who want some entries of it: unless `stages` (see `division`) is None its rows are
    divided over `fsdp`, so that no chip holds, or is sent, the whole sum."""
    if stages:
        return weight_gradient(x, g, stages)
    found = weight_gradient(x, g)
    return found if stages is None else lax.with_sharding_constraint(found, PartitionSpec("fsdp"))


def as_rows(x: Float[Array, "... dim"]) -> Float[Array, "... dim"]:
    """`x` as a matrix, where one device holds all of it.

    The gradient of a weight sums over all leading axes. Over one axis that is one matrix product; over several XLA
    first transposes an operand, which on a CPU takes longer than the product. On a larger mesh the axes stay apart:
    merging two that are both divided would gather them.
    """
    return x.reshape(-1, x.shape[-1]) if x.ndim > 2 and jax.sharding.get_abstract_mesh().size <= 1 else x


def weight_gradient(
    x: Float[Array, "*rows d_in"], g: Float[Array, "*rows d_out"], stages: Stages = ()
) -> Float[Array, "d_in d_out"]:
    """`x.T @ g` summed over all rows; with `stages` its rows are divided over `fsdp`."""
    if not stages:
        x, g = as_rows(x), as_rows(g)
        tokens = tuple(range(x.ndim - 1))
        return lax.dot_general(x, g, ((tokens, tokens), ((), ())))
    others = tuple(a for a in ("data", "expert", "sequence") if jax.sharding.get_abstract_mesh().shape[a] > 1)

    def local(x: Array, g: Array) -> Array:
        part = scattered(weight_gradient(x, g), stages)
        return lax.psum(part, others) if others else part

    tokens = PartitionSpec(BATCH_AXES, "sequence")
    return jax.shard_map(local, in_specs=(tokens, tokens), out_specs=PartitionSpec("fsdp"), check_vma=False)(x, g)


def _groups(stages: Stages) -> Iterator[list[list[int]]]:
    """The groups of chips that sum with each other in each stage. The first divides the matrix into the largest parts,
    so that a chip ends with the rows of its index."""
    count = math.prod(stages)
    for i, size in enumerate(stages):
        stride = math.prod(stages[i + 1 :])
        yield [
            [start + k * stride for k in range(size)]
            for block in range(0, count, size * stride)
            for start in range(block, block + stride)
        ]


def stages_of_exchange(dim: int) -> Stages:
    """The stages in which `exchanged` moves tokens of so many channels; none where XLA moves them at once."""
    stages = stages_of(dim)
    return stages if len(stages) > 1 and math.prod(stages) >= FEWEST else ()


def exchanged(
    x: Float[Array, "batch seq dim"], stages: Stages, before: PartitionSpec, after: PartitionSpec
) -> Float[Array, "batch seq dim"]:
    """`x` from the layout `before`, in which `fsdp` divides `dim`, in the layout `after`, in which it divides the batch
    last of all axes. A byte passes as many links of a torus in `stages` as at once. But at once, over 256 chips of a
    v5e, libtpu compiles for 30 s, and as long for the gradient."""

    def local(part: Array) -> Array:
        batch, seq, width = part.shape
        part = part.reshape(*stages, batch // math.prod(stages), seq, width)  # by the chip where a row goes
        for axis, chips in enumerate(_groups(stages)):
            part = lax.all_to_all(part, "fsdp", axis, axis, axis_index_groups=chips, tiled=True)
        part = part.reshape(math.prod(stages), -1, seq, width)  # by the chip where a slice comes from
        return part.transpose(1, 2, 0, 3).reshape(-1, seq, math.prod(stages) * width)

    return jax.shard_map(local, in_specs=before, out_specs=after, check_vma=False)(x)


def matmul_of_columns(
    x: Float[Array, "batch seq dim"], w: Float[Array, "dim columns"], stages: Stages
) -> Float[Array, "batch seq columns"]:
    """`x @ w` of a weight whose columns are divided over `fsdp`, which divides the batch of `x` last of all axes: the
    rows of `x` are gathered in `stages`, and their gradient is scattered. XLA would sum it on all of many chips."""

    def local(x: Array, w: Array) -> Array:
        for chips in reversed(list(_groups(stages))):
            x = lax.all_gather(x, "fsdp", axis_index_groups=chips, axis=0, tiled=True)
        return jnp.matmul(x, w)

    rows, columns = PartitionSpec(BATCH_AXES, "sequence"), PartitionSpec(None, "fsdp")
    result = PartitionSpec(BATCH_AXES[:-1], "sequence", "fsdp")
    return jax.shard_map(local, in_specs=(rows, columns), out_specs=result, check_vma=False)(x, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def scattered_matmul(
    x: Float[Array, "batch seq d_in"], w: Float[Array, "d_in d_out"], stages: Stages
) -> Float[Array, "batch seq d_out"]:
    """`x @ w` whose weight is gathered, and its gradient summed, in `stages`."""
    return jnp.matmul(x, gathered(w, stages))


def _forward(x: Any, w: Any, stages: Stages) -> tuple[Array, tuple[Array | None, Array | None]]:
    kept = (x.value if w.perturbed else None, w.value if x.perturbed else None)
    return jnp.matmul(x.value, gathered(w.value, stages)), kept


def _backward(
    stages: Stages, kept: tuple[Array | None, Array | None], g: Array | SymbolicZero
) -> tuple[Array | None, Array | None]:
    x, w = kept
    if isinstance(g, SymbolicZero):
        return None, None
    dx = None if w is None else jnp.matmul(g, gathered(w, stages).T)
    return dx, None if x is None else weight_gradient(x, g, stages)


scattered_matmul.defvjp(_forward, _backward, symbolic_zeros=True)
