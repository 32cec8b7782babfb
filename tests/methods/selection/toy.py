"""A loss without a model, for what concerns selection alone: it moves every entry of every weight, each its own way."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxft.methods import Method, Probe, Signals, wrap_optimizer
from jaxft.partition import combine, weights_by_path
from jaxft.weights import materialize

KEY, STEPS, L, E = jax.random.key(4), 4, 4, 4
MATRICES = [f"layers.{m}.kernel" for m in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")]
# Alike, so that what works on one weight after the other is compiled once.
SHAPES = dict.fromkeys(MATRICES, (L, 8, 8)) | {
    "layers.attn_norm.scale": (L, 8),
    "layers.mlp_norm.scale": (L, 8),
    "final_norm.scale": (8,),
    "embed.embedding": (8, 8),
    "head.kernel": (8, 8),
}
EXPERTS = {f"layers.mlp.experts.{m}.kernel": (L, E, 8, 8) for m in ("gate", "up", "down")}


@functools.cache
def params(experts: bool = False) -> dict:
    rng, tree = np.random.default_rng(0), {}
    shapes = {p: s for p, s in SHAPES.items() if not (experts and ".mlp." in p)} | (EXPERTS if experts else {})
    for path, shape in shapes.items():
        *parents, leaf = path.split(".")
        here = tree
        for name in parents:
            here = here.setdefault(name, {})
        here[leaf] = jnp.asarray(rng.normal(size=shape), jnp.float32)
    return tree


def loss(tree, batch, rng):
    """Its gradient grows with the layer, eightfold from the first to the last, so that selections by it are uneven."""
    total = jnp.float32(0)
    for i, w in enumerate(weights_by_path(materialize(tree)).values()):
        depth = 2.0 ** jnp.arange(w.shape[0]) if w.shape[0] == L else jnp.ones(w.shape[0])
        total += jnp.sum(jnp.sin(3 * w + i + batch["t"]) * depth.reshape(-1, *(1,) * (w.ndim - 1)))
    return total, jnp.float32(1), {}


def batches() -> list[dict]:
    return [{"t": np.float32(t)} for t in range(STEPS)]


class Given(Probe):
    """Knows where tokens go without a router."""

    def gates(self, params, n=1):
        mass = jnp.asarray(np.random.default_rng(n).random((L, E)), jnp.float32)
        return mass, mass**2


PROBE = Given(
    loss_fn=loss,
    batches=lambda: iter(batches()),
    trainer=lambda given, method, steps: jax.tree.map(lambda w: w + jnp.sin(9 * w) * steps, given),
    total_steps=STEPS,
    sets={"illegal": lambda: iter(batches()[2:])},
)


@functools.partial(jax.jit, static_argnums=0)
def _step(optimizer, tuned, state, batch):
    def total(trainable):
        return loss(combine(tuned._replace(trainable=trainable)), batch, KEY)[0]

    updates, state = optimizer.update(jax.grad(total)(tuned.trainable), state, tuned.trainable)
    return tuned._replace(trainable=optax.apply_updates(tuned.trainable, updates)), state


ADAM = optax.adam(1e-2)


def train(method: Method, given: dict | None = None):
    """A few steps, with updates where they are due: the cut and the state of the optimizer after each."""
    assert method.gradients is None and method.penalty is None
    optimizer = wrap_optimizer(method, ADAM)
    tuned = method.init(KEY, params() if given is None else given, PROBE)
    state = optimizer.init(tuned.trainable)
    for i, batch in enumerate(batches(), start=1):
        tuned, state = _step(optimizer, tuned, state, batch)
        if method.due is not None and method.due(i, STEPS):
            signals = Signals(0.0, None, PROBE, optimizer=optimizer)
            tuned, state = method.update(jax.random.fold_in(KEY, i), tuned, state, signals, i)
        yield tuned, state


@jax.jit
def _dense(tuned):
    return materialize(combine(tuned))


def dense(tuned) -> dict[str, np.ndarray]:
    return {p: np.asarray(w) for p, w in weights_by_path(_dense(tuned)).items()}
