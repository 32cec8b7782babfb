"""The functions that interpret weights, and the base class of the nodes that may stand where an array stood.

A *node* is a frozen pytree dataclass. It means an array (`materialize`), and knows a fast way to act on an input
(`linear`, `embed`, `unembed`). The law every node obeys: `linear(x, w) == x @ materialize(w)`, in values and gradients,
under `jit`, `scan`, `vmap` and on a sharded mesh. A node registers its rules beside its definition.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Self, TypeVar, cast, dataclass_transform

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxft.weights.memory import fetch
from jaxft.weights.reduction import as_rows, scattered_matmul, stages_for

Weight = Any  # an Array or a Node
Tree = Any
AnyNode = TypeVar("AnyNode")


class Node:
    """Base of weight nodes: frozen dataclasses registered as pytrees with `node`."""

    first: int = 0  # of those indexed by layer: nothing trains below (`first_trained`)

    def replace(self, **fields: Any) -> Self:
        return dataclasses.replace(cast(Any, self), **fields)  # `node` makes every subclass a dataclass


def static(**kwargs: Any) -> Any:
    """A dataclass field that is part of the node's structure (a Python value), not an array."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


@dataclass_transform(frozen_default=True, field_specifiers=(static,))
def node(cls: type[AnyNode]) -> type[AnyNode]:
    """Make `cls` a frozen dataclass and register it as a pytree; fields made by `static` are structure."""
    made = dataclasses.dataclass(frozen=True, eq=False)(cls)
    fields = dataclasses.fields(cast(Any, made))
    meta = [f.name for f in fields if f.metadata.get("static")]
    data = [f.name for f in fields if not f.metadata.get("static")]
    return jax.tree_util.register_dataclass(made, data_fields=data, meta_fields=meta)


def differentiated(primals: Tree) -> tuple[Tree, Tree]:
    """Of what a `custom_vjp` with `symbolic_zeros` is given: the values that are differentiated, and the others. Where
    one of the two trees has a value the other has None, which stands for a gradient of zero."""

    def part(moves: bool) -> Tree:
        return jax.tree.map(lambda p: p.value if p.perturbed == moves else None, primals)

    return part(True), part(False)


def merged(first: Tree, second: Tree) -> Tree:
    """`first`, and the values of `second` where it has None."""
    return jax.tree.map(lambda a, b: b if a is None else a, first, second, is_leaf=lambda x: x is None)


def is_node(x: Any) -> bool:
    return isinstance(x, Node)


def _no_rule(w: Any, function: str) -> None:
    if isinstance(w, Node):
        name = type(w).__name__
        dense = f", or linear_rule.register({name}, by_materializing_linear) to use the dense array"
        raise TypeError(
            f"{name} has no `{function}` rule: register one beside it{dense if function == 'linear' else ''}"
        )


# --- materialize ------------------------------------------------------------------------------------------------------


@functools.singledispatch
def materialize_rule(w: Weight) -> Array:
    """The dense array a node means. Leading axes (layers, experts) are batch axes."""
    _no_rule(w, "materialize")
    return w


def materialize(tree: Tree) -> Tree:
    """Replace every node of `tree` by the array it means; arrays stay as they are, on the device."""

    def one(w: Weight) -> Array:
        w = fetch(w)
        # Outside of a jitted function a node is one program, not one for each operation of its rule.
        is_value = is_node(w) and not any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves(w))
        return _jitted_rule(w) if is_value else materialize_rule(w)

    return jax.tree.map(one, tree, is_leaf=is_node)


_jitted_rule = jax.jit(materialize_rule)


def value(w: Weight, dtype: Any = None) -> Array:
    """A small weight (norm scale, bias) as an array, cast to `dtype` if given."""
    array = materialize_rule(w)
    return array if dtype is None else array.astype(dtype)


# --- linear, embed, unembed -------------------------------------------------------------------------------------------


@functools.singledispatch
def linear_rule(w: Weight, x: Float[Array, "... d_in"]) -> Float[Array, "... d_out"]:
    _no_rule(w, "linear")
    w = w.astype(x.dtype)
    if stages := stages_for(x):
        return scattered_matmul(x, w, stages)
    return jnp.matmul(as_rows(x), w).reshape(*x.shape[:-1], w.shape[-1])


def linear(x: Float[Array, "... d_in"], w: Weight) -> Float[Array, "... d_out"]:
    """`x @ w` for a weight of shape `[d_in, d_out]`, computed and returned in the dtype of `x`."""
    return linear_rule(w, x)


def by_materializing_linear(w: Weight, x: Float[Array, "... d_in"]) -> Float[Array, "... d_out"]:
    """A `linear` rule for nodes without a fast path; to be registered explicitly."""
    return linear(x, materialize_rule(w))


@functools.singledispatch
def embed_rule(w: Weight, tokens: Int[Array, "..."]) -> Float[Array, "... dim"]:
    if isinstance(w, Node):
        w = materialize_rule(w)
    return jnp.take(w, tokens, axis=0)


def embed(tokens: Int[Array, "..."], w: Weight) -> Float[Array, "... dim"]:
    """Rows `tokens` of an embedding of shape `[vocab, dim]`, in the dtype of the weight."""
    return embed_rule(w, tokens)


@functools.singledispatch
def unembed_rule(w: Weight, x: Float[Array, "... dim"]) -> Float[Array, "... vocab"]:
    if isinstance(w, Node):
        w = materialize_rule(w)
    return jnp.matmul(as_rows(x), w.astype(x.dtype).T).reshape(*x.shape[:-1], w.shape[0])


def unembed(x: Float[Array, "... dim"], w: Weight) -> Float[Array, "... vocab"]:
    """`x @ w.T` for an embedding of shape `[vocab, dim]`: the head of a model with tied embeddings."""
    return unembed_rule(w, x)


# --- sharding ---------------------------------------------------------------------------------------------------------


@functools.singledispatch
def specs_rule(w: Weight, spec: PartitionSpec) -> Tree:
    _no_rule(w, "specs")
    return spec


def specs(w: Weight, spec: PartitionSpec) -> Tree:
    """The PartitionSpecs of the arrays of `w`, given the spec of the leaf `[..., d_in, d_out]` that `w` stands for.

    Large parts shard as the leaf does, small factors along the dimension they share with it.
    """
    return specs_rule(w, spec)


def pad_spec(spec: PartitionSpec, ndim: int) -> tuple:
    """The entries of `spec` for an array of `ndim` dimensions, trailing ones filled with None."""
    return tuple(spec) + (None,) * (ndim - len(spec))


def axis_names(*entries: Any) -> tuple[str, ...]:
    """The mesh axes that some entries of a `PartitionSpec` name."""
    return tuple(name for e in entries if e is not None for name in (e if isinstance(e, tuple) else (e,)))


def divided_too(entry: Any, other: Any) -> Any:
    """An entry of a `PartitionSpec` that divides over `fsdp` and `expert`, too, where `other` does: an axis that is too
    short to be divided leaves that to another one, or every chip would hold all of what trains."""
    return (*axis_names(entry), *(name for name in axis_names(other) if name in ("fsdp", "expert"))) or None


# --- layers -----------------------------------------------------------------------------------------------------------


@functools.singledispatch
def at_layer_rule(w: Weight, index: Int[Array, ""]) -> Weight:
    raise TypeError(f"{type(w).__name__} is not indexed by layer")


def is_indexed(w: Any) -> bool:
    """Whether a node stacks its layers in a way that `lax.scan` cannot slice, so that it is indexed in the body."""
    return isinstance(w, Node) and type(w) in at_layer_rule.registry


def num_layers(layers: Tree) -> int:
    """The length of the leading layer axis shared by all leaves of a stacked tree."""
    for w in jax.tree.leaves(layers, is_leaf=is_indexed):
        return w.num_layers if is_indexed(w) else w.shape[0]
    raise ValueError("a stacked tree without arrays has no number of layers")


def first_trained(layers: Tree) -> int:
    """The lowest layer of a stack that needs a backward pass, as far as its nodes say (`Split.first`)."""
    return min((w.first for w in jax.tree.leaves(layers, is_leaf=is_indexed) if is_indexed(w)), default=0)


def scan_layers(
    block: Callable[[Any, Tree, Any], tuple[Any, Any]], layers: Tree, carry: Any, xs: Any = None, *, unroll: int = 1
) -> tuple[Any, Any]:
    """`lax.scan` of `block(carry, layer_params, x) -> (carry, y)` over params whose leaves are stacked `[L, ...]`.

    Arrays and ordinary nodes are sliced by the scan. A node with an `at_layer` rule (`Split`) holds stacks of other
    lengths, stays outside and is indexed in the body, so that which layer trains is data and not structure. Layers
    below which nothing trains have a scan of their own: nothing of them is kept, or done again, for a gradient.
    """
    leaves, treedef = jax.tree.flatten(layers, is_leaf=is_indexed)
    count, first = num_layers(layers), first_trained(layers)
    sliced = [None if is_indexed(w) or first else w for w in leaves]

    def at(w: Weight, index: Array, part: Weight) -> Weight:
        if is_indexed(w):
            return at_layer_rule(w, index)
        # Half of a stack, as the input of a scan, would be a copy. Where there are two scans no array trains.
        one = functools.partial(lax.dynamic_index_in_dim, index=index, keepdims=False)
        return jax.tree.map(lambda a: one(lax.stop_gradient(a)), w) if first else part

    def body(carry: Any, inputs: Any) -> tuple[Any, Any]:
        index, sliced, x = inputs
        layer = [at(w, index, s) for w, s in zip(leaves, sliced, strict=True)]
        return block(carry, treedef.unflatten(layer), x)

    if not first:
        return lax.scan(body, carry, (jnp.arange(count), sliced, xs), unroll=unroll)

    def frozen(carry: Any, inputs: Any) -> tuple[Any, Any]:
        index, x = inputs
        layer = treedef.unflatten([lax.stop_gradient(at(w, index, None)) for w in leaves])
        return block(carry, layer, x)

    below, above = (jax.tree.map(lambda a, part=part: a[part], xs) for part in (slice(first), slice(first, None)))
    carry, early = lax.scan(frozen, *lax.stop_gradient((carry, (jnp.arange(first), below))), unroll=unroll)
    carry, late = lax.scan(body, lax.stop_gradient(carry), (jnp.arange(first, count), sliced, above), unroll=unroll)
    return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts), early, late)


def fetch_layer(layer: Tree) -> Tree:
    """`fetch` for what `block` gets in `scan_layers`; nodes that hold whole stacks fetch what they read.

    To be called inside the block, so that a layer that is recomputed is fetched again and not kept.
    """
    return jax.tree.map(lambda w: w if is_indexed(w) else fetch(w), layer, is_leaf=is_indexed)


def layer_slice(layers: Tree, index: int) -> Tree:
    """One layer of a stacked tree, for models that do not scan and for inspection."""

    def take(w: Weight) -> Weight:
        return at_layer_rule(w, jnp.asarray(index)) if is_indexed(w) else w[index]

    return jax.tree.map(take, layers, is_leaf=is_indexed)
