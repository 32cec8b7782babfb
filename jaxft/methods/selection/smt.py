"""SMT: sparse matrix tuning."""

from jaxft.methods.base import Method
from jaxft.methods.registry import register
from jaxft.methods.selection.scores import gradient
from jaxft.methods.selection.select import selection


@register(
    "smt",
    title="Sparse Matrix in Large Language Model Fine-tuning",
    url="https://arxiv.org/abs/2405.15525",
    family="selection",
    learning_rate=1e-3,
    example={"budget": 10, "size": 8, "batches": 2},
)
def smt(
    budget: float | int = 0.05, size: int = 256, batches: int = 100, on: str = "layers.attn.{q,k,v}.kernel"
) -> Method:
    """Train the blocks of the attention matrices whose gradient is largest.

    Matrices are cut in blocks of size x size; the m blocks of highest mean |summed gradient| of the model train, all
    else is frozen: `BlockSplit(base [L, ...], blocks [L, m, size, size], index [L, m])`, whose backward pass multiplies
    the chosen blocks only.

    Notes:
        The paper warms up with about 100 steps of full tuning and sums the gradients met on the way; here they are the
        gradients of as many batches at the pretrained weights, so that no full optimizer state is ever held.

    Args:
        budget: blocks that train, of the whole model: a fraction or a count.
        size: side of a block; it has to divide both sides of every selected matrix.
        batches: calibration batches.
        on: selector of the matrices; attention and MLP: "@linear".
    """
    return selection(gradient(batches), granularity="block", size=size, budget=budget, per="model", on=on)
