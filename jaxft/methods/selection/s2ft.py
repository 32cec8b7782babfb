"""S2FT: structured sparse fine-tuning."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxft.methods.base import Method, chain
from jaxft.methods.registry import register
from jaxft.methods.selection.scores import make_score
from jaxft.methods.selection.select import selection
from jaxft.weights import Tree

Score = Literal["random", "magnitude", "activation", "gradient"]


@register(
    "s2ft",
    title="S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity",
    url="https://arxiv.org/abs/2412.06289",
    family="selection",
    learning_rate=1e-3,
    example={"channels": 0.125, "heads": 0.25, "head_dim": 8},
)
def s2ft(channels: float | int = 0.02, heads: float | int = 0.1, head_dim: int = 1, score: Score = "random") -> Method:
    """Train a few channels of every MLP and a few heads of every attention: rows of the down and output projections.

    theta_S of W_down[S, :] and W_o[H, :] trains, with S a set of hidden channels and H the channels of a set of heads.
    `RowSplit(base [L, d_in, d_out], rows [L, k, d_out], index [L, k])`; the backward pass keeps the k activations.

    Notes:
        The paper permutes coupled matrices so that S and H come first and the trained part is a contiguous slice.
        Here it is gathered, which takes no permutation of the checkpoint; `permute_channels` makes it contiguous where
        that is wanted. The update is of rank k: merged minus base is an additive adapter that can be switched.

    Args:
        channels: hidden channels of each MLP that train, a fraction or a count; 0 for none.
        heads: heads of each attention that train, a fraction or a count; 0 for none.
        head_dim: width of a head; 1 chooses single channels of the attention output.
        score: which heads and channels: at random, or the highest by mean |w|, |w| times activation, or |gradient|.
    """
    how = make_score(score)
    parts = []
    if channels:
        parts.append(selection(how, granularity="row", budget=channels, on="layers.mlp.down.kernel"))
    if heads:
        parts.append(selection(how, granularity="row", budget=heads, size=head_dim, on="layers.attn.o.kernel"))
    return chain(*parts)


def permute_channels(params: Tree, order: Int[Array, "layers hidden"]) -> Tree:
    """The same model with the hidden channels of its MLPs in another order: columns of gate and up, rows of down."""

    def columns(w: Array) -> Array:
        return jnp.take_along_axis(w, order[:, None, :] if w.ndim == 3 else order, axis=-1)

    mlp = dict(params["layers"]["mlp"])
    for name in ("gate", "up"):
        if name in mlp:
            mlp[name] = {leaf: columns(w) for leaf, w in mlp[name].items()}
    mlp["down"] = {**mlp["down"], "kernel": jnp.take_along_axis(mlp["down"]["kernel"], order[:, :, None], axis=-2)}
    return {**params, "layers": {**params["layers"], "mlp": mlp}}
