"""BAdam: block coordinate descent over layers."""

from typing import Literal

import numpy as np

from jaxft.errors import JaxftError
from jaxft.methods.base import Method
from jaxft.methods.registry import register
from jaxft.methods.selection.layers import Draw, LayerMasks, every, layer_counts, layer_selection, stacked_arrays
from jaxft.partition import Roles
from jaxft.weights import Tree


@register(
    "badam",
    title="BAdam: A Memory Efficient Full Parameter Optimization Method for Large Language Models",
    url="https://arxiv.org/abs/2404.02827",
    family="selection",
    example={"period": 2},
)
def badam(
    period: int = 50, order: Literal["ascending", "descending", "random"] = "ascending", start: int | None = None
) -> Method:
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

    def first_draw(params: Tree, roles: Roles) -> Draw:
        total = layer_counts(params, roles)
        if start is not None and not 0 <= start < total:
            raise JaxftError(f"badam: start={start}, but the layers are 0 to {total - 1}")
        paths = stacked_arrays(params, list(roles.stacked), roles)

        def draw(rng: np.random.Generator, before: LayerMasks | None) -> LayerMasks:
            if before is None:
                by_order = {"ascending": 0, "descending": total - 1, "random": int(rng.integers(total))}
                active = by_order[order] if start is None else start
            else:
                now = int(np.argmax(next(iter(before.values()))))
                step = {"ascending": 1, "descending": -1, "random": int(rng.integers(1, max(total, 2)))}[order]
                active = (now + step) % total
            return dict.fromkeys(paths, np.arange(total) == active)

        return draw

    return layer_selection(first_draw, due=every(period), optimizer_state="reset")
