"""How the next token is drawn from its scores."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


def sample(
    logits: Float[Array, "batch vocab"],
    keys: Key[Array, " batch"],
    temperature: Float[Array, ""],
    top_k: Int[Array, ""],
    top_p: Float[Array, ""],
) -> Int[Array, " batch"]:
    """One token a row from `softmax(logits / temperature)`, cut to the likely ones and renormalised.

    Of the `top_k` most likely tokens those are kept which are needed to reach a probability of `top_p` among them
    (nucleus sampling, https://arxiv.org/abs/1904.09751), and always the first. `top_k = vocab` and `top_p = 1`
    cut nothing. Tokens that tie with the last one kept are kept.
    """
    logits = logits.astype(jnp.float32) / temperature
    ordered = -jnp.sort(-logits, axis=-1)
    among = jnp.where(jnp.arange(logits.shape[-1]) < top_k, ordered, -jnp.inf)
    probabilities = jax.nn.softmax(among, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = (before < top_p) & (probabilities > 0)
    threshold = jnp.min(jnp.where(kept.at[:, 0].set(True), ordered, jnp.inf), axis=-1, keepdims=True)
    return jax.vmap(jax.random.categorical)(keys, jnp.where(logits >= threshold, logits, -jnp.inf))
