"""Layer freezing: the last (or first) layers train."""

from jaxtyping import PRNGKeyArray

from jaxft.errors import JaxftError
from jaxft.methods.base import Method
from jaxft.methods.probe import Probe
from jaxft.methods.registry import register
from jaxft.methods.selection.full import full
from jaxft.methods.selection.layers import layer_counts
from jaxft.partition import Tuned
from jaxft.weights import Tree


@register(
    "layer-freezing",
    title="LlamaFactory: Unified Efficient Fine-Tuning of 100+ Language Models",
    url="https://arxiv.org/abs/2403.13372",
    family="selection",
    example={"num_layers": 2},
)
def layer_freezing(num_layers: int = 2, modules: str = "", extra: str = "") -> Method:
    """Train the last `num_layers` layers, or some modules of them, and whatever else is named; freeze the rest.

    A stacked leaf becomes `Split(trainable [n, ...], frozen [L - n, ...])`. The option `freeze` of LLaMA-Factory.
    Below the first layer that trains there is no backward pass.

    Args:
        num_layers: how many layers train, from the end; negative: from the start.
        modules: which parts of those layers, joined by commas (`attn,mlp.down`); everything if empty.
        extra: selector of what else trains (`embed|head`).
    """
    if not num_layers:
        raise JaxftError("layer-freezing: num_layers=0 trains nothing: expected last layers, or (negative) first ones")

    def init(rng: PRNGKeyArray, params: Tree, probe: Probe) -> Tuned:
        total = layer_counts(params, probe.roles)
        if abs(num_layers) > total:
            raise JaxftError(f"layer-freezing: num_layers={num_layers}, but the model has {total} layers")
        span = f"layers[{total - num_layers}:]" if num_layers > 0 else f"layers[:{-num_layers}]"
        terms = [f"{span}.{m.strip()}" for m in modules.split(",")] if modules else [span]
        return full("|".join(terms + [extra] if extra else terms)).init(rng, params, probe)

    return Method(init)
