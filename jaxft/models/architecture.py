"""The parts of a decoder and how they start, in Flax NNX. What they compute is in `jaxft.models.decoder`."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxft.models.config import DecoderConfig


class Attention(nnx.Module):
    def __init__(self, config: DecoderConfig, dtype: Any, rngs: nnx.Rngs) -> None:
        project = _projection(config, dtype, rngs)
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q = project(config.hidden_size, queries, use_bias=config.qkv_bias)
        self.k = project(config.hidden_size, keys, use_bias=config.qkv_bias)
        self.v = project(config.hidden_size, keys, use_bias=config.qkv_bias)
        self.o = project(queries, config.hidden_size, use_bias=config.output_bias)
        if config.qk_norm:
            self.q_norm = _norm(config, config.head_dim, dtype, rngs)
            self.k_norm = _norm(config, config.head_dim, dtype, rngs)


class MLP(nnx.Module):
    def __init__(self, config: DecoderConfig, dtype: Any, rngs: nnx.Rngs) -> None:
        project = functools.partial(_projection(config, dtype, rngs), use_bias=config.mlp_bias)
        self.gate = project(config.hidden_size, config.intermediate_size)
        self.up = project(config.hidden_size, config.intermediate_size)
        self.down = project(config.intermediate_size, config.hidden_size)


class ExpertLinear(nnx.Module):
    """One matrix for each expert, `[experts, d_in, d_out]`."""

    def __init__(self, config: DecoderConfig, d_in: int, d_out: int, dtype: Any, rngs: nnx.Rngs) -> None:
        normal = nnx.initializers.normal(config.initializer_range)
        self.kernel = nnx.Param(normal(rngs.params(), (config.num_experts, d_in, d_out), dtype))


class Experts(nnx.Module):
    def __init__(self, config: DecoderConfig, dtype: Any, rngs: nnx.Rngs) -> None:
        dim, width = config.hidden_size, config.moe_intermediate_size
        self.gate = ExpertLinear(config, dim, width, dtype, rngs)
        self.up = ExpertLinear(config, dim, width, dtype, rngs)
        self.down = ExpertLinear(config, width, dim, dtype, rngs)


class Mixture(nnx.Module):
    def __init__(self, config: DecoderConfig, dtype: Any, rngs: nnx.Rngs) -> None:
        self.router = _projection(config, dtype, rngs)(config.hidden_size, config.num_experts, use_bias=False)
        self.experts = Experts(config, dtype, rngs)


class Layer(nnx.Module):
    def __init__(self, config: DecoderConfig, dtype: Any, rngs: nnx.Rngs) -> None:
        self.attn_norm = _norm(config, config.hidden_size, dtype, rngs)
        self.attn = Attention(config, dtype, rngs)
        self.mlp_norm = _norm(config, config.hidden_size, dtype, rngs)
        self.mlp = (Mixture if config.num_experts else MLP)(config, dtype, rngs)
        if config.post_norms:
            self.post_attn_norm = _norm(config, config.hidden_size, dtype, rngs)
            self.post_mlp_norm = _norm(config, config.hidden_size, dtype, rngs)


class Decoder(nnx.Module):
    """The whole model as an NNX module. Its pure-dict state is the params tree of docs/architecture.md."""

    def __init__(self, config: DecoderConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs) -> None:
        normal = nnx.initializers.normal(config.initializer_range)
        vocab, dim = config.vocab_size, config.hidden_size
        self.embed = nnx.Embed(vocab, dim, embedding_init=normal, param_dtype=dtype, rngs=rngs)
        stack = nnx.vmap(lambda rngs: Layer(config, dtype, rngs))
        self.layers = stack(rngs.split(config.num_layers))
        self.final_norm = _norm(config, dim, dtype, rngs)
        if not config.tie_embeddings:
            self.head = _projection(config, dtype, rngs)(dim, vocab, use_bias=False)


def _norm(config: DecoderConfig, dim: int, dtype: Any, rngs: nnx.Rngs) -> nnx.RMSNorm:
    start = nnx.initializers.constant(1.0 - config.norm_offset)  # a factor of one
    return nnx.RMSNorm(dim, scale_init=start, param_dtype=dtype, rngs=rngs)


def _projection(config: DecoderConfig, dtype: Any, rngs: nnx.Rngs) -> Callable[..., nnx.Linear]:
    normal = nnx.initializers.normal(config.initializer_range)
    return functools.partial(nnx.Linear, kernel_init=normal, param_dtype=dtype, rngs=rngs)


_DIMENSIONS: dict[str, tuple[str | None, ...]] = {  # what a projection reads and writes
    "q": ("embed", "heads"),
    "k": ("embed", "kv_heads"),
    "v": ("embed", "kv_heads"),
    "o": ("heads_in", "embed"),
    "gate": ("embed", "mlp"),
    "up": ("embed", "mlp"),
    "down": ("mlp_in", "embed"),
    "router": ("embed", None),
    "head": ("head_embed", "head_vocab"),
    "embed": ("vocab", "embed"),
    "q_norm": ("head_dim",),
    "k_norm": ("head_dim",),
}


def logical_axes(path: list[str]) -> tuple[str | None, ...]:
    """The names of the dimensions of the leaf at `path`: "layers" first for stacked ones, then those above."""
    dimensions = _DIMENSIONS.get(path[-2], ("embed",))  # the other norms scale the residual stream
    if path[-1] == "bias":
        dimensions = dimensions[-1:]
    if "experts" in path:
        dimensions = ("expert", *dimensions)
    return ("layers", *dimensions) if path[0] == "layers" else dimensions
