"""HFT: half fine-tuning."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from jaxft.errors import JaxftError
from jaxft.methods.base import Method, Signals, fold_in, path_key, rewrite, update_like
from jaxft.methods.probe import Probe
from jaxft.methods.registry import register
from jaxft.methods.selection.layers import at_rounds, generator, stacked_arrays
from jaxft.methods.selection.redraw import OptimizerState
from jaxft.methods.selection.scores import Score, balanced, random
from jaxft.methods.selection.select import Measure, choose, selection
from jaxft.methods.selection.units import Granularity, Per
from jaxft.partition import (
    Roles,
    Selector,
    Trains,
    Tuned,
    combine,
    map_weights,
    mark,
    masked_node,
    select,
    split,
    weights_by_path,
)
from jaxft.weights import Anchored, Tree, is_node, materialize

Level = Literal["category", "model", "layer"]


@register(
    "hft",
    title="HFT: Half Fine-Tuning for Large Language Models",
    url="https://arxiv.org/abs/2404.18466",
    family="selection",
    example={"rounds": 3},
)
def hft(
    fraction: float = 0.5,
    level: Level = "category",
    rounds: int = 1,
    embeddings: Literal["half", "train", "freeze"] = "half",
    optimizer_state: OptimizerState = "reset",
    half_reset: bool = False,
) -> Method:
    """Train a random half of the parameters, freeze the other half at its pretrained value.

    theta <- theta - M * update(gradient), with M constant over each weight matrix of each layer. At the category level
    every layer trains 2 of its 4 attention matrices, 1 or 2 of its 3 feed-forward matrices (two in a random half of the
    layers, one in the rest) and 1 of its 2 norms; over the stack every matrix trains in half of the layers, so that a
    category trains exactly half of its parameters and a new draw changes no shape. A stacked leaf `[L, d_in, d_out]`
    becomes `Split(trainable [L/2, d_in, d_out], frozen [L/2, ...])`.

    Notes:
        The catalog describes the feed-forward choice as alternating over the layers; public descriptions of the
        paper's code draw the half of the layers at random, as here. The treatment of embeddings is an option: `half`
        trains one of embedding and head (or, where they are tied, half of the rows), drawn once for all rounds.
        The final norm stays frozen.

    Args:
        fraction: the part of every category that trains.
        level: what is drawn: matrices within each layer and category (the paper's choice), matrices of the whole model
            regardless of category, or whole layers.
        rounds: the run is cut in this many equal parts, each with a new draw (the paper re-draws for every task).
        embeddings: embedding and head: train a `fraction` of the two, both, or neither.
        optimizer_state: at a new draw, `reset` starts a fresh optimizer, `carry` keeps the moments of what stays.
        half_reset: the paper's pilot study instead: train everything, then set the drawn `1 - fraction` back to its
            pretrained value after the last step.
    """
    if not 0 < fraction < 1:
        raise JaxftError(f"hft: fraction={fraction} must lie between 0 and 1 (exclusive); to train all use method full")
    if rounds < 1:
        raise JaxftError(f"hft: rounds={rounds} must be at least 1")
    score, granularity, per = LEVELS[level](fraction)
    if half_reset:
        return _half_reset(Measure(score, granularity), fraction, per)
    due = at_rounds(rounds)

    def drawn(on: Selector) -> Method:
        return selection(
            score, granularity=granularity, budget=fraction, per=per, on=on, due=due, optimizer_state=optimizer_state
        )

    def init(rng: PRNGKeyArray, params: Tree, probe: Probe) -> Tuned:
        on = _categories(params, probe.roles)
        params = _embeddings(fold_in(rng, 1), params, probe.roles, fraction, embeddings)
        return drawn(on).init(rng, params, probe)

    return drawn("layers")._replace(init=init)


LEVELS: dict[Level, Callable[[float], tuple[Score, Granularity, Per]]] = {
    "category": lambda fraction: (balanced(fraction), "matrix", "category"),
    "model": lambda fraction: (random(), "matrix", "model"),
    "layer": lambda fraction: (random(), "layer", "model"),
}


def _categories(params: Tree, roles: Roles) -> list[str]:
    """The stacked arrays of all categories."""
    found = [p for paths in roles.categories.values() for p in stacked_arrays(params, paths, roles)]
    if not found:
        raise JaxftError(
            "hft: no stacked matrix of any category is left to draw from (of layers that a model keeps apart, "
            "jaxft.stack_layers makes a stack)"
        )
    return found


def _embeddings(rng: PRNGKeyArray, params: Tree, roles: Roles, fraction: float, policy: str) -> Tree:
    """Mark the part of embedding and head that trains."""
    weights = weights_by_path(params)
    names = [roles.names[r] for r in ("embedding", "head") if r in roles.names]
    found = [p for n in names for p in select(params, n, roles=roles, allow_empty=True)]
    found = [p for p in found if not is_node(weights[p]) and not isinstance(weights[p], Trains)]
    if policy == "freeze" or not found:
        return params
    if policy == "half" and len(found) > 1:
        chosen = [found[i] for i in generator(rng).permutation(len(found))[: round(len(found) * fraction)]]
        return rewrite(params, chosen, lambda _, w: Trains(w), roles=roles, nodes=False) if chosen else params

    def cut(path: str, w: jax.Array) -> Any:
        if policy == "train":
            return Trains(w)
        rows = generator(path_key(rng, path)).permutation(w.shape[0]) < round(w.shape[0] * fraction)
        return masked_node(w, rows[:, None], path=path)

    return rewrite(params, found, cut, roles=roles, nodes=False)


def _half_reset(measure: Measure, fraction: float, per: Per) -> Method:
    """Full fine-tuning whose last act resets the drawn part of the layers to the start."""

    def init(rng: PRNGKeyArray, params: Tree, probe: Probe) -> Tuned:
        def anchor(path: str, w: jax.Array) -> Any:
            return Anchored(Trains(w), jnp.array(w)) if probe.roles.is_stacked(path) else Trains(w)

        return split(rewrite(params, "**", anchor, roles=probe.roles, nodes=False))

    def update(rng: PRNGKeyArray, tuned: Tuned, opt_state: Any, signals: Signals, step: int) -> tuple[Tuned, Any]:
        params, probe = materialize(combine(tuned)), signals.probe
        on = _categories(params, probe.roles)
        keep = {p: m for p, (m, _) in choose(rng, params, probe, measure, fraction, per, on, keep_empty=True).items()}
        return update_like(_reset, tuned, opt_state, keep, donate=signals.donate)

    return Method(init, update=update, due=lambda step, total: step == total)


def _reset(tuned: Tuned, opt_state: Any, keep: dict[str, Array]) -> tuple[Tuned, Any]:
    def one(path: str, w: Any) -> Any:
        if path not in keep or not isinstance(w, Anchored):  # taken by another method of a chain
            return w
        now = w.value.value
        mask = jnp.asarray(keep[path]).reshape(-1, *(1,) * (now.ndim - 1))
        return w.replace(value=Trains(jnp.where(mask, now, w.anchor)))

    return split(map_weights(one, mark(tuned)), tuned.state), opt_state
