"""Layers of a model kept apart (`blocks.0`, `blocks.1`, ...) as one stack, for the methods that choose among layers."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.errors import JaxftError, nearest
from jaxft.partition import key_name

Tree = Any


def stack_layers(params: Tree, layers: str, *, name: str = "layers") -> tuple[Tree, Callable[[Tree], Tree]]:
    """The parameters with their layers stacked into leaves `[L, ...]`, and the function that takes them apart again.

        params, unstack = stack_layers(params, "blocks")          # blocks.0.mix.kernel, ... -> layers.mix.kernel
        loss = lambda tuned, batch, rng: model_loss(unstack(materialize(tuned)), batch, rng)

    A model that scans over its layers needs neither, and computes no gradient for the layers that do not train.

    Args:
        params: nested dicts and lists of arrays.
        layers: the top-level key whose children are the layers (a list, or keys that are numbers), or a pattern of
            top-level keys with `*` for the number: "block_*".
        name: the top-level key of the stack, which `Roles.stacked` has to name.

    Raises:
        JaxftError: there are no such layers, `name` is taken, or the layers differ in structure, shape or dtype.
    """
    inside = "*" not in layers
    at = params.get(layers, {}) if inside else params
    items = at if isinstance(at, dict) else dict(enumerate(at)) if isinstance(at, list | tuple) else {}
    pattern = re.compile(r"(\d+)" if inside else re.escape(layers).replace(r"\*", r"(\d+)"))
    keys = {int(m[1]): key for key in items if (m := pattern.fullmatch(str(key)))}
    if not keys or (inside and len(keys) < len(items)):
        raise JaxftError(f'no layers "{layers}" in these parameters: {nearest(layers, map(str, params))}')
    rest = {key: value for key, value in params.items() if key != layers and (inside or key not in keys.values())}
    if name in rest:
        raise JaxftError(f'"{name}" is a key of the parameters already: choose another name for the stack')
    found = {i: items[keys[i]] for i in sorted(keys)}
    _check_alike(layers, found)
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *found.values())

    def unstack(stacked: Tree) -> Tree:
        others = {key: value for key, value in stacked.items() if key != name}
        apart = {keys[i]: jax.tree.map(lambda a, at=at: a[at], stacked[name]) for at, i in enumerate(found)}
        if not inside:
            return {**others, **apart}
        return {**others, layers: apart if isinstance(at, dict) else type(at)(apart.values())}

    return {**rest, name: stack}, unstack


def _check_alike(layers: str, found: dict[int, Tree]) -> None:
    def leaves(tree: Tree) -> dict[str, str]:
        paths = jax.tree_util.tree_leaves_with_path(tree)
        return {".".join(map(key_name, keys)): jax.typeof(leaf).str_short() for keys, leaf in paths}

    (first, layer), *others = found.items()
    wanted = leaves(layer)
    for i, other in others:
        got = leaves(other)
        for path in sorted(wanted.keys() | got):
            if wanted.get(path) != got.get(path):
                raise JaxftError(
                    f'layer {i} of "{layers}" has {path}: {got.get(path, "none")}, layer {first} '
                    f"{wanted.get(path, 'none')}: only layers that are alike make a stack"
                )
