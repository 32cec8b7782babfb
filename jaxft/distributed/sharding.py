"""Where arrays live: logical axis names of parameters and batches become PartitionSpecs on a mesh.

A model names the dimensions of its leaves (`("layers", "embed", "heads")`), `RULES` says which mesh axes a name is
divided over, and weight nodes derive the specs of their parts from the spec of the leaf they replace
(`jaxft.weights.specs`). What does not divide is replicated, in that dimension, and reported.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jaxft.distributed.mesh import BATCH_AXES, MeshError, data_partition
from jaxft.errors import JaxftError, nearest
from jaxft.partition import DECODER_ROLES, Roles, Tuned, combine, key_name
from jaxft.weights import is_node, specs
from jaxft.weights.memory import HOST_MEMORY

Tree = Any
Rules = Mapping[str, str | tuple[str, ...] | None]

RULES: Rules = {
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "heads_in": ("tensor", "fsdp"),
    "mlp_in": ("tensor", "fsdp"),
    "vocab": "tensor",
    "head_embed": None,
    "head_vocab": ("tensor", "fsdp"),
    "experts": "expert",
    "expert": "expert",
    "norm": None,
    "batch": BATCH_AXES,
    "sequence": "sequence",
}
"""Logical axis -> mesh axes. FSDP divides the inputs of every matrix, tensor parallelism heads, MLP and vocabulary.

Inputs, and not the last dimension: memory comes in tiles whose last dimension is 128 on a TPU, and a matrix of 8192
outputs divided over 256 chips along them would be stored as one of four times the size.

The head is divided along the vocabulary by both: the loss then gathers the hidden states of a piece, which are small,
and not the head, which is the largest matrix, once for every piece.
"""

LARGE = 2**20  # elements from which an array without axis names is worth dividing


@dataclasses.dataclass
class ShardingReport:
    """What was not divided as the rules say: `(path, dimension size, mesh axes, their size)` each; and, where a run is
    planned without values, what was taken for granted of them."""

    replicated: list[tuple[str, int, tuple[str, ...], int]] = dataclasses.field(default_factory=list)
    assumed: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        undivided = (
            f"{path}: a dimension of {size} is not divisible by {'*'.join(axes)} = {count}"
            for path, size, axes, count in self.replicated
        )
        return "\n".join([*self.assumed, *undivided])


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def logical_spec(names: tuple[str | None, ...], rules: Rules = RULES) -> P:
    """The PartitionSpec of dimensions with these logical names. A mesh axis is used once, by the first that asks.

    Raises JaxftError for a name without a rule.
    """
    used: set[str] = set()
    entries = []
    for name in names:
        if name is not None and name not in rules:
            raise JaxftError(f'no sharding rule for the logical axis "{name}": {nearest(name, rules)}')
        axes = tuple(a for a in _names(rules[name] if name else None) if a not in used)
        used.update(axes)
        entries.append(axes[0] if len(axes) == 1 else axes or None)
    return P(*entries)


def fit_spec(path: str, shape: tuple[int, ...], spec: P, mesh: Mesh, report: ShardingReport | None = None) -> P:
    """`spec` without the mesh axes that do not divide their dimension of `shape`; of several, the first ones stay."""
    entries = []
    for size, entry in zip(shape, (*spec, *(None,) * (len(shape) - len(spec))), strict=True):
        axes = tuple(a for a in _names(entry) if mesh.shape.get(a, 1) > 1)
        count = math.prod(mesh.shape[a] for a in axes)
        if size % count:
            if report is not None:
                report.replicated.append((path, size, axes, count))
            while axes and size % math.prod(mesh.shape[a] for a in axes):
                axes = axes[:-1]
        entries.append(axes[0] if len(axes) == 1 else axes or None)
    while entries and entries[-1] is None:
        entries.pop()
    return P(*entries)


def _unnamed_spec(shape: tuple[int, ...], mesh: Mesh) -> P:
    """The spec of an array nobody named: large ones divide their largest divisible dimension over `fsdp`."""
    size = mesh.shape.get("fsdp", 1)
    divisible = [i for i, n in enumerate(shape) if n % size == 0]
    if size == 1 or math.prod(shape) < LARGE or not divisible:
        return P()
    largest = max(divisible, key=lambda i: shape[i])
    return P(*(("fsdp" if i == largest else None) for i in range(len(shape))))


def _path(keys: tuple) -> str:
    return ".".join(key_name(k) for k in keys)


def tree_shardings(
    params: Tree,
    logical_axes: Tree | None,
    mesh: Mesh,
    *,
    rules: Rules = RULES,
    report: ShardingReport | None = None,
) -> Tree:
    """A NamedSharding for every array of a parameter tree, in a tree of the same structure.

    Args:
        params: arrays (or abstract ones) and weight nodes.
        logical_axes: a tree of tuples of axis names, where `params` has an array or a node; paths it lacks (modules a
            method added, or any third-party model with None) are replicated when small and divided over `fsdp` else.
        mesh: the device mesh.
        rules: logical axis -> mesh axes.
        report: collects the dimensions that were not divisible.
    """
    named = {
        _path(keys): names
        for keys, names in jax.tree_util.tree_leaves_with_path(
            logical_axes if logical_axes is not None else {}, is_leaf=lambda x: isinstance(x, tuple)
        )
    }

    def weight(keys: tuple, w: Any) -> Any:
        path = _path(keys)
        if path in named:
            spec = logical_spec(named[path], rules)
            wanted = specs(w, spec) if is_node(w) else spec
        else:
            wanted = jax.tree.map(lambda a: _unnamed_spec(a.shape, mesh), w)
        fitted = [
            NamedSharding(mesh, fit_spec(f"{path}.{_path(k)}" if k else path, a.shape, s, mesh, report))
            for (k, a), s in zip(
                jax.tree_util.tree_leaves_with_path(w),
                jax.tree.leaves(wanted, is_leaf=lambda x: isinstance(x, P)),
                strict=True,
            )
        ]
        return jax.tree.unflatten(jax.tree.structure(w), fitted)

    return jax.tree_util.tree_map_with_path(weight, params, is_leaf=is_node)


def tuned_shardings(
    tuned: Tuned,
    logical_axes: Tree | None,
    mesh: Mesh,
    *,
    rules: Rules = RULES,
    report: ShardingReport | None = None,
) -> Tuned:
    """Shardings of both halves of a cut, holes where the cut has holes; the method's own state is replicated."""
    whole = tree_shardings(combine(tuned), logical_axes, mesh, rules=rules, report=report)

    def half(tree: Tree) -> Tree:
        return jax.tree.map(lambda a, s: None if a is None else s, tree, whole, is_leaf=lambda x: x is None)

    return Tuned(half(tuned.trainable), half(tuned.frozen), replicated(tuned.state, mesh))


def replicated(tree: Tree, mesh: Mesh) -> Tree:
    """A fully replicated sharding for every array of `tree`."""
    return jax.tree.map(lambda _: NamedSharding(mesh, P()), tree)


def optimizer_shardings(opt_state: Tree, trainable: Tree, shardings: Tree, mesh: Mesh) -> Tree:
    """Shardings of an optimizer's state: an array of a parameter's path and shape lives as the parameter does.

    The rest (counts, factored moments, which are small) is replicated. `opt_state` and `trainable` may be abstract.
    """
    known = {
        tuple(map(key_name, keys)): (a.shape, s)
        for (keys, a), s in zip(jax.tree_util.tree_leaves_with_path(trainable), jax.tree.leaves(shardings), strict=True)
    }

    def place(keys: tuple, a: Any) -> NamedSharding:
        names = tuple(map(key_name, keys))
        for start in range(len(names)):
            shape, sharding = known.get(names[start:], (None, None))
            if shape == a.shape:
                return sharding
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(place, opt_state)


def to_host_memory(tree: Tree, shardings: Tree, roles: Roles = DECODER_ROLES, *, only_stacked: bool = False) -> Tree:
    """`shardings` with the matrices of `tree` in host memory; vectors (of layers, too) and scalars stay on the device.

    With `only_stacked`, only matrices of layers, which a scan brings to the device one by one. On a TPU those whose
    columns on a chip do not fill tiles of 128 stay there: libtpu (0.0.42) lays such a stack out transposed, and fails
    where a layer of it is fetched.
    """

    def place(keys: tuple, a: Any, sharding: NamedSharding) -> NamedSharding:
        is_stacked = any(key_name(k) in roles.stacked for k in keys)
        is_matrix = a.ndim >= 2 + is_stacked and (is_stacked or not only_stacked)
        if is_matrix and only_stacked and sharding.mesh.devices.flat[0].platform == "tpu":
            is_matrix = sharding.shard_shape(a.shape)[-1] % 128 == 0
        return sharding.with_memory_kind(HOST_MEMORY) if is_matrix else sharding

    return jax.tree_util.tree_map_with_path(place, tree, shardings)


def shard_tree(tree: Tree, shardings: Tree) -> Tree:
    """Arrays placed by a tree of shardings; those already in place are not copied.

    With several processes every process must hold the whole of each array that is not yet global.
    """
    return jax.device_put(tree, shardings)


# --- batches -------------------------------------------------------------------------------------------------------


def batch_spec(ndim: int) -> P:
    """The spec of a batch array `[rows, positions, ...]`: rows over data and fsdp, positions over sequence."""
    return P(*(BATCH_AXES, "sequence")[:ndim])


def row_shards(mesh: Mesh) -> int:
    """Over how many devices the rows of a batch are divided."""
    return math.prod(mesh.shape[a] for a in BATCH_AXES)


def check_batch(rows: int, seq_len: int, mesh: Mesh, accumulation: int = 1) -> None:
    """Raise MeshError unless `rows` global rows in `accumulation` micro-batches of `seq_len` divide over the mesh."""
    shards = row_shards(mesh)
    if rows % (shards * accumulation):
        unit = shards * accumulation
        lower = rows // unit * unit
        raise MeshError(
            f"a batch of {rows} rows cannot be divided into {accumulation} micro-batches over {shards} devices "
            f"(data * fsdp * expert); expected a multiple of {unit}, nearest: {lower or unit}"
            + (f" or {lower + unit}" if lower else "")
        )
    if seq_len % mesh.shape["sequence"]:
        shards = mesh.shape["sequence"]
        raise MeshError(f"sequences of {seq_len} tokens cannot be divided over mesh.sequence = {shards}")


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Array]:
    """A global batch from the rows that this process holds (see `data_partition` for which).

    Arrays are `[rows, ...]` with whole sequences; the second dimension is divided over `sequence` where it divides.

    Raises:
        MeshError: the rows do not divide over the mesh.
    """
    _, count = data_partition(mesh)
    shards = row_shards(mesh)
    out = {}
    for name, local in batch.items():
        local = np.asarray(local)
        shape = (local.shape[0] * count, *local.shape[1:])
        if shape[0] % shards:
            raise MeshError(
                f'batch["{name}"] has {shape[0]} rows, which do not divide over {shards} devices (data * fsdp * expert)'
            )
        sharding = NamedSharding(mesh, fit_spec(name, shape, batch_spec(local.ndim), mesh))
        out[name] = jax.make_array_from_process_local_data(sharding, local, shape)
    return out
