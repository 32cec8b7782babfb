"""Arrays that wait in the memory of the host, and are brought to the device where something is computed with them."""

from typing import Any

import jax

Tree = Any
HOST_MEMORY = "pinned_host"  # the kind of memory in a sharding; on a CPU it is the same memory under another name


def in_host_memory(array: Any) -> bool:
    """Whether an array (traced, abstract or real) is one of host memory."""
    return isinstance(array, jax.Array) and jax.typeof(array).memory_space == jax.memory.Space.Host


def fetch(tree: Tree) -> Tree:
    """`tree` with the arrays of host memory copied to that of the device; others are the same. Differentiable."""
    return jax.tree.map(lambda a: jax.device_put(a, jax.memory.Space.Device) if in_host_memory(a) else a, tree)
