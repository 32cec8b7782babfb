"""R-AMT: regularized mask tuning."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from jaxft.errors import JaxftError
from jaxft.methods.base import Method, path_key, rewrite
from jaxft.methods.probe import Probe
from jaxft.methods.registry import register
from jaxft.partition import (
    Trains,
    Tuned,
    combine,
    has_marks,
    map_weights,
    select,
    split,
    unmarked,
    weights_by_path,
)
from jaxft.weights import Thresholded, Tree, materialize


@register(
    "r-amt",
    title="Regularized Mask Tuning: Uncovering Hidden Knowledge in Pre-trained Vision-Language Models",
    url="https://arxiv.org/abs/2307.15049",
    family="selection",
    learning_rate=1e-3,
    example={"batches": 2},
)
def r_amt(
    start: float = 1e-2, threshold: float = 5e-3, dropout: float = 1.0, batches: int = 8, on: str = "@attention"
) -> Method:
    """Learn which weights to switch off: the pretrained values stay, a binary mask over them trains.

    W' = W * 1[S > alpha], dL/dS = dL/dW' * W (straight through), S from `start` everywhere, so that the run begins at
    the pretrained model: `Thresholded(base, scores [L, d_in, d_out])`. Gradient dropout: an entry keeps its task
    gradient g with probability P = (1 + sign(g) (g + g_kl) / (|g| + |g_kl|)) / 2, so that what pulls away from the
    pretrained model is dropped at random, and what agrees with it never is.

    Notes:
        From CLIP, carried over to the attention of a language model (the layers that the paper finds to matter). g_kl
        is the gradient of the divergence from the pretrained model to second order, F * (W' - W) * W, with F the
        diagonal Fisher information on calibration batches: zero at the start, and no second model runs beside. The
        reference code differentiates the divergence of the class probabilities itself. Left behind: the image encoder
        and the class prompts. Scores are as many as the weights they mask.

    Args:
        start: the score of every entry at the start, above the threshold.
        threshold: alpha, below which an entry is switched off.
        dropout: how much of a dropped gradient goes, from 0 (nothing, plain mask tuning) to 1 (all of it).
        batches: calibration batches for the Fisher information; not needed without dropout.
        on: selector of the matrices that are masked.
    """
    if start <= threshold or not 0 <= dropout <= 1:
        raise JaxftError(
            f"r-amt: start={start} must exceed threshold={threshold} (else the run starts with every weight switched "
            f"off), dropout={dropout} lie in [0, 1]"
        )

    def init(rng: PRNGKeyArray, params: Tree, probe: Probe) -> Tuned:
        weights = weights_by_path(params)
        chosen = [p for p in select(params, on, roles=probe.roles) if not has_marks(weights[p])]
        fisher = probe.gradients_of(unmarked(params), chosen, batches, jnp.square) if dropout else {}

        def mask(path: str, w: Any) -> Thresholded:
            scores = jnp.full(materialize(w).shape, start, jnp.float32)
            return Thresholded(w, Trains(scores), fisher.get(path), threshold)

        return split(rewrite(params, on, mask, roles=probe.roles))

    def update(
        gradients: Tree, state: Any, params: Tree | None = None, *, frozen: Tree, rng: PRNGKeyArray, **_: Any
    ) -> tuple[Tree, Any]:
        nodes = weights_by_path(combine(Tuned(params, frozen)))

        def drop(path: str, g: Any) -> Any:
            w = nodes[path]
            if not isinstance(w, Thresholded) or w.curvature is None or g.scores is None:
                return g
            base = jax.lax.stop_gradient(materialize(w.base)).astype(jnp.float32)
            back = jnp.where(w.scores > w.threshold, 0, -w.curvature * jnp.square(base))
            kept = jax.random.uniform(path_key(rng, path), back.shape) < purity(g.scores, back)
            return g.replace(scores=g.scores * jnp.where(kept, 1, 1 - dropout).astype(g.scores.dtype))

        return map_weights(drop, gradients), state

    gradients = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    return Method(init, gradients=gradients if dropout else None)


def purity(task: Float[Array, "..."], general: Float[Array, "..."]) -> Float[Array, "..."]:
    """The probability with which a task gradient is kept: 1 where the general gradient agrees in sign or is zero."""
    whole = jnp.abs(task) + jnp.abs(general)
    return 0.5 * (1 + jnp.sign(task) * (task + general) / jnp.maximum(whole, jnp.finfo(whole.dtype).tiny))
