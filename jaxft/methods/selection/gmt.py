"""GMT: gradient-mask tuning."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxft.errors import JaxftError
from jaxft.methods.base import Method
from jaxft.methods.registry import register
from jaxft.methods.selection.full import full
from jaxft.methods.selection.units import best_in_rows
from jaxft.partition import DECODER_ROLES, Roles, key_name
from jaxft.weights import Tree


@register(
    "gmt",
    title="Gradient-Mask Tuning Elevates the Upper Limits of LLM Performance",
    url="https://arxiv.org/abs/2406.15330",
    family="selection",
    example={"ratio": 0.5},
)
def gmt(ratio: float = 0.4, on: str = "**") -> Method:
    """Update only the entries whose gradient is largest, chosen anew at every step.

    theta <- theta - lr * update(M o g), with M = 1 on the (1 - ratio) n largest |g| of each tensor of n entries (of
    each layer of a stacked leaf). g is the gradient of the whole batch, after accumulation.

    Notes:
        M masks the gradient that the optimizer sees, as in the paper: under SGD a masked entry does not move, under
        Adam its momentum still does. The method is about quality: gradients and moments are those of full tuning.

    Args:
        ratio: the part of every tensor that is masked; 0 is plain tuning.
        on: selector of what trains.
    """
    if not 0 <= ratio < 1:
        raise JaxftError(f"gmt: ratio={ratio} must be at least 0 and below 1")
    return full(on)._replace(gradients=mask_small(ratio) if ratio else None)


def mask_small(ratio: float, roles: Roles = DECODER_ROLES) -> optax.GradientTransformation:
    """Zero for the `round(ratio * n)` entries of smallest magnitude of every tensor; ties keep the earlier entry."""

    def one(keys: tuple, g: Array) -> Array:
        stacked = g.ndim > 0 and roles.is_stacked(".".join(map(key_name, keys)))
        rows = g if stacked else g[None]  # of the shape they have: a flattened matrix could not stay divided
        entries = rows[0].size
        keep = entries - round(ratio * entries)
        mask = best_in_rows(jnp.abs(rows), jnp.full(rows.shape[0], keep, jnp.int32))
        return jnp.where(mask, rows, 0).reshape(g.shape)

    def update(gradients: Tree, state: Any, params: Tree | None = None) -> tuple[Tree, Any]:
        return jax.tree_util.tree_map_with_path(one, gradients), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
