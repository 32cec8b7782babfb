"""What a decoder is: one frozen, hashable description, read from and written to a Hugging Face `config.json`."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jaxft.errors import JaxftError, nearest

ARCHITECTURES = {
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
MODEL_TYPES = tuple(ARCHITECTURES)
MIXTURES = ("mixtral", "qwen3_moe")  # those with experts in every layer
GEMMAS = ("gemma2", "gemma3_text")
WRAPPERS = {"gemma3": "gemma3_text"}  # a model of text and images -> the language model in it, its `text_config`
ATTENTION_BIASES = ("llama", "qwen3", "qwen3_moe", *GEMMAS)  # with the key attention_bias: on all four projections
LAYER_KINDS = ("full_attention", "sliding_attention")
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "relu", "silu")
_ACTIVATION_ALIASES = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh"}


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: the base `theta` and how its frequencies are stretched.

    `type` is one of `ROPE_TYPES`. `factor` and the other fields mean what they mean in Hugging Face configs
    (`rope_scaling`, or `rope_parameters` since transformers 5) and keep their defaults where the type has no use for
    them. `original_max_position_embeddings` is the context before stretching.
    """

    theta: float = 10000.0
    type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 2048
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


_ROPE_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
_ROPE_MAY_HAVE = {"yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shapes and features of a decoder-only transformer (Llama 2/3, Mistral, Qwen2/3, Gemma 2/3, Mixtral, Qwen3-MoE).

    `hidden_size` D, `intermediate_size` F, `num_heads` H query heads and `num_kv_heads` K key/value heads of
    `head_dim` Dh channels, `num_layers` L, `vocab_size` V. `sliding_layers[l]` says whether layer l attends to the last
    `sliding_window` positions only; those layers rotate by `sliding_rope` where it is not None, the others by `rope`.

    A norm multiplies by `norm_offset` plus its scale. With `post_norms` what attention and MLP add to the residual
    stream is normalised, too. `scale_embeddings` multiplies embeddings by the square root of D. Attention scores are
    multiplied by `query_pre_attn_scalar` (None: Dh) to the power of -1/2. A soft cap c makes `c tanh(x / c)` of the
    scores of attention (`attn_logit_softcapping`) or of the head (`final_logit_softcapping`).

    With `num_experts` above 0 every layer has a mixture of experts of width `moe_intermediate_size` in the place of its
    MLP, `num_experts_per_token` of which see a token, weighed by router probabilities that sum up to 1 if
    `norm_topk_prob`. `router_aux_loss_coef` times the load-balancing loss is added to the training loss if
    `output_router_logits`, as in transformers.

    Raises JaxftError for impossible shapes.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    hidden_act: str = "silu"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_offset: float = 0.0
    post_norms: bool = False
    scale_embeddings: bool = False
    query_pre_attn_scalar: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] = ()
    sliding_rope: RopeConfig | None = None
    tie_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    num_experts: int = 0
    num_experts_per_token: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True
    router_aux_loss_coef: float = 0.0
    output_router_logits: bool = False

    def __post_init__(self) -> None:
        if self.model_type not in MODEL_TYPES:
            raise JaxftError(
                f'model_type "{self.model_type}" is not supported: {nearest(self.model_type, MODEL_TYPES)}'
            )
        if self.hidden_act not in ACTIVATIONS:
            raise JaxftError(
                f'hidden_act "{self.hidden_act}" is not supported: {nearest(self.hidden_act, ACTIVATIONS)}'
            )
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
            if getattr(self, name) < 1:
                raise JaxftError(f"{name} is {getattr(self, name)}: expected at least 1")
        if self.num_heads % self.num_kv_heads:
            raise JaxftError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}: "
                "every key/value head must serve the same number of query heads"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise JaxftError(f"head_dim is {self.head_dim}: rotary embeddings need an even number of channels")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise JaxftError(f"sliding_window is {self.sliding_window}: expected at least 1, or null for none")
        if self.num_experts or self.model_type in MIXTURES:
            if self.model_type not in MIXTURES:
                raise JaxftError(f"a {self.model_type} has no experts: num_experts is {self.num_experts}, expected 0")
            if not 1 <= self.num_experts_per_token <= self.num_experts or self.moe_intermediate_size < 1:
                raise JaxftError(
                    f"num_experts {self.num_experts}, num_experts_per_token {self.num_experts_per_token}, "
                    f"moe_intermediate_size {self.moe_intermediate_size}: expected at least 1 of each, and no more "
                    "experts for a token than there are"
                )
        sliding = self.sliding_layers or (self.sliding_window is not None,) * self.num_layers
        if len(sliding) != self.num_layers:
            raise JaxftError(f"sliding_layers names {len(sliding)} layers, the model has {self.num_layers}")
        if any(sliding) and self.sliding_window is None:
            raise JaxftError("sliding_layers names sliding layers but sliding_window is null")
        for name in ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise JaxftError(f"{name} is {getattr(self, name)}: expected more than 0, or null for none")
        # What no layer uses means nothing: one way to write one model keeps configs comparable.
        own_rope = self.sliding_rope if any(sliding) and self.sliding_rope != self.rope else None
        object.__setattr__(self, "sliding_layers", tuple(sliding))
        object.__setattr__(self, "sliding_window", self.sliding_window if any(sliding) else None)
        object.__setattr__(self, "sliding_rope", own_rope)

    @property
    def attention_scale(self) -> float:
        """What attention scores are multiplied by."""
        return (self.query_pre_attn_scalar or self.head_dim) ** -0.5

    def replace(self, **fields: Any) -> "DecoderConfig":
        return dataclasses.replace(self, **fields)


def _ropes_from_huggingface(
    config: Mapping[str, Any], max_position_embeddings: int
) -> tuple[RopeConfig, RopeConfig | None]:
    """The rotary embedding of all layers, and that of the sliding ones where the model type has two."""
    if config["model_type"] != "gemma3_text":
        return _rope_from_huggingface(config, max_position_embeddings), None
    by_kind = config.get("rope_parameters") or {}
    if unknown := sorted(set(by_kind) - set(LAYER_KINDS)):
        raise JaxftError(
            f"rope_parameters of a gemma3_text holds {', '.join(unknown)}: expected {' and '.join(LAYER_KINDS)}"
        )
    ropes = {
        "full_attention": {"rope_scaling": config.get("rope_scaling"), "rope_theta": config.get("rope_theta")},
        "sliding_attention": {"rope_theta": config.get("rope_local_base_freq")},
    }
    full, sliding = (
        _rope_from_huggingface({**ropes[kind], "rope_parameters": by_kind.get(kind)}, max_position_embeddings)
        for kind in LAYER_KINDS
    )
    return full, sliding


def _rope_from_huggingface(config: Mapping[str, Any], max_position_embeddings: int) -> RopeConfig:
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope_type = parameters.get("rope_type") or parameters.get("type") or "default"
    if any(isinstance(entry, Mapping) for entry in parameters.values()):
        raise JaxftError("rope_parameters holds one entry per layer type; only one for all layers is supported")
    if rope_type not in ROPE_TYPES:
        raise JaxftError(f'rope_type "{rope_type}" is not supported: {nearest(rope_type, ROPE_TYPES)}')
    partial = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise JaxftError(f"partial_rotary_factor {partial} is not supported: expected 1.0 (all channels rotate)")
    theta = parameters.get("rope_theta") or config.get("rope_theta") or 10000.0
    known = (*_ROPE_NEEDS[rope_type], *_ROPE_MAY_HAVE.get(rope_type, ()))
    fields = {name: parameters[name] for name in known if parameters.get(name) is not None}
    if rope_type in ("llama3", "yarn"):
        original = config.get("original_max_position_embeddings") or max_position_embeddings
        fields.setdefault("original_max_position_embeddings", original)
    if rope_type == "yarn":
        fields.setdefault("factor", max_position_embeddings / fields["original_max_position_embeddings"])
        fields["truncate"] = bool(parameters.get("truncate", True))
    missing = [name for name in _ROPE_NEEDS[rope_type] if name not in fields]
    if missing:
        raise JaxftError(f'rope_parameters of rope_type "{rope_type}" lacks {", ".join(missing)}')
    return RopeConfig(theta=float(theta), type=rope_type, **fields)


def _rope_to_huggingface(rope: RopeConfig) -> dict[str, Any]:
    names = (*_ROPE_NEEDS[rope.type], *_ROPE_MAY_HAVE.get(rope.type, ()))
    parameters = {name: getattr(rope, name) for name in names if getattr(rope, name) is not None}
    parameters |= {"rope_theta": rope.theta, "rope_type": rope.type}
    return parameters if rope.truncate else parameters | {"truncate": False}


def _token_ids(entry: int | list[int] | None) -> tuple[int, ...]:
    if entry is None:
        return ()
    return tuple(int(token) for token in entry) if isinstance(entry, (list, tuple)) else (int(entry),)


def _sliding_from_huggingface(config: Mapping[str, Any], num_layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """The window and which layers use it. Mistral, Mixtral, Qwen3-MoE: all; Qwen: those from `max_window_layers` on, or
    `layer_types`; Gemma: `layer_types`, or all but every `sliding_window_pattern`-th."""
    model_type = config["model_type"]
    window = config.get("sliding_window", None if model_type == "mixtral" else 4096)
    if model_type == "llama" or (window is None and model_type not in GEMMAS):
        return None, ()
    if window is None:
        raise JaxftError(f"sliding_window of a {model_type} model is null: expected how many positions its layers see")
    if model_type in ("mistral", "mixtral"):
        return int(window), (True,) * num_layers
    if model_type not in GEMMAS and not config.get("use_sliding_window", False):
        return None, ()
    if model_type == "qwen3_moe":
        return int(window), (True,) * num_layers
    types = config.get("layer_types")
    if types is not None:
        unknown = set(types) - set(LAYER_KINDS)
        if unknown:
            raise JaxftError(f"layer_types holds {sorted(unknown)}: supported are {', '.join(LAYER_KINDS)}")
        return int(window), tuple(kind == "sliding_attention" for kind in types)
    if model_type in GEMMAS:
        period = int(config["sliding_window_pattern"])
        return int(window), tuple((layer + 1) % period > 0 for layer in range(num_layers))
    first = int(config.get("max_window_layers", 28))
    return int(window), tuple(layer >= first for layer in range(num_layers))


def _mixture_from_huggingface(config: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """The fields of a mixture of experts. A scanned stack has layers of one kind: all of them are mixtures."""
    model_type = config["model_type"]
    if model_type not in MIXTURES:
        return {}
    shared = {
        "router_aux_loss_coef": float(config.get("router_aux_loss_coef", 0.001)),
        "output_router_logits": bool(config.get("output_router_logits", False)),
    }
    if model_type == "mixtral":
        if config.get("router_jitter_noise"):
            raise JaxftError(f"router_jitter_noise {config['router_jitter_noise']} is not supported: expected 0.0")
        return shared | {
            "num_experts": int(config.get("num_local_experts", 8)),
            "num_experts_per_token": int(config.get("num_experts_per_tok", 2)),
            "moe_intermediate_size": int(config.get("intermediate_size", 14336)),
        }
    step, dense = int(config.get("decoder_sparse_step", 1)), set(config.get("mlp_only_layers") or ())
    plain = [layer for layer in range(num_layers) if layer in dense or (layer + 1) % step]
    if plain:
        raise JaxftError(
            f"decoder_sparse_step {step} and mlp_only_layers {sorted(dense)} make {len(plain)} of {num_layers} layers "
            f"plain MLPs (layer {plain[0]} first): the layers of a scanned stack are all alike, so expected "
            "decoder_sparse_step 1 and mlp_only_layers []"
        )
    return shared | {
        "num_experts": int(config.get("num_experts") or config.get("num_local_experts") or 128),
        "num_experts_per_token": int(config.get("num_experts_per_tok", 8)),
        "moe_intermediate_size": int(config.get("moe_intermediate_size", 768)),
        "norm_topk_prob": bool(config.get("norm_topk_prob", False)),
    }


_GEMMA_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma2": {
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "sliding_window_pattern": 2,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "sliding_window_pattern": 6,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
    },
}
_GEMMA_SHARED_DEFAULTS = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def _gemma_from_huggingface(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields in which the Gemma family differs from the others."""
    model_type = config["model_type"]
    if model_type not in GEMMAS:
        return {}
    if config.get("use_bidirectional_attention"):
        raise JaxftError("use_bidirectional_attention is true: only causal attention is supported")
    softcap = config.get("attn_logit_softcapping")
    if softcap is not None and model_type != "gemma2":
        raise JaxftError(
            f"attn_logit_softcapping {softcap} is not supported for {model_type}, where transformers reads it "
            "but does not apply it: expected null"
        )
    return {
        "norm_offset": 1.0,
        "post_norms": True,
        "scale_embeddings": True,
        "query_pre_attn_scalar": config["query_pre_attn_scalar"],
        "attn_logit_softcapping": softcap,
        "final_logit_softcapping": config.get("final_logit_softcapping"),
    }


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the language model in a model of text and images; other configs as they are."""
    inner = WRAPPERS.get(str(config.get("model_type")))
    if inner is None:
        return config
    if not isinstance(config.get("text_config"), Mapping):
        raise JaxftError(f"config.json of a {config['model_type']} model lacks text_config")
    shared = ("bos_token_id", "eos_token_id", "pad_token_id", "quantization_config", "tie_word_embeddings")
    outer = {name: config[name] for name in shared if config.get(name) is not None}
    return {**config["text_config"], **outer, "model_type": inner}


def from_huggingface(config: Mapping[str, Any]) -> DecoderConfig:
    """A `DecoderConfig` from the contents of a Hugging Face `config.json`.

    Reads both spellings of the rotary parameters (`rope_parameters`, or `rope_theta` + `rope_scaling`). Defaults of
    absent keys are those of transformers for the model type. Of a model of text and images (`gemma3`) the language
    model is described, which is of a type of its own (`gemma3_text`). Raises JaxftError naming the key for an unknown
    `model_type`, for a feature that is not supported, and for a required key that is absent.
    """
    config = _text_config(config)
    model_type = config.get("model_type")
    if model_type in GEMMAS:
        config = {**_GEMMA_SHARED_DEFAULTS, **_GEMMA_DEFAULTS[model_type], **config}
    if model_type not in MODEL_TYPES:
        raise JaxftError(f'model_type "{model_type}" is not supported: {nearest(str(model_type), MODEL_TYPES)}')
    if config.get("quantization_config"):
        raise JaxftError("quantization_config: quantised checkpoints are not supported; load the unquantised weights")
    if config.get("attention_dropout"):
        raise JaxftError(f"attention_dropout {config['attention_dropout']} is not supported: expected 0.0")

    def need(name: str) -> Any:
        if config.get(name) is None:
            raise JaxftError(f"config.json of a {model_type} model lacks {name}")
        return config[name]

    num_heads, hidden_size = int(need("num_attention_heads")), int(need("hidden_size"))
    num_layers = int(need("num_hidden_layers"))
    defaults = {"mistral": 131072, "mixtral": 131072, "qwen3_moe": 32768}
    max_positions = int(config.get("max_position_embeddings", defaults.get(model_type, 2048)))
    head_dim = config.get("head_dim")
    if head_dim is None:
        if hidden_size % num_heads and model_type != "qwen3":
            raise JaxftError(f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}")
        head_dim = 128 if model_type == "qwen3" else hidden_size // num_heads
    default_kv_heads = {"mistral": 8, "mixtral": 8, "qwen3_moe": 4}.get(model_type, num_heads)
    kv_heads = config.get("num_key_value_heads") or default_kv_heads
    activation = config.get("hidden_activation") or config.get("hidden_act", "silu")
    window, sliding_layers = _sliding_from_huggingface(config, num_layers)
    rope, sliding_rope = _ropes_from_huggingface(config, max_positions)
    bias = bool(config.get("attention_bias", False)) and model_type in ATTENTION_BIASES
    return DecoderConfig(
        model_type=model_type,
        vocab_size=int(need("vocab_size")),
        hidden_size=hidden_size,
        intermediate_size=int(need("intermediate_size")),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=int(kv_heads),
        head_dim=int(head_dim),
        max_position_embeddings=max_positions,
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-5 if model_type == "mixtral" else 1e-6)),
        rope=rope,
        hidden_act=_ACTIVATION_ALIASES.get(activation, activation),
        qkv_bias=bias or model_type == "qwen2",
        output_bias=bias,
        mlp_bias=bool(config.get("mlp_bias", False)) and model_type == "llama",
        qk_norm=model_type in ("qwen3", "qwen3_moe", "gemma3_text"),
        sliding_window=window,
        sliding_layers=sliding_layers,
        sliding_rope=sliding_rope,
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        initializer_range=float(config.get("initializer_range", 0.02)),
        bos_token_id=config.get("bos_token_id"),
        eos_token_ids=_token_ids(config.get("eos_token_id")),
        pad_token_id=config.get("pad_token_id"),
        **_mixture_from_huggingface(config, num_layers),
        **_gemma_from_huggingface(config),
    )


def to_huggingface(config: DecoderConfig, dtype: str) -> dict[str, Any]:
    """The contents of the `config.json` that describes `config`, with tensors of `dtype` ("float32", "bfloat16", ...).

    Rotary parameters are written in both spellings, so that transformers 4 and 5 read the same model.
    """
    eos = config.eos_token_ids
    rope = _rope_to_huggingface(config.rope)
    scaling = {key: entry for key, entry in rope.items() if key != "rope_theta"}
    result = {
        "architectures": [ARCHITECTURES[config.model_type]],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": config.hidden_act,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "rope_scaling": None if config.rope.type == "default" else scaling,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        "attention_dropout": 0.0,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else (list(eos) or None),
        "pad_token_id": config.pad_token_id,
        "use_cache": True,
        "torch_dtype": dtype,
        "dtype": dtype,
    }
    if config.model_type in ATTENTION_BIASES:
        result["attention_bias"] = config.qkv_bias
    if config.model_type == "llama":
        result["mlp_bias"] = config.mlp_bias
    if config.model_type in ("mistral", "mixtral"):
        result["sliding_window"] = config.sliding_window
    if config.num_experts:
        result |= {
            "num_experts_per_tok": config.num_experts_per_token,
            "router_aux_loss_coef": config.router_aux_loss_coef,
            "output_router_logits": config.output_router_logits,
        }
    if config.model_type == "mixtral":
        result |= {"num_local_experts": config.num_experts, "router_jitter_noise": 0.0}
    if config.model_type == "qwen3_moe":
        result |= {
            "num_experts": config.num_experts,
            "moe_intermediate_size": config.moe_intermediate_size,
            "norm_topk_prob": config.norm_topk_prob,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "use_sliding_window": config.sliding_window is not None,
            "sliding_window": config.sliding_window,
        }
    if config.model_type in ("qwen2", "qwen3"):
        first = config.sliding_layers.index(True) if any(config.sliding_layers) else config.num_layers
        result |= {
            "use_sliding_window": config.sliding_window is not None,
            "sliding_window": config.sliding_window,
            "max_window_layers": first,
            "layer_types": [LAYER_KINDS[sliding] for sliding in config.sliding_layers],
        }
    if config.model_type in GEMMAS:
        result |= {
            "hidden_activation": config.hidden_act,
            "query_pre_attn_scalar": config.query_pre_attn_scalar or config.head_dim,
            "attn_logit_softcapping": config.attn_logit_softcapping,
            "final_logit_softcapping": config.final_logit_softcapping,
            "sliding_window": config.sliding_window or 4096,  # never null, though no layer may slide
            "layer_types": [LAYER_KINDS[sliding] for sliding in config.sliding_layers],
        }
    if config.model_type == "gemma3_text":
        sliding = config.sliding_rope or config.rope
        result |= {
            "rope_parameters": {"full_attention": rope, "sliding_attention": _rope_to_huggingface(sliding)},
            "rope_local_base_freq": sliding.theta,
        }
    return result


def holding_biases(config: DecoderConfig, biased: frozenset[str]) -> DecoderConfig:
    """The config that describes `config`'s model with biases on the projections `biased` ("attn.q", "mlp.down", ...).

    Flags are all or nothing in Hugging Face configs, so projections without a bias get one (to be written as zeros).
    A model type which cannot hold the biases becomes `llama` where that is the same function; otherwise JaxftError.
    """
    qkv = config.qkv_bias or bool(biased & {"attn.q", "attn.k", "attn.v"})
    output = config.output_bias or "attn.o" in biased
    mlp = config.mlp_bias or bool(biased & {"mlp.gate", "mlp.up", "mlp.down"})
    unknown = biased - {"attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down"}
    if unknown:
        raise JaxftError(f"no Hugging Face model type holds a bias on {', '.join(sorted(unknown))}")
    own = {
        "llama": True,
        "qwen3": not mlp,
        "qwen2": not (output or mlp),
        "mistral": not (qkv or output or mlp),
        "mixtral": not (qkv or output or mlp),
        "qwen3_moe": not mlp,
        "gemma2": not mlp,
        "gemma3_text": not mlp,
    }[config.model_type]
    if own:
        both = config.model_type in ATTENTION_BIASES and (qkv or output)
        return config.replace(qkv_bias=qkv or both, output_bias=output or both, mlp_bias=mlp)
    window = config.sliding_window
    lacks = [("experts", config.num_experts), ("norms after attention and MLP", config.post_norms)]
    lacks.append(("q_norm and k_norm", config.qk_norm))
    lacks.append((f"sliding window of {window}", window is not None and window < config.max_position_embeddings))
    reason = next((what for what, there in lacks if there), None)
    if reason:
        raise JaxftError(
            f"{config.model_type} cannot hold biases on {', '.join(sorted(biased))}, "
            f"and llama, which can, has no {reason}: train without biases there, or export the delta only"
        )
    if config.hidden_size % config.num_heads:
        raise JaxftError(
            f"{config.model_type} cannot hold biases on {', '.join(sorted(biased))}, and llama, which can, needs "
            f"hidden_size {config.hidden_size} to be a multiple of num_heads {config.num_heads}"
        )
    attention = qkv or output
    return config.replace(
        model_type="llama",
        sliding_window=None,
        sliding_layers=(),
        qkv_bias=attention,
        output_bias=attention,
        mlp_bias=mlp,
    )


def yarn_attention_factor(rope: RopeConfig) -> float:
    """The factor on cos and sin in YaRN (https://arxiv.org/abs/2309.00071, section 3.4: 0.1 ln(s) + 1)."""

    def scale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)
