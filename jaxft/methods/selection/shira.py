"""SHiRA: sparse high-rank adapters."""

from typing import Literal

from jaxft.errors import JaxftError
from jaxft.methods.base import Method
from jaxft.methods.registry import register
from jaxft.methods.selection.scores import make_score
from jaxft.methods.selection.select import selection
from jaxft.methods.selection.units import entries_of_rank

Mask = Literal["random", "magnitude", "gradient", "first_order"]


@register(
    "shira",
    title="SHiRA: Sparse High Rank Adapters",
    url="https://arxiv.org/abs/2406.13175",
    family="selection",
    learning_rate=1e-3,
    example={"rank": 2},
)
def shira(rank: int = 32, mask: Mask = "random", batches: int = 1, on: str = "@linear") -> Method:
    """Train a fixed 1-2 % of the entries of every matrix, as many as a LoRA of rank `rank` has parameters.

    W' = W + S, S sparse with rank * (d_in + d_out) entries that start at zero:
    `SparseDelta(base [L, d_in, d_out], values [L, k], indices [L, k])`.

    Notes:
        The count follows peft. Of the paper's masks, Rand, WM (weight magnitude), Grad and SNIP are here; Struct (rows
        and columns) is `select` with granularity row.

    Args:
        rank: k = rank * (d_in + d_out) entries of each matrix train.
        mask: which: at random, or the largest |w|, |gradient| or |w * gradient|.
        batches: calibration batches for the masks that need a gradient.
        on: selector of the matrices.
    """
    if rank < 1:
        raise JaxftError(f"shira: rank={rank} must be at least 1")
    needs_data = mask in ("gradient", "first_order")
    return selection(
        make_score({"name": mask, "batches": batches} if needs_data else mask),
        budget=entries_of_rank(rank),
        on=on,
    )
