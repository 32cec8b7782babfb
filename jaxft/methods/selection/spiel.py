"""SpIEL: sparse tuning whose positions move to where the gradient is."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from jaxft.errors import JaxftError
from jaxft.methods.base import Method, Signals
from jaxft.methods.probe import Probe
from jaxft.methods.registry import register
from jaxft.methods.selection.layers import every
from jaxft.methods.selection.redraw import redraw
from jaxft.methods.selection.scores import random
from jaxft.methods.selection.select import draw_again, selection
from jaxft.methods.selection.units import best_in_rows
from jaxft.partition import Tuned, combine, shape_of, weights_by_path
from jaxft.weights import SparseDelta, Tree


@register(
    "spiel",
    title="Scaling Sparse Fine-Tuning to Large Language Models",
    url="https://arxiv.org/abs/2401.16405",
    family="selection",
    learning_rate=1e-3,
    example={"budget": 0.05, "period": 2, "batches": 2},
)
def spiel(
    budget: float | int = 0.01, period: int = 20, replaced: float = 0.2, batches: int = 4, on: str = "@linear"
) -> Method:
    """Sparse deltas that are dropped where they move little and regrown where the gradient is large.

    W' = W + scatter(delta, eta), `SparseDelta(base [L, ...], values [L, k], indices [L, k])`, eta uniform at the start.
    Every `period` steps, of each matrix: the n deltas that changed least since the last time are dropped (the weight is
    the pretrained one again), and the n other positions of largest |gradient| enter with a delta of zero. A dropped
    position among the largest goes on with its delta. n = replaced * k, falling geometrically to 0.1 % of k at the end.

    Notes:
        This is SpIEL-AG. The paper accumulates the gradients of a candidate set over several training steps; here the
        gradient of all positions is averaged over `batches` calibration batches, dense for the length of that pass.
        Moments of positions that stay are kept, those of new ones start at zero.

    Args:
        budget: positions of each matrix, a fraction or a count.
        period: steps between re-selections.
        replaced: the part of the positions dropped at the first one.
        batches: calibration batches whose mean gradient decides what grows.
        on: selector of the matrices.
    """
    if not 0 < replaced < 1 or period < 1:
        raise JaxftError(f"spiel: replaced={replaced} must lie between 0 and 1, period={period} be at least 1")
    start = selection(random(), budget=budget, on=on)

    def init(rng: PRNGKeyArray, params: Tree, probe: Probe) -> Tuned:
        tuned = start.init(rng, params, probe)
        nodes = {p: w for p, w in weights_by_path(combine(tuned)).items() if p in tuned.state}
        return tuned._replace(state={p: jnp.zeros(w.values.shape, jnp.float32) for p, w in nodes.items()})

    def update(rng: PRNGKeyArray, tuned: Tuned, opt_state: Any, signals: Signals, step: int) -> tuple[Tuned, Any]:
        params = combine(tuned)
        nodes = {p: w for p, w in weights_by_path(params).items() if p in tuned.state}
        gradients = signals.probe.gradients_of(params, nodes, batches)
        share = replaced_share(replaced, step // period, max(signals.probe.total_steps // period, 1))
        new = {p: regrow(w, tuned.state[p], gradients[p], share) for p, w in nodes.items()}
        tuned, opt_state = redraw(tuned, opt_state, new, signals, values="rewind")
        now = weights_by_path(combine(tuned))
        return tuned._replace(state={p: jnp.array(now[p].values, jnp.float32) for p in new}), opt_state

    return Method(init, update=update, due=every(period))


def replaced_share(first: float, done: int, total: int) -> float:
    """The part of the positions to replace at re-selection `done` of `total`: from `first` to 0.001, geometrically."""
    return first * math.exp(math.log(0.001 / first) * done / total)


def regrow(w: SparseDelta, before: Array, gradient: Array, share: float) -> Array:
    """New indices of a sparse delta: less those that moved least since `before`, plus those of largest |gradient|."""
    k = w.indices.shape[-1]
    n = math.prod(shape_of(w)[w.indices.ndim - 1 :])
    return _regrow(w, before, gradient, jnp.int32(max(int(share * k), 0)), n)


@functools.partial(jax.jit, static_argnums=4)
def _regrow(w: SparseDelta, before: Array, gradient: Array, drop: Array, n: int) -> Array:
    index = w.indices.reshape(-1, w.indices.shape[-1])
    moved = jnp.abs(w.values - before).reshape(index.shape)
    keep = best_in_rows(moved, jnp.full(index.shape[0], index.shape[1], jnp.int32) - drop)
    scores = jnp.abs(gradient.astype(jnp.float32)).reshape(index.shape[0], n)
    kept = jnp.where(keep, index, n)
    scores = jax.vmap(lambda s, i: s.at[i].set(jnp.inf, mode="drop"))(scores, kept)
    return draw_again(w, scores)
