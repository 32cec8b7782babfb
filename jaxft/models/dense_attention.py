"""Attention by forming all scores of a layer: what runs everywhere."""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float

from jaxft.models.rematerialization import attended

_UNSEEN = -1e30  # the score of a key that is not seen; finite, so that a row without any key stays finite


def dense_attention(
    q: Float[Array, "batch seq heads dim"],
    k: Float[Array, "batch keys kv_heads dim"],
    v: Float[Array, "batch keys kv_heads dim"],
    mask: Bool[Array, "#batch seq keys"],
    scale: float,
    softcap: float | None,
) -> Float[Array, "batch seq heads dim"]:
    """`softmax(scale q k^T) v` over the keys that `mask` shows; see `jaxft.models.attention`."""
    # Heads before positions: each head's product is then one of contiguous matrices.
    q = rearrange(q, "batch seq (kv group) dim -> batch kv group seq dim", kv=k.shape[2])
    out = _dense(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask[:, None, None], scale, softcap)
    return rearrange(out, "batch kv group seq dim -> batch seq (kv group) dim")


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _dense(
    q: Float[Array, "batch kv_heads group seq dim"],
    k: Float[Array, "batch kv_heads keys dim"],
    v: Float[Array, "batch kv_heads keys dim"],
    mask: Bool[Array, "#batch 1 1 seq keys"],
    scale: float,
    softcap: float | None,
) -> Float[Array, "batch kv_heads group seq dim"]:
    """Attention that keeps no scores for the backward pass.

    What is kept is the logarithm of each query's partition sum, as in FlashAttention-2 (arXiv:2307.08691, section 3.1):
    computing the scores again takes no longer than writing and reading them, and a model without remat does not hold
    `batch * heads * seq * keys` numbers a layer.
    """
    return _dense_forward(q, k, v, mask, scale, softcap)[0]


def _repeated(x: Float[Array, "batch kv_heads keys dim"], group: int) -> Array:
    """`x` for each query head: with the group among the batch axes no product sums or spreads over two axes."""
    return jnp.broadcast_to(x[:, :, None], (*x.shape[:2], group, *x.shape[2:]))


def _dense_forward(
    q: Array, k: Array, v: Array, mask: Array, scale: float, softcap: float | None
) -> tuple[Array, tuple]:
    keys, values = (_repeated(x, q.shape[2]) for x in (k, v))
    scores = jnp.where(mask, scores_of(q, keys, scale, softcap), _UNSEEN)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.where(mask, jnp.exp(scores - top), 0.0)
    total = jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    out = weighted_values(weights, values) / total
    out = attended(out.astype(q.dtype))
    return out, (q, k, v, mask, attended(top + jnp.log(total)), out)


def _dense_backward(scale: float, softcap: float | None, residuals: tuple, g: Array) -> tuple[Array | None, ...]:
    q, k, v, mask, log_total, out = residuals
    keys, values = (_repeated(x, q.shape[2]) for x in (k, v))
    dq, dk, dv = gradients_over_keys(q, keys, values, mask, log_total, out, g, scale, softcap)
    dk, dv = (d.sum(2).swapaxes(2, 3).astype(x.dtype) for d, x in ((dk, k), (dv, v)))  # of groups, in float32
    return dq, dk, dv, None


_dense.defvjp(_dense_forward, _dense_backward)


# --- parts, for one head or many --------------------------------------------------------------------------------------


def scores_of(
    q: Float[Array, "*heads rows dim"], k: Float[Array, "*heads keys dim"], scale: float, softcap: float | None
) -> Float[Array, "*heads rows keys"]:
    """Of queries and keys, in fp32."""
    scores = jnp.einsum("...td,...sd->...ts", q, k, preferred_element_type=jnp.float32) * scale
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def weighted_values(
    weights: Float[Array, "*heads rows keys"], v: Float[Array, "*heads keys dim"]
) -> Float[Array, "*heads rows dim"]:
    """Sums of values in fp32, of products in the dtype of `v`."""
    return jnp.einsum("...ts,...sd->...td", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)


def gradients_over_keys(
    q: Float[Array, "*heads rows dim"],
    k: Float[Array, "*heads keys dim"],
    v: Float[Array, "*heads keys dim"],
    mask: Bool[Array, "*#heads rows keys"],
    log_total: Float[Array, "*heads rows 1"],
    out: Float[Array, "*heads rows dim"],
    g: Float[Array, "*heads rows dim"],
    scale: float,
    softcap: float | None,
) -> tuple[Float[Array, "*heads rows dim"], Float[Array, "*heads dim keys"], Float[Array, "*heads dim keys"]]:
    """What the gradient `g` of attention's result gives queries through these keys, and these keys and values.

    The keys may be some of those that a query sees: `log_total`, the logarithm of its partition sum, and `out`, the
    result, are over all of them. Gradients of keys and values are in fp32, transposed: these are the products that need
    no transposed copy of the scores.
    """
    scores = scores_of(q, k, scale, softcap)
    probabilities = jnp.where(mask, jnp.exp(scores - log_total), 0.0)
    dprobabilities = jnp.einsum("...td,...sd->...ts", g, v, preferred_element_type=jnp.float32)
    shift = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    dscores = probabilities * (dprobabilities - shift) * scale
    if softcap is not None:
        dscores *= 1 - jnp.square(scores / softcap)
    dscores = dscores.astype(q.dtype)
    transposed = functools.partial(jnp.einsum, "...ts,...td->...ds", preferred_element_type=jnp.float32)
    dq = jnp.einsum("...ts,...sd->...td", dscores, k)
    return dq, transposed(dscores, q), transposed(probabilities.astype(v.dtype), g)
