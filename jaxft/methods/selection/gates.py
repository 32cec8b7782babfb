"""Gates: weights that all have masters and moments, of which some are still while their gate is closed."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxft.methods.base import map_moments, update_like
from jaxft.partition import Trains, Tuned, map_weights, mark, split
from jaxft.weights import Gated, Tree, is_node


def is_gated(x: Any) -> bool:
    return isinstance(x, Gated)


def gate(w: Array, is_open: Array, propagates: Array | None, stacked: bool) -> Gated:
    """A weight behind gates, with its mark."""
    passes = None if propagates is None else jnp.asarray(propagates, bool)
    return Gated(Trains(w), jnp.asarray(is_open, bool), passes, stacked)


def hold_closed(optimizer: optax.GradientTransformation, decay: float = 1.0) -> optax.GradientTransformationExtraArgs:
    """An optimizer under which a closed weight stays where it is, with its moments: no momentum, no weight decay.

    A closed gate is known by its gradient, which is zero in every entry. Steps are counted in common (torch, where a
    parameter without a gradient is skipped, counts them for each).

    Args:
        optimizer: what moves the open weights.
        decay: the update of layer l of L is multiplied by `decay ** (L - 1 - l)` (discriminative learning rates).
    """
    inner = optax.with_extra_args_support(optimizer)

    def update(gradients: Tree, state: Any, params: Tree | None = None, **extra: Any) -> tuple[Tree, Any]:
        updates, after = inner.update(gradients, state, params, **extra)
        live = jax.tree.map(lambda g: _live(g) if is_gated(g) else True, gradients, is_leaf=is_gated)

        def still(g: Any, on: Any, u: Any) -> Any:
            if not is_gated(g):
                return u
            scale = _layer_scale(u.value, decay) if g.stacked else 1.0
            return u.replace(value=jnp.where(on, u.value * scale, 0).astype(u.value.dtype))

        def hold(new: Tree, old: Tree) -> Tree:
            def one(g: Any, on: Any, n: Any, o: Any) -> Any:
                if not is_gated(g) or n.value is None:
                    return n
                return n.replace(value=jnp.where(on, n.value, o.value))

            return jax.tree.map(one, gradients, live, new, old, is_leaf=is_gated)

        updates = jax.tree.map(still, gradients, live, updates, is_leaf=is_gated)
        return updates, map_moments(after, gradients, hold, state)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _live(g: Gated) -> Array:
    axes = tuple(range(int(g.stacked), g.value.ndim))
    return jnp.any(g.value != 0, axis=axes, keepdims=True)


def _layer_scale(value: Array, decay: float) -> Array:
    depth = jnp.arange(value.shape[0])[::-1].astype(value.dtype)
    return (decay**depth).reshape(-1, *(1,) * (value.ndim - 1))


def turn(
    tuned: Tuned, opt_state: Any, is_open: dict[str, Array], propagates: Array | None, donate: bool
) -> tuple[Tuned, Any]:
    """The same model with other gates open, by path; `propagates [L]` for all of them, or None to leave it."""
    arrays = {"is_open": is_open} | ({} if propagates is None else {"propagates": propagates})
    return update_like(_turn, tuned, opt_state, arrays, donate=donate)


def _turn(tuned: Tuned, opt_state: Any, arrays: dict) -> tuple[Tuned, Any]:
    def one(path: str, w: Any) -> Any:
        if path not in arrays["is_open"]:
            return w
        now = arrays["is_open"][path]

        def set_gate(x: Any) -> Any:
            if not is_gated(x):
                return x
            passes = x.propagates
            if passes is not None and "propagates" in arrays:
                passes = jnp.broadcast_to(arrays["propagates"], passes.shape)
            return x.replace(is_open=now.astype(bool), propagates=passes)

        return jax.tree.map(set_gate, w, is_leaf=is_gated) if is_node(w) else w

    return split(map_weights(one, mark(tuned)), tuned.state), opt_state
