"""Prompt tuning: virtual tokens in front of the input."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from jaxft.errors import JaxftError
from jaxft.methods.base import Method
from jaxft.methods.probe import Probe
from jaxft.methods.registry import register
from jaxft.partition import Trains, Tuned, select, split, unmarked, weights_by_path
from jaxft.weights import PROMPT, SoftPrompt, Tree, add_site, materialize


@register(
    "prompt-tuning",
    title="The Power of Scale for Parameter-Efficient Prompt Tuning",
    url="https://arxiv.org/abs/2104.08691",
    family="modules",
    learning_rate=1e-1,
    mergeable=False,
    identity=False,
    example={"num_tokens": 4},
)
def prompt_tuning(num_tokens: int = 20, init_from: Literal["vocabulary", "random"] = "vocabulary") -> Method:
    """Train P virtual tokens in front of every sequence, everything else frozen.

    The model reads [P; E(x)], with P `[num_tokens, D]` float32 trained; targets are those of x. Virtual tokens are seen
    by every segment of a packed row and see only each other.

    Notes:
        The outputs change at the start already, before any training: attention sees the prompt.

    Args:
        num_tokens: length of the prompt.
        init_from: embeddings of random vocabulary entries (the paper's sampled vocabulary), or uniform in +-0.5.
    """
    if num_tokens < 1:
        raise JaxftError(f"prompt-tuning: num_tokens={num_tokens} must be at least 1")

    def init(rng: PRNGKeyArray, params: Tree, probe: Probe) -> Tuned:
        (path,) = select(params, "@embedding", roles=probe.roles)
        table = materialize(unmarked(weights_by_path(params)[path]))
        if init_from == "vocabulary":
            rows = jax.random.choice(rng, table.shape[0], (num_tokens,), replace=num_tokens > table.shape[0])
            embedding = jnp.take(table, rows, axis=0).astype(jnp.float32)
        else:
            embedding = jax.random.uniform(rng, (num_tokens, table.shape[1]), jnp.float32, -0.5, 0.5)
        return split(add_site(params, PROMPT, SoftPrompt(Trains(embedding)), layers=None))

    return Method(init)
