"""APET: arbitrary few parameters."""

from collections.abc import Callable, Sequence
from typing import Literal

from jaxft.methods.base import Method
from jaxft.methods.registry import register
from jaxft.methods.selection.scores import random
from jaxft.methods.selection.select import selection


@register(
    "apet",
    title="Arbitrary Few Parameters are Good Enough for Adapting Large-scale Pre-trained Language Models",
    url="https://arxiv.org/abs/2306.02320",
    family="selection",
    learning_rate=1e-3,
    example={"count": 500},
)
def apet(count: int = 100_000, spread: Literal["model", "matrix"] = "model", on: str = "@linear") -> Method:
    """Train exactly `count` parameters at arbitrary positions: W' = W + scatter(theta), theta `[count]` from zero.

    Every leaf becomes `SparseDelta(base, values [L, k], indices [L, k])`.

    Notes:
        The reference code (yushengsu-thu/PET_Scaling) draws whole tensors, of the model and of the modules of other
        methods, as long as they fit in `count`; here single positions of the model, exactly as many. `count` says how
        many parameters suffice; `smallest_sufficient` finds the least of a series that does.

    Args:
        count: how many scalars train: of all selected weights together, or (`spread: matrix`) of each matrix.
        spread: positions drawn uniformly over the model, or as many in every matrix.
        on: selector of the weights.
    """
    return selection(random(), budget=count, per=spread, on=on)


def smallest_sufficient(counts: Sequence[int], reaches: Callable[[int], bool]) -> int | None:
    """The least of ascending `counts` of trained parameters for which `reaches(count)` holds, by bisection.

    `reaches` trains with that many parameters and says whether the result is good enough; it is taken to be monotone
    (more parameters are never worse). None if no count is enough.
    """
    if not reaches(counts[-1]):
        return None
    low, high = 0, len(counts) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(counts[middle]) else (middle + 1, high)
    return counts[high]
