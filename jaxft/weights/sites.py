"""Sites: named points of a model at which a method may add a module, and the modules themselves.

`site(params, "attn.q", x)` is the identity unless `params["sites"]["attn.q"]` holds a module. So additive methods, too,
are rewrites of the parameter tree. Modules inside `layers.sites` are stacked `[L, ...]` and sliced by the layer scan.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxft.weights.core import Node, Weight, linear, materialize_rule, node, specs_rule, static, value

PROMPT = "prompt"  # the site of virtual tokens in front of the input


class SiteModule(Node):
    """Base of the modules a site may hold. It means no matrix, so `materialize` leaves it as it is."""


@materialize_rule.register
def _(w: SiteModule) -> SiteModule:
    return jax.tree.map(lambda a: a, w)


@specs_rule.register
def _(w: SiteModule, spec: PartitionSpec) -> Any:
    return jax.tree.map(lambda a: PartitionSpec(), w)  # small: replicated


@functools.singledispatch
def site_rule(module: Any, x: Float[Array, "... dim"]) -> Float[Array, "... dim"]:
    raise TypeError(f"{type(module).__name__} cannot act at a site: it has no `site` rule")


def site(params: dict, name: str, x: Float[Array, "... dim"]) -> Float[Array, "... dim"]:
    """`x` through the module at site `name`, or `x` itself where there is none."""
    module = params.get("sites", {}).get(name)
    return x if module is None else site_rule(module, x)


@node
class ScaleShift(SiteModule):
    """`x * scale + shift`, per channel (SSF, IA3-like rescaling). Identity at `scale=1, shift=0`."""

    scale: Float[Array, "*layers dim"]
    shift: Float[Array, "*layers dim"] | None = None


@site_rule.register
def _(module: ScaleShift, x: Array) -> Array:
    y = x * module.scale.astype(x.dtype)
    return y if module.shift is None else y + module.shift.astype(x.dtype)


ACTIVATIONS = {"relu": jax.nn.relu, "gelu": jax.nn.gelu, "silu": jax.nn.silu, "tanh": jnp.tanh, "identity": lambda x: x}


@node
class Bottleneck(SiteModule):
    """`x + scale * act(x @ down + down_bias) @ up + up_bias`: an adapter. Identity while `up`, `up_bias` are zero."""

    down: Weight
    up: Weight
    down_bias: Float[Array, "*layers rank"] | None = None
    up_bias: Float[Array, "*layers dim"] | None = None
    scale: float = static(default=1.0)
    activation: str = static(default="relu")


@site_rule.register
def _(module: Bottleneck, x: Array) -> Array:
    hidden = linear(x, module.down)
    if module.down_bias is not None:
        hidden = hidden + value(module.down_bias, x.dtype)
    update = linear(ACTIVATIONS[module.activation](hidden), module.up)
    if module.up_bias is not None:
        update = update + value(module.up_bias, x.dtype)
    return x + module.scale * update


@node
class SoftPrompt(SiteModule):
    """Virtual tokens `[P, D]` in front of every sequence, visible to all its segments."""

    embedding: Float[Array, "prompt dim"]


@node
class Tally(SiteModule):
    """Counts what passes and changes nothing: the gradient of `mass [dim]` is the sum of x over tokens, that of `count`
    how often x was not zero. They are statistics, not derivatives, as in `Observed`."""

    mass: Float[Array, "*layers dim"]
    count: Float[Array, "*layers dim"]


@jax.custom_vjp
def _tally(x: Array, mass: Array, count: Array) -> Array:
    return x


def _tally_forward(x: Array, mass: Array, count: Array) -> tuple[Array, tuple[Array, Array]]:
    tokens = tuple(range(x.ndim - 1))
    return x, (jnp.sum(x.astype(mass.dtype), tokens), jnp.sum(x != 0, tokens, dtype=count.dtype))


def _tally_backward(sums: tuple[Array, Array], g: Array) -> tuple[Array, Array, Array]:
    return g, *sums


_tally.defvjp(_tally_forward, _tally_backward)


@site_rule.register
def _(module: Tally, x: Array) -> Array:
    return _tally(x, module.mass, module.count)


@functools.singledispatch
def prompt_rule(module: Any) -> Float[Array, "prompt dim"]:
    raise TypeError(f"{type(module).__name__} makes no virtual tokens: it has no `prompt` rule")


@prompt_rule.register
def _(module: SoftPrompt) -> Array:
    return module.embedding


def prompt_embeddings(params: dict) -> Float[Array, "prompt dim"] | None:
    """The virtual token embeddings at the top-level site `prompt`, or None."""
    module = params.get("sites", {}).get(PROMPT)
    return None if module is None else prompt_rule(module)


def add_site(params: dict, name: str, module: SiteModule, *, layers: str | None = "layers") -> dict:
    """A copy of `params` with `module` at site `name`, inside the stacked `layers` subtree or (None) at the top.

    Raises ValueError if the site is taken: two modules at one point have no defined order.
    """
    home = params[layers] if layers else params
    sites = home.get("sites", {})
    if name in sites:
        raise ValueError(f'site "{name}" already holds a {type(sites[name]).__name__}')
    home = {**home, "sites": {**sites, name: module}}
    return {**params, layers: home} if layers else home
