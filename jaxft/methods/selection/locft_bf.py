"""LocFT-BF: model editing by localised, breadth-first fine-tuning."""

from jaxft.methods.base import Method
from jaxft.methods.registry import register
from jaxft.methods.selection.full import full


@register(
    "locft-bf",
    title="Fine-tuning Done Right in Model Editing",
    url="https://arxiv.org/abs/2509.22072",
    family="selection",
    learning_rate=5e-4,
)
def locft_bf(layer: int = -2, module: str = "mlp.down") -> Method:
    """Edit facts by training one matrix, the MLP down-projection of one late layer, on shuffled batches of all edits.

    theta_W <- theta_W - update(mean gradient over a mini-batch of edits), several epochs over the whole edit set
    (breadth first), never one edit to convergence before the next (depth first). The leaf becomes
    `Split(trainable [1, ...], frozen [L - 1, ...])`; all other leaves are frozen.

    Notes:
        Breadth-first order is what the data pipeline does anyway: give it all edits as one source with
        `loss_on: answers` and several epochs. The best layer differs by model; the paper finds it by a sweep.

    Args:
        layer: the layer whose matrix trains; negative counts from the end.
        module: which matrix of it.
    """
    return full(f"layers[{layer}].{module}.kernel")
