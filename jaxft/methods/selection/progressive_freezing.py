"""Progressive layer freezing with discriminative learning rates."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PRNGKeyArray

from jaxft.errors import JaxftError
from jaxft.methods.base import Method, Signals, others_below, rewrite
from jaxft.methods.probe import Probe
from jaxft.methods.registry import register
from jaxft.methods.selection.gates import gate, hold_closed, turn
from jaxft.methods.selection.layers import at_rounds, layer_counts, stacked_arrays
from jaxft.partition import Trains, Tuned, split
from jaxft.partition import select as select_paths
from jaxft.weights import Tree


@register(
    "progressive-freezing",
    title="Site-Level Fine-Tuning with Progressive Layer Freezing: Towards Robust Prediction of Bronchopulmonary "
    "Dysplasia from Day-1 Chest Radiographs in Extremely Preterm Infants",
    url="https://arxiv.org/abs/2507.12269",
    family="selection",
    example={"rounds": 3, "frozen": 0.5, "decay": 0.8},
)
def progressive_freezing(
    rounds: int = 4, frozen: float = 0.75, decay: float = 0.9, also: str = "final_norm|head"
) -> Method:
    """Start with all layers and freeze them from the bottom up, each learning more slowly than the one above.

    In round r of R the layers l < round(frozen * L * r / (R - 1)) are frozen (none in the first round);
    theta_l <- theta_l - decay^(L - 1 - l) * update(gradient_l) in the others. Every leaf becomes
    `Gated(value [L, ...], is_open [L], propagates [L])`: the backward pass ends at the lowest layer still open.

    Notes:
        The paper tunes a ResNet-50 on chest radiographs; order of freezing and discriminative rates are carried over
        to the layers of a language model. Left behind: CutMix and the linear probe, which concern images and a new
        head. Moments exist for all layers.

    Args:
        rounds: equal parts of the run.
        frozen: the part of the layers that is frozen in the last round.
        decay: by what the learning rate falls from a layer to the one below.
        also: selector of what else trains throughout; terms that match nothing are passed over.
    """
    if rounds < 2 or not 0 < frozen < 1 or not 0 < decay <= 1:
        raise JaxftError(
            f"progressive-freezing: rounds={rounds} must be at least 2, frozen={frozen} lie in (0, 1), "
            f"decay={decay} in (0, 1]"
        )

    def opened(total: int, done: int) -> Array:
        return jnp.asarray(np.arange(total) >= min(round(frozen * total * done / (rounds - 1)), total - 1))

    def init(rng: PRNGKeyArray, params: Tree, probe: Probe) -> Tuned:
        total = layer_counts(params, probe.roles)
        paths = stacked_arrays(params, list(probe.roles.stacked), probe.roles)
        on = jnp.ones(total, bool)
        params = rewrite(params, paths, lambda _, w: gate(w, on, on, True), roles=probe.roles, nodes=False)
        rest = list(select_paths(params, also, roles=probe.roles, allow_empty=True)) if also else []
        if rest:
            params = rewrite(params, rest, lambda _, w: Trains(w), roles=probe.roles, nodes=False)
        return split(params, {p: jnp.asarray(total, jnp.int32) for p in paths})

    def update(rng: PRNGKeyArray, tuned: Tuned, opt_state: Any, signals: Signals, step: int) -> tuple[Tuned, Any]:
        total = int(next(iter(tuned.state.values())))
        done = round(step * rounds / signals.probe.total_steps)
        on = opened(total, done)
        passes = on | others_below(tuned, tuned.state, signals.probe.roles)
        return turn(tuned, opt_state, dict.fromkeys(tuned.state, on), passes, signals.donate)

    def gradients(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
        return hold_closed(optimizer, decay)

    return Method(init, update=update, due=at_rounds(rounds), gradients=gradients)
