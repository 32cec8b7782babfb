"""Skip tuning: the first layers are left out of the backward pass."""

from jaxtyping import PRNGKeyArray

from jaxft.errors import JaxftError
from jaxft.methods.base import Method
from jaxft.methods.probe import Probe
from jaxft.methods.registry import register
from jaxft.methods.selection.full import full
from jaxft.methods.selection.layers import layer_counts
from jaxft.partition import Tuned
from jaxft.partition import select as select_paths
from jaxft.weights import Tree


@register(
    "skip-tuning",
    title="Skip Tuning: Pre-trained Vision-Language Models are Effective and Efficient Adapters Themselves",
    url="https://arxiv.org/abs/2412.11509",
    family="selection",
    example={"skip": 2},
)
def skip_tuning(skip: float | int = 0.5, after: str = "final_norm|head") -> Method:
    """Full tuning of everything behind the first `skip` layers; the gradient stops there (LSkip).

    theta_l <- theta_l - update(gradient_l) for l >= omega, nothing below: `Split(trainable [L - omega, ...],
    frozen [omega, ...])`, without a backward pass in the first omega layers.

    Notes:
        The paper caches the features behind the frozen layers once; here they are computed anew each step (forward
        only), which gives the same gradients. Its class-wise skip of the contrastive loss (CSkip) has no counterpart in
        a language model. The embedding feeds the frozen layers, so it stays frozen.

    Args:
        skip: omega, a number of layers from 1 on, or a fraction of them below 1; 0 skips none.
        after: selector of what trains behind the layers; terms that match nothing (a tied head) are passed over.
    """

    def init(rng: PRNGKeyArray, params: Tree, probe: Probe) -> Tuned:
        total = layer_counts(params, probe.roles)
        omega = round(skip * total) if skip < 1 else int(skip)
        if not 0 <= omega < total:
            raise JaxftError(f"skip-tuning: skip={skip} leaves none of {total} layers to train")
        terms = [t for t in after.split("|") if t and select_paths(params, t, roles=probe.roles, allow_empty=True)]
        span = f"layers[{omega}:]" if omega else "layers"
        return full("|".join([span, *terms])).init(rng, params, probe)

    return Method(init)
