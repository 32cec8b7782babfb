"""What the backward pass computes again of a layer, and how the inputs of layers wait in host memory for it.

An input in host memory has to be back on the device when the backward pass of its layer begins. The compiler would
fetch it there, at the begin of the layer, and for the copy to run beside products it would have to take one layer out
of the loop. Here the backward pass of a layer fetches the input of the layer below, so that the copy is in the same
iteration as the products it runs beside.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero, zero_from_primal
from jaxtyping import Array

from jaxft.errors import JaxftError, nearest
from jaxft.weights import Tree, differentiated, merged, scan_layers

REMAT_POLICIES = ("none", "block", "attention", "dots", "offload")
ATTENTION, _PROJECTION = "attention", "projection"
_KEPT = {"block": (), "attention": (ATTENTION,), "dots": (ATTENTION, _PROJECTION)}
Block: TypeAlias = Callable[[Tree, Tree, Tree], tuple[Tree, Tree]]


def projected(y: Array) -> Array:
    """The result of a projection, whatever its weight is made of: what "dots" keeps of a layer."""
    return checkpoint_name(y, _PROJECTION)


def attended(y: Array) -> Array:
    """What the backward pass of attention needs beside queries, keys and values: its result, and the logarithms of the
    partition sums. "attention" and "dots" keep it."""
    return checkpoint_name(y, ATTENTION)


def _is_attention_of_cudnn(primitive: Any, *_: Any, **__: Any) -> bool:
    # It is one operation of the compiler, of whose results no name can be given to the sums.
    return primitive.name == "dot_product_attention_fwd_wrapper"


def scan_rematerialized(
    block: Block, layers: Tree, carry: Tree, xs: Tree, shared: Tree, policy: str
) -> tuple[Tree, Tree]:
    """`scan_layers` of `block(carry, layer, (x, shared)) -> (carry, y)`, recomputed in the backward pass but for what
    `policy` keeps of a layer: "none" everything; "block" its input only; "attention" its input and the result of
    attention; "dots" the results of its projections, too; "offload" its input, in host memory.

    Args:
        block: one layer; what it uses of arrays that do not differ by layer comes in `shared`.
        layers, carry, xs: as for `scan_layers`. With "offload" the carry consists of floating-point arrays.
        shared: arrays that every layer reads.
        policy: of `REMAT_POLICIES`.

    Raises:
        JaxftError: the policy is unknown.
    """
    if policy not in REMAT_POLICIES:
        raise JaxftError(f'remat "{policy}" is unknown: {nearest(policy, REMAT_POLICIES)}')
    if policy == "offload":
        return _scan_with_inputs_in_host_memory(block, layers, carry, xs, shared)
    if policy != "none":
        kept = jax.checkpoint_policies.save_only_these_names(*_KEPT[policy])
        if ATTENTION in _KEPT[policy]:
            kept = jax.checkpoint_policies.save_from_both_policies(kept, _is_attention_of_cudnn)
        block = jax.checkpoint(block, policy=kept, prevent_cse=False)  # inside a scan nothing merges the two passes
    return scan_layers(lambda carry, layer, x: block(carry, layer, (x, shared)), layers, carry, xs)


def _scan_with_inputs_in_host_memory(
    block: Block, layers: Tree, carry: Tree, xs: Tree, shared: Tree
) -> tuple[Tree, Tree]:
    def body(carry: tuple[Tree, Tree], layer: Tree, x: Tree) -> tuple[tuple[Tree, Tree], Tree]:
        return _layer(block, *carry, layer, (x, shared))

    # The first layer is above none: what it fetches, of this array, nobody reads.
    nothing = jax.tree.map(jax.numpy.zeros_like, carry)
    (carry, below), ys = scan_layers(body, layers, (carry, nothing), xs)
    return _last(carry, below), ys


# The carry of the scan holds, beside the input of a layer, that of the layer below. In the backward pass the place of
# the latter's gradient is taken by its value: a layer gets its own input from the layer above, and returns the one that
# the layer below will need.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _layer(block: Block, carry: Tree, below: Tree, layer: Tree, xs: Tree) -> tuple[tuple[Tree, Tree], Tree]:
    out, y = block(carry, layer, xs)
    return (out, carry), y


def _layer_forward(
    block: Block, carry: Tree, below: Tree, layer: Tree, xs: Tree
) -> tuple[tuple[tuple[Tree, Tree], Tree], tuple[Tree, ...]]:
    # Gradients of what does not train are not asked for.
    carry, below, xs, whole = jax.tree.map(lambda p: p.value, (carry, below, xs, layer))
    return _layer(block, carry, below, whole, xs), (_moved(below, jax.memory.Space.Host), *differentiated(layer), xs)


def _layer_backward(block: Block, kept: tuple[Tree, ...], cotangents: Tree) -> tuple[Tree, Tree, Tree, None]:
    below, trained, frozen, xs = kept
    (out_gradient, carry), y_gradient = cotangents

    def again(carry: Tree, trained: Tree) -> tuple[Tree, Tree]:
        return block(carry, merged(trained, frozen), xs)

    results, pull = jax.vjp(again, carry, trained)
    gradients = jax.tree.map(
        lambda g, r: zero_from_primal(r) if isinstance(g, SymbolicZero) else g, (out_gradient, y_gradient), results
    )
    carry_gradient, layer_gradient = pull(gradients)
    return carry_gradient, _moved(below, jax.memory.Space.Device), layer_gradient, None


_layer.defvjp(_layer_forward, _layer_backward, symbolic_zeros=True)


@jax.custom_vjp
def _last(carry: Tree, below: Tree) -> Tree:
    """The carry behind the last layer; its backward pass hands that layer its input, which never left the device."""
    return carry


_last.defvjp(lambda carry, below: (carry, below), lambda below, gradient: (gradient, below))


def _moved(tree: Tree, space: jax.memory.Space) -> Tree:
    return jax.tree.map(lambda a: jax.device_put(a, space), tree)
