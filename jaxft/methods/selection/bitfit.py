"""BitFit: only the biases train."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from jaxft.methods.base import Method, rewrite, stop_below
from jaxft.methods.probe import Probe
from jaxft.methods.registry import register
from jaxft.partition import Tuned, layer_mask, masked_node, select, shape_of, split, weights_by_path
from jaxft.weights import Tree, Weight


@register(
    "bitfit",
    title="BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models",
    url="https://arxiv.org/abs/2106.10199",
    family="selection",
    learning_rate=3e-3,
)
def bitfit(on: str = "@linear", missing: Literal["add", "skip"] = "add") -> Method:
    """Train the bias terms only: y = x W + b with W frozen, b `[L, d_out]`.

    Notes:
        The models of the paper have a bias on every projection. Decoders of today mostly have none: `missing="add"`
        gives the selected projections a zero bias (the identity), `missing="skip"` trains only the ones there are.

    Args:
        on: selector of the projections whose biases train; a layer range limits it to those layers.
        missing: what to do for a projection without a bias.
    """

    def init(rng: PRNGKeyArray, params: Tree, probe: Probe) -> Tuned:
        weights = weights_by_path(params)
        kernels = {p: m for p, m in select(params, on, roles=probe.roles).items() if p.rsplit(".", 1)[-1] == "kernel"}
        layers = {p.rsplit(".", 1)[0] + ".bias": m for p, m in kernels.items()}
        biases = list(layers)
        if missing == "add":
            for kernel, bias in zip(kernels, biases, strict=True):
                if bias not in weights:
                    shape = shape_of(weights[kernel])
                    params = _insert(params, bias.split("."), jnp.zeros((*shape[:-2], shape[-1]), jnp.float32))
        else:
            biases = [b for b in biases if b in weights] or biases

        def cut(path: str, w: Array) -> Weight:
            return masked_node(w, layer_mask(layers[path], w.shape), stacked=probe.roles.is_stacked(path), path=path)

        tuned = split(rewrite(params, biases, cut, roles=probe.roles, nodes=False))
        return stop_below(tuned, {b: layers[b] for b in biases}, probe.roles)

    return Method(init)


def _insert(tree: dict, path: list[str], leaf: object) -> dict:
    head, *rest = path
    return {**tree, head: _insert(tree[head], rest, leaf) if rest else leaf}
