"""SSF: scaling and shifting features."""

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from jaxft.errors import JaxftError
from jaxft.methods.base import Method
from jaxft.methods.probe import Probe
from jaxft.methods.registry import register
from jaxft.partition import Trains, Tuned, select, shape_of, split, weights_by_path
from jaxft.weights import ScaleShift, Tree, add_site


@register(
    "ssf",
    title="Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning",
    url="https://arxiv.org/abs/2210.08823",
    family="modules",
    learning_rate=3e-3,
)
def ssf(on: str = "@linear|layers.attn_norm|layers.mlp_norm", shift: bool = True) -> Method:
    """A trained scale and shift per channel after every operation of a layer.

    y = gamma * f(x) + beta, gamma `[L, d]` one and beta `[L, d]` zero at the start, after each selected projection and
    norm f. `merge` folds them away: W' = W gamma, b' = b gamma + beta after a projection; after a norm both go into
    the projections that read it, W' = gamma W, b' = b + beta W.

    Notes:
        The final norm is not in the default selection: only the head reads it, which may be tied and has no bias.

    Args:
        on: selector of the projections (kernels) and norms (scales) that are followed by a scale and shift.
        shift: whether there is a beta.
    """

    def init(rng: PRNGKeyArray, params: Tree, probe: Probe) -> Tuned:
        weights = weights_by_path(params)
        for path, chosen in select(params, on, roles=probe.roles).items():
            *names, leaf = path.split(".")
            if leaf not in ("kernel", "scale"):
                continue
            if chosen is not True:
                raise JaxftError(f'ssf: "{path}" is selected for some layers only, which ssf cannot do: drop the range')
            *stack, dim = (*shape_of(weights[path])[: probe.roles.is_stacked(path)], shape_of(weights[path])[-1])
            scale = Trains(jnp.ones((*stack, dim), jnp.float32))
            beta = Trains(jnp.zeros((*stack, dim), jnp.float32)) if shift else None
            layers = names.pop(0) if probe.roles.is_stacked(path) else None
            params = add_site(params, ".".join(names), ScaleShift(scale, beta), layers=layers)
        return split(params)

    return Method(init)


def fold_scale_shift(home: dict, name: str, module: ScaleShift, consumers: tuple[str, ...]) -> dict:
    """The weights of one scope (a stack of layers or the top level) with the module after `name` folded into them."""
    own = _get(home, name)
    if "kernel" not in own:  # a norm, whose scale may mean a factor or what is added to one: its readers know neither
        for reader in consumers:
            if (kernel := _get(home, reader).get("kernel")) is None:
                continue
            home = _set(home, f"{reader}.kernel", kernel * _beside(module.scale, kernel)[..., None])
            if module.shift is not None:
                pushed = jnp.einsum("...i,...io->...o", _beside(module.shift, kernel), kernel)
                home = _set(home, f"{reader}.bias", _get(home, reader).get("bias", 0) + pushed)
        return home
    home = _set(home, f"{name}.kernel", own["kernel"] * jnp.expand_dims(_beside(module.scale, own["kernel"]), -2))
    bias = own["bias"] * _beside(module.scale, own["kernel"]) if "bias" in own else None
    if module.shift is not None:
        shift = jnp.broadcast_to(_beside(module.shift, own["kernel"]), own["kernel"][..., 0, :].shape)
        bias = shift if bias is None else bias + shift
    return home if bias is None else _set(home, f"{name}.bias", bias)


def _beside(vector: jax.Array, kernel: jax.Array) -> jax.Array:
    """A vector `[*layers, d]` with axes of one for those that only the kernel has (its experts)."""
    return vector.reshape(*vector.shape[:-1], *(1,) * (kernel.ndim - vector.ndim - 1), vector.shape[-1])


def _get(tree: dict, name: str) -> dict:
    for key in name.split("."):
        tree = tree.get(key, {})
    return tree


def _set(tree: dict, path: str, leaf: jax.Array) -> dict:
    head, _, rest = path.partition(".")
    return {**tree, head: _set(tree[head], rest, leaf) if rest else leaf}
