"""BAdam: block coordinate descent over layers."""

from jaxft.errors import JaxftError
from jaxft.methods.base import Method
from jaxft.methods.registry import register
from jaxft.methods.selection.layers import every
from jaxft.methods.selection.scores import Order, cyclic
from jaxft.methods.selection.select import selection


@register(
    "badam",
    title="BAdam: A Memory Efficient Full Parameter Optimization Method for Large Language Models",
    url="https://arxiv.org/abs/2404.02827",
    family="selection",
    example={"period": 2},
)
def badam(period: int = 50, order: Order = "ascending", start: int | None = None) -> Method:
    """Train one layer at a time with Adam, each for `period` steps, in turn.

    Block coordinate descent: theta_l <- `period` Adam steps from fresh moments, then the next l. Every leaf becomes
    `Split(trainable [1, ...], frozen [L - 1, ...])`, so gradients and moments exist for one layer.

    Notes:
        Embedding, head and final norm stay frozen, the default of the reference code and of LLaMA-Factory. Its random
        order is a new permutation every cycle; here each next layer is drawn from all others. Take a constant learning
        rate within a layer's turn, or a slow schedule.

    Args:
        period: steps a layer trains before the next does (K in the paper).
        order: from the first layer up, from the last down, or at random.
        start: the first layer to train; by default the first, the last or a random one.
    """
    if period < 1:
        raise JaxftError(f"badam: period={period} must be at least 1")

    score = cyclic(order, start)
    return selection(score, granularity="layer", budget=1, on=None, due=every(period), optimizer_state="reset")
