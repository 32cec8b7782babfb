"""Attention through one function, with packing: tokens see earlier tokens of their own segment only."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxft.errors import JaxftError, nearest
from jaxft.models.sharding import mesh_axes, platform, spec_of

IMPLEMENTATIONS = ("auto", "xla", "splash", "cudnn")
PROMPT_SEGMENT = -1  # the segment of virtual tokens: as keys they are visible to every segment
_MIN_BLOCK, _MAX_BLOCK = 128, 512  # of splash attention: the lane width of a TPU, and a size that fits its VMEM
_FUSED_BLOCKS = 8  # up to so many blocks of keys the backward pass of splash attention runs as one kernel
_MAX_KEYS, _MAX_WINDOWED_KEYS = 2048, 1024  # in such a block; a large one sees more than a window


def attention(
    q: Float[Array, "batch seq heads dim"],
    k: Float[Array, "batch keys kv_heads dim"],
    v: Float[Array, "batch keys kv_heads dim"],
    *,
    positions: Int[Array, "#batch seq"],
    segment_ids: Int[Array, "batch seq"] | None = None,
    key_positions: Int[Array, "#batch keys"] | None = None,
    key_segment_ids: Int[Array, "batch keys"] | None = None,
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
    of the queries. `heads` is a multiple of `kv_heads`: query head h reads key/value head `h // (heads / kv_heads)`.

    Implementations: "xla" runs everywhere; "splash" is the Pallas flash attention for TPU that ships with JAX
    (interpreted, slowly, elsewhere); "cudnn" is cuDNN's for GPU, in bf16 or fp16; "auto" takes the fastest that can
    compute the case. Asking for one that cannot raises JaxftError with the reason.
    """
    if implementation not in IMPLEMENTATIONS:
        raise JaxftError(f'attention "{implementation}" is unknown: {nearest(implementation, IMPLEMENTATIONS)}')
    is_self = key_positions is None
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if implementation == "auto":
        implementation = {"tpu": "splash", "gpu": "cudnn"}.get(platform(), "xla")
        if _obstacle(implementation, q, k, is_self=is_self, causal=causal, softcap=softcap):
            implementation = "xla"
    elif reason := _obstacle(implementation, q, k, is_self=is_self, causal=causal, softcap=softcap):
        raise JaxftError(f'attention "{implementation}" cannot be used here: {reason}. Use "auto" or "xla"')

    if implementation == "splash":
        return _splash(q, k, v, segment_ids, sliding_window=sliding_window, scale=scale, softcap=softcap)
    mask = _mask(
        positions,
        positions if is_self else key_positions,
        segment_ids,
        segment_ids if is_self else key_segment_ids,
        causal=causal,
        sliding_window=sliding_window,
    )
    if implementation == "cudnn":
        # It skips what is not causal or outside of the window by itself; segments it takes as a mask only.
        window = None if sliding_window is None else (sliding_window - 1, 0)
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            mask=None if segment_ids is None else mask[:, None],
            scale=scale,
            is_causal=causal,
            local_window_size=window,
            implementation="cudnn",
        )
    return _xla(q, k, v, mask, scale, softcap)


def _obstacle(
    implementation: str, q: Array, k: Array, *, is_self: bool, causal: bool, softcap: float | None
) -> str | None:
    """Why an implementation cannot compute this case, or None if it can. `k` serves the shapes of the case only."""
    if implementation == "xla":
        return None
    if not is_self:
        return "keys that are not those of the queries (a key/value cache or a soft prompt)"
    seq, head_dim = q.shape[1], q.shape[3]
    if implementation == "splash":
        shards = _sequence_shards(seq)
        if seq % (_MIN_BLOCK * shards):
            return f"the sequence length {seq} is not a multiple of {_MIN_BLOCK * shards}"
        if not causal:
            return "it is used for causal attention only"
        if platform() == "tpu" and head_dim % 64:
            return f"head_dim {head_dim} is not a multiple of 64"
        return None
    if platform() != "gpu":
        return "there is no GPU"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 or float16, not in {q.dtype}"
    if softcap is not None:
        return "it has no soft cap"
    if not causal or seq % 2:
        return "it is used for causal attention over an even number of positions only"
    if head_dim % 8 or head_dim > 128:
        return f"head_dim {head_dim} is not a multiple of 8 up to 128"
    if _sequence_shards(seq) > 1:
        return "the sequence is cut over the mesh"
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


def _xla(
    q: Array, k: Array, v: Array, mask: Bool[Array, "#batch seq keys"], scale: float, softcap: float | None
) -> Array:
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
    """Attention by forming all scores of a layer, but keeping none of them for the backward pass.

    What is kept is the logarithm of each query's partition sum, as in FlashAttention-2 (arXiv:2307.08691, section 3.1):
    computing the scores again takes no longer than writing and reading them, and a model without remat does not hold
    `batch * heads * seq * keys` numbers a layer.
    """
    return _dense_forward(q, k, v, mask, scale, softcap)[0]


def _repeated(x: Float[Array, "batch kv_heads keys dim"], group: int) -> Array:
    """`x` for each query head: with the group among the batch axes no product sums or spreads over two axes."""
    return jnp.broadcast_to(x[:, :, None], (*x.shape[:2], group, *x.shape[2:]))


def _scores(q: Array, k: Array, scale: float, softcap: float | None) -> Float[Array, "batch kv_heads group seq keys"]:
    scores = jnp.einsum("bkgtd,bkgsd->bkgts", q, k, preferred_element_type=jnp.float32) * scale
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def _dense_forward(
    q: Array, k: Array, v: Array, mask: Array, scale: float, softcap: float | None
) -> tuple[Array, tuple]:
    keys, values = _repeated(k, q.shape[2]), _repeated(v, q.shape[2])
    scores = jnp.where(mask, _scores(q, keys, scale, softcap), -1e30)  # finite: a row without any key stays finite
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.where(mask, jnp.exp(scores - top), 0.0)
    total = jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    out = jnp.einsum("bkgts,bkgsd->bkgtd", weights.astype(v.dtype), values, preferred_element_type=jnp.float32) / total
    out = out.astype(q.dtype)
    return out, (q, k, v, mask, top + jnp.log(total), out)


def _dense_backward(scale: float, softcap: float | None, residuals: tuple, g: Array) -> tuple[Array | None, ...]:
    q, k, v, mask, log_total, out = residuals
    keys, values = _repeated(k, q.shape[2]), _repeated(v, q.shape[2])
    scores = _scores(q, keys, scale, softcap)
    probabilities = jnp.where(mask, jnp.exp(scores - log_total), 0.0)
    dprobabilities = jnp.einsum("bkgtd,bkgsd->bkgts", g, values, preferred_element_type=jnp.float32)
    shift = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    dscores = probabilities * (dprobabilities - shift) * scale
    if softcap is not None:
        dscores *= 1 - jnp.square(scores / softcap)
    dscores = dscores.astype(q.dtype)
    dq = jnp.einsum("bkgts,bkgsd->bkgtd", dscores, keys)
    # The transposed products are those that need no transposed copy of the scores; groups are summed in float32.
    transposed = functools.partial(jnp.einsum, "bkgts,bkgtd->bkgds", preferred_element_type=jnp.float32)
    dk = transposed(dscores, q).sum(2).swapaxes(2, 3).astype(k.dtype)
    dv = transposed(probabilities.astype(v.dtype), g).sum(2).swapaxes(2, 3).astype(v.dtype)
    return dq, dk, dv, None


_dense.defvjp(_dense_forward, _dense_backward)


def _sequence_shards(seq: int) -> int:
    axes = mesh_axes("sequence", seq)
    return math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in axes) if axes else 1


def _splash(
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array | None,
    *,
    sliding_window: int | None,
    scale: float,
    softcap: float | None,
) -> Array:
    """Splash attention, one call a device: batch, heads and query positions are cut over the ambient mesh.

    Keys and values of a row are gathered whole. Of a causal row every device takes a piece from the front and the one
    as far from the end, or the last device would have almost twice the work of all on average.
    """
    batch, seq, heads, _ = q.shape
    shape = (seq, seq)
    mask: Any = splash_attention.CausalMask(shape)
    if sliding_window is not None:
        mask = splash_attention.LocalMask(shape, (sliding_window - 1, 0), offset=0)
    heads_axes = mesh_axes("heads", k.shape[2])
    sequence_shards = _sequence_shards(seq)
    head_shards = math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in heads_axes or ())
    pieces = sequence_shards
    if sequence_shards > 1 and sliding_window is None and seq % (2 * _MIN_BLOCK * sequence_shards) == 0:
        pieces = 2 * sequence_shards
        mask.q_sequence = zigzag_positions(seq, sequence_shards)
    block = block_of(seq // pieces)
    kernel = splash_attention.make_splash_mha(
        mask=splash_attention.MultiHeadMask([mask] * heads),
        block_sizes=_block_sizes(block, fused_keys(seq, block, sliding_window)),
        head_shards=head_shards,
        q_seq_shards=sequence_shards,
        attn_logits_soft_cap=softcap,
        interpret=platform() != "tpu",
    )
    if segment_ids is None:
        segment_ids = jnp.ones((batch, seq), jnp.int32)

    def local(kernel: Any, q: Array, k: Array, v: Array, query_segments: Array, key_segments: Array) -> Array:
        if pieces > sequence_shards:
            q, query_segments = to_zigzag(q, 2, sequence_axes[0]), to_zigzag(query_segments, 1, sequence_axes[0])
        ids = splash_attention.SegmentIds(query_segments, key_segments)
        out = jax.vmap(kernel)(q, k, v, segment_ids=ids)
        return from_zigzag(out, 2, sequence_axes[0]) if pieces > sequence_shards else out

    batch_axes, sequence_axes = mesh_axes("batch", batch), mesh_axes("sequence", seq) or ()
    q = (q * scale).astype(q.dtype)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))  # heads before positions
    if not jax.sharding.get_abstract_mesh().empty:
        query_spec = PartitionSpec(batch_axes, heads_axes, sequence_axes or None, None)
        key_spec = PartitionSpec(batch_axes, heads_axes, None, None)
        mesh = jax.sharding.get_abstract_mesh()
        kernel_spec = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(heads_axes, sequence_axes or None)))
        segments_spec = spec_of((batch, seq), ("batch", "sequence"))
        local = jax.shard_map(
            local,
            in_specs=(kernel_spec, query_spec, key_spec, key_spec, segments_spec, PartitionSpec(batch_axes, None)),
            out_specs=query_spec,
            check_vma=False,
        )
    return jnp.swapaxes(local(kernel, q, k, v, segment_ids, segment_ids), 1, 2)


def zigzag_positions(seq: int, shards: int) -> np.ndarray:
    """0 .. seq - 1 in zigzag order: of `2 * shards` pieces, shard i holds number i and number i from the end."""
    pieces = np.arange(seq, dtype=np.int32).reshape(2, shards, -1)
    return np.stack([pieces[0], pieces[1, ::-1]], axis=1).reshape(-1)


def to_zigzag(x: Shaped[Array, "..."], axis: int, name: str) -> Shaped[Array, "..."]:
    """What a device holds of an array cut over the mesh axis `name`, in the order of `zigzag_positions`.

    For the inside of a `shard_map`. Each device sends its two pieces to two others, or keeps them.
    """
    even, odd = (
        jax.lax.ppermute(piece, name, pairs)
        for piece, pairs in zip(jnp.split(x, 2, axis), _zigzag_pairs(name), strict=True)
    )
    is_even = jax.lax.axis_index(name) % 2 == 0
    return jnp.concatenate([jnp.where(is_even, even, odd), jnp.where(is_even, odd, even)], axis)


def from_zigzag(x: Shaped[Array, "..."], axis: int, name: str) -> Shaped[Array, "..."]:
    """The inverse of `to_zigzag`."""
    front, back = jnp.split(x, 2, axis)
    is_even = jax.lax.axis_index(name) % 2 == 0
    pieces = jnp.where(is_even, front, back), jnp.where(is_even, back, front)
    return jnp.concatenate(
        [
            jax.lax.ppermute(piece, name, [(to, origin) for origin, to in pairs])
            for piece, pairs in zip(pieces, _zigzag_pairs(name), strict=True)
        ],
        axis,
    )


def _zigzag_pairs(name: str) -> tuple[list[tuple[int, int]], ...]:
    """`(origin, destination)` of pieces 0, 2, 4, ... and of pieces 1, 3, 5, ..., of which each device holds one."""
    shards = jax.lax.axis_size(name)
    return tuple([(i // 2, min(i, 2 * shards - 1 - i)) for i in range(start, 2 * shards, 2)] for start in (0, 1))


def block_of(positions: int) -> int:
    """The size of the blocks in which splash attention takes so many positions; all of them where none divides."""
    return max((size for size in (_MIN_BLOCK, 256, _MAX_BLOCK) if positions % size == 0), default=positions)


def fused_keys(seq: int, block: int, sliding_window: int | None) -> int | None:
    """How many keys a block has in the fused backward kernel of splash attention; None where two kernels run.

    Fused, the backward pass computes the scores once and not twice, but writes the gradient of the queries once for
    every block of keys before it sums them: blocks grow with the sequence, while they fit.
    """
    most = max(block, _MAX_KEYS if sliding_window is None else _MAX_WINDOWED_KEYS)
    sizes = (size for size in range(block, most + 1, block) if seq % size == 0 and seq // size <= _FUSED_BLOCKS)
    return next(sizes, None)


@functools.cache
def _block_sizes(block: int, fused: int | None) -> splash_attention.BlockSizes:
    """Blocks of one size, but for the keys of the fused backward kernel."""
    return splash_attention.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=fused or block,
        block_kv_dkv_compute=block,
        block_q_dq=None if fused else block,
        block_kv_dq=None if fused else block,
        use_fused_bwd_kernel=fused is not None,
    )
