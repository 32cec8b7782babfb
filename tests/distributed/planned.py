"""What planning is tested on: a model described by its config.json alone, and runs that tune it."""

import json

import jax

from jaxft.config import parse_config
from jaxft.data import EvaluationSetConfig

VOCAB, DIM, INNER, LAYERS, HEADS, KV_HEADS, HEAD_DIM, ROWS, SEQ = 896, 256, 640, 6, 6, 2, 64, 4, 128
LINEAR = LAYERS * (2 * DIM * HEADS * HEAD_DIM + 2 * DIM * KV_HEADS * HEAD_DIM + 3 * DIM * INNER)  # in all projections


def write_shape(path):
    """A model of which no half of a matrix, and no activation, looks like another matrix."""
    config = dict(
        model_type="llama",
        architectures=["LlamaForCausalLM"],
        vocab_size=VOCAB,
        hidden_size=DIM,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=False,
    )
    (path / "config.json").write_text(json.dumps(config))
    return path


def config(directory, method="{name: full}", *overrides):
    text = f"""
model:
  {{path: "{directory}", param_dtype: bfloat16, frozen_dtype: bfloat16, compute_dtype: bfloat16, remat: block}}
method: {method}
data: {{sources: [{{path: data.jsonl}}], seq_len: {SEQ}, batch_size: {ROWS}}}
training: {{steps: 10, learning_rate: 1.0e-3}}
mesh: {{fsdp: -1}}
output: out
"""
    return parse_config(text, overrides)


GEMMA = {
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "sliding_window": 200,
    "sliding_window_pattern": 3,
    "tie_word_embeddings": True,
}
MIXTURE = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4}


def shape_for(name, directory, tmp_path):
    """The directory of a model that a method can tune: a mixture of experts for those that choose experts."""
    if name != "esft":
        return directory
    (tmp_path / "config.json").write_text(json.dumps(json.loads((directory / "config.json").read_text()) | MIXTURE))
    return tmp_path


def method_config(directory, text, *others):
    # Half of so many positions, which a chip holds of a row, is no side of a matrix.
    overrides = ("mesh.fsdp=2", "mesh.tensor=2", "mesh.data=1", "model.attention=xla", "data.seq_len=160")
    found = config(directory, text, *overrides, *others)
    other = EvaluationSetConfig(path="other.jsonl")  # for those that compare data sets: never read
    return found.model_copy(update={"evaluation": found.evaluation.model_copy(update={"sets": {"other": other}})})


# Scatters of many entries on a mesh with `tensor` take long to compile: one method has them.
OTHERWISE = {"shira": {"rank": 32}, "sara": {"budget": 0.02}, "lt-sft": {"budget": 0.02}}


def sides(dims):
    """A shape up to transposition and axes of 1."""
    return tuple(sorted(n for n in dims if n > 1))


def whole_matrices(model):
    """The matrices of a model as `sides`: of a layer, of all layers, of half of them; heads apart and together.

    Without the router, whose few columns are not divided: gathered over one axis it is whole.
    """
    found = set()
    for keys, a in jax.tree_util.tree_leaves_with_path(model.abstract()):
        stack, matrix = ((LAYERS, LAYERS // 2, 1), a.shape[1:]) if keys[0].key == "layers" else ((1,), a.shape)
        if len(matrix) == 2 and "router" not in str(keys):
            apart = [
                (*matrix[:i], matrix[i] // HEAD_DIM, HEAD_DIM, *matrix[i + 1 :])
                for i in range(2)
                if "attn" in str(keys) and matrix[i] != DIM
            ]
            found |= {sides((n, *dims)) for n in stack for dims in (matrix, *apart)}
    return found
