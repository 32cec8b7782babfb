"""SpIEL: sparse tuning whose positions move to where the gradient is."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from jaxft.errors import JaxftError
from jaxft.methods.base import Method, Signals
from jaxft.methods.registry import register
from jaxft.methods.selection.layers import every
from jaxft.methods.selection.redraw import num_units, redraw
from jaxft.methods.selection.scores import gradient, random
from jaxft.methods.selection.select import draw_again, selection
from jaxft.methods.selection.units import best_in_rows
from jaxft.partition import Tuned, combine, weights_by_path
from jaxft.weights import SparseDelta, materialize


@register(
    "spiel",
    title="Scaling Sparse Fine-Tuning to Large Language Models",
    url="https://arxiv.org/abs/2401.16405",
    family="selection",
    learning_rate=1e-3,
    example={"budget": 0.05, "period": 2, "batches": 2},
)
def spiel(
    budget: float | int = 0.01,
    period: int = 20,
    replaced: float = 0.2,
    batches: int = 4,
    start: Literal["random", "gradient"] = "random",
    on: str = "@linear",
) -> Method:
    """Sparse deltas that are dropped where they stay small and regrown where the gradient is large.

    W' = W + scatter(delta, eta), `SparseDelta(base [L, ...], values [L, k], indices [L, k])`. Every `period` steps, of
    each matrix: the n deltas of least magnitude are dropped (the weight is the pretrained one again), and the n other
    positions of largest |gradient| enter with a delta of zero. A dropped position among the largest goes on with its
    delta. n = replaced * k, falling linearly to 0 at the end of the run.

    Notes:
        This is SpIEL-AG as its reference code has it (magnitude of deltas, linear decay). There, gradients of a set of
        k candidates are accumulated over several training steps; here the gradient of all positions is averaged over
        `batches` calibration batches, dense for the length of that pass. There, the first selection replaces the
        random start by gradients: `start: gradient` does so at once. Moments of positions that stay are kept; those of
        new ones start at zero, there at the accumulated gradient and its square.

    Args:
        budget: positions of each matrix, a fraction or a count.
        period: steps between re-selections.
        replaced: the part of the positions dropped at the first one.
        batches: calibration batches whose mean gradient decides what grows.
        start: the first positions, at random or those of largest |gradient|.
        on: selector of the matrices.
    """
    if not 0 < replaced < 1 or period < 1:
        raise JaxftError(f"spiel: replaced={replaced} must lie between 0 and 1, period={period} be at least 1")
    first = selection(random() if start == "random" else gradient(batches), budget=budget, on=on)

    def update(rng: PRNGKeyArray, tuned: Tuned, opt_state: Any, signals: Signals, step: int) -> tuple[Tuned, Any]:
        params = combine(tuned)
        nodes = {p: w for p, w in weights_by_path(params).items() if p in tuned.state}
        gradients = signals.probe.gradients_of(params, nodes, batches)
        share = replaced * max(1 - step / max(signals.probe.total_steps, 1), 0)
        new = {p: regrow(w, gradients[p], share) for p, w in nodes.items()}
        return redraw(tuned, opt_state, new, signals, values="rewind")

    return Method(first.init, update=update, due=every(period))


def regrow(w: SparseDelta, gradient: Array, share: float) -> Array:
    """New indices of a sparse delta: less a share of them, those of least |delta|, plus those of largest |gradient|."""
    return _regrow(w, gradient, jnp.float32(share), num_units(w))


@functools.partial(jax.jit, static_argnums=3)
def _regrow(w: SparseDelta, gradient: Array, share: Array, n: int) -> Array:
    index = w.indices.reshape(-1, w.indices.shape[-1])
    held = index < n
    counts = held.sum(-1, dtype=jnp.int32)
    size = jnp.where(held, jnp.abs(materialize(w.values)).reshape(index.shape), -1)
    keep = best_in_rows(size, counts - (share * counts).astype(jnp.int32))
    scores = jnp.abs(gradient.astype(jnp.float32)).reshape(index.shape[0], n)
    kept = jnp.where(keep, index, n)
    scores = jax.vmap(lambda s, i: s.at[i].set(jnp.inf, mode="drop"))(scores, kept)
    return draw_again(w, scores)
