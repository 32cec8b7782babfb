"""Attention through one function, with packing: tokens see earlier tokens of their own segment only."""

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxft.errors import JaxftError, nearest
from jaxft.models.rematerialization import ATTENTION, attended
from jaxft.models.sharding import columns, mesh_axes, platform, spec_of

IMPLEMENTATIONS = ("auto", "xla", "splash", "cudnn")
PROMPT_SEGMENT = -1  # the segment of virtual tokens: as keys they are visible to every segment
_MIN_BLOCK, _MAX_BLOCK = 128, 512  # sides of a tile of splash attention: the lane width of a TPU, and 2^18 scores
_MAX_ROWS = 1024  # of a tile
_MAX_FUSED = 2**18  # elements of a block of keys of its fused backward kernel, for the VMEM of a v5e
_PARTIAL = 240  # FLOPs that it does while HBM delivers two bytes: 197 TFLOP/s, of which it reaches half, by 819 GB/s
_PARTIAL_BYTES = 2**30  # of gradients of queries by block of keys
_NEARLY, _FEW_PARTIAL_BYTES = 1.05, 2**28  # of the least cost, and of these gradients, up to which blocks are smaller


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
    obstacle = functools.partial(
        _obstacle, q=q, k=k, is_self=is_self, causal=causal, softcap=softcap, sliding_window=sliding_window, tile=tile
    )
    if implementation == "auto":
        implementation = {"tpu": "splash", "gpu": "cudnn"}.get(platform(), "xla")
        if obstacle(implementation):
            implementation = "xla"
    elif reason := obstacle(implementation):
        raise JaxftError(f'attention "{asked}" cannot be used here: {reason}. Use "auto" or "xla"')

    if implementation == "splash":
        return _splash(q, k, v, segment_ids, sliding_window=sliding_window, scale=scale, softcap=softcap, tile=tile)
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


def key_copies(num_heads: int, num_kv_heads: int) -> int:
    """How often keys and values are repeated so that the heads of queries that a device has, where `tensor` divides
    these, read heads it has, too: else every device would compute the attention of all heads."""
    shards = _shards("heads", num_heads)
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
    implementation: str,
    q: Array,
    k: Array,
    *,
    is_self: bool,
    causal: bool,
    softcap: float | None,
    sliding_window: int | None,
    tile: tuple[int, int] | None,
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
        pieces = _positions(seq, sliding_window), seq
        for side, name, size in zip(tile or (), ("positions", "keys"), pieces, strict=False):
            fitting = [n for n in range(_MIN_BLOCK, min(size, _MAX_ROWS) + 1, _MIN_BLOCK) if size % n == 0]
            if side not in fitting:
                return f"{side} {name} are no side of a tile: {', '.join(map(str, fitting))} are"
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
    out = attended(out.astype(q.dtype))
    return out, (q, k, v, mask, attended(top + jnp.log(total)), out)


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


def _shards(name: str, size: int) -> int:
    """Over how many devices of the ambient mesh a dimension is cut."""
    return math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in mesh_axes(name, size) or ())


def _sequence_shards(seq: int) -> int:
    return _shards("sequence", seq)


def _is_zigzag(seq: int, sliding_window: int | None) -> bool:
    """Whether each device holds two pieces of a row's queries: with a window all have the same work as they are."""
    shards = _sequence_shards(seq)
    return shards > 1 and sliding_window is None and seq % (2 * _MIN_BLOCK * shards) == 0


def _positions(seq: int, sliding_window: int | None) -> int:
    """How many consecutive queries of a row a device holds, at least."""
    shards = _sequence_shards(seq)
    return seq // (2 * shards if _is_zigzag(seq, sliding_window) else shards)


def _splash(
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array | None,
    *,
    sliding_window: int | None,
    scale: float,
    softcap: float | None,
    tile: tuple[int, int] | None,
) -> Array:
    """Splash attention, one call a device: batch, heads and query positions are cut over the ambient mesh.

    Keys and values of a row are gathered whole. Of a causal row every device takes a piece from the front and the one
    as far from the end, or the last device would have almost twice the work of all on average.

    The queries of all heads of a key/value head are rows of one matrix, in the order of `Tiling`.
    """
    batch, seq, num_heads, head_dim = q.shape
    kv_heads, group = k.shape[2], num_heads // k.shape[2]
    cut = tiling(batch, seq, num_heads, kv_heads, head_dim, sliding_window, tile)
    batch_axes, sequence_axes = mesh_axes("batch", batch), mesh_axes("sequence", seq) or ()
    heads_axes = mesh_axes("heads", kv_heads)
    is_zigzag = _is_zigzag(seq, sliding_window)
    positions = zigzag_positions(seq, _sequence_shards(seq)) if is_zigzag else np.arange(seq, dtype=np.int32)
    kernel = splash_attention.make_splash_mha(
        mask=splash_attention.MultiHeadMask([_row_mask(positions, group, cut, sliding_window)] * kv_heads),
        block_sizes=_block_sizes(cut),
        head_shards=_shards("heads", kv_heads),
        q_seq_shards=_sequence_shards(seq),
        residual_checkpoint_name=ATTENTION,
        attn_logits_soft_cap=softcap,
        interpret=platform() != "tpu",
    )
    if segment_ids is None:
        segment_ids = jnp.ones((batch, seq), jnp.int32)

    def local(kernel: Any, q: Array, k: Array, v: Array, query_segments: Array, key_segments: Array) -> Array:
        if sequence_axes:  # here and not before, so that their gradients are scattered and not summed whole
            k, v = (jax.lax.all_gather(x, sequence_axes, axis=1, tiled=True) for x in (k, v))
        if is_zigzag:
            q, query_segments = (to_zigzag(x, 1, sequence_axes[0]) for x in (q, query_segments))
        granule, heads = cut.granule, cut.heads
        q = rearrange(q, "b (n p) (c k g) d -> c b k (n g p) d", p=granule, g=group, k=heads)
        k, v = (rearrange(x, "b s (c k) d -> c b k s d", k=heads) for x in (k, v))
        query_segments = repeat(query_segments, "b (n p) -> b (n g p)", p=granule, g=group)
        ids = splash_attention.SegmentIds(query_segments, key_segments)

        def attend(qkv: tuple[Array, Array, Array]) -> Array:
            return jax.vmap(kernel)(*qkv, segment_ids=ids)

        out = attend((q[0], k[0], v[0]))[None] if len(q) == 1 else jax.lax.map(attend, (q, k, v))
        out = rearrange(out, "c b k (n g p) d -> b (n p) (c k g) d", p=granule, g=group)
        return from_zigzag(out, 1, sequence_axes[0]) if is_zigzag else out

    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        spec = PartitionSpec(batch_axes, sequence_axes or None, heads_axes, None)
        kernel_spec = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(heads_axes, sequence_axes or None)))
        segments_spec = spec_of((batch, seq), ("batch", "sequence"))
        local = jax.shard_map(
            local,
            in_specs=(kernel_spec, spec, spec, spec, segments_spec, PartitionSpec(batch_axes, None)),
            out_specs=spec,
            check_vma=False,
        )
    return local(kernel, (q * scale).astype(q.dtype), k, v, segment_ids, segment_ids)


# --- how splash attention is cut --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How splash attention cuts the work of one device.

    granule: positions that lie together. The rows of the kernel are the queries of all heads that read one key/value
    head: `granule` positions of the first, the same of the next and so on, then the next positions. A tile of rows thus
    spans few positions, though it has many rows.
    rows, keys: of a block; it is skipped if no row sees a key of it.
    fused_keys: keys of a block of the fused backward kernel; None where two kernels run.
    heads: key/value heads that are computed at a time.
    """

    granule: int
    rows: int
    keys: int
    fused_keys: int | None
    heads: int


def tiling(
    batch: int,
    seq: int,
    num_heads: int,
    kv_heads: int,
    head_dim: int,
    sliding_window: int | None = None,
    tile: tuple[int, int] | None = None,
) -> Tiling:
    """The tiling for queries `[batch, seq, num_heads, head_dim]` on the ambient mesh.

    A causal row computes half of the larger of granule and keys in vain, a windowed one half of both together. A step
    of the grid takes about 0.35 us whatever it computes, a fourth of what 512 x 512 scores take on v5e. So a tile has
    256 keys (1/64 of those that a row sees, if that is more) and 512 to 1024 rows: of the queries of as many heads as
    share their keys, at 128 or 256 positions. Where that makes fewer than 2^17 scores it is a square.

    The fused backward kernel forms the scores once where two form them twice, but writes the gradient of a query once
    for every block of keys, and these are summed afterwards: its blocks are as large as makes both together cheapest,
    or smaller where that costs nearly as little and needs little memory, as they compute less in vain; heads take turns
    where all these gradients would be more than `_PARTIAL_BYTES`.

    With a `tile`, its positions and keys are those of all kernels.
    """
    group, shards = num_heads // kv_heads, _sequence_shards(seq)
    if tile:
        granule, keys = tile
        rows = _rows(granule, group)
    else:
        granule, rows, keys = _tile(_positions(seq, sliding_window), seq, group, min(seq, sliding_window or seq))
    heads = kv_heads // _shards("heads", kv_heads)
    head_bytes = batch // _shards("batch", batch) * group * seq // shards * head_dim * 2  # of a gradient, in bfloat16

    def computed(keys: int) -> float:  # FLOPs of a row's product, over head_dim
        return 2 * computed_pairs(seq, granule, keys, sliding_window) / seq

    def partial_bytes(size: int, heads: int) -> int:
        return heads * head_bytes * seq // size

    costs: dict[tuple[int | None, int], float] = {(None, heads): 7 * computed(keys)}
    largest = keys if tile else min(seq, max(_MAX_FUSED // head_dim, keys))
    for size in range(keys, largest + 1, keys):
        fitting = [n for n in range(1, heads + 1) if heads % n == 0 and partial_bytes(size, n) <= _PARTIAL_BYTES]
        if seq % size == 0 and fitting:
            costs[size, max(fitting)] = 5 * computed(size) + _PARTIAL * seq // size
    least = min(costs.values())
    fused_keys, heads = next(  # the smallest blocks come first
        (size, n)
        for (size, n), cost in costs.items()
        if cost == least or (size and cost <= _NEARLY * least and partial_bytes(size, n) <= _FEW_PARTIAL_BYTES)
    )
    return Tiling(granule, rows, keys, fused_keys, heads)


def _rows(granule: int, group: int) -> int:
    """Of a tile: `granule` positions of as many of the heads that share their keys as fit."""
    return granule * max(n for n in range(1, group + 1) if group % n == 0 and granule * n <= _MAX_ROWS)


def _tile(positions: int, seq: int, group: int, span: int) -> tuple[int, int, int]:
    """Granule, rows and keys of a tile, for pieces of `positions` of a row of `seq` tokens that see `span` keys."""
    block = max((size for size in (_MIN_BLOCK, 256, _MAX_BLOCK) if positions % size == 0), default=positions)
    keys = max((size for size in (256, 512, 1024) if seq % size == 0 and size <= max(256, span // 64)), default=block)
    tiles = [(_rows(granule, group), -granule) for granule in (128, 256) if positions % granule == 0]
    rows, granule = max(tiles, default=(block, -block))
    if rows * min(keys, 256) < min(2**17, block**2):
        return block, block, block
    return -granule, rows, keys


def computed_pairs(seq: int, granule: int, keys: int, sliding_window: int | None) -> int:
    """How many pairs of a query and a key the blocks have that splash attention does not skip, of one head and row."""
    first = np.arange(0, seq, granule)
    last_block = (first + granule - 1) // keys
    first_block = np.maximum(first - (sliding_window or seq) + 1, 0) // keys
    return int((last_block - first_block + 1).sum()) * granule * keys


class _RowMask:
    """For the masks of splash attention, which look at every pair to learn whether a block has any, or all, to compute.

    The positions of a tile are consecutive: three pairs tell. All are seen if the last key is by the first position and
    the first key by the last position; none if the nearest pair is not.
    """

    def __getitem__(self: Any, index: tuple[slice, slice]) -> np.ndarray:
        rows, (start, end) = index[0], (index[1].start, index[1].stop - 1)
        first, last = self.q_sequence[rows.start], self.q_sequence[rows.stop - 1]
        near = np.clip(end, first, last)
        return self.mask_function(np.array([[first, last, near]]), np.array([[end, start, np.clip(near, start, end)]]))


class _CausalRows(_RowMask, splash_attention.CausalMask):
    pass


class _LocalRows(_RowMask, splash_attention.LocalMask):
    pass


def _row_mask(positions: np.ndarray, group: int, cut: Tiling, sliding_window: int | None) -> Any:
    """The mask of the rows of the kernel, for queries of one head at `positions`."""
    shape = (group * len(positions), len(positions))
    mask: Any
    if sliding_window is None:
        mask = _CausalRows(shape)
    else:
        mask = _LocalRows(shape, (sliding_window - 1, 0), offset=0)
    mask.q_sequence = repeat(positions, "(n p) -> (n g p)", p=cut.granule, g=group)
    return mask


def _block_sizes(cut: Tiling) -> splash_attention.BlockSizes:
    is_fused = cut.fused_keys is not None
    pieces = (n for n in range(_MIN_BLOCK, cut.keys + 1, _MIN_BLOCK) if cut.keys % n == 0)
    multiplied = max(n for n in pieces if cut.rows * n <= _MAX_BLOCK**2)  # of the keys of a block, at a time
    return splash_attention.BlockSizes(
        block_q=cut.rows,
        block_kv=cut.keys,
        block_kv_compute=multiplied,
        block_q_dkv=cut.rows,
        block_kv_dkv=cut.fused_keys or cut.keys,
        block_kv_dkv_compute=multiplied,
        block_q_dq=None if is_fused else cut.rows,
        block_kv_dq=None if is_fused else cut.keys,
        use_fused_bwd_kernel=is_fused,
    )


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
