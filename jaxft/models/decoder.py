"""The decoder's forward pass: functions of a params tree, scanned over its stacked layers.

The functions see weights only through `jaxft.weights` (`linear`, `value`, `site`), so they run with whatever a method
put into the tree.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from jaxft.models.attention import attention
from jaxft.models.config import DecoderConfig
from jaxft.models.mixture import Routing, mixture
from jaxft.models.rematerialization import projected, scan_rematerialized
from jaxft.models.rope import rotary_embedding, rotate
from jaxft.models.sharding import columns, from_residual, residual, to_residual
from jaxft.weights import Tree, fetch_layer, linear, site, value

_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


def rms_norm(x: Float[Array, "... dim"], norm: Tree, config: DecoderConfig) -> Float[Array, "... dim"]:
    """`x / rms(x) * (norm_offset + scale)` computed in fp32, returned in the dtype of `x`."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + config.rms_norm_eps)
    scale = value(norm["scale"], jnp.float32)
    return (wide * (config.norm_offset + scale if config.norm_offset else scale)).astype(x.dtype)


def project(layer: Tree, name: str, x: Float[Array, "... d_in"]) -> Float[Array, "... d_out"]:
    """The projection `name` ("attn.q") of one layer's params: matrix, bias wherever there is one, site."""
    group, leaf = name.split(".")
    weights = layer[group][leaf]
    y = projected(linear(x, weights["kernel"]))
    if "bias" in weights:
        y = y + value(weights["bias"], y.dtype)
    return site(layer, name, y)


def decoder_block(
    config: DecoderConfig,
    layer: Tree,
    x: Float[Array, "batch seq dim"],
    rope: tuple[Array, Array],
    attend: Callable[[Array, Array, Array], Array],
    is_real: Bool[Array, "batch seq"] | None = None,
) -> tuple[Float[Array, "batch seq dim"], Routing | None]:
    """One layer: attention and MLP (or a mixture of experts), each normalised first and added to the residual stream.

    With `post_norms` what is added is normalised, too; sites "attn" and "mlp" stand after that, at what is added.
    With a mixture also where its tokens went; those that are not real (padding) go nowhere.
    """

    def norm(name: str, x: Array) -> Float[Array, "batch seq dim"]:
        return site(layer, name, rms_norm(x, layer[name], config))

    def heads(name: str, normed: Array) -> Float[Array, "batch seq heads head_dim"]:
        y = project(layer, f"attn.{name}", normed)
        return columns(rearrange(y, "batch seq (heads dim) -> batch seq heads dim", dim=config.head_dim))

    normed = from_residual(norm("attn_norm", x))
    q, k, v = heads("q", normed), heads("k", normed), heads("v", normed)
    if config.qk_norm:
        q = rms_norm(q, layer["attn"]["q_norm"], config)
        k = rms_norm(k, layer["attn"]["k_norm"], config)
    mixed = columns(attend(rotate(q, *rope), rotate(k, *rope), v))
    mixed = rearrange(mixed, "batch seq heads dim -> batch seq (heads dim)")
    mixed = to_residual(project(layer, "attn.o", mixed))
    x = x + site(layer, "attn", norm("post_attn_norm", mixed) if config.post_norms else mixed)

    normed = norm("mlp_norm", x)
    activation, routing = _ACTIVATIONS[config.hidden_act], None
    if config.num_experts:
        mixed, routing = mixture(config, layer, normed, is_real, activation)
    else:
        normed = from_residual(normed)
        gated = activation(project(layer, "mlp.gate", normed)) * project(layer, "mlp.up", normed)
        mixed = project(layer, "mlp.down", columns(gated))
    mixed = to_residual(mixed)
    x = x + site(layer, "mlp", norm("post_mlp_norm", mixed) if config.post_norms else mixed)
    return residual(site(layer, "block", x)), routing


def run_layers(
    config: DecoderConfig,
    layers: Tree,
    x: Float[Array, "batch seq dim"],
    positions: Int[Array, "#batch seq"],
    segment_ids: Int[Array, "batch seq"] | None,
    *,
    prompt: int = 0,
    remat: str = "none",
    implementation: str = "auto",
    cache: dict | None = None,
) -> tuple[Float[Array, "batch seq dim"], dict | None, Routing | None]:
    """Scan the stacked layers. With a cache, keys and values are written after those it holds, and all are seen.
    Without, the first `prompt` positions are virtual tokens.

    Returns the hidden states, the cache, and where a mixture of experts sent its tokens, by layer.
    """
    ropes = [
        rotary_embedding(rope, config.head_dim, config.max_position_embeddings, positions)
        for rope in (config.rope, config.sliding_rope)
        if rope is not None
    ]
    ropes = jax.lax.optimization_barrier(ropes)  # else XLA computes cosines and sines anew in every layer and pass
    is_real = None if segment_ids is None else segment_ids != 0
    if cache is not None:
        start, cache = cache["length"], _append_tokens(cache, positions, segment_ids)

    def block(carry: tuple[Array, Any], layer: Tree, xs: tuple[Tree, Tree]) -> tuple[tuple[Array, Any], Any]:
        x, kv = carry
        layer = fetch_layer(layer)
        (index, is_sliding), (ropes, positions, segment_ids, is_real) = xs

        def attend(q: Array, k: Array, v: Array) -> Array:
            nonlocal kv
            see = functools.partial(
                attention,
                positions=positions,
                segment_ids=segment_ids,
                prompt=prompt,
                scale=config.attention_scale,
                softcap=config.attn_logit_softcapping,
                implementation=implementation,
            )
            if cache is not None:
                at = (index, 0, start, 0, 0)
                kv = {
                    name: jax.lax.dynamic_update_slice(kv[name], new[None].astype(kv[name].dtype), at)
                    for name, new in (("k", k), ("v", v))
                }
                k, v = kv["k"][index], kv["v"][index]
                see = functools.partial(see, key_positions=cache["positions"], key_segment_ids=cache["segment_ids"])
            windowed = functools.partial(see, sliding_window=config.sliding_window)
            if len(set(config.sliding_layers)) == 1:
                return windowed(q, k, v)
            # A window is part of a kernel (a static mask, whose empty blocks it never visits), so a layer runs one of
            # two. One scan with a branch compiles both once, whatever the depth and the pattern of kinds, and keeps a
            # single stack of layers; a scan over periods of the pattern would unroll it (five kernels in six alike),
            # leave a remainder, and cut every stack [L, ...] that methods address by layer.
            return jax.lax.cond(is_sliding, windowed, see, q, k, v)

        rope = ropes[0] if len(ropes) == 1 else jax.tree.map(functools.partial(jnp.where, is_sliding), *ropes[::-1])
        x, routing = decoder_block(config, layer, x, rope, attend, is_real)
        return (x, kv), routing

    kv = None if cache is None else {"k": cache["k"], "v": cache["v"]}
    xs = (jnp.arange(config.num_layers), jnp.asarray(config.sliding_layers))
    shared = (ropes, positions, segment_ids, is_real)
    (x, kv), routing = scan_rematerialized(block, layers, (x, kv), xs, shared, remat)
    return x, (None if cache is None else {**cache, **kv}), routing


def _append_tokens(cache: dict, positions: Array, segment_ids: Array) -> dict:
    at = (0, cache["length"])
    written = {
        name: jax.lax.dynamic_update_slice(cache[name], jnp.broadcast_to(new, segment_ids.shape).astype(jnp.int32), at)
        for name, new in (("positions", positions), ("segment_ids", segment_ids))
    }
    return {**cache, **written, "length": cache["length"] + segment_ids.shape[1]}
