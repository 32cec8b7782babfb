"""LISA: layerwise importance-sampled AdamW."""

from jaxft.errors import JaxftError
from jaxft.methods.base import Method, chain
from jaxft.methods.registry import register
from jaxft.methods.selection.full import full
from jaxft.methods.selection.layers import every
from jaxft.methods.selection.redraw import OptimizerState
from jaxft.methods.selection.scores import random
from jaxft.methods.selection.select import selection


@register(
    "lisa",
    title="LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning",
    url="https://arxiv.org/abs/2403.17919",
    family="selection",
    example={"num_layers": 1, "period": 2},
)
def lisa(
    num_layers: int = 2,
    period: int = 20,
    always: str = "embed|head|final_norm",
    optimizer_state: OptimizerState = "reset",
) -> Method:
    """Train the embedding, the head and `num_layers` random layers, drawn anew every `period` steps.

    With probability gamma / L per layer and period: theta_l <- theta_l - update(gradient_l), else theta_l stays. Every
    leaf `[L, ...]` of the stack becomes `Split(trainable [gamma, ...], frozen [L - gamma, ...])`, so gradients and
    moments exist for gamma layers only.

    Notes:
        `optimizer_state="reset"` restarts all moments at a new draw, those of the always-trained parts too, so that
        Adam's bias correction fits every parameter.

    Args:
        num_layers: gamma, how many layers train at a time.
        period: steps between draws (K in the paper).
        always: selector of what trains throughout; terms that match nothing in a model (a tied head) are passed over.
        optimizer_state: at a new draw, `reset` starts a fresh optimizer, `carry` keeps the moments of what stays.
    """
    if num_layers < 1 or period < 1:
        raise JaxftError(f"lisa: num_layers={num_layers} and period={period} must be at least 1")

    layers = selection(
        random(),
        granularity="layer",
        budget=num_layers,
        on=None,
        due=every(period),
        optimizer_state=optimizer_state,
    )
    return chain(full(always, missing="skip"), layers) if always else layers
