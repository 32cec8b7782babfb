"""LIFT: principal weights."""

from jaxft.methods.base import Method
from jaxft.methods.registry import register
from jaxft.methods.selection.layers import every
from jaxft.methods.selection.scores import low_rank
from jaxft.methods.selection.select import selection


@register(
    "lift-principal-weights",
    title="LIFT the Veil for the Truth: Principal Weights Emerge after Rank Reduction for Reasoning-Focused "
    "Supervised Fine-Tuning",
    url="https://arxiv.org/abs/2506.00772",
    family="selection",
    learning_rate=1e-3,
    example={"rank": 4, "period": 2},
)
def lift_principal_weights(
    rank: int = 128, budget: float | int = 0.05, period: int = 200, on: str = "@linear"
) -> Method:
    """Train the entries that are largest after rank reduction, found anew as the weights move.

    W_r = U_r S_r V_r^T, the best rank-r approximation of each matrix; the top 5 % of |W_r| train, the rest stay. Every
    `period` steps the mask is found anew from the weights as they are: an entry that stays keeps its moments, one that
    enters starts at zero, one that leaves keeps its value. `SparseDelta(base [L, ...], values [L, k], indices [L, k])`.

    Notes:
        In the reference code the count is rank' * (d_in + d_out), that of a LoRA; here it is a fraction, as in the
        paper's text. With `rank` at full rank this is magnitude selection.

    Args:
        rank: of the approximation.
        budget: entries of each matrix that train, a fraction or a count.
        period: steps between masks.
        on: selector of the matrices.
    """
    return selection(low_rank(rank), budget=budget, on=on, due=every(period))
