"""FreezeAsGuard: freeze the tensors through which an unwanted domain would be learned."""

import functools
import math

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray

from jaxft.errors import JaxftError
from jaxft.methods.base import Method
from jaxft.methods.probe import Probe
from jaxft.methods.registry import register
from jaxft.methods.selection.scores import Candidates, Score
from jaxft.methods.selection.select import selection
from jaxft.partition import map_weights
from jaxft.weights import Tree, materialize


@register(
    "freezeasguard",
    title="FreezeAsGuard: Mitigating Illegal Adaptation of Diffusion Models via Selective Tensor Freezing",
    url="https://arxiv.org/abs/2405.17472",
    family="selection",
    example={"guard_steps": 2, "batches": 2},
)
def freezeasguard(
    illegal: str = "",
    frozen: float = 0.5,
    guard_steps: int = 40,
    user_rate: float = 1e-3,
    mask_rate: float = 0.2,
    batches: int = 2,
    on: str = "@linear",
) -> Method:
    """Freeze those matrices whose tuning helps an unwanted domain more than the wanted one; train the others.

    theta(m) = m theta_0 + (1 - m) theta_tuned, m = sigmoid(x / T), a scalar for every matrix of every layer. In turn,
    `guard_steps` times: a user tunes theta_tuned on both domains under m, theta_tuned <- theta_tuned - Adam((1 - m) g),
    twice; then x descends on (L_legal - L_illegal) / 2 + c (frozen - mean m)^2. At last the `frozen` part of the
    matrices with the largest m is frozen, and the rest trains from theta_0: `Split(trainable [k, ...], frozen [L - k,
    ...])`.

    Notes:
        From diffusion models; nothing in the mask learning is tied to them. The wanted domain is the data of the run,
        the unwanted one an evaluation set. T = 0.2, c = 0.1 and two user steps for each step of the mask are those of
        the reference code. It starts from a model tuned on both domains and takes plain gradient steps on m; here
        theta_tuned starts at theta_0, the user tunes with Adam, and steps on x are divided by the largest entry of the
        gradient, so that one rate fits every model. The mask holds for this tuning only, in the hands of one who uses
        it. Left behind: learning it over many users' domains at once.

    Args:
        illegal: the evaluation set that tuning shall not help; by default the last one of the configuration.
        frozen: the part of the matrices that is frozen.
        guard_steps: steps of the mask.
        user_rate: learning rate of the imitated user.
        mask_rate: learning rate of the mask.
        batches: calibration batches of each domain.
        on: selector of the matrices.
    """
    if not 0 < frozen < 1 or guard_steps < 1 or user_rate <= 0 or mask_rate <= 0:
        raise JaxftError(
            f"freezeasguard: frozen={frozen} must lie between 0 and 1, guard_steps={guard_steps} be at least 1, "
            f"user_rate={user_rate} and mask_rate={mask_rate} above 0"
        )

    score = guard(illegal, frozen, guard_steps, user_rate, mask_rate, batches)
    return selection(score, granularity="matrix", lowest=True, budget=1 - frozen, per="model", on=on)


def guard(illegal: str, frozen: float, guard_steps: int, user_rate: float, mask_rate: float, batches: int) -> Score:
    """The relaxed mask of every matrix as its score: the lowest train. Options are those of `freezeasguard`."""

    def score(rng: PRNGKeyArray, candidates: Candidates, probe: Probe) -> dict[str, Array]:
        unwanted = probe.on(illegal or (list(probe.sets) or [""])[-1])
        return guard_mask(
            candidates, probe, unwanted, frozen, steps=guard_steps, rates=(user_rate, mask_rate), batches=batches
        )

    return score


TEMPERATURE, SPARSITY, USER_STEPS = 0.2, 0.1, 2


def guard_mask(
    candidates: Candidates,
    legal: Probe,
    illegal: Probe,
    frozen: float,
    *,
    steps: int,
    rates: tuple[float, float],
    batches: int,
) -> dict[str, Array]:
    """The relaxed mask m in (0, 1) of every matrix of every layer, `[pools, 1]` by path; near 1: to be frozen."""
    base = {p: w.astype(jnp.float32) for p, w in candidates.weights.items()}
    tuned, moments = base, optax.adam(rates[0]).init(base)
    start = TEMPERATURE * math.log(frozen / (1 - frozen))
    logits = {p: jnp.full(candidates.units[p], start, jnp.float32) for p in base}
    whole = materialize(candidates.params)

    def gradients(dense: dict) -> tuple[dict, dict]:
        params: Tree = map_weights(lambda p, w: dense.get(p, w), whole)
        return tuple(probe.gradients_of(params, base, batches) for probe in (legal, illegal))  # type: ignore[return-value]

    for _ in range(steps):
        for _ in range(USER_STEPS):
            tuned, moments = _tune(rates[0], logits, tuned, moments, *gradients(_mixed(logits, base, tuned)))
        logits = _guard(rates[1], frozen, logits, base, tuned, *gradients(_mixed(logits, base, tuned)))
    return _soft(logits)


@jax.jit
def _soft(logits: dict) -> dict:
    return {p: jax.nn.sigmoid(x / TEMPERATURE) for p, x in logits.items()}


def _over_entries(m: Array, w: Array) -> Array:
    return m.reshape(-1, *(1,) * (w.ndim - 1)) if m.size > 1 else m.reshape(())


@jax.jit
def _mixed(logits: dict, base: dict, tuned: dict) -> dict:
    soft = {p: _over_entries(m, base[p]) for p, m in _soft(logits).items()}
    return {p: soft[p] * base[p] + (1 - soft[p]) * tuned[p] for p in base}


@functools.partial(jax.jit, static_argnums=0)
def _tune(
    rate: float, logits: dict, tuned: dict, moments: optax.OptState, wanted: dict, unwanted: dict
) -> tuple[dict, optax.OptState]:
    """A step of the user, on legal and illegal data alike."""
    soft = {p: _over_entries(m, tuned[p]) for p, m in _soft(logits).items()}
    gradient = {p: (1 - soft[p]) * (wanted[p] + unwanted[p]) / 2 for p in tuned}
    updates, moments = optax.adam(rate).update(gradient, moments)
    return optax.apply_updates(tuned, updates), moments


@functools.partial(jax.jit, static_argnums=(0, 1))
def _guard(rate: float, frozen: float, logits: dict, base: dict, tuned: dict, wanted: dict, unwanted: dict) -> dict:
    """A step of the guard: the user shall learn what is legal and not what is illegal."""

    def through(logits: dict) -> Array:
        # By the chain rule through theta(m), dL/dm of a matrix is <its gradient, theta_0 - theta_tuned>.
        soft = {p: _over_entries(m, base[p]) for p, m in _soft(logits).items()}
        return sum(jnp.sum(soft[p] * (base[p] - tuned[p]) * (wanted[p] - unwanted[p]) / 2) for p in base)

    def share(logits: dict) -> Array:
        soft = jnp.concatenate([m.reshape(-1) for m in _soft(logits).values()])
        return SPARSITY * jnp.square(frozen - soft.mean())

    pull, even = jax.grad(through)(logits), jax.grad(share)(logits)
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(g)) for g in pull.values()]))
    return {p: x - rate * (pull[p] / jnp.maximum(largest, 1e-30) + even[p]) for p, x in logits.items()}
