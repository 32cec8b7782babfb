"""Granularity and budget: from scores of entries to units of weights, and from a budget to the units that train.

Scores of units are arrays `[pools, n]`: a row for each layer of a stacked leaf (one row for any other leaf), a column
for each unit in it. All choices are exact: k units are k units, ties go to the earlier one.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxft.errors import JaxftError

Granularity = Literal["element", "row", "column", "block", "expert", "matrix", "layer", "leaf"]
"""element: one entry. row, column: `size` consecutive input or output channels (a head, if `size` is its width).
block: `size x size` entries. expert: one matrix of the stack that a layer has of them. matrix: one layer's share of a
leaf. layer: a whole layer. leaf: all its layers."""

Per = Literal["matrix", "leaf", "layer", "category", "model"]
Budget = float | int | Callable[[tuple[int, ...]], int]

WITHIN = ("element", "row", "column", "block", "expert")
REDUCTIONS: dict[str, Callable] = {
    "mean": jnp.mean,
    "sum": jnp.sum,
    "norm": lambda x, axis: jnp.sqrt(jnp.sum(x * x, axis=axis)),
    "max": jnp.max,
}
Reduction = Literal["mean", "sum", "norm", "max"]


# --- granularity ------------------------------------------------------------------------------------------------------


def unit_shape(granularity: str, shape: tuple[int, ...], stacked: bool, size: int, path: str) -> tuple[int, int]:
    """`[pools, n]` of the units of a leaf of `shape`.

    Raises:
        JaxftError: the leaf cannot be cut so: it is a vector, or `size` does not divide it.
    """
    pools, matrix = (shape[0], shape[1:]) if stacked else (1, shape)
    if granularity == "leaf":
        return 1, 1
    if granularity in ("matrix", "layer"):
        return pools, 1
    if granularity == "element":
        return pools, math.prod(matrix)
    if granularity == "expert":
        if len(matrix) != 3:
            raise JaxftError(f'"{path}" of shape {shape} has no experts to choose from: select on: "@experts"')
        return pools, matrix[0]
    if len(matrix) != 2:
        raise JaxftError(
            f'"{path}" of shape {shape} has no {granularity}s to choose from: select matrices, e.g. on: "@linear"'
        )
    sides = {"row": matrix[:1], "column": matrix[1:], "block": matrix}[granularity]
    if any(side % size for side in sides):
        whole = " x ".join(map(str, sides))
        raise JaxftError(f'{granularity}s of size {size} do not tile the {whole} of "{path}": choose a divisor')
    return pools, math.prod(side // size for side in sides)


@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def reduce_to_units(
    score: Array, granularity: str, stacked: bool, size: int, reduction: str
) -> Float[Array, "pools n"]:
    """Scores of entries, in the shape of the weight, as scores of units: what `reduction` makes of their entries."""
    score = score.astype(jnp.float32)
    score = score if stacked else score[None]
    pools, reduce = score.shape[0], REDUCTIONS[reduction]
    if granularity == "element":
        return score.reshape(pools, -1)
    if granularity == "leaf":
        return reduce(score.reshape(1, -1), axis=-1)[:, None]
    if granularity in ("matrix", "layer"):
        return reduce(score.reshape(pools, -1), axis=-1)[:, None]
    if granularity == "expert":
        return reduce(score.reshape(pools, score.shape[1], -1), axis=-1)
    d_in, d_out = score.shape[1:]
    if granularity == "row":
        return reduce(score.reshape(pools, d_in // size, size * d_out), axis=-1)
    if granularity == "column":
        return reduce(score.reshape(pools, d_in, d_out // size, size), axis=(1, 3))
    tiles = score.reshape(pools, d_in // size, size, d_out // size, size)
    return reduce(tiles, axis=(2, 4)).reshape(pools, -1)


# --- the k best of many -----------------------------------------------------------------------------------------------


def _keys(scores: Float[Array, "..."]) -> UInt32[Array, "..."]:
    """Unsigned integers in the order of the floats; nan below everything."""
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores.astype(jnp.float32)) + 0.0  # -0 and 0 are one number
    bits = lax.bitcast_convert_type(scores, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _best_of_row(scores: Float[Array, "..."], count: Int[Array, ""]) -> Bool[Array, "..."]:
    # The threshold is found bit by bit: 32 passes that count, no sort, so it scales and divides over a mesh.
    keys = _keys(scores)

    def bit(i: Array, threshold: Array) -> Array:
        higher = threshold | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(jnp.sum(keys >= higher, dtype=jnp.int32) >= count, higher, threshold)

    threshold = lax.fori_loop(0, 32, bit, jnp.uint32(0))
    above, ties = keys > threshold, keys == threshold
    left = count - jnp.sum(above, dtype=jnp.int32)
    # Where the ties that are taken end, found likewise: a running sum over entries would have to gather them.
    index = jnp.zeros(scores.shape, jnp.uint32)
    for axis, size in enumerate(scores.shape):
        index = index * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, scores.shape, axis)
    bits = scores.size.bit_length()

    def further(i: Array, end: Array) -> Array:
        higher = end | (jnp.uint32(1) << (bits - 1 - i).astype(jnp.uint32))
        return jnp.where(jnp.sum(ties & (index < higher), dtype=jnp.int32) <= left, higher, end)

    return above | (ties & (index < lax.fori_loop(0, bits, further, jnp.uint32(0))))


@jax.jit
def best_in_rows(scores: Float[Array, "pools ..."], counts: Int[Array, " pools"]) -> Bool[Array, "pools ..."]:
    """The `counts[i]` highest of every row, earlier entries first among equals; a row may have several axes."""
    return jax.vmap(_best_of_row)(scores, counts)


@jax.jit
def _at_least(scores: Array, threshold: Array) -> Int[Array, " pools"]:
    return jnp.sum(_keys(scores) >= threshold, axis=-1, dtype=jnp.int32)


@jax.jit
def _above_and_first_ties(scores: Array, threshold: Array, take: Int[Array, " pools"]) -> Bool[Array, "pools n"]:
    keys = _keys(scores)
    ties = keys == threshold
    return (keys > threshold) | (ties & (jnp.cumsum(ties, axis=-1, dtype=jnp.int32) <= take[:, None]))


def best_of_all(scores: Mapping[str, Float[Array, "pools n"]], count: int) -> dict[str, Bool[Array, "pools n"]]:
    """The `count` highest of several arrays together. Totals are counted on the host, so they may exceed 32 bits."""

    def total(threshold: int) -> dict[str, np.ndarray]:
        found = {p: _at_least(s, np.uint32(threshold)) for p, s in scores.items()}
        return {p: np.asarray(n, np.int64) for p, n in found.items()}

    threshold = 0
    for bit in reversed(range(32)):
        higher = threshold | 1 << bit
        if sum(int(n.sum()) for n in total(higher).values()) >= count:
            threshold = higher
    least = total(threshold)
    above = total(threshold + 1) if threshold < 2**32 - 1 else {p: np.zeros_like(n) for p, n in least.items()}
    left = count - sum(int(n.sum()) for n in above.values())
    masks = {}
    for path, s in scores.items():
        ties = least[path] - above[path]
        take = np.clip(left - (np.cumsum(ties) - ties), 0, ties)
        left -= int(take.sum())
        masks[path] = _above_and_first_ties(s, np.uint32(threshold), jnp.asarray(take, jnp.int32))
    return masks


@partial(jax.jit, static_argnums=1)
def positions(mask: Bool[Array, "pools n"], k: int) -> Int[Array, "pools k"]:
    """Columns of the true entries of every row, ascending; a row with fewer than `k` is padded with `n`."""
    n = mask.shape[-1]
    if n >= 2**31:
        raise JaxftError(f"{n} entries in one layer do not fit a 32-bit index")
    return jax.vmap(lambda row: jnp.nonzero(row, size=k, fill_value=n)[0])(mask).astype(jnp.int32)


# --- budgets ----------------------------------------------------------------------------------------------------------


def budget_count(budget: float | int, total: int) -> int:
    """A budget as a count: below 1 it is a fraction of `total`, otherwise a number of entries.

    Raises:
        JaxftError: it is no positive number, not whole, nothing of `total`, or more than there is.
    """
    count = round(budget * total) if budget < 1 else int(budget)
    if budget >= 1 and count != budget:
        raise JaxftError(f"a budget of {budget} is neither a fraction below 1 nor a whole number")
    if not 1 <= count <= total:
        raise JaxftError(f"a budget of {budget} is {count} of {total} entries: expected one at least, all at most")
    return count


def spend(
    scores: dict[str, Float[Array, "pools n"]],
    allowed: dict[str, np.ndarray],
    budget: Budget,
    per: Per,
    groups: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, tuple[Bool[Array, "pools n"], int]]:
    """The units a budget buys, and the most that any row of a leaf got: path -> (mask, most).

    Args:
        scores: of the units, by path.
        allowed: `bool[pools]` by path, the rows that may be chosen from.
        budget: of each pool: a fraction below 1, a count, or (per matrix) a function of the shape of the matrix.
        per: what shares one budget: the units of one matrix, of a leaf (all layers), of a layer (all leaves), of a
            category, or all.
        groups: the category of each path.
        shapes: of the matrices, by path, for a budget that is a function.

    Raises:
        JaxftError: the budget is impossible.
        jax.errors.ConcretizationTypeError: scores are traced, and the budget is shared by several matrices, so that
            shapes depend on values.
    """
    if per == "matrix":
        chosen = {}
        for path, s in scores.items():
            k = budget_count(budget(shapes[path]) if callable(budget) else budget, s.shape[1])
            chosen[path] = best_in_rows(s, jnp.asarray(np.where(allowed[path], k, 0), jnp.int32)), k
        return chosen
    if callable(budget):
        raise JaxftError(f'a budget that depends on the matrix has to be spent per matrix, not per "{per}"')
    for path, s in scores.items():
        if isinstance(s, jax.core.Tracer):
            raise jax.errors.ConcretizationTypeError(s, f'a budget is shared by several matrices, among them "{path}"')
    if per == "layer":
        return _spend_per_layer(scores, allowed, budget)
    pools: dict[str, dict[str, Array]] = {}
    for path, s in scores.items():
        pools.setdefault({"leaf": path, "category": groups.get(path, path), "model": ""}[per], {})[path] = s
    chosen = {}
    for pool in pools.values():
        total = sum(int(allowed[p].sum()) * s.shape[1] for p, s in pool.items())
        barred = {p: jnp.where(jnp.asarray(allowed[p])[:, None], s, -jnp.inf) for p, s in pool.items()}
        for path, mask in best_of_all(barred, budget_count(budget, total)).items():
            chosen[path] = mask, int(mask.sum(-1, dtype=jnp.int32).max())
    return chosen


def _spend_per_layer(scores: dict, allowed: dict, budget: float | int) -> dict:
    rows = {p: s.shape[0] for p, s in scores.items()}
    if len(set(rows.values())) > 1:
        raise JaxftError(f"a budget per layer needs leaves with as many layers each, got {rows}")
    sizes = np.array([s.shape[1] for s in scores.values()])
    may = np.stack([allowed[p] for p in scores], axis=1)
    totals = (may * sizes).sum(1)
    counts = [budget_count(budget, int(t)) if t else 0 for t in totals]
    barred = [jnp.where(jnp.asarray(allowed[p])[:, None], s, -jnp.inf) for p, s in scores.items()]
    mask = best_in_rows(jnp.concatenate(barred, axis=1), jnp.asarray(counts, jnp.int32))
    parts = jnp.split(mask, np.cumsum(sizes)[:-1], axis=1)
    return {p: (m, int(m.sum(-1, dtype=jnp.int32).max())) for p, m in zip(scores, parts, strict=True)}


def check_choice(name: str, value: str, choices: object) -> None:
    """Raise JaxftError if `value` is none of the values of a `Literal`."""
    if value not in get_args(choices):
        raise JaxftError(f'{name}="{value}" is unknown: expected one of {", ".join(get_args(choices))}')
