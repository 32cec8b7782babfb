"""Splash attention, the Pallas flash attention for TPU that ships with JAX: over a mesh, and how it is cut into tiles.

A soft prompt is outside of what its masks can say: every segment sees it. So the kernel attends to the tokens, the
scores of the few virtual tokens are formed beside it, and both are put together by their partition sums.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from jax.experimental.pallas.ops.tpu import splash_attention as pallas
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxft.models.dense_attention import dense_attention, gradients_over_keys, scores_of, weighted_values
from jaxft.models.rematerialization import ATTENTION, attended
from jaxft.models.sharding import mesh_axes, num_shards, platform, spec_of

_MIN_BLOCK, _MAX_BLOCK = 128, 512  # sides of a tile of splash attention: the lane width of a TPU, and 2^18 scores
_MAX_ROWS = 1024  # of a tile
_MAX_FUSED = 2**18  # elements of a block of keys of its fused backward kernel, for the VMEM of a v5e
_PARTIAL = 240  # FLOPs that it does while HBM delivers two bytes: 197 TFLOP/s, of which it reaches half, by 819 GB/s
_PARTIAL_BYTES = 2**30  # of gradients of queries by block of keys
_NEARLY, _FEW_PARTIAL_BYTES = 1.05, 2**28  # of the least cost, and of these gradients, up to which blocks are smaller


def splash_attention(
    q: Float[Array, "batch seq heads dim"],
    k: Float[Array, "batch seq kv_heads dim"],
    v: Float[Array, "batch seq kv_heads dim"],
    positions: Int[Array, "#batch seq"],
    segment_ids: Int[Array, "batch seq"] | None,
    *,
    prompt: int,
    sliding_window: int | None,
    scale: float,
    softcap: float | None,
    tile: tuple[int, int] | None,
) -> Float[Array, "batch seq heads dim"]:
    """Causal attention; see `jaxft.models.attention`, which asks `splash_obstacle` before."""
    attend = functools.partial(_over_mesh, sliding_window=sliding_window, scale=scale, softcap=softcap, tile=tile)
    if not prompt:
        return attend(q, k, v, segment_ids, None)
    (q_prompt, k_prompt, v_prompt), (q, k, v) = ([x[:, i] for x in (q, k, v)] for i in np.s_[:prompt, prompt:])
    distance = np.arange(prompt)[:, None] - np.arange(prompt)
    sees = (distance >= 0) & (distance < (sliding_window or prompt))
    in_front = dense_attention(q_prompt, k_prompt, v_prompt, jnp.asarray(sees[None]), scale, softcap)
    segment_ids = None if segment_ids is None else segment_ids[:, prompt:]
    distances = positions[:, prompt:, None] - np.arange(prompt)
    near = jnp.broadcast_to(distances < sliding_window, (q.shape[0], *distances.shape[1:])) if sliding_window else None
    return jnp.concatenate([in_front, attend(q, k, v, segment_ids, (k_prompt, v_prompt, near))], axis=1)


def _over_mesh(
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array | None,
    prompt: tuple[Array, Array, Bool[Array, "batch seq prompt"] | None] | None,
    *,
    sliding_window: int | None,
    scale: float,
    softcap: float | None,
    tile: tuple[int, int] | None,
) -> Array:
    """Of tokens, one call a device: batch, heads and query positions are cut over the ambient mesh.

    Keys and values of a row are gathered whole. Of a causal row every device takes a piece from the front and the one
    as far from the end, or the last device would have almost twice the work of all on average.

    The queries of all heads of a key/value head are rows of one matrix, in the order of `Tiling`.

    `prompt` are keys and values that all segments see, and which of them are in a query's window (None: all).
    """
    batch, seq, num_heads, head_dim = q.shape
    kv_heads, group = k.shape[2], num_heads // k.shape[2]
    cut = tiling(batch, seq, num_heads, kv_heads, head_dim, sliding_window, tile)
    batch_axes, sequence_axes = mesh_axes("batch", batch), mesh_axes("sequence", seq) or ()
    heads_axes = mesh_axes("heads", kv_heads)
    is_zigzag = _is_zigzag(seq, sliding_window)
    order = zigzag_positions(seq, _sequence_shards(seq)) if is_zigzag else np.arange(seq, dtype=np.int32)
    kernel = pallas.make_splash_mha(
        mask=pallas.MultiHeadMask([_row_mask(order, group, cut, sliding_window)] * kv_heads),
        block_sizes=_block_sizes(cut),
        head_shards=num_shards("heads", kv_heads),
        q_seq_shards=_sequence_shards(seq),
        save_residuals=prompt is not None,
        residual_checkpoint_name=None if prompt is not None else ATTENTION,
        attn_logits_soft_cap=softcap,
        interpret=platform() != "tpu",
    )
    if segment_ids is None:
        segment_ids = jnp.ones((batch, seq), jnp.int32)

    def local(
        kernel: Any, q: Array, k: Array, v: Array, segments: Array, key_segments: Array, prompt: Any, near: Array | None
    ) -> Array:
        if sequence_axes:  # here and not before, so that their gradients are scattered and not summed whole
            k, v = (jax.lax.all_gather(x, sequence_axes, axis=1, tiled=True) for x in (k, v))
        if is_zigzag:
            q, segments = (to_zigzag(x, 1, sequence_axes[0]) for x in (q, segments))

        def rows(x: Array) -> Array:  # of what the queries of all heads have in common
            return repeat(x, "b (n p) ... -> b (n g p) ...", p=cut.granule, g=group)

        def keys(x: Array) -> Array:
            return rearrange(x, "b s (c k) d -> c b k s d", k=cut.heads)

        q = rearrange(q, "b (n p) (c k g) d -> c b k (n g p) d", p=cut.granule, g=group, k=cut.heads)
        ids = pallas.SegmentIds(rows(segments), key_segments)
        near = None if near is None else rows(near)

        def some_heads(given: tuple[Array, Array, Array, Any]) -> Array:
            q, k, v, prompt = given
            if prompt is None:
                return jax.vmap(kernel)(q, k, v, segment_ids=ids)
            return jax.vmap(functools.partial(_with_prompt, softcap, kernel))(q, k, v, ids, *prompt, near)

        given = (q, keys(k), keys(v), jax.tree.map(keys, prompt))
        is_one = len(q) == 1
        out = some_heads(jax.tree.map(lambda x: x[0], given))[None] if is_one else jax.lax.map(some_heads, given)
        out = rearrange(out, "c b k (n g p) d -> b (n p) (c k g) d", p=cut.granule, g=group)
        return from_zigzag(out, 1, sequence_axes[0]) if is_zigzag else out

    virtual, near = (None, None) if prompt is None else (prompt[:2], prompt[2])
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        spec = PartitionSpec(batch_axes, sequence_axes or None, heads_axes, None)
        kernel_spec = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(heads_axes, sequence_axes or None)))
        tokens_spec = spec_of((batch, seq), ("batch", "sequence"))
        row_spec = PartitionSpec(batch_axes, None)
        local = jax.shard_map(
            local,
            in_specs=(
                *(kernel_spec, spec, spec, spec, tokens_spec, row_spec),
                virtual and (PartitionSpec(batch_axes, None, heads_axes, None),) * 2,
                None if near is None else tokens_spec,
            ),
            out_specs=spec,
            check_vma=False,
        )
    return local(kernel, (q * scale).astype(q.dtype), k, v, segment_ids, segment_ids, virtual, near)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_prompt(
    softcap: float | None,
    kernel: Any,
    q: Float[Array, "heads rows dim"],
    k: Float[Array, "heads seq dim"],
    v: Float[Array, "heads seq dim"],
    segment_ids: Any,
    prompt_k: Float[Array, "heads prompt dim"],
    prompt_v: Float[Array, "heads prompt dim"],
    near: Bool[Array, "rows prompt"] | None,
) -> Float[Array, "heads rows dim"]:
    """What `kernel` computes, if its queries saw these keys, too: all of them, or those that are `near`.

    Its backward pass is right for some of the keys if it is given result and partition sum of all, as in ring attention
    (arXiv:2310.01889). JAX has no public name for it.
    """
    return _with_prompt_forward(softcap, kernel, q, k, v, segment_ids, prompt_k, prompt_v, near)[0]


def _with_prompt_forward(
    softcap: float | None,
    kernel: Any,
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Any,
    prompt_k: Array,
    prompt_v: Array,
    near: Array | None,
) -> tuple[Array, tuple]:
    out, (log_sum,) = kernel(q, k, v, segment_ids=segment_ids)  # of the tokens: finite, as each sees itself
    log_sum = log_sum[..., None]
    scores = scores_of(q, prompt_k, 1.0, softcap)
    scores = scores if near is None else jnp.where(near, scores, -jnp.inf)
    top = jnp.maximum(log_sum, jnp.max(scores, axis=-1, keepdims=True))
    weights, weight = jnp.exp(scores - top), jnp.exp(log_sum - top)
    total = weight + jnp.sum(weights, axis=-1, keepdims=True)
    out = (weight * out.astype(jnp.float32) + weighted_values(weights, prompt_v)) / total
    out, log_total = attended(out.astype(q.dtype)), attended(top + jnp.log(total))
    return out, (kernel, q, k, v, segment_ids, prompt_k, prompt_v, near, out, log_total)


def _with_prompt_backward(softcap: float | None, residuals: tuple, g: Array) -> tuple[Array | None, ...]:
    kernel, q, k, v, segment_ids, prompt_k, prompt_v, near, out, log_total = residuals
    kept = (q, k, v, segment_ids, None, out, log_total[..., 0], kernel.dq_mask_info, kernel.dkv_mask_info)
    _, _, _, dq, dk, dv, *_ = kernels._splash_attention_bwd(**kernel.kwargs, res=kept, do=g)
    seen = True if near is None else near
    dq_prompt, *of_prompt = gradients_over_keys(q, prompt_k, prompt_v, seen, log_total, out, g, 1.0, softcap)
    dk_prompt, dv_prompt = (d.swapaxes(-1, -2).astype(q.dtype) for d in of_prompt)
    return None, dq + dq_prompt, dk, dv, None, dk_prompt, dv_prompt, None


_with_prompt.defvjp(_with_prompt_forward, _with_prompt_backward)


def splash_obstacle(
    seq: int, head_dim: int, *, causal: bool, sliding_window: int | None, tile: tuple[int, int] | None
) -> str | None:
    """Why rows of `seq` tokens cannot be computed so, or None if they can."""
    if seq % (_MIN_BLOCK * _sequence_shards(seq)):
        return f"the sequence length {seq} is not a multiple of {_MIN_BLOCK * _sequence_shards(seq)}"
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


def _sequence_shards(seq: int) -> int:
    return num_shards("sequence", seq)


def _is_zigzag(seq: int, sliding_window: int | None) -> bool:
    """Whether each device holds two pieces of a row's queries: with a window all have the same work as they are."""
    shards = _sequence_shards(seq)
    return shards > 1 and sliding_window is None and seq % (2 * _MIN_BLOCK * shards) == 0


def _positions(seq: int, sliding_window: int | None) -> int:
    """How many consecutive queries of a row a device holds, at least."""
    shards = _sequence_shards(seq)
    return seq // (2 * shards if _is_zigzag(seq, sliding_window) else shards)


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
    heads = kv_heads // num_shards("heads", kv_heads)
    head_bytes = (
        batch // num_shards("batch", batch) * group * seq // shards * head_dim * 2
    )  # of a gradient, in bfloat16

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


class _CausalRows(_RowMask, pallas.CausalMask):
    pass


class _LocalRows(_RowMask, pallas.LocalMask):
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


def _block_sizes(cut: Tiling) -> pallas.BlockSizes:
    is_fused = cut.fused_keys is not None
    pieces = (n for n in range(_MIN_BLOCK, cut.keys + 1, _MIN_BLOCK) if cut.keys % n == 0)
    multiplied = max(n for n in pieces if cut.rows * n <= _MAX_BLOCK**2)  # of the keys of a block, at a time
    return pallas.BlockSizes(
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
