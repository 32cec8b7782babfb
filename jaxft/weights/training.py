"""What weights do in a training step and at no other time: `in_training` hands random numbers to those that draw some.

A model never passes keys around: the train step puts them into the nodes of its parameters, and evaluation, generation
and export, which see the parameters as they are, have no dropout. The numbers are a function of seed and step, the same
on every mesh and after a resume.
"""

import dataclasses
import functools
import zlib
from typing import Any, cast

import jax
from jaxtyping import PRNGKeyArray

from jaxft.weights.core import Node, Tree, Weight, is_node


@functools.singledispatch
def in_training_rule(w: Weight, rng: PRNGKeyArray) -> Weight:
    """A node as it acts in one training step. Most act as always."""
    return w


def in_training(params: Tree, rng: PRNGKeyArray) -> Tree:
    """The parameters as they act in one training step; every node draws from a stream of its own, named by its path."""

    def one(w: Weight, rng: PRNGKeyArray) -> Weight:
        if not isinstance(w, Node):
            return w
        inner: dict[str, Any] = {}
        for i, field in enumerate(dataclasses.fields(cast(Any, w))):
            held = getattr(w, field.name)
            if isinstance(held, Node):
                inner[field.name] = one(held, jax.random.fold_in(rng, i))
        changed = any(inner[name] is not getattr(w, name) for name in inner)
        return in_training_rule(w.replace(**inner) if changed else w, rng)

    def at(path: tuple, w: Weight) -> Weight:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return one(w, jax.random.fold_in(rng, zlib.crc32(name.encode())))

    return jax.tree_util.tree_map_with_path(at, params, is_leaf=is_node)
