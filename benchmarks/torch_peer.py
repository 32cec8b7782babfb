"""The peer of the benchmarks: transformers' Llama with random weights, peft's LoRA, a plain PyTorch training loop.

The loop is what a careful user writes: fused AdamW, gradients of what trains only, clipping, scaled dot product
attention, bfloat16 weights on a GPU, and `torch.compile` where asked for. Nothing else in the repository needs torch.
"""

import contextlib
import os
from collections.abc import Callable
from typing import Any

from jobs import Job, decoder_config

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def prepare(job: Job) -> tuple[Callable[[], float], dict[str, Any]]:
    """`(step, facts)`: a function that makes one training step and returns its loss, and what is known before it."""
    import torch
    import transformers

    from jaxft.models.config import to_huggingface

    device = torch.device("cuda" if job.device == "gpu" else "cpu")
    if job.device == "gpu" and not torch.cuda.is_available():
        raise RuntimeError("PyTorch has no GPU here")
    if job.threads:
        torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, job.dtype)
    shapes = to_huggingface(decoder_config(job.model), job.dtype)
    config = transformers.LlamaConfig(**{k: v for k, v in shapes.items() if k not in ("architectures", "model_type")})
    config.use_cache = False
    with device, _default_dtype(torch, dtype):
        model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="sdpa", dtype=dtype)
    model.train()
    if job.method == "lora":
        import peft

        lora = peft.LoraConfig(r=job.rank, lora_alpha=2 * job.rank, target_modules=TARGETS, lora_dropout=0.0)
        model = peft.get_peft_model(model, lora)
    elif job.method == "hft":
        freeze_half(model)
    if job.remat == "block":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if job.method == "lora":
            model.enable_input_require_grads()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=1e-4, fused=True)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, config.vocab_size, (job.batch, job.seq_len + 1), generator=generator).to(device)
    tokens, targets = rows[:, :-1].contiguous(), rows[:, 1:].reshape(-1)

    # peft keeps its factors in float32 and, without this, runs their products in it.
    casts = job.method == "lora" and dtype != torch.float32

    def loss_of(tokens: Any, targets: Any) -> Any:
        with torch.autocast(device.type, dtype, enabled=casts):
            logits = model(input_ids=tokens).logits
        return torch.nn.functional.cross_entropy(logits.view(-1, logits.shape[-1]).float(), targets)

    forward = torch.compile(loss_of) if job.compile else loss_of

    def step() -> float:
        loss = forward(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()  # waits for the device

    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": sum(p.numel() for p in trained),
        "device": torch.cuda.get_device_name() if job.device == "gpu" else "cpu",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "peak_bytes": torch.cuda.max_memory_allocated if job.device == "gpu" else None,
    }
    return step, facts


@contextlib.contextmanager
def _default_dtype(torch: Any, dtype: Any) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def freeze_half(model: Any) -> None:
    """HFT by `requires_grad`, in the proportions of `jaxft.methods.hft`: two of four attention matrices a layer, one or
    two of three feed-forward matrices in turn, one of two norms, the embedding but not the head, not the final norm.

    Which half it is does not matter to the time of a step; over the layers every matrix trains in half of them. A tied
    table trains whole, where jaxft trains half of its rows: `requires_grad` knows no rows.
    """
    attention = [("q_proj", "k_proj"), ("v_proj", "o_proj"), ("k_proj", "v_proj"), ("q_proj", "o_proj")]
    feed_forward = [("gate_proj", "up_proj"), ("down_proj",), ("up_proj",), ("gate_proj", "down_proj")]
    norms = ["input_layernorm", "post_attention_layernorm"]
    for name, parameter in model.named_parameters():
        if ".layers." in name:
            layer = int(name.split(".layers.")[1].split(".")[0])
            chosen = (*attention[layer % 4], *feed_forward[layer % 4], norms[layer % 2])
            parameter.requires_grad_(name.split(".")[-2] in chosen)
        else:
            parameter.requires_grad_("embed_tokens" in name)


if not os.environ.get("HF_HUB_OFFLINE"):
    os.environ["HF_HUB_OFFLINE"] = "1"  # only code of transformers is used here, nothing of the hub
