"""`select`: any selection, as score x granularity x budget x schedule x what happens when it is drawn again."""

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from jaxft.errors import JaxftError
from jaxft.methods.base import Method, Signals, fold_in, rewrite
from jaxft.methods.probe import Probe
from jaxft.methods.registry import register
from jaxft.methods.selection.layers import at_rounds, every, generator, layer_counts
from jaxft.methods.selection.redraw import PARTS, OptimizerState, UnitNode, Values, num_units, redraw, unit_axis
from jaxft.methods.selection.scores import Candidates, Dense, Random, Score, make_score
from jaxft.methods.selection.units import (
    WITHIN,
    Budget,
    Cover,
    Granularity,
    Per,
    Reduction,
    best_in_rows,
    check_choice,
    divisible,
    make_budget,
    positions,
    reduce_to_units,
    spend,
    unit_shape,
)
from jaxft.partition import (
    Roles,
    Selector,
    Trains,
    Tuned,
    combine,
    has_marks,
    shape_of,
    split,
    unmarked,
    weights_by_path,
)
from jaxft.partition import select as select_paths
from jaxft.weights import (
    BlockSplit,
    Packed,
    RowSplit,
    SiteModule,
    SparseDelta,
    Split,
    Tree,
    Weight,
    gather_blocks,
    gather_rows,
    is_node,
    materialize,
    pack,
    split_layers,
)


@register(
    "select",
    title="A selection of your own",
    url="",
    family="selection",
    learning_rate=1e-3,
    example={"score": {"name": "fisher", "batches": 2}, "granularity": "row", "budget": 0.25, "period": 2},
)
def select(
    score: str | dict[str, Any] | Callable = "magnitude",
    granularity: Granularity = "element",
    budget: float | int | dict[str, float] = 0.05,
    per: Per | None = None,
    on: str = "@linear",
    size: int = 1,
    reduction: Reduction = "mean",
    lowest: bool = False,
    period: int = 0,
    rounds: int = 1,
    values: Values = "fold",
    optimizer_state: OptimizerState = "carry",
) -> Method:
    """Train the units of weights that score highest: theta <- theta - M * update(gradient), M by score and budget.

    Elements become `SparseDelta(base [L, ...], values [L, k], indices [L, k])`, rows and columns
    `RowSplit(base, rows [L, k, d_out], index [L, k])`, blocks `BlockSplit`, matrices and layers `Split`: gradients and
    moments exist for what trains only. When the selection is drawn again, every matrix keeps how many units of it train
    and shapes stay, so nothing recompiles.

    Args:
        score: a name (`jaxft.methods.selection.scores`), `{name: ..., options}`, or a function
            `(rng, candidates, probe) -> scores by path`.
        granularity: what is chosen as a whole: element, row (input channel), column (output channel), block, expert
            (its matrix in a mixture), matrix (of one layer), layer (all its matrices), leaf (all its layers).
        budget: how much of each pool trains: a fraction below 1, a number of units, `{rank: r}` (as many entries of a
            matrix as a low-rank update of rank r has), or `{cover: share}` (the fewest units of a matrix whose scores
            make up that share of all).
        per: what shares one budget: the units of a matrix (the default within matrices), of a leaf, of a layer, of a
            category, or of the model (the default for whole matrices, layers and leaves).
        on: selector of the candidates.
        size: how many consecutive rows or columns are one unit (the width of a head), or the side of a block.
        reduction: how the scores of the entries of a unit are summed up: mean, sum, norm or max.
        lowest: whether the lowest scores train instead of the highest.
        period: steps between draws; 0 draws once.
        rounds: equal parts of the run (epochs), each with a new draw; 1 draws once.
        values: what a unit that stops training keeps: `fold` its trained value, `rewind` the one it started from.
        optimizer_state: at a new draw, `carry` keeps the moments of what goes on training, `reset` restarts all.
    """
    if period < 0 or rounds < 1:
        raise JaxftError(f"select: period={period} must be at least 0 (draw once), rounds={rounds} at least 1")
    if period and rounds > 1:
        raise JaxftError(f"select: period={period}, rounds={rounds}: give a period in steps or rounds, not both")
    return selection(
        make_score(score),
        granularity=granularity,
        budget=make_budget(budget),
        per=per,
        on=on,
        size=size,
        reduction=reduction,
        lowest=lowest,
        due=every(period) if period else at_rounds(rounds),
        values=values,
        optimizer_state=optimizer_state,
    )


def selection(
    score: Score,
    *,
    granularity: Granularity = "element",
    budget: Budget = 0.05,
    per: Per | None = None,
    on: Selector | None = "@linear",
    size: int = 1,
    reduction: Reduction = "mean",
    lowest: bool = False,
    due: Callable[[int, int], bool] | None = None,
    values: Values = "fold",
    optimizer_state: OptimizerState = "carry",
) -> Method:
    """What `select` is made of, for presets: the budget may be a function of a matrix's shape, the schedule any `due`,
    and `on=None` are all stacked leaves.

    Layers of very different counts are packed end to end instead of padded to the longest (`Packed`).

    Raises:
        JaxftError: choices that do not go together.
    """
    per = _check(granularity, per, size, due, values, budget, lowest)
    measure = Measure(score, granularity, size, reduction, lowest)

    def init(rng: PRNGKeyArray, params: Tree, probe: Probe) -> Tuned:
        chosen = choose(rng, params, probe, measure, budget, per, on)
        if not chosen:
            raise JaxftError("every score is zero: the budget covers nothing")

        def cut(path: str, w: Weight) -> Weight:
            mask, counts = chosen[path]
            stacked = probe.roles.is_stacked(path)
            if granularity in WITHIN:
                with as_values(mask):
                    most = int(counts.max())
                    index = positions(mask, divisible(most) if granularity == "element" else most)
                return cut_units(w, index, granularity, size, stacked, counts)
            return cut_layers(w, np.asarray(mask)[:, 0]) if stacked and granularity != "leaf" else Trains(w)

        tuned = split(rewrite(params, list(chosen), cut, roles=probe.roles))
        # The nodes of this method, by path: those of other methods in a chain are not its to draw again.
        cuts = [p for p, w in weights_by_path(combine(tuned)).items() if p in chosen and is_node(w)]
        return tuned._replace(state={p: jnp.zeros((), jnp.int32) for p in cuts})

    def update(rng: PRNGKeyArray, tuned: Tuned, opt_state: Any, signals: Signals, step: int) -> tuple[Tuned, Any]:
        params = combine(tuned)
        nodes = {p: w for p, w in weights_by_path(params).items() if p in tuned.state}
        scores = measure.units(rng, nodes, params, signals.probe) if nodes else {}
        if granularity == "layer":
            scores = dict.fromkeys(nodes, sum(scores.values()))
        new = {p: draw_again(w, scores[p], size) for p, w in nodes.items()}
        return redraw(tuned, opt_state, new, signals, values=values, optimizer_state=optimizer_state)

    return Method(init, update=update if due else None, due=due)


class Measure(NamedTuple):
    """How units are scored."""

    score: Score
    granularity: Granularity = "element"
    size: int = 1
    reduction: Reduction = "mean"
    lowest: bool = False

    def units(
        self, rng: PRNGKeyArray, weights: dict[str, Weight], params: Tree, probe: Probe, decide: bool = True
    ) -> dict[str, Array]:
        """Scores `[pools, n]` of the units of weights, by path; the highest train. `decide`: see `Candidates`."""
        stacked = {p: probe.roles.is_stacked(p) for p in weights}
        shapes = {p: unit_shape(self.granularity, shape_of(w), stacked[p], self.size, p) for p, w in weights.items()}
        found = {}
        scores = self.score(rng, Candidates(Dense(weights), params, shapes, decide), probe)
        if scores.keys() != weights.keys():
            lacks = next(iter(scores.keys() ^ weights.keys()))
            raise JaxftError(f'a score has to score all candidates and nothing else: look at "{lacks}"')
        for path, s in scores.items():
            if s.shape not in (shapes[path], shape_of(weights[path])):
                raise JaxftError(
                    f'the score of "{path}" has the shape {s.shape}: expected that of its entries, '
                    f"{shape_of(weights[path])}, or of its units, {shapes[path]}"
                )
            if s.shape != shapes[path]:
                s = reduce_to_units(s, self.granularity, stacked[path], self.size, self.reduction)
            found[path] = -s if self.lowest else s
        return found


def choose(
    rng: PRNGKeyArray,
    params: Tree,
    probe: Probe,
    measure: Measure,
    budget: Budget,
    per: Per,
    on: Selector | None,
    *,
    keep_empty: bool = False,
) -> dict[str, tuple[Array, np.ndarray]]:
    """What trains of a model that may carry marks: path -> (mask of units `[pools, n]`, how many each row has).

    Leaves of which nothing trains are left out, unless `keep_empty`.
    """
    paths, allowed = _candidates(params, on, probe.roles, measure.granularity)
    weights = weights_by_path(params)
    # Within matrices each has as many as any other of its shape, whichever they are.
    is_shared = per != "matrix" and measure.granularity in WITHIN
    draws = generator(fold_in(rng, 1)) if is_shared and isinstance(measure.score, Random) else None
    decide = draws is None and (is_shared or measure.granularity not in WITHIN or isinstance(budget, Cover))
    scores = measure.units(fold_in(rng, 0), {p: weights[p] for p in paths}, unmarked(params), probe, decide)
    matrices = {p: shape_of(weights[p])[probe.roles.is_stacked(p) :] for p in paths}
    units = {"element": "entries", "matrix": "matrices", "leaf": "leaves"}.get(measure.granularity)
    units = units or f"{measure.granularity}s"
    if probe.assume and draws is None and any(isinstance(s, jax.core.Tracer) for s in scores.values()):
        if isinstance(budget, Cover):
            probe.assume(
                f"how many {units} train follows from values: planned as if all scored alike, the most it takes"
            )
        elif per != "matrix":
            probe.assume(f"which {units} train follows from values: planned as if they were drawn at random")
            draws = generator(fold_in(rng, 1))
    with as_values(*scores.values()):
        if measure.granularity == "layer":
            whole = {"layer": sum(scores.values())}
            every = {"layer": np.logical_and.reduce(list(allowed.values()))}
            chosen = dict.fromkeys(paths, spend(whole, every, budget, "leaf", {}, {}, units, draws)["layer"])
        else:
            chosen = spend(scores, allowed, budget, per, _categories(probe.roles, params), matrices, units, draws)
    return {p: (mask, counts) for p, (mask, counts) in chosen.items() if counts.any() or keep_empty}


def as_values(*arrays: Array) -> contextlib.AbstractContextManager:
    """Where `init` is traced over abstract weights, what follows from values (random scores) stays a value."""
    traced = any(isinstance(a, jax.core.Tracer) for a in arrays)
    # Where nothing is traced it would do no more than fold the constants of jitted functions, one program for each.
    plain = not isinstance(jnp.empty(()), jax.core.Tracer)
    return contextlib.nullcontext() if traced or plain else jax.ensure_compile_time_eval()


def _check(granularity: str, per: Per | None, size: int, due: object, values: str, budget: Budget, lowest: bool) -> Per:
    check_choice("granularity", granularity, Granularity)
    if size < 1 or (size > 1 and granularity not in ("row", "column", "block")):
        raise JaxftError(f"size={size} must be at least 1, and other than 1 for rows, columns and blocks only")
    if size == 1 and granularity == "block":
        raise JaxftError("a block of size=1 is an entry: set granularity=element, or size to the side of a block (128)")
    fitting: dict[str, tuple[Per, ...]] = {
        "matrix": ("leaf", "layer", "category", "model"),
        "layer": ("model",),
        "leaf": ("category", "model"),
    }
    fits = fitting.get(granularity, ("matrix", "leaf", "layer", "category", "model"))
    per = per or ("matrix" if granularity in WITHIN else "model")
    if per not in fits:
        raise JaxftError(f'per="{per}" does not go with granularity="{granularity}": expected one of {", ".join(fits)}')
    if isinstance(budget, Cover) and (lowest or per != "matrix"):
        raise JaxftError(
            "budget {cover: share} is of the highest scores of each matrix: not with lowest, nor another per"
        )
    if callable(budget) and granularity != "element":
        raise JaxftError(f"budget {{rank: r}} counts entries and goes with granularity element, not {granularity}")
    if due and granularity == "leaf":
        raise JaxftError("which leaves train is structure and cannot be drawn again: use granularity matrix or layer")
    if due and values == "rewind" and granularity not in WITHIN:
        raise JaxftError(f'values="rewind" needs the frozen value beside the trained one, which a {granularity} lacks')
    return per


def _candidates(
    params: Tree, on: Selector | None, roles: Roles, granularity: str
) -> tuple[list[str], dict[str, np.ndarray]]:
    """The paths that may be cut, and their layers that may train."""
    weights = weights_by_path(params)
    if on is None:
        layer_counts(params, roles)
        on = list(roles.stacked)
    found = select_paths(params, on, roles=roles)

    def fits(w: Weight) -> bool:
        return not has_marks(w) and not isinstance(w, SiteModule) and (granularity in WITHIN or not is_node(w))

    paths = [p for p in found if fits(weights[p])]
    if not paths:
        raise JaxftError(f'everything selected by "{on}" is already taken by an earlier method of the chain')
    if granularity == "layer" and not all(map(roles.is_stacked, paths)):
        loose = next(p for p in paths if not roles.is_stacked(p))
        raise JaxftError(f'"{loose}" is in no layer: select stacked leaves, e.g. on: "layers"')
    allowed = {}
    for path in paths:
        rows = shape_of(weights[path])[0] if roles.is_stacked(path) and granularity != "leaf" else 1
        if found[path] is not True and granularity == "leaf":
            raise JaxftError(f'"{path}" is selected for some layers only: use granularity matrix or layer')
        allowed[path] = np.ones(rows, bool) if found[path] is True else np.asarray(found[path])
    return paths, allowed


def _categories(roles: Roles, params: Tree) -> Mapping[str, str]:
    return {
        path: name
        for name, selectors in roles.categories.items()
        for selector in selectors
        for path in select_paths(params, selector, roles=roles, allow_empty=True)
    }


# --- units as nodes ---------------------------------------------------------------------------------------------------


WASTE = 1.25  # rows longer than this, over the units in them, are packed,
WORTH = 1024  # if that saves so many entries


def cut_units(w: Weight, index: Array, granularity: str, size: int, stacked: bool, counts: np.ndarray) -> Weight:
    """The node that trains the units at `index [pools, k]` of a weight, with its mark; packed if that saves much.

    `counts` says how many each row has, before those that pad it.
    """
    cut = _cut_units(w, index, granularity, size, stacked)
    field, where = PARTS[type(cut)]
    index, trained = getattr(cut, where), getattr(cut, field).value
    rows = index.reshape(-1, index.shape[-1])
    counts = counts * (size if granularity in ("row", "column") else 1)
    count = int(counts.sum())
    if not stacked or rows.size <= WASTE * count or trained.size * (1 - count / rows.size) < WORTH:
        return cut
    moved, start, held = pack(counts, index.shape[-1])
    with as_values(index):
        windows = jax.vmap(jnp.roll)(rows, moved).reshape(index.shape)
    axis = unit_axis(cut)
    flat = _end_to_end(trained, held, index.ndim - 1, axis, divisible(held.size))
    start = jnp.asarray(start.reshape(index.shape[:-1]))
    trained = Packed(Trains(flat), start, index.shape[-1], axis % flat.ndim)
    return cut.replace(**{field: trained, where: windows})


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _end_to_end(trained: Array, held: Int[Array, " n"], num_stacked: int, axis: int, length: int) -> Array:
    """The units `held` of the rows of a stack, along `axis`, and zeros up to `length`."""
    first = jnp.moveaxis(trained, axis, num_stacked)
    flat = first.reshape(-1, *first.shape[num_stacked + 1 :])[held]
    return jnp.moveaxis(jnp.pad(flat, ((0, length - held.size), *((0, 0),) * (flat.ndim - 1))), 0, axis)


def _cut_units(w: Weight, index: Array, granularity: str, size: int, stacked: bool) -> UnitNode:
    stack = shape_of(w)[:-2] if granularity in ("row", "column", "block") else shape_of(w)[:stacked]
    with as_values(index):
        index = spell_out(index.reshape(*stack, index.shape[-1]), size if granularity in ("row", "column") else 1)
    if granularity == "element":
        return SparseDelta(w, Trains(jnp.zeros(index.shape, jnp.float32)), index)
    dense = materialize(w)
    if granularity == "block":
        return BlockSplit(w, Trains(gather_blocks(dense, index, size, size)), index)
    axis = {"row": -2, "column": -1, "expert": -3}[granularity]
    return RowSplit(w, Trains(gather_rows(dense, index, axis)), index, axis)


def cut_layers(w: Array, mask: np.ndarray) -> Weight:
    """A stack `[L, ...]` of which the masked layers train: `Split`, or the marked array where all do."""
    k = int(mask.sum())
    if k == mask.size:
        return Trains(w)
    cut = split_layers(w, jnp.asarray(mask), k)
    return cut.replace(trainable=Trains(cut.trainable))


@functools.partial(jax.jit, static_argnums=1, inline=True)
def spell_out(index: Array, size: int) -> Array:
    """Groups of `size` consecutive slices, `[..., k]`, as their slices, `[..., k * size]`."""
    slices = index[..., None] * size + jnp.arange(size, dtype=index.dtype)
    return slices.reshape(*index.shape[:-1], -1)


def draw_again(w: Weight, scores: Array, size: int = 1) -> Array:
    """The best units of every matrix, as many as now: new indices, or a mask for a `Split`."""
    if isinstance(w, Split):
        return best_in_rows(scores.reshape(1, -1), w.is_trainable.sum(dtype=jnp.int32)[None])[0]
    index = getattr(w, PARTS[type(w)][1])
    rows = index.reshape(-1, index.shape[-1])
    group, held = size if isinstance(w, RowSplit) else 1, rows < num_units(w)
    counts = held.sum(-1, dtype=jnp.int32) // group
    best = spell_out(positions(best_in_rows(scores, counts), rows.shape[-1] // group), group)
    # Where the old ones stand: what is packed has its place in a window.
    return jax.vmap(jnp.roll)(best, jnp.argmax(held, axis=-1)).reshape(index.shape)
