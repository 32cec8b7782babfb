"""A tiny Llama of transformers with peft's adapters on it, and ours with the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import torch

from jaxft.hub import load_pretrained
from jaxft.training.loss import language_model_loss
from tests.tiny_models import checkpoint, torch_model

NAME = "llama3"
TOKENS = np.random.default_rng(3).integers(3, 96, (3, 4, 17))  # steps, rows, positions
PROJECTIONS = {f"attn.{m}": f"self_attn.{m}_proj" for m in "qkvo"} | {
    f"mlp.{m}": f"mlp.{m}_proj" for m in ("gate", "up", "down")
}


def ours():
    return load_pretrained(checkpoint(NAME), dtype=jnp.float32)


def theirs(config: peft.PeftConfig) -> peft.PeftModel:
    model = type(torch_model(NAME)).from_pretrained(checkpoint(NAME), attn_implementation="eager")
    return peft.get_peft_model(model, config).eval()


def to_torch(x) -> torch.Tensor:
    return torch.from_numpy(np.array(x, np.float32))


def torch_losses(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    """A step on each of `TOKENS`, with the loss of its next tokens (the last ones, where a prompt is in front)."""
    losses = []
    for batch in torch.as_tensor(TOKENS):
        logits = model(input_ids=batch[:, :-1]).logits[:, -(batch.shape[1] - 1) :]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def jax_losses(model, tuned, optimizer: optax.GradientTransformation):
    """The same with ours; also returns what was trained."""
    from jaxft.partition import combine

    loss_fn = language_model_loss(model, remat="none")

    @jax.jit
    def step(trainable, opt_state, batch):
        def mean(trainable):
            total, weight, _ = loss_fn(combine(tuned._replace(trainable=trainable)), batch, None)
            return total / weight

        loss, gradients = jax.value_and_grad(mean)(trainable)
        updates, opt_state = optimizer.update(gradients, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, loss

    trainable, opt_state, losses = tuned.trainable, optimizer.init(tuned.trainable), []
    for batch in jnp.asarray(TOKENS):
        arrays = {"tokens": batch[:, :-1], "targets": batch[:, 1:], "weights": jnp.ones(batch[:, 1:].shape)}
        trainable, opt_state, loss = step(trainable, opt_state, arrays)
        losses.append(float(loss))
    return losses, tuned._replace(trainable=trainable)


OPTIMIZERS = {
    "sgd": (lambda p: torch.optim.SGD(p, lr=0.05), optax.sgd(0.05)),
    "adamw": (
        lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1),
        optax.adamw(0.01, b1=0.9, b2=0.95, eps=1e-6, weight_decay=0.1),
    ),
}
