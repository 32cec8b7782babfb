"""Which tensors of a Hugging Face checkpoint make up which leaf of the params tree."""

import re

import jax
import numpy as np

from jaxft.errors import JaxftError
from jaxft.models.config import DecoderConfig
from jaxft.weights import Tree, Weight, is_node

_TOP = {
    "embed.embedding": "model.embed_tokens.weight",
    "final_norm.scale": "model.norm.weight",
    "head.kernel": "lm_head.weight",
}
_IN_LAYER = {
    "attn_norm.scale": "input_layernorm.weight",
    "mlp_norm.scale": "post_attention_layernorm.weight",
    "attn.q_norm.scale": "self_attn.q_norm.weight",
    "attn.k_norm.scale": "self_attn.k_norm.weight",
    **{
        f"{group}.{name}.{ours}": f"{module}.{name}_proj.{theirs}"
        for group, module, names in (("attn", "self_attn", "qkvo"), ("mlp", "mlp", ("gate", "up", "down")))
        for name in names
        for ours, theirs in (("kernel", "weight"), ("bias", "bias"))
    },
}
_POST_NORMS = {  # where attention and MLP are normalised before and after
    "post_attn_norm.scale": "post_attention_layernorm.weight",
    "mlp_norm.scale": "pre_feedforward_layernorm.weight",
    "post_mlp_norm.scale": "post_feedforward_layernorm.weight",
}
_MIXTURE = {  # of each model type: the module of the mixture, and what it calls the matrices of an expert
    "mixtral": ("block_sparse_moe", {"gate": "w1", "up": "w3", "down": "w2"}),
    "qwen3_moe": ("mlp", {name: f"{name}_proj" for name in ("gate", "up", "down")}),
}
_EXPERT = re.compile(r"mlp\.experts\.(gate|up|down)\.kernel")
HEAD = _TOP["head.kernel"]
EMBED = _TOP["embed.embedding"]


def dotted(path: tuple) -> str:
    """The path of a leaf as docs/architecture.md writes it: "layers.attn.q.kernel"."""
    return ".".join(str(key.key) for key in path)


def flatten(params: Tree) -> dict[str, Weight]:
    """The leaves of a params tree by dotted path; weight nodes count as leaves."""
    return {dotted(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params, is_leaf=is_node)[0]}


def tensor_names(path: str, config: DecoderConfig) -> np.ndarray:
    """The names of the tensors of one leaf, in an array of the shape of its stack: `[]`, `[layers]` or, of experts,
    `[layers, experts]`.

    Raises JaxftError for a leaf that Hugging Face checkpoints do not have.
    """
    if path in _TOP:
        return np.array(_TOP[path], object)
    inside, layers = path.removeprefix("layers."), range(config.num_layers)
    module, names = _MIXTURE.get(config.model_type, ("", {}))
    if (found := _EXPERT.fullmatch(inside)) and names:
        tensor, experts = names[found[1]], range(config.num_experts)
        rows = [[f"model.layers.{layer}.{module}.experts.{e}.{tensor}.weight" for e in experts] for layer in layers]
        return np.array(rows, object)
    known = _IN_LAYER | (_POST_NORMS if config.post_norms else {})
    if names:
        known = known | {"mlp.router.kernel": f"{module}.gate.weight"}
    if inside == path or inside not in known:
        raise JaxftError(f'no Hugging Face tensor stands for the parameter "{path}"')
    return np.array([f"model.layers.{layer}.{known[inside]}" for layer in layers], object)


def is_transposed(path: str) -> bool:
    """Kernels are `[d_in, d_out]` here and `[d_out, d_in]` in Hugging Face files."""
    return path.endswith(".kernel")
