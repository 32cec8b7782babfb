"""ESFT: expert-specialised fine-tuning of a mixture of experts."""

from jaxft.errors import JaxftError
from jaxft.methods.base import Method
from jaxft.methods.registry import register
from jaxft.methods.selection.scores import GateKind, gate
from jaxft.methods.selection.select import selection
from jaxft.methods.selection.units import Cover, check_choice


@register(
    "esft",
    title="Let the Expert Stick to His Last: Expert-Specialized Fine-Tuning for Sparse Architectural Large Language "
    "Models",
    url="https://arxiv.org/abs/2407.01906",
    family="selection",
    learning_rate=1e-5,
    example={"p": 0.4, "batches": 2},
)
def esft(p: float = 0.2, score: GateKind = "token", batches: int = 8, on: str = "@experts") -> Method:
    """Train, in each layer, the few experts that a sample of the task goes to; all else is frozen.

    Relevance of expert e in layer l: `R_le = mean_t g_lte` (score gate) or `mean_t 1[g_lte > 0] / K` (token), g the
    gate of the K chosen experts and 0 elsewhere, over all tokens of the sample, as a share of the layer. The experts
    that train are the most relevant ones, the fewest whose shares sum up to p or more:
    `RowSplit(base [L, E, d_in, d_out], rows [L, k, d_in, d_out], index [L, k])` for gate, up and down, k the most that
    any layer has; their weight gradients are the only ones computed. A run is planned with the most that k can be,
    p E rounded up.

    Notes:
        The paper averages over samples, its code (deepseek-ai/ESFT) over tokens, as here; its thresholds are p = 0.2
        for token and 0.1 for gate. The later version of that code divides scores by their sum over layers; its
        published scores, and the paper, divide by the sum over the experts of a layer.

    Args:
        p: the share of a layer's routing that its trained experts cover; 1 trains every expert that is used.
        score: token, how many tokens choose an expert; gate, how much weight they give it.
        batches: calibration batches of the task.
        on: selector of the matrices of experts.
    """
    if not 0 < p <= 1:
        raise JaxftError(f"esft: p={p} is not a share above 0 and up to 1")
    check_choice("score", score, GateKind)

    return selection(gate(score, batches), granularity="expert", budget=Cover(p), on=on)
