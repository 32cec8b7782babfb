"""IST: importance-aware sparse tuning of low-rank updates."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PRNGKeyArray

from jaxft.errors import JaxftError
from jaxft.methods.base import Method, Signals, fold_in
from jaxft.methods.probe import Probe
from jaxft.methods.registry import register
from jaxft.methods.reparametrization.lora import lora
from jaxft.methods.selection.gates import gate, hold_closed, turn
from jaxft.methods.selection.layers import generator, layer_counts
from jaxft.partition import Tuned, combine, is_mark, map_weights, mark, split, weights_by_path
from jaxft.weights import LowRank, Tree

IMPORTANCE = "importance"


@register(
    "ist",
    title="Layer-wise Importance Matters: Less Memory for Better Performance in Parameter-efficient Fine-tuning of "
    "Large Language Models",
    url="https://arxiv.org/abs/2410.11772",
    family="selection",
    learning_rate=2e-3,
    example={"rank": 4, "fraction": 0.5, "period": 2, "switch": 2},
)
def ist(
    rank: int = 16,
    fraction: float = 0.25,
    suppressed: float = 0.5,
    beta: float = 0.25,
    candidates: int = 3,
    period: int = 10,
    switch: int = 1,
    rate: float = 10.0,
    on: str = "@linear",
) -> Method:
    """LoRA on all layers, of which only some, the more important the likelier, are updated at a time.

    Scores I `[L]`, zero at first: a layer is drawn for update with probability proportional to sigmoid(-I_l), without
    replacement. Every `period` steps a few different sets S of layers are drawn in proportion to sigmoid(I_l), the
    response of their updates is scaled by beta, and the loss on a batch gives a reward r = exp(-loss) - mean;
    I_l <- I_l + rate * r * p_l (1 - p_l) for l in S, p = sigmoid(I). So a layer whose suppression does no harm rises in
    I and is updated less. `LowRank(base, Gated(a [L, d_in, rank]), Gated(b [L, rank, d_out]))`.

    Notes:
        As in the reference code, I scores how dispensable a layer is. The batches are the calibration batches. Layers
        that are not drawn keep factors and moments bit for bit; moments exist for all layers.

    Args:
        rank: of the low-rank updates.
        fraction: the part of the layers that is updated at a time.
        suppressed: the part of the layers in a candidate set.
        beta: by what the response of a suppressed layer is multiplied; 1 leaves all scores alone.
        candidates: sets that are tried at a time.
        period: steps between trials.
        switch: steps between draws of the updated layers.
        rate: step size of the scores.
        on: selector of the matrices.
    """
    shares = 0 < fraction <= 1 and 0 < suppressed < 1 and 0 <= beta <= 1
    if not shares or candidates < 2 or period < 1 or switch < 1:
        raise JaxftError(
            f"ist: fraction={fraction} must lie in (0, 1], suppressed={suppressed} in (0, 1), beta={beta} in [0, 1], "
            f"candidates={candidates} be at least 2, period={period} and switch={switch} at least 1"
        )
    start = lora(rank=rank, on=on)

    def init(rng: PRNGKeyArray, params: Tree, probe: Probe) -> Tuned:
        total = layer_counts(params, probe.roles)
        before = weights_by_path(params)
        tuned = start.init(rng, params, probe)
        active = jnp.asarray(drawn(np.zeros(total), generator(fold_in(rng, 1)), fraction))
        own: dict[str, Any] = {}

        def close(path: str, w: Any) -> Any:
            if not isinstance(w, LowRank) or isinstance(before[path], LowRank) or not probe.roles.is_stacked(path):
                return w
            if not is_mark(w.a):
                raise JaxftError(f'ist: "{path}" covers some layers only, but ist chooses those: drop the range')
            own[path] = jnp.zeros((), jnp.int32)
            return w.replace(a=gate(w.a.value, active, None, True), b=gate(w.b.value, active, None, True))

        params = map_weights(close, mark(tuned))
        if not own:
            raise JaxftError(f'ist: "{on}" selects no stacked matrix')
        return split(params, {**own, IMPORTANCE: jnp.zeros(total, jnp.float32)})

    def update(rng: PRNGKeyArray, tuned: Tuned, opt_state: Any, signals: Signals, step: int) -> tuple[Tuned, Any]:
        scores, draws = np.asarray(tuned.state[IMPORTANCE]), generator(rng)
        if step % period == 0:
            sets = different(scores, draws, suppressed, candidates)
            losses = [float(signals.probe.loss(_suppressed(tuned, s, beta))) for s in sets]
            scores = reinforced(scores, sets, losses, rate)
        tuned = tuned._replace(state={**tuned.state, IMPORTANCE: jnp.asarray(scores, jnp.float32)})
        if step % switch:
            return tuned, opt_state
        active = jnp.asarray(drawn(-scores, draws, fraction))
        return turn(tuned, opt_state, {p: active for p in tuned.state if p != IMPORTANCE}, None, signals.donate)

    def gradients(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
        return hold_closed(optimizer)

    def due(step: int, total: int) -> bool:
        return (step % period == 0 or step % switch == 0) and step < total

    return Method(init, update=update, due=due, gradients=gradients)


def drawn(scores: np.ndarray, draws: np.random.Generator, part: float) -> np.ndarray:
    """A random part of the layers (rounded down, one at least), in proportion to sigmoid(scores), as `bool[L]`."""
    chance = 1 / (1 + np.exp(-scores.astype(np.float64)))
    chosen = draws.choice(len(scores), max(int(part * len(scores)), 1), replace=False, p=chance / chance.sum())
    return np.isin(np.arange(len(scores)), chosen)


def different(scores: np.ndarray, draws: np.random.Generator, part: float, count: int) -> list[np.ndarray]:
    """`count` sets of layers of which no two are the same; fewer where there are not as many."""
    found: list[np.ndarray] = []
    for _ in range(100 * count):
        one = drawn(scores, draws, part)
        if not any((one == other).all() for other in found):
            found.append(one)
        if len(found) == count:
            break
    return found


def reinforced(scores: np.ndarray, sets: list[np.ndarray], losses: list[float], rate: float) -> np.ndarray:
    """Scores after the trials of some sets of layers: I + rate * (reward - mean) * p (1 - p) on each set."""
    rewards = np.exp(-np.asarray(losses))
    chance = 1 / (1 + np.exp(-scores))
    advantage = sum((r - rewards.mean()) * s for r, s in zip(rewards, sets, strict=True))
    return scores + rate * chance * (1 - chance) * advantage


def _suppressed(tuned: Tuned, layers: np.ndarray, beta: float) -> Tree:
    """The model with the low-rank updates of some layers scaled by `beta`."""
    factor = jnp.asarray(np.where(layers, beta, 1.0), jnp.float32)

    def scale(path: str, w: Any) -> Any:
        if path not in tuned.state:
            return w
        return w.replace(b=w.b.replace(value=w.b.value * factor[:, None, None]))

    return map_weights(scale, combine(tuned))
