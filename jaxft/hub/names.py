"""Which tensors of a Hugging Face checkpoint make up which leaf of the params tree."""

import jax

from jaxft.errors import JaxftError
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
HEAD = _TOP["head.kernel"]
EMBED = _TOP["embed.embedding"]


def dotted(path: tuple) -> str:
    """The path of a leaf as docs/architecture.md writes it: "layers.attn.q.kernel"."""
    return ".".join(str(key.key) for key in path)


def flatten(params: Tree) -> dict[str, Weight]:
    """The leaves of a params tree by dotted path; weight nodes count as leaves."""
    return {dotted(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params, is_leaf=is_node)[0]}


def tensor_names(path: str, num_layers: int) -> list[str]:
    """The names of the tensors of one leaf: one for each layer of a stacked leaf, else a single one."""
    if path in _TOP:
        return [_TOP[path]]
    inside = path.removeprefix("layers.")
    if inside == path or inside not in _IN_LAYER:
        raise JaxftError(f'no Hugging Face tensor stands for the parameter "{path}"')
    return [f"model.layers.{layer}.{_IN_LAYER[inside]}" for layer in range(num_layers)]


def is_transposed(path: str) -> bool:
    """Kernels are `[d_in, d_out]` here and `[d_out, d_in]` in Hugging Face files."""
    return path.endswith(".kernel")
