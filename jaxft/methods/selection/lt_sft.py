"""LT-SFT: lottery-ticket sparse fine-tuning."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxft.errors import JaxftError
from jaxft.methods.base import Method
from jaxft.methods.registry import register
from jaxft.methods.selection.scores import change
from jaxft.methods.selection.select import selection
from jaxft.partition import Tuned, combine
from jaxft.weights import Packed, SparseDelta, is_node


@register(
    "lt-sft",
    title="Composable Sparse Fine-Tuning for Cross-Lingual Transfer",
    url="https://arxiv.org/abs/2110.07560",
    family="selection",
    learning_rate=1e-3,
    example={"budget": 0.05, "search_steps": 3},
)
def lt_sft(budget: float | int = 0.05, search_steps: int = 100, on: str = "layers", l1: float = 0.0) -> Method:
    """Train the K entries that a full run moves most, from the pretrained start.

    Phase 1 trains all selected weights for `search_steps` steps, theta0 -> theta1. The mask is the K largest
    |theta1 - theta0| over all selected weights together. Phase 2 rewinds to theta0 and trains those entries only:
    theta2 = theta0 + phi with phi a sparse vector of exactly K entries, `SparseDelta(base [L, ...], values [L, k],
    indices [L, k])`. Sparse vectors of several runs add up.

    Args:
        budget: K, a fraction of the selected entries below 1, a count from 1 on.
        search_steps: length of phase 1, on the same data with the same optimizer.
        on: selector of the candidates.
        l1: weight of the pull |phi| toward the start (mean over phi), 0 for none.
    """
    if search_steps < 1 or l1 < 0:
        raise JaxftError(f"lt-sft: search_steps={search_steps} must be at least 1, l1={l1} not negative")
    tickets = selection(change(search_steps), budget=budget, per="model", on=on)

    def penalty(tuned: Tuned) -> Array:
        nodes = [w for w in jax.tree.leaves(combine(tuned), is_leaf=is_node) if isinstance(w, SparseDelta)]
        values = [jnp.abs(w.values.values if isinstance(w.values, Packed) else w.values) for w in nodes]
        return l1 * sum(jnp.sum(v) for v in values) / sum(v.size for v in values)

    return tickets._replace(penalty=penalty if l1 else None)
