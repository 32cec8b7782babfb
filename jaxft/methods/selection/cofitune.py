"""CoFiTune: a range of MLPs trains, gently where units matter to what the model knows."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jaxft.errors import JaxftError
from jaxft.methods.base import Method, rewrite, stop_below
from jaxft.methods.probe import Probe
from jaxft.methods.registry import register
from jaxft.methods.selection.layers import layer_counts
from jaxft.partition import Tuned, layer_mask, masked_node, split, unmarked, weights_by_path
from jaxft.weights import Damped, Tree, materialize

DOWN = "layers.mlp.down.kernel"


@register(
    "cofitune",
    title="Balancing Speciality and Versatility: a Coarse to Fine Framework for Supervised Fine-tuning Large "
    "Language Model",
    url="https://arxiv.org/abs/2404.10306",
    family="selection",
    learning_rate=5e-4,
    example={"batches": 2},
)
def cofitune(
    first: float | int = 0.25, last: float | int = 0.5, modules: str = "up,down", soft: float = 1.0, batches: int = 8
) -> Method:
    """Train the MLPs of a middle-lower range of layers; scale the gradient of a neuron by what it does not matter.

    Coarse: of L layers, those in [first, last) train their up and down projections, all else is frozen. Fine: with
    g_j = dLoss/dgate_j of a gate on unit j, I_j = |tanh((g_j - mean g) / std g)| over the units of its layer; the
    gradient of the unit's column is multiplied by 1 - soft * I_j. Units are hidden neurons for the up (and gate)
    projection, outputs for the down projection: `Damped(Split(trainable [k, d, f], ...), rate [L, 1, f])`.

    Notes:
        The paper finds range and modules by a search and reports the default here as best. It measures g on the
        divergence between two dropout passes; the decoders here have no dropout, so it is measured on the loss of the
        calibration batches, where dLoss/dgate is <w, dLoss/dw> over the weights behind (or of) the unit, exactly. The
        reference code multiplies the flattened gradient of W_up by the mask of its neurons over and over, which meets
        other entries than theirs; here each neuron's own are damped. Heads are not, since only MLPs train. An
        optimizer that normalises gradients (Adam) undoes a constant factor: use SGD where the degree matters.

    Args:
        first: the first layer that trains: a number of layers from 1 on, a fraction below 1.
        last: the layer behind the last one, counted as `first` is.
        modules: which projections train, joined by commas: gate, up, down.
        soft: how strongly importance damps, from 0 (not) to 1.
        batches: calibration batches for the importance.
    """
    names = [m.strip() for m in modules.split(",")]
    if not 0 <= soft <= 1 or not names or set(names) - {"gate", "up", "down"}:
        raise JaxftError(f'cofitune: soft={soft} must lie in [0, 1], modules="{modules}" name some of gate, up, down')

    def init(rng: PRNGKeyArray, params: Tree, probe: Probe) -> Tuned:
        total = layer_counts(params, probe.roles)
        start, stop = (round(b * total) if b < 1 else int(b) for b in (first, last))
        if not 0 <= start < stop <= total:
            raise JaxftError(
                f"cofitune: first={first}, last={last} are layers {start} to {stop} of {total}: expected a range"
            )
        layers = (np.arange(total) >= start) & (np.arange(total) < stop)
        neurons, outputs = gate_gradients(unmarked(params), probe, batches) if soft else (None, None)

        def cut(path: str, w: Array) -> Any:
            node = masked_node(w, layer_mask(layers, w.shape), stacked=True, path=path)
            gates = outputs if path == DOWN else neurons
            return node if gates is None else Damped(node, (1 - soft * importance(gates))[:, None, :])

        paths = [f"layers.mlp.{name}.kernel" for name in names]
        tuned = split(rewrite(params, paths, cut, roles=probe.roles, nodes=False))
        return stop_below(tuned, dict.fromkeys(paths, layers), probe.roles)

    return Method(init)


@jax.jit
def importance(gates: Float[Array, "layers units"]) -> Float[Array, "layers units"]:
    """|tanh| of the derivatives by gates, standardised within each layer: in [0, 1)."""
    centred = gates - gates.mean(-1, keepdims=True)
    return jnp.abs(jnp.tanh(centred / jnp.maximum(gates.std(-1, ddof=1, keepdims=True), 1e-30)))


def gate_gradients(params: Tree, probe: Probe, batches: int) -> tuple[Array, Array]:
    """The derivatives of the mean loss by a factor on each hidden neuron of each MLP, `[L, hidden]`, and on each of
    its outputs, `[L, outputs]`."""
    gradient = probe.gradients_of(params, [DOWN], batches)[DOWN]
    product = gradient * materialize(weights_by_path(params)[DOWN]).astype(jnp.float32)
    return product.sum(-1), product.sum(-2)
