"""Rotary position embeddings (https://arxiv.org/abs/2104.09864) and their stretched variants."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxft.models.config import RopeConfig, yarn_attention_factor


def _default(theta: float, head_dim: int) -> np.ndarray:
    return 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)


def _llama3(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Llama 3.1: long wavelengths are divided by `factor`, short ones kept, those between interpolated."""
    frequencies = _default(rope.theta, head_dim)
    turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
    smooth = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0.0, 1.0)
    return (1 - smooth) * frequencies / rope.factor + smooth * frequencies


def _yarn(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """YaRN (https://arxiv.org/abs/2309.00071): a ramp over channels from extrapolation to interpolation."""

    def channel(rotations: float) -> float:
        """The channel that makes `rotations` turns over the original context."""
        length = rope.original_max_position_embeddings
        return head_dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = channel(rope.beta_fast or 32), channel(rope.beta_slow or 1)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2) - low) / (high - low or 0.001), 0.0, 1.0)
    frequencies = _default(rope.theta, head_dim)
    return frequencies / rope.factor * ramp + frequencies * (1 - ramp)


def rotary_embedding(
    rope: RopeConfig, head_dim: int, limit: int, positions: Int[Array, "batch seq"]
) -> tuple[Float[Array, "batch seq half"], Float[Array, "batch seq half"]]:
    """cos and sin of the angle of each position and channel pair, in fp32, `half = head_dim / 2`.

    `dynamic` (NTK-aware) scaling depends on the longest position of the batch once that exceeds `limit`, the
    `max_position_embeddings` of the model, as in transformers; up to there it is the identity.
    """
    attention_factor = 1.0
    if rope.type == "dynamic":
        length = jnp.maximum(jnp.max(positions) + 1, limit).astype(jnp.float32)
        stretch = rope.factor * length / limit - (rope.factor - 1)
        theta = rope.theta * stretch ** (head_dim / (head_dim - 2))
        frequencies = theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    else:
        if rope.type == "llama3":
            frequencies = _llama3(rope, head_dim)
        elif rope.type == "yarn":
            frequencies, attention_factor = _yarn(rope, head_dim), yarn_attention_factor(rope)
        else:
            frequencies = _default(rope.theta, head_dim) / (rope.factor if rope.type == "linear" else 1.0)
        frequencies = jnp.asarray(frequencies, jnp.float32)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * attention_factor, jnp.sin(angles) * attention_factor


def rotate(
    x: Float[Array, "batch seq heads dim"], cos: Float[Array, "batch seq half"], sin: Float[Array, "batch seq half"]
) -> Float[Array, "batch seq heads dim"]:
    """Rotate channel pairs `(i, i + dim/2)` by their angles, in fp32; the result has the dtype of `x`."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
