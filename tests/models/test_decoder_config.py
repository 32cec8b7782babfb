"""Configs: both spellings of Hugging Face's, what is refused and how, presets against published sizes."""

import math

import jax
import pytest
import transformers

from jaxft.errors import JaxftError
from jaxft.models import PRESETS, LanguageModel, preset
from jaxft.models.config import from_huggingface, holding_biases, to_huggingface
from tests.tiny_models import CONFIGS

LLAMA = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_through_transformers(name):
    ours = from_huggingface(CONFIGS[name]().to_dict())
    written = to_huggingface(ours, "float32")
    assert from_huggingface(written) == ours
    theirs = transformers.AutoConfig.for_model(**written)
    assert from_huggingface(theirs.to_dict()) == ours


def test_both_spellings_of_rotary_parameters():
    scaled = {**SCALED, "original_max_position_embeddings": 8192}
    old = from_huggingface({**LLAMA, "rope_theta": 500000.0, "rope_scaling": scaled})
    new = from_huggingface({**LLAMA, "rope_parameters": {**scaled, "rope_theta": 500000.0}})
    assert old == new
    assert old.rope.theta == 500000.0 and old.rope.factor == 8.0
    oldest = from_huggingface({**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert (oldest.rope.type, oldest.rope.factor, oldest.rope.theta) == ("linear", 2.0, 10000.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llma"}, 'model_type "llma" is not supported: did you mean "llama"'),
        ({"rope_scaling": {"rope_type": "longrope"}}, 'rope_type "longrope" is not supported'),
        ({"rope_scaling": {"rope_type": "linear"}}, 'rope_type "linear" lacks factor'),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "one entry per layer type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"hidden_act": "swiglu"}, 'hidden_act "swiglu" is not supported'),
        ({"num_key_value_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "hidden_size 32 is not a multiple"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"vocab_size": None}, "lacks vocab_size"),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1"),
        ({"quantization_config": {"bits": 4}}, "quantised checkpoints are not supported"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0"),
        ({"model_type": "gemma2", "sliding_window": None}, "sliding_window of a gemma2 model is null"),
        ({"model_type": "gemma2", "attn_logit_softcapping": 0}, "attn_logit_softcapping is 0: expected more than 0"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "transformers reads it but does not apply it"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "only causal attention"),
        (
            {"model_type": "gemma3_text", "rope_parameters": {"factor": 8.0}},
            "holds factor: expected full_attention",
        ),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["chunked_attention"] * 3},
            "chunked_attention",
        ),
    ],
)
def test_what_is_not_supported_is_named(change, message):
    with pytest.raises(JaxftError, match=message):
        from_huggingface({**LLAMA, **change})


def test_windows_by_layer():
    qwen = {**LLAMA, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8}
    assert from_huggingface({**qwen, "max_window_layers": 2}).sliding_layers == (False, False, True)
    unused = from_huggingface({**qwen, "max_window_layers": 3})
    assert unused.sliding_window is None and unused == from_huggingface({**qwen, "use_sliding_window": False})
    types = ["sliding_attention", "full_attention", "full_attention"]
    assert from_huggingface({**qwen, "layer_types": types}).sliding_layers == (True, False, False)
    mistral = from_huggingface({**LLAMA, "model_type": "mistral", "sliding_window": 8})
    assert mistral.sliding_layers == (True, True, True)
    gemma = from_huggingface({**LLAMA, "model_type": "gemma3_text", "sliding_window_pattern": 2})
    assert gemma.sliding_layers == (True, False, True) and gemma.sliding_rope.theta == 10000.0
    alike = from_huggingface({**LLAMA, "model_type": "gemma3_text", "sliding_window_pattern": 1})
    assert alike.sliding_window is None and alike.sliding_rope is None
    assert from_huggingface(to_huggingface(alike, "float32")) == alike


def test_biases_go_where_the_model_type_can_hold_them():
    def held(change, *biased):
        config = holding_biases(from_huggingface({**LLAMA, **change}), frozenset(biased))
        return config.model_type, config.qkv_bias, config.output_bias, config.mlp_bias

    qwen2, mistral, qwen3 = {"model_type": "qwen2"}, {"model_type": "mistral"}, {"model_type": "qwen3"}
    assert held({}) == ("llama", False, False, False)
    assert held({}, "attn.q") == ("llama", True, True, False)
    assert held({}, "mlp.up") == ("llama", False, False, True)
    assert held(qwen2, "attn.q", "attn.k", "attn.v") == ("qwen2", True, False, False)
    assert held(qwen2, "mlp.up") == ("llama", True, True, True)
    assert held(qwen3, "attn.o") == ("qwen3", True, True, False)
    assert held({**mistral, "sliding_window": None}, "attn.o") == ("llama", True, True, False)
    with pytest.raises(JaxftError, match="mistral cannot hold biases on attn.o, and llama, .* sliding window of 8"):
        held({**mistral, "sliding_window": 8}, "attn.o")
    gemma2 = {"model_type": "gemma2"}
    assert held(gemma2, "attn.q") == ("gemma2", True, True, False)
    with pytest.raises(JaxftError, match="gemma2 cannot hold biases on mlp.up, .* norms after attention and MLP"):
        held(gemma2, "mlp.up")
    with pytest.raises(JaxftError, match="qwen3 cannot hold biases on mlp.up, .* q_norm"):
        held(qwen3, "mlp.up")
    with pytest.raises(JaxftError, match="bias on head"):
        held({}, "head")


PUBLISHED_SIZES = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "mistral-nemo-12b": 12_247_782_400,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "mixtral-8x7b": 46_702_792_704,
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma2-27b": 27_227_128_320,
    "gemma3-270m": 268_098_176,
    "gemma3-1b": 999_885_952,
    "gemma3-4b": 4_300_079_472,
    "gemma3-12b": 12_187_325_040,
    "gemma3-27b": 27_432_406_640,
}
READS_IMAGES = ("gemma3-4b", "gemma3-12b", "gemma3-27b")


def vision(hidden_size):
    """The parameters of what reads images: SigLIP of 27 layers of width 1152, and a norm and a matrix out of it."""
    width, inner, patches = 1152, 4304, 64 * 64
    layer = 4 * (width * width + width) + 2 * width * inner + inner + width + 4 * width
    return (3 * 14 * 14 + 1 + patches) * width + 27 * layer + 2 * width + width * hidden_size + width


@pytest.mark.parametrize("name", PUBLISHED_SIZES)
def test_presets_have_the_published_number_of_parameters(name):
    """The figures are the parameter counts of the safetensors files on the hub."""
    leaves = jax.tree.leaves(LanguageModel(preset(name)).abstract())
    other = vision(preset(name).hidden_size) if name in READS_IMAGES else 0
    assert sum(math.prod(leaf.shape) for leaf in leaves) + other == PUBLISHED_SIZES[name]


@pytest.mark.parametrize(("name", "layers", "window"), [("gemma3-4b", 34, 1024), ("gemma3-12b", 48, 1024)])
def test_a_language_model_inside_another_is_described(name, layers, window):
    """The configs of these models name what differs from the defaults of transformers only."""
    shapes = preset(name)
    text = {
        "model_type": "gemma3_text",
        "hidden_size": shapes.hidden_size,
        "intermediate_size": shapes.intermediate_size,
        "num_attention_heads": shapes.num_heads,
        "num_key_value_heads": shapes.num_kv_heads,
        "num_hidden_layers": layers,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": window,
    }
    outer = {"model_type": "gemma3", "text_config": text, "eos_token_id": [1, 106]}
    found = from_huggingface(outer)
    assert found == shapes.replace(eos_token_ids=(1, 106))
    theirs = transformers.Gemma3Config(text_config=dict(text)).text_config
    assert from_huggingface(theirs.to_dict()) == shapes
    with pytest.raises(JaxftError, match="config.json of a gemma3 model lacks text_config"):
        from_huggingface({"model_type": "gemma3"})


def test_presets_survive_export_and_have_a_nearest_name():
    for config in PRESETS.values():
        assert from_huggingface(to_huggingface(config, "bfloat16")) == config
    with pytest.raises(JaxftError, match='did you mean "llama3.1-8b"'):
        preset("llama3.1-8")
