"""LoRA: low-rank adaptation."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from jaxft.errors import JaxftError
from jaxft.methods.base import Method, path_key, rewrite, stop_below
from jaxft.methods.probe import Probe
from jaxft.methods.registry import register
from jaxft.partition import Tuned, layer_mask, masked_node, shape_of, split
from jaxft.weights import LowRank, Tree, Weight


@register(
    "lora",
    title="LoRA: Low-Rank Adaptation of Large Language Models",
    url="https://arxiv.org/abs/2106.09685",
    family="reparametrization",
    learning_rate=2e-3,
    example={"rank": 4},
)
def lora(rank: int = 16, alpha: float | None = None, on: str = "@linear", dropout: float = 0.0) -> Method:
    """Add a trained product of two thin matrices to frozen weights.

    W' = W + (alpha / rank) A B, with W `[L, d_in, d_out]` frozen, A `[L, d_in, rank]` uniform in
    +-1/sqrt(d_in) (the initialisation of the reference code and of peft) and B `[L, rank, d_out]` zero, both float32.
    In the paper's orientation A is B^T and B is A^T.

    Args:
        rank: the width of the product.
        alpha: the scale of the update is alpha / rank; twice the rank by default.
        on: selector of the matrices; a layer range (`layers[16:].attn`) limits it to those layers. Vectors beside them
            (`attn.*` has norms in some models) are left alone.
        dropout: share of the inputs of A that each training step sets to zero, as in peft; none of an embedding's rows.
    """
    if not 0 <= dropout < 1:
        raise JaxftError(f"lora: dropout={dropout} must be at least 0 and below 1")
    if rank < 1:
        raise JaxftError(f"lora: rank={rank} must be at least 1")
    scale = (2 * rank if alpha is None else alpha) / rank

    def init(rng: PRNGKeyArray, params: Tree, probe: Probe) -> Tuned:
        chosen: dict[str, Any] = {}

        def add(path: str, w: Weight, layers: Any) -> LowRank:
            *stack, d_in, d_out = shape_of(w)
            if rank > min(d_in, d_out):
                raise JaxftError(f'lora: rank={rank} exceeds the smaller side of "{path}" ({d_in} x {d_out})')
            chosen[path] = layers
            bound = 1 / math.sqrt(d_in)
            a = jax.random.uniform(path_key(rng, path), (*stack, d_in, rank), jnp.float32, -bound, bound)
            b = jnp.zeros((*stack, rank, d_out), jnp.float32)
            mask = layer_mask(layers, (*stack, d_in, d_out))
            a, b = (masked_node(factor, mask, stacked=bool(stack), path=path) for factor in (a, b))
            return LowRank(w, a, b, scale, dropout)

        tuned = split(rewrite(params, on, add, roles=probe.roles, layers=True, matrices=True))
        return stop_below(tuned, chosen, probe.roles)

    return Method(init)
