"""Tune a model that knows nothing of this library: any `apply_fn(params, x)` of Flax Linen (or NNX, or plain JAX).

Methods rewrite the parameter tree; `materialize` turns every weight node back into the array it means, so the model's
own `apply` runs unchanged, and gradients reach the trained parts only. Run: `python examples/linen_model.py`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import jaxft


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(2):
            x = nn.relu(nn.Dense(64)(x))
        return nn.Dense(4)(x)


def main(steps: int = 100) -> tuple[float, float]:
    model, rng = Classifier(), jax.random.key(0)
    x = jax.random.normal(rng, (256, 16))
    y = jnp.argmax(x @ jax.random.normal(jax.random.key(1), (16, 4)), axis=-1)
    params = model.init(rng, x)["params"]

    # The hidden layers get a low-rank update, the output layer trains whole.
    method = jaxft.chain(jaxft.lora(rank=4, on="Dense_{0,1}.kernel"), jaxft.full(on="Dense_2"))

    def loss(params: dict, batch: dict, rng: jax.Array) -> tuple[jax.Array, jax.Array, dict]:
        logits = model.apply({"params": jaxft.materialize(params)}, batch["x"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
        return losses.sum(), jnp.asarray(losses.size, jnp.float32), {}

    optimizer = optax.adamw(1e-2)
    tuned = method.init(rng, params, jaxft.Probe())
    opt_state = optimizer.init(tuned.trainable)

    @jax.jit
    def step(trainable: dict, opt_state: tuple) -> tuple:
        def mean(trainable: dict) -> jax.Array:
            total, count, _ = loss(jaxft.combine(tuned._replace(trainable=trainable)), {"x": x, "y": y}, rng)
            return total / count

        value, gradients = jax.value_and_grad(mean)(trainable)
        updates, opt_state = optimizer.update(gradients, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, value

    trainable, losses = tuned.trainable, []
    for _ in range(steps):
        trainable, opt_state, value = step(trainable, opt_state)
        losses.append(float(value))
    plain = jaxft.merge(tuned._replace(trainable=trainable))
    assert jax.tree.structure(plain) == jax.tree.structure(params), "merged: ordinary parameters of the same model"
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()
