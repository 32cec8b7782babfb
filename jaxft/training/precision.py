"""Which dtype holds what. Four choices, set separately; nothing follows another by accident."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.errors import JaxftError, nearest
from jaxft.partition import Tuned
from jaxft.weights import is_node

DTYPES = ("float32", "bfloat16", "float16")


def dtype(name: str) -> jnp.dtype:
    """A floating dtype by name. Raises JaxftError for any other."""
    if name not in DTYPES:
        raise JaxftError(f'unknown dtype "{name}": {nearest(name, DTYPES)}')
    return jnp.dtype(name)


@dataclasses.dataclass(frozen=True)
class Precision:
    """Dtypes of a training run, by name.

    param_dtype: the masters of what trains. float32, since an update of less than 1/256 of a bfloat16 weight is lost.
    frozen_dtype: what does not train; None leaves it as it was loaded.
    compute_dtype: activations and matrix products.
    Gradients and their sum over micro-batches are float32 or wider; moments follow the optimizer's `moment_dtype`.
    """

    param_dtype: str = "float32"
    frozen_dtype: str | None = None
    compute_dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in (self.param_dtype, self.frozen_dtype, self.compute_dtype):
            if name is not None:
                dtype(name)


def cast_floating(tree: Any, to: Any) -> Any:
    """Every floating array of `tree` in dtype `to`; integers, booleans and keys stay."""
    return jax.tree.map(lambda a: a.astype(to) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)


def cast_tuned(tuned: Tuned, precision: Precision) -> Tuned:
    """A cut with trainable masters and frozen weights in the dtypes asked for.

    A node class with the attribute `keep_dtype = True` (a quantised base, whose scales mean something) is left alone.
    """
    trainable = cast_floating(tuned.trainable, dtype(precision.param_dtype))
    if precision.frozen_dtype is None:
        return tuned._replace(trainable=trainable)

    def kept(x: Any) -> bool:
        return is_node(x) and getattr(x, "keep_dtype", False)

    frozen = jax.tree.map(
        lambda w: w if kept(w) else cast_floating(w, dtype(precision.frozen_dtype)), tuned.frozen, is_leaf=kept
    )
    return tuned._replace(trainable=trainable, frozen=frozen)
