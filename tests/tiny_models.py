"""Tiny, randomly initialised models of every supported kind, made by transformers: the oracle of the tests."""

import functools
import tempfile
from pathlib import Path

import torch
import transformers

SHAPES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}


GEMMA3 = {
    **SHAPES,
    "num_hidden_layers": 7,
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "sliding_window": 5,
    "final_logit_softcapping": 20.0,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    },
}


def _llama(**fields) -> transformers.PreTrainedConfig:
    return transformers.LlamaConfig(**{**SHAPES, **fields})


def _rope(rope_type: str, theta: float = 500.0, **fields) -> dict:
    return {"rope_type": rope_type, "rope_theta": theta, **fields}


CONFIGS = {
    "llama3": lambda: _llama(rope_parameters=_rope("llama3", factor=8.0, **LLAMA3)),
    "llama-tied-biased": lambda: _llama(tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama-linear": lambda: _llama(rope_parameters=_rope("linear", factor=4.0)),
    # 24 tokens in a context of 16: the frequencies do stretch
    "llama-dynamic": lambda: _llama(max_position_embeddings=16, rope_parameters=_rope("dynamic", factor=4.0)),
    "llama-yarn": lambda: _llama(
        rope_parameters=_rope("yarn", 10000.0, factor=4.0, original_max_position_embeddings=16, beta_fast=8)
    ),
    "llama-gelu": lambda: _llama(hidden_act="gelu", num_key_value_heads=1, head_dim=12),
    "mistral": lambda: transformers.MistralConfig(**SHAPES, sliding_window=5, head_dim=16),
    "qwen2": lambda: transformers.Qwen2Config(**SHAPES, tie_word_embeddings=True),
    "qwen2-windows": lambda: transformers.Qwen2Config(
        **SHAPES, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPES, head_dim=16),
    # Layers of both kinds, the global ones with a rotary embedding of their own; 24 tokens are more than the window.
    "gemma2": lambda: transformers.Gemma2Config(**SHAPES, head_dim=16, query_pre_attn_scalar=8, sliding_window=5),
    "gemma3": lambda: transformers.Gemma3TextConfig(**GEMMA3),
    "mixtral": lambda: transformers.MixtralConfig(**SHAPES, num_local_experts=5, num_experts_per_tok=2),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(
        **SHAPES, head_dim=16, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=24, norm_topk_prob=True
    ),
    "qwen3-moe-gates": lambda: transformers.Qwen3MoeConfig(  # gates that do not sum up to 1, and a window
        **SHAPES,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=40,
        norm_topk_prob=False,
        use_sliding_window=True,
        sliding_window=5,
    ),
}


@functools.cache
def torch_model(name: str) -> torch.nn.Module:
    """The model, with weights large enough that every part of it shows in the logits."""
    config = CONFIGS[name]()
    config._attn_implementation = "eager"
    return _drawn(transformers.AutoModelForCausalLM.from_config(config))


def gemma_with_images() -> torch.nn.Module:
    """A Gemma 3 that reads images too."""
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config={**GEMMA3, "num_hidden_layers": 3, "final_logit_softcapping": None},  # which this class ignores
        vision_config={**vision, "image_size": 28, "patch_size": 14, "vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_index=95,
    )
    return _drawn(transformers.Gemma3ForConditionalGeneration(config))


def _drawn(model: torch.nn.Module) -> torch.nn.Module:
    model = model.eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.2 * noise + (1.0 if "norm" in path else 0.0))
    return model


@functools.cache
def checkpoint(name: str) -> Path:
    """The directory in which transformers saved the model."""
    directory = Path(tempfile.mkdtemp(prefix=f"tiny-{name}-"))
    torch_model(name).save_pretrained(directory)
    return directory


def torch_logits(model: torch.nn.Module, tokens) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.as_tensor(tokens)).logits.numpy()
