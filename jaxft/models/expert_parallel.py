"""Tokens travel to experts: what a mixture computes where the mesh axis `expert` divides its experts.

The devices of a group along `expert` hold different experts and different tokens. Each is sent the tokens of all of
them (an all-gather), multiplies the rows that go to its own experts, and what the devices add to each token is summed
where the token came from (a reduce-scatter). With as many devices in a group as a token has experts that is what an
all-to-all of one copy for every expert would send, and every shape is known beforehand.

How many rows a device gets is not: it depends on the router. Rows go through a buffer that has room for `SPARE` times
those of a balanced batch, in as many rounds as the fullest device needs, so that no token is dropped, and nothing has
the size of the worst case. The first round is the program; further ones are a loop, which as a rule does not run.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxft.models.sharding import platform
from jaxft.weights import Axes, Tree, differentiated, merged, sum_rows

SPARE = 2.0  # times the rows of a balanced batch have room in one round
TILE = 128  # a round has a multiple of this many rows

Compute = Callable[[Tree, Array, Array, Array], Array]
"""`(weights, rows [shards, rows, dim] sorted by expert, sizes [shards, experts], gates [shards, rows]) -> rows`."""


class Arrivals(NamedTuple):
    """What each device was sent: one entry for every token and expert in its group, runs of one expert and sender.

    token: of an entry, which of the tokens that were sent it is. end: how many rows for the experts of this device
    there are up to the end of a run, runs in the order of experts, then senders. first: the entry of a run's first row,
    less the rows before it.
    """

    token: Int[Array, "shards entries"]
    end: Int[Array, "shards runs"]
    first: Int[Array, "shards runs"]


def expert_axes(shards: tuple[str, ...], experts: int) -> tuple[str, ...]:
    """The mesh axes over which tokens that lie over `shards` travel to their experts; () where they do not divide."""
    size = jax.sharding.get_abstract_mesh().shape
    return tuple(axis for axis in shards if axis == "expert" and experts % size[axis] == 0)


def across_experts(
    compute: Compute,
    weights: Tree,
    tokens: Float[Array, "shards tokens dim"],
    order: Int[Array, "shards entries"],
    sizes: Int[Array, "shards experts"],
    gates: Float[Array, "shards entries"],
    axes: Axes,
) -> Float[Array, "shards tokens dim"]:
    """The mixture of tokens that lie over `axes.shards`, whose experts lie over `axes.groups`.

    Args:
        compute: what experts make of rows, times the gates of these, with the first dimension of their matrices divided
            over `axes.groups`.
        weights: what `compute` gets, and what has gradients.
        order: of the entries of a shard, `tokens x k` of them, those of expert 0 first; entry i is of token i // k.
        sizes: how many of them each expert has.
        gates: of the entries in that order.
    """
    (shards, count, _), entries, experts = tokens.shape, order.shape[1], sizes.shape[1]
    group = _group_size(axes)
    k = entries // count
    sent = functools.partial(_shared, axes=axes)
    tokens, gates = sent(tokens), sent(gates)
    token = (sent(order // k).reshape(shards, group, entries) + count * jnp.arange(group)[:, None]).reshape(shards, -1)
    arrivals = _arrivals(token, sent(sizes).reshape(shards, group, experts), _is_own(shards, experts, axes))
    worst = group * count * min(k, experts // group)
    rows = int(min(_room(entries), worst))
    rounds = -(-jnp.max(arrivals.end[:, -1]) // rows)

    def step(index: Array | int, tokens: Array, gates: Array, weights: Tree, arrivals: Arrivals) -> Array:
        return _round(compute, index, rows, tokens, gates, weights, arrivals, experts, axes)

    given = (tokens, gates, weights, arrivals)
    found = step(0, *given)
    if rows < worst:
        found = _further(step, rounds, found, given)
    return _summed(found, axes)


def _group_size(axes: Axes) -> int:
    return math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in axes.groups)


def _room(entries: int) -> float:
    """How many rows a round has on a device that sends so many entries and, if all is balanced, gets as many."""
    if platform() == "cpu":  # whose devices wait for each other where a loop, and what may run beside it, both send
        return math.inf
    return -(-math.ceil(SPARE * entries) // TILE) * TILE


def _shared(x: Float[Array, "shards n ..."], axes: Axes) -> Float[Array, "shards all ..."]:
    """What all devices of a group have, to each of them."""
    divided = PartitionSpec(axes.shards)

    def gather(x: Array) -> Array:
        return lax.all_gather(x[0], axes.groups).reshape(1, -1, *x.shape[2:])

    return jax.shard_map(gather, in_specs=divided, out_specs=divided, axis_names=set(axes.shards))(x)


def _summed(x: Float[Array, "shards all dim"], axes: Axes) -> Float[Array, "shards n dim"]:
    """The sum over a group of what each of its devices has for all, to each device its part."""
    divided, group = PartitionSpec(axes.shards), _group_size(axes)

    def scatter(x: Array) -> Array:
        # The parts lie along a dimension of their own, here and in the gradient of the gather: pieces of one with
        # others before it libtpu would sum by all-reduce, which sends twice as much.
        return lax.psum_scatter(x[0].reshape(group, -1, x.shape[-1]), axes.groups)[None]

    return jax.shard_map(scatter, in_specs=divided, out_specs=divided, axis_names=set(axes.shards))(x)


def _is_own(shards: int, experts: int, axes: Axes) -> Bool[np.ndarray, "shards experts"]:
    """Which experts the device of each shard holds."""
    size = jax.sharding.get_abstract_mesh().shape
    places = np.indices([size[axis] for axis in axes.shards]).reshape(len(axes.shards), shards)
    (axis,) = axes.groups
    return places[axes.shards.index(axis)][:, None] == np.arange(experts) // (experts // size[axis])


def _arrivals(
    token: Int[Array, "shards entries"],
    sizes: Int[Array, "shards senders experts"],
    is_own: Bool[np.ndarray, "shards experts"],
) -> Arrivals:
    shards, senders, _ = sizes.shape
    before = jnp.cumsum(sizes, axis=2) - sizes + (token.shape[1] // senders) * jnp.arange(senders)[:, None]
    length, entry = (x.swapaxes(1, 2).reshape(shards, -1) for x in (sizes * is_own[:, None], before))
    end = jnp.cumsum(length, axis=1)
    return Arrivals(token, end, entry - (end - length))


def _round(
    compute: Compute,
    index: Array | int,
    rows: int,
    tokens: Float[Array, "shards all dim"],
    gates: Float[Array, "shards entries"],
    weights: Tree,
    arrivals: Arrivals,
    experts: int,
    axes: Axes,
) -> Float[Array, "shards all dim"]:
    """What the rows `index * rows` up to the next round's add to the tokens of each device's group."""
    start = index * rows
    at = start + jnp.arange(rows)
    is_row = at < arrivals.end[:, -1:]
    find = functools.partial(jnp.searchsorted, v=at, side="right", method="compare_all")
    run = jnp.minimum(jax.vmap(find)(arrivals.end), arrivals.end.shape[1] - 1)
    entry = jnp.where(is_row, jnp.take_along_axis(arrivals.first, run, axis=1) + at, 0)
    token = jnp.where(is_row, jnp.take_along_axis(arrivals.token, entry, axis=1), tokens.shape[1])
    gate = jnp.where(is_row, jnp.take_along_axis(gates, entry, axis=1), 0)
    ends = jnp.clip(arrivals.end.reshape(token.shape[0], experts, -1)[..., -1] - start, 0, rows)
    y = compute(weights, _rows_of(tokens, token, axes), jnp.diff(ends, axis=1, prepend=0), gate)
    return _onto_tokens(y, token, tokens.shape[1], axes)


# The rows of tokens, and their sums by token: each is the transpose of the other. A row of no token is zero.


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rows_of(tokens: Array, token: Array, axes: Axes) -> Array:
    return jnp.take_along_axis(tokens, token[..., None], axis=1, mode="fill", fill_value=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _onto_tokens(rows: Array, token: Array, count: int, axes: Axes) -> Array:
    return sum_rows(rows, token, count, axes)


_rows_of.defvjp(
    lambda x, token, axes: (_rows_of(x, token, axes), (token, x[:, :, :0])),
    lambda axes, kept, g: (_onto_tokens(g, kept[0], kept[1].shape[1], axes), None),
)
_onto_tokens.defvjp(
    lambda x, token, count, axes: (_onto_tokens(x, token, count, axes), token),
    lambda count, axes, token, g: (_rows_of(g, token, axes), None),
)


# --- further rounds ---------------------------------------------------------------------------------------------------

Step = Callable[..., Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _further(step: Step, rounds: Int[Array, ""], first: Array, given: Tree) -> Array:
    """`first` and `step(1, *given)` to `step(rounds - 1, *given)`. What each step needs backward is computed again."""
    return lax.fori_loop(1, rounds, lambda i, y: y + step(i, *given), first)


def _further_forward(step: Step, rounds: Any, first: Any, given: Tree) -> tuple[Array, tuple]:
    y = _further(step, rounds.value, first.value, jax.tree.map(lambda p: p.value, given))
    return y, (rounds.value, *differentiated(given))


def _further_backward(step: Step, kept: tuple, g: Array | SymbolicZero) -> tuple:
    rounds, moved, fixed = kept
    if isinstance(g, SymbolicZero):
        return None, None, None

    def more(index: Array, sums: Tree) -> Tree:
        def of(moved: Tree) -> Array:
            return step(index, *merged(moved, fixed))

        return jax.tree.map(jnp.add, sums, jax.vjp(of, moved)[1](g)[0])

    return None, g, lax.fori_loop(1, rounds, more, jax.tree.map(jnp.zeros_like, moved))


_further.defvjp(_further_forward, _further_backward, symbolic_zeros=True)
