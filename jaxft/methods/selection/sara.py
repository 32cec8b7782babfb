"""SaRA: the smallest weights train."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, PRNGKeyArray

from jaxft.errors import JaxftError
from jaxft.methods.base import Method, Signals
from jaxft.methods.probe import Probe
from jaxft.methods.registry import register
from jaxft.methods.selection.layers import at_rounds
from jaxft.methods.selection.redraw import num_units, redraw
from jaxft.methods.selection.scores import magnitude
from jaxft.methods.selection.select import selection
from jaxft.partition import Tuned, combine, shape_of, weights_by_path
from jaxft.weights import SparseDelta, Tree, add_entries, gather_flat, get_entries, is_node, materialize

THRESHOLD = "threshold"


@register(
    "sara",
    title="SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation",
    url="https://arxiv.org/abs/2409.06633",
    family="selection",
    learning_rate=1e-3,
    example={"budget": 0.2, "adjustments": 2},
)
def sara(budget: float | int = 0.1, adjustments: int = 1, nuclear: float = 5e-4, on: str = "@linear") -> Method:
    """Train the entries of smallest magnitude, and go on with those that stay small.

    W' = W + P, P nonzero where |W| < t, t the threshold under which the budget of the model's entries lies:
    `SparseDelta(base [L, ...], values [L, k], indices [L, k])`. The loss has + nuclear * sum of ||P||_* (the
    singular values of each matrix's P). Midway, entries that have grown beyond t are frozen where they are, and those
    still below train on.

    Notes:
        From diffusion models, carried over to the matrices of a language model as it is. The penalty costs some 30
        products of every P with itself at each step, which large matrices make slow: nuclear=0 leaves it out.

    Args:
        budget: entries that train, of all selected ones: a fraction or a count.
        adjustments: how often, at equal parts of the run, what is no longer small is frozen.
        nuclear: weight of the penalty.
        on: selector of the matrices.
    """
    if adjustments < 0 or nuclear < 0:
        raise JaxftError(f"sara: adjustments={adjustments} and nuclear={nuclear} must not be negative")
    start = selection(magnitude(), lowest=True, budget=budget, per="model", on=on)

    def init(rng: PRNGKeyArray, params: Tree, probe: Probe) -> Tuned:
        tuned = start.init(rng, params, probe)
        nodes = {p: w for p, w in weights_by_path(combine(tuned)).items() if p in tuned.state}
        threshold = jnp.max(jnp.stack([_largest(w) for w in nodes.values()]))
        return tuned._replace(state={**tuned.state, THRESHOLD: threshold})

    def update(rng: PRNGKeyArray, tuned: Tuned, opt_state: Any, signals: Signals, step: int) -> tuple[Tuned, Any]:
        nodes = {p: w for p, w in weights_by_path(combine(tuned)).items() if p in tuned.state}
        new = {p: still_small(w, tuned.state[THRESHOLD]) for p, w in nodes.items()}
        return redraw(tuned, opt_state, new, signals)

    def penalty(tuned: Tuned) -> Array:
        nodes = [
            w
            for p, w in weights_by_path(combine(tuned)).items()
            if p in tuned.state and isinstance(w, SparseDelta) and len(shape_of(w)) > 1
        ]
        return nuclear * sum(nuclear_norm(w) for w in nodes)

    due = at_rounds(adjustments + 1)
    return Method(init, update=update if due else None, due=due, penalty=penalty if nuclear else None)


def _entries(w: SparseDelta) -> Array:
    """The weights at the positions of a sparse delta; zero at padding."""
    dense = materialize(w.base) if is_node(w.base) else w.base
    take = jax.vmap(gather_flat) if w.indices.ndim > 1 else gather_flat
    return take(dense, w.indices).astype(jnp.float32) + materialize(w.values)


@jax.jit
def _largest(w: SparseDelta) -> Float[Array, ""]:
    return jnp.max(jnp.abs(_entries(w)))


@jax.jit
def still_small(w: SparseDelta, threshold: Array) -> Array:
    """The indices of which those whose weight exceeds `threshold` in magnitude have become padding."""
    return jnp.where(jnp.abs(_entries(w)) <= threshold, w.indices, num_units(w))


def nuclear_norm(w: SparseDelta) -> Float[Array, ""]:
    """The sum of the singular values of what a sparse delta adds, P, of all layers.

    ||P||_* = <P, U V^T>, whose derivative is U V^T (0 in directions that P does not have). Both need the entries of
    U V^T where P has any, and no more: a device forms the matrices of one layer at a time.
    """
    values = materialize(w.values).astype(jnp.float32)
    shape = shape_of(w)[w.indices.ndim - 1 :]

    def entries(given: tuple[Array, Array]) -> Array:
        values, indices = given
        return get_entries(polar_factor(add_entries(jnp.zeros(shape), values, indices)), indices)

    k = values.shape[-1]
    given = jax.lax.stop_gradient((values.reshape(-1, k), w.indices.reshape(-1, k)))
    return jnp.sum(values * _map_over_devices(entries, given).reshape(values.shape))


def _map_over_devices(fn: Callable[[Tree], Array], given: tuple[Array, ...]) -> Array:
    """`fn` of each row of some matrices, one after the other, the rows divided over the devices of the ambient mesh."""
    rows, mesh = given[0].shape[0], jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.lax.map(fn, given)
    spec = PartitionSpec(mesh.axis_names)
    divided = jax.shard_map(functools.partial(jax.lax.map, fn), in_specs=spec, out_specs=spec, check_vma=False)
    return divided(tuple(jnp.pad(a, ((0, -rows % mesh.size), (0, 0))) for a in given))[:rows]


def polar_factor(matrices: Float[Array, "... m n"]) -> Float[Array, "... m n"]:
    """U V^T of the singular value decomposition, by Newton-Schulz: matrix products only, so it runs well everywhere.

    X <- 1.5 a X - 0.5 a^3 X X^T X takes every singular value to 1; those below 1e-4 of the Frobenius norm do not get
    there, and zero stays zero. The scales a (Chen and Chow, "A Stable Scaling of Newton-Schulz for Improving the Sign
    Function Computation of a Hermitian Matrix", 2014) make small ones grow 2.5 times a step, not 1.5 times.
    """
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else jnp.swapaxes(matrices, -1, -2)
    x = x / jnp.maximum(jnp.linalg.norm(x, axis=(-2, -1), keepdims=True), 1e-30)
    scales = jnp.asarray(_scales())

    def step(i: Array, x: Array) -> Array:
        scaled = scales[i] * x
        return 1.5 * scaled - 0.5 * (scaled @ jnp.swapaxes(scaled, -1, -2)) @ scaled

    x = jax.lax.fori_loop(0, len(scales), step, x)
    return x if wide else jnp.swapaxes(x, -1, -2)


def _scales(least: float = 1e-4) -> list[float]:
    """Of each step, if singular values lie between `least` and 1: the ends then meet at the least of the next."""
    found = []
    while 1 - least > 1e-7:
        end = max(least, 0.1)  # else values near 1 would come so near zero that rounding might change their sign
        found.append(math.sqrt(3 / (1 + end + end**2)))
        least = min(1.5 * found[-1] * x - 0.5 * (found[-1] * x) ** 3 for x in (least, 1.0))
    return found
