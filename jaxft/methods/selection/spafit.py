"""SPAFIT: strata of layers, each tuned with more than the one below."""

import numpy as np
from jaxtyping import PRNGKeyArray

from jaxft.errors import JaxftError
from jaxft.methods.base import Method, chain, stop_below
from jaxft.methods.probe import Probe
from jaxft.methods.registry import register
from jaxft.methods.reparametrization.lora import lora
from jaxft.methods.selection.bitfit import bitfit
from jaxft.methods.selection.layers import layer_counts
from jaxft.partition import Tuned, has_marks, mark, weights_by_path
from jaxft.weights import Tree


@register(
    "spafit",
    title="SPAFIT: Stratified Progressive Adaptation Fine-tuning for Pre-trained Large Language Models",
    url="https://arxiv.org/abs/2405.00201",
    family="selection",
    learning_rate=2e-3,
    example={"rank": 4},
)
def spafit(
    frozen: float | int = 0.25,
    biases: float | int = 0.5,
    rank: int = 16,
    lora_on: str = "attn.{q,k,v,o}.kernel",
    bias_on: str = "{attn.q,attn.k,attn.v,attn.o,mlp.gate,mlp.up,mlp.down}.kernel",
) -> Method:
    """Freeze the lowest layers, tune the biases of the next, and biases and low-rank updates of the highest.

    Of L layers: l < a frozen; a <= l only biases b train; l >= b also W' = W + (alpha / rank) A B.
    A chain of BitFit and LoRA, each on its layers: biases `Split [L - a, d]`, factors `Split [L - b, d, rank]`.

    Notes:
        No public implementation is known. The paper tunes encoders with a new classifier head; a language model has
        none, so nothing else trains. Projections without a bias get a zero one. Boundaries (0, 0) are BitFit and LoRA
        on all layers.

    Args:
        frozen: a, the first layer whose biases train: a number of layers from 1 on, a fraction below 1.
        biases: b, the first layer with low-rank updates, counted as `frozen` is.
        rank: of the updates.
        lora_on: selector, within a layer, of the matrices with a low-rank update.
        bias_on: selector, within a layer, of the projections whose biases train.
    """

    def init(rng: PRNGKeyArray, params: Tree, probe: Probe) -> Tuned:
        total = layer_counts(params, probe.roles)
        first, second = (round(b * total) if b < 1 else int(b) for b in (frozen, biases))
        if not 0 <= first <= second <= total or first == total:
            raise JaxftError(
                f"spafit: frozen={frozen}, biases={biases} are boundaries {first} and {second} of {total} layers: "
                "expected them in order, the first below the number of layers"
            )
        parts = [bitfit(on=f"layers[{first}:].{bias_on}")]
        if second < total:
            parts.append(lora(rank=rank, on=f"layers[{second}:].{lora_on}"))
        tuned = chain(*parts).init(rng, params, probe)
        own = [path for path, w in weights_by_path(mark(tuned)).items() if has_marks(w)]
        return stop_below(tuned, dict.fromkeys(own, np.arange(total) >= first), probe.roles)

    return Method(init)
