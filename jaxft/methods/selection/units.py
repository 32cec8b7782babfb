"""Granularity and budget: from scores of entries to units of weights, and from a budget to the units that train.

Scores of units are arrays `[pools, n]`: a row for each layer of a stacked leaf (one row for any other leaf; one for the
matrix of each expert of each layer where rows, columns or blocks of it are chosen), a column for each unit in it. All
choices are exact: k units are k units, ties go to the earlier one.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxft.errors import JaxftError, nearest

Granularity = Literal["element", "row", "column", "block", "expert", "matrix", "layer", "leaf"]
"""element: one entry. row, column: `size` consecutive input or output channels (a head, if `size` is its width).
block: `size x size` entries. expert: one matrix of the stack that a layer has of them. matrix: one layer's share of a
leaf. layer: a whole layer. leaf: all its layers."""

Per = Literal["matrix", "leaf", "layer", "category", "model"]


class Cover(NamedTuple):
    """A budget: of each matrix the fewest units whose scores sum up to `share` of all of them, or more."""

    share: float


Budget = float | int | Callable[[tuple[int, ...]], int] | Cover

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
    if len(matrix) == 3:
        pools, matrix = pools * matrix[0], matrix[1:]
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
    d_in, d_out = score.shape[-2:]
    score = score.reshape(-1, d_in, d_out)
    pools = score.shape[0]
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
    nth = jnp.arange(1, k + 1, dtype=jnp.int32)
    # Row after row: a device counts a whole one. Where a running count reaches a number first is the place of that one.
    found = jax.lax.map(lambda row: jnp.searchsorted(jnp.cumsum(row, dtype=jnp.int32), nth), mask)
    return found.astype(jnp.int32)


def divisible(count: int) -> int:
    """`count`, or up to 2 % more: some padding costs less than an axis that does not divide over a mesh. A TPU keeps
    vectors in tiles of 1024, and gathers those whose parts fill no tile by summing: 65,536 are one on each of 64 chips.
    """
    return next(n for unit in (2**16, 2**12, 256, 16, 1) if (n := -(-count // unit) * unit) <= 1.02 * count)


# --- budgets ----------------------------------------------------------------------------------------------------------


def make_budget(spec: float | int | Mapping[str, float] | Budget) -> Budget:
    """A budget from a number, `{rank: r}` or `{cover: share}`, or as it is.

    Raises:
        JaxftError: it is none of these; the message names the nearest.
    """
    if not isinstance(spec, Mapping):
        return spec
    if len(spec) != 1 or not set(spec) <= {"rank", "cover"}:
        known = nearest(str(next(iter(spec), "")), ("rank", "cover"))
        raise JaxftError(f"budget={dict(spec)} is unknown: expected a number, {{rank: r}} or {{cover: share}}; {known}")
    ((name, value),) = spec.items()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise JaxftError(f"budget {{{name}: {value!r}}}: expected a number")
    if name == "cover":
        if not 0 < value <= 1:
            raise JaxftError(f"budget {{cover: {value}}} is not a share above 0 and up to 1")
        return Cover(value)
    if value < 1 or value != int(value):
        raise JaxftError(f"budget {{rank: {value}}} is not a whole number from 1 on")
    return entries_of_rank(int(value))


def entries_of_rank(rank: int) -> Callable[[tuple[int, ...]], int]:
    """The budget of entries that is as large as a low-rank update: rank (d_in + d_out) of a matrix, at most all of it;
    all of a vector."""

    def count(shape: tuple[int, ...]) -> int:
        if len(shape) < 2:
            return math.prod(shape)
        return math.prod(shape[:-2]) * min(rank * (shape[-2] + shape[-1]), shape[-2] * shape[-1])

    return count


def budget_count(budget: float | int, total: int, units: str = "entries") -> int:
    """A budget as a count: below 1 it is a fraction of `total`, otherwise a number of units.

    Raises:
        JaxftError: it is no positive number, not whole, nothing of `total`, or more than there is.
    """
    if isinstance(budget, bool) or not math.isfinite(budget):
        raise JaxftError(f"a budget of {budget} is no number of {units}: expected a fraction below 1 or a count")
    if budget < 0:
        raise JaxftError(f"a budget of {budget} is negative: expected a fraction below 1 or a count of {units}")
    if isinstance(budget, float) and budget == 1:
        raise JaxftError(
            f"a budget of 1.0 may mean one of the {units} or all of them: write 1 for one, {total} for all, "
            "or select whole weights with method full"
        )
    count = round(budget * total) if budget < 1 else int(budget)
    if budget >= 1 and count != budget:
        raise JaxftError(f"a budget of {budget} is neither a fraction below 1 nor a whole number")
    if not 1 <= count <= total:
        raise JaxftError(f"a budget of {budget} is {count} of {total} {units}: expected one at least, all at most")
    return count


def covering(scores: Float[Array, "pools n"], share: float) -> Bool[np.ndarray, "pools n"]:
    """In each row the highest scores, the fewest that sum up to `share` of the row or more; ties go to the earlier.

    Scores of zero are never among them. Scores that are traced, when a run is planned without data, are taken to be
    even: no others need as many units.

    Raises:
        JaxftError: a score is negative.
    """
    traced = isinstance(scores, jax.core.Tracer)
    values = np.ones(scores.shape) if traced else np.asarray(scores, np.float64)
    if (values < 0).any():
        raise JaxftError("a budget {cover: share} needs scores that are not negative")
    order = np.argsort(-values, axis=-1, kind="stable")
    best = np.take_along_axis(values, order, -1)
    before = np.cumsum(best, -1) - best
    needed = (before < share * values.sum(-1, keepdims=True)) & (best > 0)
    mask = np.zeros(values.shape, bool)
    np.put_along_axis(mask, order, needed, -1)
    return mask


def spend(
    scores: dict[str, Float[Array, "pools n"]],
    allowed: dict[str, np.ndarray],
    budget: Budget,
    per: Per,
    groups: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    units: str = "entries",
    draws: np.random.Generator | None = None,
) -> dict[str, tuple[Bool[Array, "pools n"], Int[np.ndarray, " pools"]]]:
    """The units a budget buys, and how many each row of a leaf got: path -> (mask, counts).

    Args:
        scores: of the units, by path.
        allowed: `bool[layers]` by path, the layers that may be chosen from; each has as many rows of `scores`.
        budget: of each pool: a fraction below 1, a count, or (per matrix) `Cover` or a function of the shape.
        per: what shares one budget: the units of one matrix, of a leaf (all layers), of a layer (all leaves), of a
            category, or all.
        groups: the category of each path.
        shapes: of the matrices, by path, for a budget that is a function.
        units: what units are called in messages.
        draws: where scores are noise, or unknown: says how many units each matrix gets, so that scores decide only
            which, or nothing.

    Raises:
        JaxftError: the budget is impossible.
        jax.errors.ConcretizationTypeError: scores are traced, and the budget is shared by several matrices, so that
            shapes depend on values.
    """
    may = {p: np.repeat(allowed[p], s.shape[0] // allowed[p].size) for p, s in scores.items()}
    if per == "matrix":
        return {p: _spend_on_matrices(s, may[p], budget, shapes.get(p, ()), units) for p, s in scores.items()}
    if callable(budget) or isinstance(budget, Cover):
        raise JaxftError(f'a budget that depends on the matrix has to be spent per matrix, not per "{per}"')
    if draws is not None:
        sizes = {p: np.where(may[p], s.shape[1], 0) for p, s in scores.items()}
        layers = {p: np.repeat(np.arange(a.size), may[p].size // a.size) for p, a in allowed.items()}
        found = drawn_counts(draws, sizes, layers, budget, per, groups, units)
        return {p: (_best(s, found[p]), found[p]) for p, s in scores.items()}
    for path, s in scores.items():
        if isinstance(s, jax.core.Tracer):
            raise jax.errors.ConcretizationTypeError(s, f'a budget is shared by several matrices, among them "{path}"')
    barred = {p: _barred(s, may[p]) for p, s in scores.items()}
    if per == "layer":
        return _spend_per_layer(barred, allowed, budget, units)
    pools: dict[str, list[str]] = {}
    for path in scores:
        pools.setdefault({"leaf": path, "category": groups.get(path, path), "model": ""}[per], []).append(path)
    chosen = {}
    for paths in pools.values():
        total = sum(int(may[p].sum()) * scores[p].shape[1] for p in paths)
        for path, mask in best_of_all({p: barred[p] for p in paths}, budget_count(budget, total, units)).items():
            chosen[path] = mask, np.asarray(mask.sum(-1, dtype=jnp.int32))
    return chosen


def _best(scores: Float[Array, "pools n"], counts: Int[np.ndarray, " pools"]) -> Bool[Array | np.ndarray, "pools n"]:
    if scores.shape[1] == 1:  # of one unit the count says everything, and is a value where scores are traced
        return counts[:, None] > 0
    return best_in_rows(scores, jnp.asarray(counts, jnp.int32))


def drawn_counts(
    draws: np.random.Generator,
    sizes: Mapping[str, Int[np.ndarray, " pools"]],
    layers: Mapping[str, Int[np.ndarray, " pools"]],
    budget: float | int,
    per: Per,
    groups: Mapping[str, str],
    units: str = "entries",
) -> dict[str, Int[np.ndarray, " pools"]]:
    """How many units each row of each leaf gets where a budget is spent on units drawn at random, none of them twice.

    Args:
        draws: the generator.
        sizes: how many units each row has to choose from.
        layers: the layer of each row.
        budget, per, groups, units: see `spend`.
    """
    pools: dict[str | int, list[tuple[str, int]]] = {}
    for path in sizes:
        for row, layer in enumerate(layers[path]):
            key: str | int = {"leaf": path, "category": groups.get(path, path), "model": ""}.get(per, int(layer))
            pools.setdefault(key, []).append((path, row))
    counts = {p: np.zeros(len(rows), np.int64) for p, rows in sizes.items()}
    for members in pools.values():
        room = np.array([sizes[path][row] for path, row in members], np.int64)
        if room.any():
            drawn = _hypergeometric(draws, room, budget_count(budget, int(room.sum()), units))
            for (path, row), count in zip(members, drawn, strict=True):
                counts[path][row] = count
    return counts


def _hypergeometric(
    draws: np.random.Generator, room: Int[np.ndarray, " pools"], count: int
) -> Int[np.ndarray, " pools"]:
    """How many of `count` units that are drawn from pools without putting any back are from each. NumPy's own stops at
    a thousand million units.

    If each unit is taken by itself, with the same probability, those taken are, whatever their number, as likely as any
    others of that number. So they stay when units at random are added or taken away until there are `count`.
    """
    found = draws.binomial(room, count / room.sum())
    lacking = count - int(found.sum())
    left = room - found if lacking > 0 else found
    moved: set[int] = set()
    while len(moved) < abs(lacking):
        moved |= set(draws.integers(left.sum(), size=abs(lacking) - len(moved)).tolist())
    pools = np.searchsorted(np.cumsum(left), list(moved), side="right")
    return found + np.sign(lacking) * np.bincount(pools, minlength=room.size)


@jax.jit
def _barred(scores: Float[Array, "pools n"], may: Bool[Array, " pools"]) -> Float[Array, "pools n"]:
    return jnp.where(may[:, None], scores, -jnp.inf)


def _spend_on_matrices(
    scores: Array, may: np.ndarray, budget: Budget, shape: tuple[int, ...], units: str
) -> tuple[Array, np.ndarray]:
    if isinstance(budget, Cover):
        mask = covering(scores, budget.share) & may[:, None]
        return jnp.asarray(mask), mask.sum(-1)
    counts = np.where(may, budget_count(budget(shape) if callable(budget) else budget, scores.shape[1], units), 0)
    return best_in_rows(scores, jnp.asarray(counts, jnp.int32)), counts


def _spend_per_layer(scores: dict, allowed: dict, budget: float | int, units: str) -> dict:
    layers = {p: may.size for p, may in allowed.items()}
    if len(set(layers.values())) > 1:
        raise JaxftError(f"a budget per layer needs leaves with as many layers each, got {layers}")
    rows = [s.reshape(layers[p], -1) for p, s in scores.items()]
    sizes = np.array([row.shape[1] for row in rows])
    totals = (np.stack([allowed[p] for p in scores], axis=1) * sizes).sum(1)
    counts = [budget_count(budget, int(t), units) if t else 0 for t in totals]
    mask = best_in_rows(jnp.concatenate(rows, axis=1), jnp.asarray(counts, jnp.int32))
    parts = jnp.split(mask, np.cumsum(sizes)[:-1], axis=1)
    masks = {p: m.reshape(s.shape) for (p, s), m in zip(scores.items(), parts, strict=True)}
    return {p: (m, np.asarray(m.sum(-1, dtype=jnp.int32))) for p, m in masks.items()}


def check_choice(name: str, value: str, choices: object) -> None:
    """Raise JaxftError if `value` is none of the values of a `Literal`."""
    if value not in get_args(choices):
        raise JaxftError(f'{name}="{value}" is unknown: expected one of {", ".join(get_args(choices))}')
