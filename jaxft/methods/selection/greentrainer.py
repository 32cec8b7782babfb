"""GreenTrainer: the most important tensors under a budget of backward FLOPs."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PRNGKeyArray

from jaxft.errors import JaxftError
from jaxft.methods.base import Method, Signals, others_below, rewrite
from jaxft.methods.probe import Probe
from jaxft.methods.registry import register
from jaxft.methods.selection.gates import gate, hold_closed, is_gated, turn
from jaxft.methods.selection.layers import at_rounds, stacked_arrays
from jaxft.partition import Roles, Tuned, combine, shape_of, split, unmarked, weights_by_path
from jaxft.weights import Tree


@register(
    "greentrainer",
    title="Towards Green AI in Fine-tuning Large Language Models via Adaptive Backpropagation",
    url="https://arxiv.org/abs/2309.13192",
    family="selection",
    example={"rho": 0.5, "rounds": 3, "batches": 2},
)
def greentrainer(
    rho: float = 0.5, rounds: int = 3, batches: int = 4, resolution: int = 1000, on: str = "@linear"
) -> Method:
    """Train the tensors that reduce the loss most within `rho` of the FLOPs of a full backward pass; anew each round.

    maximise sum_k I_k  subject to  sum_k t_dw(k) + sum_(layers at or above the deepest chosen) t_dy(l) <= rho * full,
    by dynamic programming over quantised FLOPs. I_k = sum g^2: what a small step along -g of tensor k alone gains, to
    first order. Every leaf becomes `Gated(value [L, ...], is_open [L], propagates [L])`: matmuls of closed tensors, and
    of input gradients below the deepest open layer, are skipped at run time; another choice compiles nothing.

    Notes:
        The paper takes dw of the last update in I = |sum dw g|; here dw = -g on calibration batches. The deepest chosen
        layer is charged its whole input gradient. Attention scores and norms count as free. Masters and moments exist
        for all tensors (the method saves FLOPs); a closed tensor keeps its moments.

    Args:
        rho: backward FLOPs as a part of those of full tuning.
        rounds: equal parts of the run (epochs), each with a new choice.
        batches: calibration batches for the importance.
        resolution: into how many parts the budget is quantised; costs are rounded up.
        on: selector of the tensors, of stacked leaves.
    """
    if not 0 < rho <= 1 or rounds < 1:
        raise JaxftError(f"greentrainer: rho={rho} must lie in (0, 1], rounds={rounds} be at least 1")

    def decide(params: Tree, paths: list[str], probe: Probe) -> tuple[dict[str, Array], Array]:
        gradients = probe.gradients_of(params, paths, batches)
        found = [_squares(gradients[p]) for p in paths]
        if probe.assume:
            probe.assume("which tensors are open follows from gradients: planned as if all were alike")
            found = [np.ones(g.shape) for g in found]
        gains = np.stack([np.asarray(g, np.float64) for g in found], axis=1)
        costs, passing = flops(params, paths, probe.roles)
        chosen = backward_knapsack(gains, costs, passing, rho, resolution)
        deepest = np.flatnonzero(chosen.any(1))[0]
        opened = {p: jnp.asarray(chosen[:, i]) for i, p in enumerate(paths)}
        return opened, jnp.asarray(np.arange(len(chosen)) >= deepest)

    def init(rng: PRNGKeyArray, params: Tree, probe: Probe) -> Tuned:
        paths = [p for p in stacked_arrays(params, on, probe.roles) if not is_gated(weights_by_path(params)[p])]
        if not paths:
            raise JaxftError(f'greentrainer: "{on}" selects no stacked weight that is still frozen')
        opened, passes = decide(unmarked(params), paths, probe)
        params = rewrite(params, paths, lambda p, w: gate(w, opened[p], passes, True), roles=probe.roles, nodes=False)
        return split(params, {p: jnp.zeros((), jnp.int32) for p in paths})

    def update(rng: PRNGKeyArray, tuned: Tuned, opt_state: Any, signals: Signals, step: int) -> tuple[Tuned, Any]:
        opened, passes = decide(combine(tuned), list(tuned.state), signals.probe)
        passes |= others_below(tuned, tuned.state, signals.probe.roles)
        return turn(tuned, opt_state, opened, passes, signals.donate)

    def gradients(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
        return hold_closed(optimizer)

    due = at_rounds(rounds)
    return Method(init, update=update if due else None, due=due, gradients=gradients)


@jax.jit
def _squares(gradient: Array) -> Array:
    return jnp.sum(jnp.square(gradient), axis=tuple(range(1, gradient.ndim)))


def flops(params: Tree, paths: list[str], roles: Roles) -> tuple[np.ndarray, np.ndarray]:
    """Multiply-adds per token: `costs [L, tensors]` of weight gradients, `passing [L]` of input gradients."""
    shapes = {p: shape_of(w) for p, w in weights_by_path(params).items() if roles.is_stacked(p)}
    layers = shapes[paths[0]][0]
    costs = np.tile([math.prod(shapes[p][1:]) for p in paths], (layers, 1)).astype(float)
    through = sum(math.prod(s[1:]) for s in shapes.values() if len(s) == 3)
    return costs, np.full(layers, float(through))


def backward_knapsack(
    gains: np.ndarray, costs: np.ndarray, passing: np.ndarray, rho: float, resolution: int = 1000
) -> np.ndarray:
    """The choice of tensors `bool[L, m]` of highest total gain within `rho` of the full backward cost.

    Args:
        gains: `[L, m]`, what each tensor is worth.
        costs: `[L, m]`, the cost of its weight gradient.
        passing: `[L]`, the cost of the input gradient of a layer, paid for the deepest chosen layer and all above.
        rho: budget as a part of everything.
        resolution: parts of the budget; costs are rounded up to whole ones, so the budget is never exceeded.

    Raises:
        JaxftError: the budget buys no tensor at all.
    """
    if rho >= 1:
        return np.ones(gains.shape, bool)
    budget = rho * (costs.sum() + passing.sum())
    part = budget / resolution
    steps = np.ceil(costs / part - 1e-9).astype(int)
    best = np.zeros(resolution + 1)  # the highest gain for a cost of at most q, of the layers seen so far
    taken: list[tuple[int, int, np.ndarray]] = []
    found, paid = (0.0, 0, 0), 0.0
    for layer in reversed(range(len(gains))):
        for item in range(gains.shape[1]):
            step = steps[layer, item]
            with_item = np.full_like(best, -np.inf)
            if step <= resolution:
                with_item[step:] = best[: resolution + 1 - step] + gains[layer, item]
            taken.append((layer, item, with_item > best))
            best = np.maximum(best, with_item)
        paid += passing[layer]
        room = resolution - int(np.ceil(paid / part - 1e-9))
        if room >= 0 and best[room] > found[0]:
            found = (float(best[room]), room, len(taken))
    if not found[2]:
        raise JaxftError(
            f"rho={rho} of the backward FLOPs buys no tensor: the cheapest, in the last layer, takes "
            f"{(costs[-1].min() + passing[-1]) / (costs.sum() + passing.sum()):.3f}"
        )
    chosen, room = np.zeros(gains.shape, bool), found[1]
    for layer, item, take in reversed(taken[: found[2]]):
        if take[room]:
            chosen[layer, item] = True
            room -= steps[layer, item]
    return chosen
