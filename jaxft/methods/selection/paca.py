"""PaCA: partial connection adaptation."""

from jaxft.methods.base import Method
from jaxft.methods.registry import register
from jaxft.methods.selection.scores import random
from jaxft.methods.selection.select import selection


@register(
    "paca",
    title="PaCA: Partial Connection Adaptation for Efficient Fine-Tuning",
    url="https://arxiv.org/abs/2503.01905",
    family="selection",
    learning_rate=1e-3,
    example={"rank": 4},
)
def paca(rank: int = 16, on: str = "@linear") -> Method:
    """Train `rank` random input connections of every matrix, in place.

    y = x W as one product; the gradient of W[I, :] is x[:, I]^T dy, so the backward pass keeps x[..., I] only.
    `RowSplit(base [L, d_in, d_out], rows [L, rank, d_out], index [L, rank])`, rank * d_out scalars train.

    Notes:
        In the paper's orientation (y = W x) these are columns of W. Over a quantised base (QPaCA) the chosen rows are
        held in full precision, by the same node.

    Args:
        rank: how many input channels of each matrix train.
        on: selector of the matrices.
    """
    return selection(random(), granularity="row", budget=rank, on=on)
