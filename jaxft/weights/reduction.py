"""Gradients of weights that are divided over many chips: summed in stages, each chip keeping only its rows.

A weight `[d_in, d_out]` whose rows are divided over `fsdp` wants the sum over all chips of `x.T @ g`, and of it only a
part on each. On groups that span more than one axis of a torus XLA's TPU compiler (libtpu 0.0.42) makes that an
all-reduce of the whole matrix, of which each chip then throws most away: twice the traffic. Here it is a reduce-scatter
along one axis of the torus after the other, which stay what they are. Up to 32 chips XLA sums while it multiplies
(collective matrix products), which is better still; that is left to it.
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

BATCH_AXES = ("data", "expert", "fsdp")
Stages = tuple[int, ...]
_STAGES: ContextVar[Stages] = ContextVar("stages", default=())


@contextlib.contextmanager
def scattered_in(stages: Stages) -> Iterator[None]:
    """What is differentiated inside sums gradients of weights in `stages`: how many chips of the axis `fsdp` of the
    ambient mesh lie along each axis of the torus, the slowest first. With fewer than two XLA decides."""
    token = _STAGES.set(stages if len(stages) > 1 else ())
    try:
        yield
    finally:
        _STAGES.reset(token)


def stages_for(x: Float[Array, "... d_in"]) -> Stages:
    """The stages for the gradient of a weight that `x` is multiplied with; none where XLA decides.

    XLA decides unless the matrix and `x [batch, seq, d_in]` divide over the ambient mesh, and where `tensor` divides
    the matrix, too.
    """
    stages, mesh = _STAGES.get(), jax.sharding.get_abstract_mesh()
    if not stages or x.ndim != 3 or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return ()
    size = mesh.shape
    rows = math.prod(size[axis] for axis in BATCH_AXES)
    divides = x.shape[0] % rows == 0 and x.shape[1] % size["sequence"] == 0 and x.shape[2] % size["fsdp"] == 0
    return stages if divides and size["tensor"] == 1 and size["fsdp"] == math.prod(stages) else ()


def weight_gradient(
    x: Float[Array, "*rows d_in"], g: Float[Array, "*rows d_out"], stages: Stages = ()
) -> Float[Array, "d_in d_out"]:
    """`x.T @ g` summed over all rows; with `stages` its rows are divided over `fsdp`."""
    if not stages:
        return jnp.matmul(x.reshape(-1, x.shape[-1]).T, g.reshape(-1, g.shape[-1]))
    others = tuple(a for a in ("data", "expert", "sequence") if jax.sharding.get_abstract_mesh().shape[a] > 1)

    def local(x: Array, g: Array) -> Array:
        part = weight_gradient(x, g)
        for groups in _groups(stages):
            part = lax.psum_scatter(part, "fsdp", scatter_dimension=0, axis_index_groups=groups, tiled=True)
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def scattered_matmul(
    x: Float[Array, "batch seq d_in"], w: Float[Array, "d_in d_out"], stages: Stages
) -> Float[Array, "batch seq d_out"]:
    """`x @ w` whose weight gradient is summed in `stages`."""
    return jnp.matmul(x, w)


def _forward(x: Any, w: Any, stages: Stages) -> tuple[Array, tuple[Array | None, Array | None]]:
    kept = (x.value if w.perturbed else None, w.value if x.perturbed else None)
    return jnp.matmul(x.value, w.value), kept


def _backward(
    stages: Stages, kept: tuple[Array | None, Array | None], g: Array | SymbolicZero
) -> tuple[Array | None, Array | None]:
    x, w = kept
    if isinstance(g, SymbolicZero):
        return None, None
    return None if w is None else jnp.matmul(g, w.T), None if x is None else weight_gradient(x, g, stages)


scattered_matmul.defvjp(_forward, _backward, symbolic_zeros=True)
