"""The train step: one jitted function for every method, loss and model."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxft.distributed.mesh import torus_stages
from jaxft.errors import JaxftError
from jaxft.methods.base import Method, wrap_optimizer
from jaxft.models.sharding import platform
from jaxft.partition import Tuned, combine
from jaxft.training.compilation import Option, compiler_options
from jaxft.training.loss import Batch, Loss
from jaxft.training.offload import in_turns
from jaxft.training.state import TrainState, tuned_of
from jaxft.weights.memory import fetch, in_host_memory
from jaxft.weights.reduction import scattered_in
from jaxft.weights.training import in_training

Tree = Any
Metrics = dict[str, Any]
_GRADIENTS = 2**31 - 1  # the stream of random numbers of `Method.gradients`; micro-batches have those of their numbers
_WEIGHTS = 2**31 - 2  # the stream of weights that draw in a training step (dropout)
Schedule = Callable[[Array], Array]


class TrainStep(Protocol):
    """`(state, frozen, batch) -> (state, metrics)`, jitted."""

    def __call__(self, state: TrainState, frozen: Tree, batch: Batch, /) -> tuple[TrainState, Metrics]: ...

    def lower(self, state: TrainState, frozen: Tree, batch: Batch, /) -> Any:
        """The same for abstract arguments, to be compiled ahead of time."""
        ...


def micro_batches(batch: Batch, count: int) -> Batch:
    """Arrays `[rows, ...]` as `[count, rows / count, ...]`; micro-batch `i` has the rows `i, i + count, ...`.

    Strided, so that every device cuts the rows it holds and none is moved.

    Raises JaxftError if the rows do not divide.
    """
    if count == 1:
        return jax.tree.map(lambda x: x[None], batch)

    def cut(x: Array) -> Array:
        if x.shape[0] % count:
            raise JaxftError(f"training.accumulation = {count} does not divide a batch of {x.shape[0]} rows")
        return jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)

    return jax.tree.map(cut, batch)


def summed_gradients(
    loss: Loss, tuned: Tuned, batch: Batch, rng: Array, accumulation: int = 1, shardings: Tree | None = None
) -> tuple[Array, Array, dict[str, Array], Tree]:
    """`(sum of losses, sum of weights, sums of aux, gradient of the sum of losses)` over all micro-batches.

    The gradient is with respect to `tuned.trainable` only, float32 or wider. Micro-batches run one after the other and
    only sums outlive them. `shardings` (of the trainable leaves) keeps the sum divided as its parameters are.
    """

    def one(batch: Batch, rng: Array) -> tuple[Array, Array, dict[str, Array], Tree]:
        def of_trainable(trainable: Tree) -> tuple[Array, tuple]:
            params = in_training(combine(tuned._replace(trainable=trainable)), jax.random.fold_in(rng, _WEIGHTS))
            total, weight, aux = loss(params, batch, rng)
            return total, (weight, aux)

        (total, (weight, aux)), gradients = jax.value_and_grad(of_trainable, has_aux=True)(tuned.trainable)
        gradients = jax.tree.map(lambda g: g.astype(jnp.promote_types(g.dtype, jnp.float32)), gradients)
        if shardings is not None:
            gradients = jax.lax.with_sharding_constraint(gradients, shardings)
        return total.astype(jnp.float32), weight.astype(jnp.float32), aux, gradients

    if accumulation == 1:
        return one(batch, rng)
    pieces = micro_batches(batch, accumulation)

    def body(sums: tuple, inputs: tuple[Array, Batch]) -> tuple[tuple, None]:
        index, piece = inputs
        return jax.tree.map(jnp.add, sums, one(piece, jax.random.fold_in(rng, index))), None

    shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], pieces), rng)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    if shardings is not None:
        zeros = (*zeros[:3], jax.lax.with_sharding_constraint(zeros[3], shardings))
    return jax.lax.scan(body, zeros, (jnp.arange(accumulation), pieces))[0]


def _if_finite(finite: Array, update: Callable[..., tuple], gradients: Tree, old: tuple[Tree, Any]) -> tuple[Tree, Any]:
    """`update(gradients, *old)`, or `old` where the step is not finite.

    By a branch, since a selection between old and new leaves would keep both alive on a TPU: a copy of every moment. On
    a GPU it is the other way round: XLA copies all that a branch returns, and selects in place.
    """
    if platform() != "gpu" or any(map(in_host_memory, jax.tree.leaves(old))):
        return jax.lax.cond(finite, update, lambda gradients, *old: old, gradients, *old)
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), update(gradients, *old), old)


def make_train_step(
    loss: Loss,
    method: Method,
    optimizer: optax.GradientTransformation,
    *,
    accumulation: int = 1,
    clip_norm: float | None = None,
    schedule: Schedule | None = None,
    shardings: TrainState | None = None,
    options: Mapping[str, Option] = {},  # noqa: B006
    ahead: bool = False,
) -> TrainStep:
    """The jitted `(state, frozen, batch) -> (state, metrics)`; the state is donated.

    The loss is `sum of token losses / sum of token weights`, both over the *whole* batch (all micro-batches, all
    devices), plus the method's penalty. Only trainable leaves are differentiated, clipped and updated. A step whose
    loss or gradient is not finite leaves parameters and optimizer state as they were, and is counted.

    Args:
        loss: any `(params, batch, rng) -> (sum, weight, aux)` with `aux` a dict of additive scalars.
        method: its `batch`, `penalty` and `gradients` are applied here.
        optimizer: the same optax optimizer that `init_state` got.
        accumulation: micro-batches a batch is cut into.
        clip_norm: the largest global norm of the gradient of the trainable leaves; None does not clip.
        schedule: the learning rate by optimizer update, for the metrics only.
        shardings: `shardings_of(state)`; with it the next state stays where the first one was.
        options: of the compiler, beside those of `compilation.OPTIONS`.
        ahead: see `compilation.fetches_ahead`.

    Metrics are scalar arrays that stay on the devices: `loss` (the token mean), `penalty` (if the method has one),
    `grad_norm` (before clipping), `learning_rate` (if `schedule`), `weight`, `skipped` (0 or 1), and every sum in
    `aux`. If the method needs gradients, `gradients` holds the tree (before clipping).
    """
    if accumulation < 1:
        raise JaxftError(f"training.accumulation = {accumulation}: expected a positive number of micro-batches")
    optimizer = optax.with_extra_args_support(wrap_optimizer(method, optimizer))

    def train_step(state: TrainState, frozen: Tree, batch: Batch) -> tuple[TrainState, Metrics]:
        batch_rng, loss_rng = jax.random.split(jax.random.fold_in(state.rng, state.step))
        if method.batch is not None:
            batch = method.batch(batch_rng, batch)
        tuned = tuned_of(state, frozen)
        places = None if shardings is None else shardings.trainable
        total, weight, aux, gradients = summed_gradients(loss, tuned, batch, loss_rng, accumulation, places)
        share = 1 / jnp.where(weight == 0, 1, weight)  # a batch without targets: loss 0, gradient 0
        mean = total * share
        gradients = jax.tree.map(lambda g: g * share, gradients)
        metrics: Metrics = {**aux, "loss": mean, "weight": weight}
        objective = mean
        if method.penalty is not None:
            here = tuned._replace(frozen=fetch(frozen))
            penalty, extra = jax.value_and_grad(lambda t: method.penalty(here._replace(trainable=t)))(state.trainable)
            gradients = jax.tree.map(lambda g, e: g + e.astype(g.dtype), gradients, extra)
            metrics["penalty"] = penalty
            objective = mean + penalty
        norm = optax.tree.norm(gradients)
        metrics["grad_norm"] = norm
        if "gradients" in method.needs:
            metrics["gradients"] = gradients
        finite = jnp.isfinite(objective) & jnp.isfinite(norm)

        def update(gradients: Tree, trainable: Tree, opt_state: Any) -> tuple[Tree, Any]:
            if clip_norm is not None:
                scale = jnp.minimum(1, clip_norm / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny))
                gradients = jax.tree.map(lambda g: g * scale, gradients)
            extra = {"value": objective, "frozen": fetch(frozen), "rng": jax.random.fold_in(loss_rng, _GRADIENTS)}
            updates, moments = optimizer.update(gradients, opt_state, trainable, **extra)
            new = optax.apply_updates(trainable, updates), moments
            # Dtypes stay: float32 gradients would make bfloat16 moments float32, and the second step recompile.
            return jax.tree.map(
                lambda n, o: n if n.dtype == o.dtype else n.astype(o.dtype), new, (trainable, opt_state)
            )

        run = update if shardings is None else in_turns(update, shardings.opt_state)
        trainable, opt_state = _if_finite(finite, run, gradients, (state.trainable, state.opt_state))
        skipped = jnp.where(finite, 0, 1).astype(jnp.int32)
        metrics["skipped"] = skipped
        if schedule is not None:
            metrics["learning_rate"] = jnp.asarray(schedule(state.step - state.skipped), jnp.float32)
        state = state._replace(
            step=state.step + 1, trainable=trainable, opt_state=opt_state, skipped=state.skipped + skipped
        )
        return state, metrics

    if shardings is None:
        return jax.jit(train_step, donate_argnums=0, compiler_options=dict(options) or None)
    mesh, stages = shardings.step.mesh.abstract_mesh, torus_stages(shardings.step.mesh)
    told = compiler_options(shardings.step.mesh, options, ahead=ahead) or None

    def placed_step(state: TrainState, frozen: Tree, batch: Batch) -> tuple[TrainState, Metrics]:
        # Models state the layout of activations on the ambient mesh.
        with jax.sharding.use_abstract_mesh(mesh), scattered_in(stages):
            state, metrics = train_step(state, frozen, batch)
        everywhere = {name: shardings.step for name in metrics}
        if "gradients" in metrics:
            everywhere["gradients"] = shardings.trainable
        return state, jax.lax.with_sharding_constraint(metrics, everywhere)

    return jax.jit(placed_step, donate_argnums=0, out_shardings=(shardings, None), compiler_options=told)
