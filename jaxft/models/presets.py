"""Shapes of well-known models, from their published config.json. Weights are not part of a preset.

Sources: the config.json of meta-llama/Llama-2-*, Meta-Llama-3-*, Llama-3.1-*, Llama-3.2-*, mistralai/Mistral-*,
mistralai/Mixtral-*, Qwen/Qwen2.5-*, Qwen/Qwen3-*, google/gemma-2-* and google/gemma-3-* on huggingface.co (those of
Gemma 3 checked against transformers' models/gemma3/convert_gemma3_weights.py).
"""

import functools
from typing import Any

from jaxft.errors import JaxftError, nearest
from jaxft.models.config import DecoderConfig, RopeConfig


def _llama2(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> DecoderConfig:
    return DecoderConfig(
        model_type="llama",
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_ids=(2,),
    )


def _llama3(
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    *,
    kv_heads: int = 8,
    factor: float | None = 8.0,
    tied: bool = False,
) -> DecoderConfig:
    """Llama 3 (`factor=None`: 8192 positions), 3.1 (rotary factor 8) and 3.2 (factor 32, tied): 131072 positions."""
    stretched = RopeConfig(
        theta=500000.0,
        type="llama3",
        factor=factor or 1.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    return DecoderConfig(
        model_type="llama",
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        max_position_embeddings=8192 if factor is None else 131072,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=500000.0) if factor is None else stretched,
        tie_embeddings=tied,
        bos_token_id=128000,
        eos_token_ids=(128001,),
    )


def _mistral(
    *, vocab: int, theta: float, window: int | None = None, hidden: int = 4096, layers: int = 32, positions: int = 32768
) -> DecoderConfig:
    return DecoderConfig(
        model_type="mistral",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=14336,
        num_layers=layers,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_position_embeddings=positions,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=theta),
        sliding_window=window,
        bos_token_id=1,
        eos_token_ids=(2,),
    )


def _qwen2(
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    *,
    vocab: int = 151936,
    positions: int = 32768,
    epsilon: float = 1e-6,
    tied: bool = False,
) -> DecoderConfig:
    return DecoderConfig(
        model_type="qwen2",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        max_position_embeddings=positions,
        rms_norm_eps=epsilon,
        rope=RopeConfig(theta=1000000.0),
        qkv_bias=True,
        tie_embeddings=tied,
        bos_token_id=151643,
        eos_token_ids=(151643,),
    )


def _qwen3(
    hidden: int, intermediate: int, layers: int, heads: int, *, kv_heads: int = 8, tied: bool = False
) -> DecoderConfig:
    return DecoderConfig(
        model_type="qwen3",
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=128,
        max_position_embeddings=40960,
        rms_norm_eps=1e-6,
        rope=RopeConfig(theta=1000000.0),
        qk_norm=True,
        tie_embeddings=tied,
        bos_token_id=151643,
        eos_token_ids=(151645,),
    )


_MIXTRAL_8X7B = DecoderConfig(
    model_type="mixtral",
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_position_embeddings=32768,
    rms_norm_eps=1e-5,
    rope=RopeConfig(theta=1000000.0),
    bos_token_id=1,
    eos_token_ids=(2,),
    num_experts=8,
    num_experts_per_token=2,
    moe_intermediate_size=14336,
    router_aux_loss_coef=0.02,
)


def _qwen3_moe(hidden: int, intermediate: int, expert: int, layers: int, heads: int, kv_heads: int) -> DecoderConfig:
    dense = _qwen3(hidden, intermediate, layers, heads, kv_heads=kv_heads)
    return dense.replace(
        model_type="qwen3_moe",
        num_experts=128,
        num_experts_per_token=8,
        moe_intermediate_size=expert,
        norm_topk_prob=True,
        router_aux_loss_coef=0.001,
    )


def _gemma(
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    *,
    period: int,
    window: int,
    scalar: int = 256,
    head_dim: int = 256,
    **fields: Any,
) -> DecoderConfig:
    """All layers but every `period`-th see a window."""
    return DecoderConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=1e-6,
        hidden_act="gelu_pytorch_tanh",
        norm_offset=1.0,
        post_norms=True,
        scale_embeddings=True,
        query_pre_attn_scalar=scalar,
        sliding_window=window,
        sliding_layers=tuple((layer + 1) % period > 0 for layer in range(layers)),
        tie_embeddings=True,
        bos_token_id=2,
        eos_token_ids=(1,),
        pad_token_id=0,
        **fields,
    )


_gemma2 = functools.partial(
    _gemma,
    model_type="gemma2",
    vocab_size=256000,
    max_position_embeddings=8192,
    period=2,
    window=4096,
    attn_logit_softcapping=50.0,
    final_logit_softcapping=30.0,
)
_gemma3_text = functools.partial(
    _gemma,
    model_type="gemma3_text",
    vocab_size=262144,
    max_position_embeddings=32768,
    period=6,
    window=512,
    qk_norm=True,
    rope=RopeConfig(theta=1000000.0),
    sliding_rope=RopeConfig(theta=10000.0),
)
_gemma3 = functools.partial(  # the language model of those that read images: 64 tokens more, none of them of text
    _gemma3_text,
    vocab_size=262208,
    max_position_embeddings=131072,
    window=1024,
    rope=RopeConfig(theta=1000000.0, type="linear", factor=8.0),
)

PRESETS: dict[str, DecoderConfig] = {
    "llama2-7b": _llama2(4096, 11008, 32, 32, 32),
    "llama2-13b": _llama2(5120, 13824, 40, 40, 40),
    "llama2-70b": _llama2(8192, 28672, 80, 64, 8),
    "llama3-8b": _llama3(4096, 14336, 32, 32, factor=None),
    "llama3-70b": _llama3(8192, 28672, 80, 64, factor=None),
    "llama3.1-8b": _llama3(4096, 14336, 32, 32),
    "llama3.1-70b": _llama3(8192, 28672, 80, 64),
    "llama3.1-405b": _llama3(16384, 53248, 126, 128),
    "llama3.2-1b": _llama3(2048, 8192, 16, 32, factor=32.0, tied=True),
    "llama3.2-3b": _llama3(3072, 8192, 28, 24, factor=32.0, tied=True),
    "mistral-7b-v0.1": _mistral(vocab=32000, theta=10000.0, window=4096),
    "mistral-7b-v0.2": _mistral(vocab=32000, theta=1000000.0),
    "mistral-7b-v0.3": _mistral(vocab=32768, theta=1000000.0),
    "mistral-nemo-12b": _mistral(vocab=131072, theta=1000000.0, hidden=5120, layers=40, positions=131072),
    "qwen2.5-0.5b": _qwen2(896, 4864, 24, 14, 2, tied=True),
    "qwen2.5-1.5b": _qwen2(1536, 8960, 28, 12, 2, positions=131072, tied=True),
    "qwen2.5-3b": _qwen2(2048, 11008, 36, 16, 2, tied=True),
    "qwen2.5-7b": _qwen2(3584, 18944, 28, 28, 4, vocab=152064, positions=131072),
    "qwen2.5-14b": _qwen2(5120, 13824, 48, 40, 8, vocab=152064, positions=131072, epsilon=1e-5),
    "qwen2.5-32b": _qwen2(5120, 27648, 64, 40, 8, vocab=152064, positions=131072, epsilon=1e-5),
    "qwen2.5-72b": _qwen2(8192, 29568, 80, 64, 8, vocab=152064, positions=131072, epsilon=1e-5),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, tied=True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, tied=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, tied=True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64),
    "qwen3-30b-a3b": _qwen3_moe(2048, 6144, 768, 48, 32, 4),
    "qwen3-235b-a22b": _qwen3_moe(4096, 12288, 1536, 94, 64, 4),
    "mixtral-8x7b": _MIXTRAL_8X7B,
    "gemma2-2b": _gemma2(2304, 9216, 26, 8, 4),
    "gemma2-9b": _gemma2(3584, 14336, 42, 16, 8),
    "gemma2-27b": _gemma2(4608, 36864, 46, 32, 16, head_dim=128, scalar=144),
    "gemma3-270m": _gemma3_text(640, 2048, 18, 4, 1),
    "gemma3-1b": _gemma3_text(1152, 6912, 26, 4, 1),
    "gemma3-4b": _gemma3(2560, 10240, 34, 8, 4),
    "gemma3-12b": _gemma3(3840, 15360, 48, 16, 8),
    "gemma3-27b": _gemma3(5376, 21504, 62, 32, 16, head_dim=128, scalar=168),
}


def preset(name: str) -> DecoderConfig:
    """The shapes of a well-known model, e.g. "llama3.1-8b". Raises JaxftError naming the nearest for other names."""
    if name not in PRESETS:
        raise JaxftError(f'no preset "{name}": {nearest(name, PRESETS)}')
    return PRESETS[name]
