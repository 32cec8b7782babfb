"""Attention through one function, with packing: tokens see earlier tokens of their own segment only."""

import functools
import math
import re

import jax
import jax.numpy as jnp
from einops import repeat
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import AxisType
from jaxtyping import Array, Bool, Float, Int

from jaxft.errors import JaxftError, nearest
from jaxft.models.dense_attention import dense_attention
from jaxft.models.sharding import columns, mesh_axes, num_shards, platform, spec_of
from jaxft.models.splash_attention import splash_attention, splash_obstacle

IMPLEMENTATIONS = ("auto", "xla", "splash", "cudnn")
PROMPT_SEGMENT = -1  # the segment of virtual tokens: as keys they are visible to every segment


def attention(
    q: Float[Array, "batch seq heads dim"],
    k: Float[Array, "batch keys kv_heads dim"],
    v: Float[Array, "batch keys kv_heads dim"],
    *,
    positions: Int[Array, "#batch seq"],
    segment_ids: Int[Array, "batch seq"] | None = None,
    key_positions: Int[Array, "#batch keys"] | None = None,
    key_segment_ids: Int[Array, "batch keys"] | None = None,
    prompt: int = 0,
    causal: bool = True,
    sliding_window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    implementation: str = "auto",
) -> Float[Array, "batch seq heads dim"]:
    """`softmax(scale q k^T) v` over the keys a query may see; softmax in fp32, result in the dtype of `q`.

    `scale` is 1 / sqrt(dim) if it is None. With a `softcap` c the scores are c tanh(scale q k^T / c).

    A query sees the keys of its own segment (and of `PROMPT_SEGMENT`), at positions not after its own if `causal`, and
    less than `sliding_window` before it. Segment 0 is padding: no query sees it as a key, and what padded queries get
    is finite and means nothing. Positions count up by one inside a segment. Without `key_positions` the keys are those
    of the queries, and the first `prompt` of each row are those of `PROMPT_SEGMENT`. `heads` is a multiple of
    `kv_heads`: query head h reads key/value head `h // (heads / kv_heads)`.

    Implementations: "xla" runs everywhere; "splash" is the Pallas flash attention for TPU that ships with JAX
    (interpreted, slowly, elsewhere), "splash:128x256" the same in tiles of 128 positions and 256 keys (`tiling` chooses
    otherwise); "cudnn" is cuDNN's for GPU, in bf16 or fp16; "auto" takes the fastest that can compute the case. Asking
    for one that cannot raises JaxftError with the reason.
    """
    asked = implementation
    implementation, tile = parse_implementation(asked)
    is_self = key_positions is None
    if is_self and (copies := key_copies(q.shape[2], k.shape[2])) > 1:
        k, v = (columns(repeat(x, "batch keys heads dim -> batch keys (heads n) dim", n=copies)) for x in (k, v))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    obstacle = functools.partial(_obstacle, q, is_self, causal, sliding_window, prompt, softcap, tile)
    if implementation == "auto":
        implementation = {"tpu": "splash", "gpu": "cudnn"}.get(platform(), "xla")
        if obstacle(implementation):
            implementation = "xla"
    elif reason := obstacle(implementation):
        raise JaxftError(f'attention "{asked}" cannot be used here: {reason}. Use "auto" or "xla"')

    if implementation == "splash":
        return splash_attention(
            *(q, k, v, positions, segment_ids),
            prompt=prompt,
            sliding_window=sliding_window,
            scale=scale,
            softcap=softcap,
            tile=tile,
        )
    mask = _mask(
        positions,
        positions if is_self else key_positions,
        segment_ids,
        segment_ids if is_self else key_segment_ids,
        causal=causal,
        sliding_window=sliding_window,
    )
    if implementation == "cudnn":
        return _cudnn_attention(q, k, v, mask, segment_ids is not None, sliding_window, scale)
    return dense_attention(q, k, v, mask, scale, softcap)


def _cudnn_attention(
    q: Float[Array, "batch seq heads dim"],
    k: Float[Array, "batch seq kv_heads dim"],
    v: Float[Array, "batch seq kv_heads dim"],
    mask: Bool[Array, "#batch seq seq"],
    has_segments: bool,
    sliding_window: int | None,
    scale: float,
) -> Float[Array, "batch seq heads dim"]:
    """Causal attention by cuDNN, which skips what is not causal or lies outside of the window by itself, and takes
    segments as a mask only.

    Where `sequence` cuts rows each device computes its part with the keys of the whole row. What is not causal of that
    is masked, and computed: the last part, for which the others wait, sees nearly all keys anyway.
    """
    parts = num_shards("sequence", q.shape[1])
    window = None if sliding_window is None else (sliding_window - 1, 0)
    kinds = {"is_causal": True, "local_window_size": window} if parts == 1 else {}
    mask = mask[:, None] if has_segments or parts > 1 else None

    def call(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
        return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, implementation="cudnn", **kinds)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return call(q, k, v, mask)
    # Each device calls it for what it has: left to the compiler, rows are gathered around a conditional, and before the
    # backward pass of one.
    heads = "heads" if mesh_axes("heads", k.shape[2]) else None
    queries = spec_of(q.shape, ("batch", "sequence", heads, None))
    keys = spec_of(k.shape, ("batch", None, heads, None))
    seen = (
        None if mask is None else spec_of(mask.shape, ("batch" if mask.shape[0] > 1 else None, None, "sequence", None))
    )
    return jax.shard_map(call, in_specs=(queries, keys, keys, seen), out_specs=queries, check_vma=False)(q, k, v, mask)


def key_copies(num_heads: int, num_kv_heads: int) -> int:
    """How often keys and values are repeated so that the heads of queries that a device has, where `tensor` divides
    these, read heads it has, too: else every device would compute the attention of all heads."""
    shards = num_shards("heads", num_heads)
    copies = math.lcm(num_kv_heads, shards) // num_kv_heads
    return copies if num_heads % (copies * num_kv_heads) == 0 else 1


def parse_implementation(text: str) -> tuple[str, tuple[int, int] | None]:
    """The name of an implementation, and the positions and keys of its tiles where these are given ("splash:128x256").

    Raises:
        JaxftError: there is no such implementation; names the nearest.
    """
    name, colon, sides = text.partition(":")
    if name not in IMPLEMENTATIONS:
        raise JaxftError(f'attention "{text}" is unknown: {nearest(name, IMPLEMENTATIONS)}')
    if not colon:
        return name, None
    found = re.fullmatch(r"(\d+)x(\d+)", sides)
    if name != "splash" or not found:
        raise JaxftError(
            f'attention "{text}": tiles are those of splash attention, positions x keys, as in "splash:128x256"'
        )
    return name, (int(found[1]), int(found[2]))


def _obstacle(
    q: Array,
    is_self: bool,
    causal: bool,
    sliding_window: int | None,
    prompt: int,
    softcap: float | None,
    tile: tuple[int, int] | None,
    implementation: str,
) -> str | None:
    """Why an implementation cannot compute this case, or None if it can."""
    if implementation == "xla":
        return None
    if not is_self:
        return "keys that are not those of the queries (a key/value cache)"
    seq, head_dim = q.shape[1], q.shape[3]
    if implementation == "splash":
        return splash_obstacle(seq - prompt, head_dim, causal=causal, sliding_window=sliding_window, tile=tile)
    if platform() != "gpu":
        return "there is no GPU"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 or float16, not in {q.dtype}"
    if softcap is not None:
        return "it has no soft cap"
    if not causal or seq % (2 * num_shards("sequence", seq)):
        return "it is used for causal attention over an even number of positions only"
    most = 256 if fused_attention_stablehlo.check_compute_capability("9.0") else 128
    if head_dim % 8 or head_dim > most:
        return f"head_dim {head_dim} is not a multiple of 8 up to {most}"
    return None


def _mask(
    positions: Int[Array, "#batch seq"],
    key_positions: Int[Array, "#batch keys"],
    segment_ids: Int[Array, "batch seq"] | None,
    key_segment_ids: Int[Array, "batch keys"] | None,
    *,
    causal: bool,
    sliding_window: int | None,
) -> Bool[Array, "#batch seq keys"]:
    """Which keys each query sees."""
    distance = positions[:, :, None] - key_positions[:, None, :]
    mask = jnp.ones_like(distance, bool)
    if causal:
        mask &= distance >= 0
    if sliding_window is not None:
        mask &= distance < sliding_window
    if segment_ids is not None and key_segment_ids is not None:
        keys = key_segment_ids[:, None, :]
        mask &= (segment_ids[:, :, None] == keys) | (keys == PROMPT_SEGMENT)
        mask &= keys != 0
    return mask
