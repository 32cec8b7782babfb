"""Meshes, sharding rules and multi-process batches."""

from jaxft.distributed.mesh import (
    AXES,
    BATCH_AXES,
    MeshConfig,
    MeshError,
    data_partition,
    initialize,
    make_mesh,
)
from jaxft.distributed.sharding import (
    RULES,
    ShardingReport,
    check_batch,
    optimizer_shardings,
    replicated,
    row_shards,
    shard_batch,
    shard_tree,
    tree_shardings,
    tuned_shardings,
)

__all__ = [
    "AXES",
    "BATCH_AXES",
    "RULES",
    "MeshConfig",
    "MeshError",
    "ShardingReport",
    "check_batch",
    "data_partition",
    "initialize",
    "make_mesh",
    "optimizer_shardings",
    "replicated",
    "row_shards",
    "shard_batch",
    "shard_tree",
    "tree_shardings",
    "tuned_shardings",
]
