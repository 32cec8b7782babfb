"""FLOPs: the least that a method needs, and what the kernels compute whose inside a compiled program does not show."""

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh
from jaxtyping import Array

from jaxft.distributed import hlo
from jaxft.distributed.sharding import row_shards
from jaxft.models.attention import key_copies, parse_implementation
from jaxft.models.mixture import is_gated_before_down
from jaxft.models.splash_attention import computed_pairs, tiling
from jaxft.partition import DECODER_ROLES, combine, weights_by_path
from jaxft.weights import LowRank, SiteModule, SparseDelta, Split, Tree, first_trained, is_node, prompt_embeddings
from jaxft.weights.rows import SOME_EXPERTS


def trained_share(params: Tree) -> float:
    """Of the entries of all matrices that are a `Split`, where there is a backward pass, the part that trains: how
    often a conditional weight gradient runs."""
    found = [w for w in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Split)) if isinstance(w, Split)]
    splits = [w for w in found if len(w.trainable.shape) > 2]
    trained = sum(math.prod(w.trainable.shape) for w in splits)
    passed = sum(math.prod(w.trainable.shape[1:]) * (w.num_layers - w.first) for w in splits)
    return trained / passed if splits else 1.0


def visible_pairs(seq_len: int, window: int | None = None) -> int:
    """How many (query, key) pairs causal attention over one row sees."""
    window = min(window or seq_len, seq_len)
    return window * (window + 1) // 2 + (seq_len - window) * window


def _windows(config: Any) -> list[int | None]:
    return [config.sliding_window if slides else None for slides in config.sliding_layers]


RECOMPUTED = ("block", "attention", "offload")  # policies that keep no result of a layer's projections


def model_flops(config: Any, tuned: Any, rows: int, seq_len: int, remat: str) -> float:
    """The least FLOPs of a step: two for each multiply-add of matrix products, everything else free.

    With T tokens, P entries of the matrices a token passes (low-rank factors included, the embedding table not) and
    P_t entries that train: 2TP forward, 2TP gradients of activations, 2TP_t gradients of weights. Causal attention
    costs `4 heads head_dim` a visible pair forward, 2.5 times that backward (the scores are recomputed, as flash
    attention does). `remat="block"` and `"offload"` repeat the forward pass of the layers but for the last projection,
    whose result no gradient needs (unless a mixture's gates act on what its experts make); `attention` does but for
    attention, too; `dots` repeats of low-rank projections the product with the first factor.

    Layers below the lowest that trains (`first_trained`) have a forward pass and nothing else; the lowest counts
    whole. Virtual tokens of a prompt count in the layers. Gates count as open, the most that a step may have to
    compute. Rows, columns and blocks that train count as they are, scattered entries as one tile of 128 x 128 each, up
    to the whole matrix: a matrix unit computes no less.
    """
    params, tokens = combine(tuned), rows * seq_len
    prompt = jax.eval_shape(prompt_embeddings, params)
    length = seq_len + (0 if prompt is None else prompt.shape[0])  # of a row in the layers
    first = first_trained(params["layers"])
    behind = 1 - first / config.num_layers  # the part of the layers that has a backward pass
    in_layers = last = inner = outside = 0.0
    for path, w in weights_by_path(params).items():
        share = _active_share(config, path)
        entries = _entries(path, w) * share
        if path.startswith("embed."):
            outside += 0 if "head" in params else entries
        elif DECODER_ROLES.is_stacked(path):
            in_layers += entries
            # What a low-rank factor reads is needed for its gradient even where the sum is not.
            first_factor = _entries(path, w.a) * share if isinstance(w, LowRank) else 0
            inner += first_factor
            is_last = ".down." in path and (".experts." not in path or is_gated_before_down(params["layers"]))
            last += entries - first_factor if is_last else 0
        else:
            outside += entries
    trained = sum(
        entries * _active_share(config, path)
        for path, entries in _trained_entries(tuned).items()
        if not (path.startswith("embed.") and "head" in params)
    )
    sites = params.get("layers", {}).get("sites", {})
    if config.post_norms or any(name in sites for name in ("mlp.down", "mlp", "block")):  # it is read again backward
        last = 0
    pairs = [rows * visible_pairs(length, window) for window in _windows(config)]
    attention, attention_behind = (4 * config.num_heads * config.head_dim * sum(p) for p in (pairs, pairs[first:]))
    again = in_layers - last if remat in RECOMPUTED else inner if remat == "dots" else 0
    passes = in_layers * (1 + behind) + behind * again
    total = 2 * rows * length * passes + 2 * tokens * (2 * outside + trained) + attention + 2.5 * attention_behind
    return total + (attention_behind if remat in ("block", "offload") else 0)


def penalty_flops(penalty: Callable[[Any], Array], tuned: Any) -> float:
    """FLOPs of the matrix products in a method's penalty and its gradient, as they stand."""

    def of(jaxpr: Any) -> float:
        total = 0.0
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                (summed, _), _ = eqn.params["dimension_numbers"]
                left, result = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
                total += 2 * math.prod(result) * math.prod(left[axis] for axis in summed)
            times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
            total += times * sum(of(inner) for inner in jaxprs_in_params(eqn.params))
        return total

    gradient = jax.grad(lambda trainable, tuned: penalty(tuned._replace(trainable=trainable)))
    return of(jax.make_jaxpr(gradient)(tuned.trainable, tuned).jaxpr)


def _active_share(config: Any, path: str) -> float:
    """The part of a weight's entries that one token passes: experts it is routed to."""
    experts = getattr(config, "num_experts", None)
    chosen = getattr(config, "num_experts_per_token", None)
    return chosen / experts if experts and chosen and ".experts." in path else 1.0


def _is_matrix(path: str, shape: tuple[int, ...]) -> bool:
    return len(shape) - DECODER_ROLES.is_stacked(path) >= 2


def _entries(path: str, w: Any) -> int:
    """Entries of the matrix products a weight makes a token pass."""
    if isinstance(w, LowRank):
        return _entries(path, w.base) + _entries(path, w.a) + _entries(path, w.b)
    if isinstance(w, SiteModule):
        arrays = [a for a in jax.tree.leaves(w, is_leaf=lambda x: is_node(x) and x is not w)]
        return sum(_entries(path, a) for a in arrays) if "prompt" not in path else 0
    if isinstance(w, Split):
        frozen = w.frozen if not is_node(w.frozen) else jax.eval_shape(lambda n: n, w.frozen)
        return _entries(path, w.trainable) + (
            _entries(path, frozen) if is_node(frozen) else math.prod(frozen.shape) * _is_matrix(path, frozen.shape)
        )
    if is_node(w):
        inner = getattr(w, "base", None)
        if inner is None:
            inner = getattr(w, "value", None)
        if inner is not None:
            return _entries(path, inner)
        return max((_entries(path, a) for a in jax.tree.leaves(w)), default=0)
    return math.prod(w.shape) if _is_matrix(path, w.shape) else 0


_TILE = 128 * 128


def _trained_entries(tuned: Any) -> dict[str, int]:
    """How many entries of matrices have a gradient computed, by the path of the trained array."""
    whole = {path: w for path, w in weights_by_path(combine(tuned)).items()}
    found = {}
    for keys, a in jax.tree_util.tree_leaves_with_path(tuned.trainable):
        path = jax.tree_util.keystr(keys, simple=True, separator=".")
        owner = next((p for p in whole if path == p or path.startswith(p + ".")), None)
        if owner is not None and _entries(owner, whole[owner]):
            size = math.prod(a.shape)
            found[path] = min(size * _TILE, held) if (held := _scattered(owner, whole[owner])) else size
    return found


def _scattered(path: str, w: Any) -> int:
    """The entries of the matrices in which single ones train; 0 where a weight has no such."""
    inside = [x for x in jax.tree.leaves(w, is_leaf=lambda x: isinstance(x, SparseDelta)) if isinstance(x, SparseDelta)]
    return sum(_entries(path, x.base) for x in inside)


def kernel_flops(config: Any, rows: int, seq_len: int, mesh: Mesh, attention: str = "auto") -> hlo.Kernels:
    """FLOPs of the kernels whose inside a compiled program does not show: splash attention, products of experts.

    `rows` of `seq_len` tokens go through the model at once. `attention` is its implementation.
    """
    most = expert_rows(config, rows, seq_len, mesh)
    attend = attention_kernels(config, rows, seq_len, mesh, attention)
    return lambda op, operands: attend(op, operands) + grouped_kernels(op, operands, most, config.num_experts)


def expert_rows(config: Any, rows: int, seq_len: int, mesh: Mesh) -> float:
    """How many rows the experts of one device multiply, if all devices have equally many."""
    return rows * seq_len * config.num_experts_per_token / row_shards(mesh) / mesh.shape["sequence"]


def grouped_kernels(
    op: hlo.Instruction,
    operands: list[tuple[str, tuple[int, ...]]],
    most: float = math.inf,
    experts: int | None = None,
) -> float:
    """FLOPs of products of sorted rows with a matrix a group: each row is multiplied with one of them.

    `ragged-dot` (XLA's own): `[rows, d_in] x [groups, d_in, d_out]`; `tgmm` (Pallas), the gradient of the matrices,
    `[groups, d_in, d_out]` of `d_in x rows` and `rows x d_out`; on a GPU both are kernels of `weights.ragged_gpu`. A
    buffer may have more rows than are filled: kernels compute nothing for the others, so that no more than `most` rows
    count. Where some of the `experts` train, a device has as many rows of one of them as of another.
    """
    found = re.match(r"(ragged-dot|tgmm)(?!-metadata)", op.name) or re.search(r"/(ragged_\w+)/pallas_call", op.op_name)
    if not found:
        return 0.0
    result = op.shapes[0][1]
    left = next(dims for dtype, dims in operands if len(dims) == 2 and not dtype.startswith(("s", "u")))
    if experts and SOME_EXPERTS in op.op_name:
        most *= result[0] / experts
    if found[1] in ("tgmm", "ragged_outer"):
        return 2 * result[1] * min(left[0] * left[1] // result[1], most) * result[2]
    return 2 * min(left[0], most) * left[1] * result[1]


def attention_kernels(config: Any, rows: int, seq_len: int, mesh: Mesh, attention: str = "auto") -> hlo.Kernels:
    """FLOPs of the kernels of attention, which compute whole blocks and skip those that nothing sees: splash attention
    on a TPU, cuDNN on a GPU.

    `rows` go through the model at once. Where layers are of two kinds each has its kernels, in the branches of a
    conditional; every kernel counts as the mean layer, so that it does not matter how often which branch runs.
    """
    windows, (_, tile) = _windows(config), parse_implementation(attention)

    @functools.cache
    def layer(window: int | None) -> tuple[float, float]:
        """How many products of all queries with all keys a layer computes, forward and backward."""
        heads = config.num_kv_heads * key_copies(config.num_heads, config.num_kv_heads)
        cut = tiling(rows, seq_len, config.num_heads, heads, config.head_dim, window, tile)

        def seen(keys: int) -> float:
            return computed_pairs(seq_len, cut.granule, keys, window) / seq_len**2

        return 2 * seen(cut.keys), 5 * seen(cut.fused_keys) if cut.fused_keys else 7 * seen(cut.keys)

    if mesh.devices.flat[0].platform == "gpu":
        return _cudnn_kernels(windows, seq_len)
    with jax.set_mesh(mesh):
        forward, backward = np.mean([layer(window) for window in windows], axis=0).tolist()
    products = {"fwd": forward, "dkv": backward * 4 / 7, "dq": backward * 3 / 7}

    def flops(op: hlo.Instruction, operands: list[tuple[str, tuple[int, ...]]]) -> float:
        found = re.match(r"splash_m[hq]a_(fwd|dq|dkv)", op.name)
        if not found:
            return 0.0
        queries = next(dims for dtype, dims in operands if len(dims) >= 3 and not dtype.startswith(("s", "u")))
        is_fused = found[1] == "dkv" and len(op.shapes) > 4  # it has the gradients of queries among its results
        return 2 * (backward if is_fused else products[found[1]]) * math.prod(queries) * seq_len

    return flops


CUDNN_TILE = 128  # positions and keys of what cuDNN computes at once, about; it does not say


def _cudnn_kernels(windows: list[int | None], seq_len: int) -> hlo.Kernels:
    """FLOPs of cuDNN's attention, which skips tiles that are not causal or lie outside of the window, as above. Where
    it is not told of these, since a sequence is cut over the mesh, it skips none."""
    seen = np.mean([computed_pairs(seq_len, CUDNN_TILE, CUDNN_TILE, window) for window in windows]) / seq_len

    def flops(op: hlo.Instruction, operands: list[tuple[str, tuple[int, ...]]]) -> float:
        if "__cudnn$fmha" not in op.attributes:
            return 0.0
        queries, keys = operands[0][1], operands[1][1]  # [batch, positions, heads, dim]
        count = float(seen) if '"mask_type": "CAUSAL"' in op.attributes else keys[1]
        return 2 * (5 if "Backward" in op.attributes else 2) * math.prod(queries) * count

    return flops
