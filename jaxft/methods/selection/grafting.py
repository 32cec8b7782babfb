"""Grafting: which entries of a tuned model carry its skill."""

import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from jaxft.errors import JaxftError
from jaxft.methods.base import Method, rewrite
from jaxft.methods.probe import Probe
from jaxft.methods.registry import register
from jaxft.methods.selection.full import full
from jaxft.methods.selection.scores import Candidates
from jaxft.methods.selection.select import Measure, choose
from jaxft.partition import Trains, Tuned, split, unmarked, weights_by_path
from jaxft.weights import Grafted, Tree, materialize


@register(
    "grafting",
    title="Task-Specific Skill Localization in Fine-tuned Language Models",
    url="https://arxiv.org/abs/2302.06600",
    family="selection",
    learning_rate=1e-1,
    identity=False,
    example={"budget": 0.1, "tuning_steps": 3, "sharpness": 2.0},
)
def grafting(
    budget: float | int = 0.01, tuning_steps: int = 100, sharpness: float = 4.0, on: str = "@linear"
) -> Method:
    """Tune fully, then learn which few entries to take over into the pretrained model; values are not trained again.

    theta(gamma) = gamma * theta_tuned + (1 - gamma) * theta_pre, gamma = gamma_0 (1 - sigmoid(S)) + (1 - gamma_0)
    sigmoid(S), gamma_0 the entries of largest |theta_tuned - theta_pre| within the budget. S trains, from -sharpness:
    `Grafted(base, tuned, start, logits)`, all `[L, d_in, d_out]`.

    Notes:
        `jaxft.weights.rounded` gives the model with gamma rounded to 0 or 1; `jaxft.merge` the relaxed one. As in the
        paper the budget fixes gamma_0, and the relaxation stays near it. The reference code starts S at -10 and makes
        up for the vanishing slope by a learning rate of 1e7 under SGD; with Adam a start nearer to zero does. Its
        gamma_0 lacks the last of the entries of the budget, which equals the threshold.

    Args:
        budget: entries of gamma_0, of all selected ones: a fraction or a count.
        tuning_steps: length of the full run that makes theta_tuned.
        sharpness: how far from one half gamma starts.
        on: selector of the weights that are grafted; the others stay pretrained.
    """
    if tuning_steps < 1 or sharpness <= 0:
        raise JaxftError(f"grafting: tuning_steps={tuning_steps} must be at least 1, sharpness={sharpness} above 0")

    def init(rng: PRNGKeyArray, params: Tree, probe: Probe) -> Tuned:
        start = materialize(unmarked(params))
        after = weights_by_path(probe.train(start, full("**"), tuning_steps))

        def moved(rng: PRNGKeyArray, candidates: Candidates, probe: Probe) -> dict[str, Array]:
            return {p: jnp.abs(after[p] - w) for p, w in candidates.weights.items()}

        chosen = choose(rng, params, probe, Measure(moved), budget, "model", on, keep_empty=True)

        def graft(path: str, w: Array) -> Grafted:
            first = chosen[path][0].reshape(w.shape)
            tuned = after[path].astype(w.dtype)
            return Grafted(w, tuned, first, Trains(jnp.full(w.shape, -sharpness, jnp.float32)))

        return split(rewrite(params, list(chosen), graft, roles=probe.roles, nodes=False))

    return Method(init)
