"""What a training run carries from step to step, and how it starts."""

from collections.abc import Collection
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int, PRNGKeyArray

from jaxft.distributed.sharding import (
    RULES,
    Rules,
    ShardingReport,
    optimizer_shardings,
    replicated,
    shard_tree,
    to_host_memory,
    tree_shardings,
    tuned_shardings,
)
from jaxft.errors import JaxftError, nearest
from jaxft.methods.base import Method, distinct, wrap_optimizer
from jaxft.methods.probe import Probe
from jaxft.partition import Tuned, combine
from jaxft.training.precision import Precision, cast_tuned

Tree = Any


class TrainState(NamedTuple):
    """All that a step changes. Frozen parameters are not in it: a step takes them as an argument and returns none.

    step: steps taken, int32, skipped ones included.
    trainable: what trains, holes (None) elsewhere.
    opt_state: the optimizer's, of the trainable leaves only.
    rng: a typed key; step `s` uses `fold_in(rng, s)`, so it never changes.
    method_state: `Tuned.state`.
    skipped: steps whose loss or gradient was not finite and that changed nothing, int32.
    """

    step: Int[Array, ""]
    trainable: Tree
    opt_state: Any
    rng: PRNGKeyArray
    method_state: Any
    skipped: Int[Array, ""]


def tuned_of(state: TrainState, frozen: Tree) -> Tuned:
    """The cut that a state and its frozen parameters make."""
    return Tuned(state.trainable, frozen, state.method_state)


def parameters(state: TrainState, frozen: Tree) -> Tree:
    """The parameters the model runs on: nodes included, `materialize` makes plain arrays of them."""
    return combine(tuned_of(state, frozen))


def shardings_of(tree: Tree) -> Tree:
    """Where each array of a tree lives: what `make_train_step` needs to leave the next state in the same place."""
    return jax.tree.map(lambda a: a.sharding, tree)


def abstract(tree: Tree) -> Tree:
    """Shapes, dtypes and shardings of a tree, for ahead-of-time compilation and for restoring into."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree)


def abstract_state(
    method: Method,
    params: Tree,
    optimizer: optax.GradientTransformation,
    rng: PRNGKeyArray,
    mesh: Mesh,
    *,
    logical_axes: Tree | None = None,
    probe: Probe = Probe(),  # noqa: B008
    precision: Precision = Precision(),  # noqa: B008
    rules: Rules = RULES,
    report: ShardingReport | None = None,
    offload: Collection[str] = (),
) -> tuple[TrainState, Tree]:
    """What `init_state` returns, as `jax.ShapeDtypeStruct`s with shardings: for any model, on any mesh, in no memory.

    The draws of a method are made for real (with `rng`, on the host), so that the structure is that of the run.

    Raises:
        JaxftError: the method leaves nothing to train, or needs values (data, weights) to know its own shapes.
    """
    method_rng, _ = jax.random.split(rng)
    try:
        tuned = jax.eval_shape(lambda params: cast_tuned(method.init(method_rng, params, probe), precision), params)
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
        raise JaxftError(
            "this method looks at weights or data before it knows its own shapes, so that nothing can be planned or "
            "compiled before there are any"
        ) from error
    if not jax.tree.leaves(tuned.trainable):
        raise JaxftError("the method leaves nothing to train")
    return lay_out(
        tuned,
        method,
        optimizer,
        rng,
        mesh,
        logical_axes=logical_axes,
        rules=rules,
        report=report,
        offload=offload,
    )


Offloadable = Literal["optimizer", "frozen"]


def _places(
    tuned: Tuned, opt_state: Tree, shardings: Tuned, mesh: Mesh, offload: Collection[str]
) -> tuple[Tuned, Tree]:
    """Shardings of a cut and of the optimizer's state, in the memory where each array waits."""
    if unknown := set(offload) - set(get_args(Offloadable)):
        raise JaxftError(f'offload holds "{min(unknown)}": {nearest(min(unknown), get_args(Offloadable))}')
    places = optimizer_shardings(opt_state, tuned.trainable, shardings.trainable, mesh)
    if "optimizer" in offload:
        places = to_host_memory(opt_state, places)
    if "frozen" in offload:
        frozen = to_host_memory(tuned.frozen, shardings.frozen, only_stacked=True)
        shardings = shardings._replace(frozen=frozen)
    return shardings, places


def lay_out(
    tuned: Tuned,
    method: Method,
    optimizer: optax.GradientTransformation,
    rng: PRNGKeyArray,
    mesh: Mesh,
    *,
    logical_axes: Tree | None = None,
    rules: Rules = RULES,
    report: ShardingReport | None = None,
    offload: Collection[str] = (),
) -> tuple[TrainState, Tree]:
    """The abstract state and frozen half, with shardings, of an abstract cut; arguments as of `init_state`."""
    _, step_rng = jax.random.split(rng)
    shardings = tuned_shardings(tuned, logical_axes, mesh, rules=rules, report=report)
    opt_state = jax.eval_shape(wrap_optimizer(method, optimizer).init, tuned.trainable)
    shardings, opt_places = _places(tuned, opt_state, shardings, mesh, offload)
    count = jax.ShapeDtypeStruct((), jnp.int32)
    key = jax.ShapeDtypeStruct(step_rng.shape, step_rng.dtype)
    state = TrainState(count, tuned.trainable, opt_state, key, tuned.state, count)
    one = replicated(count, mesh)
    places = TrainState(one, shardings.trainable, opt_places, replicated(key, mesh), shardings.state, one)

    def placed(a: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)

    return jax.tree.map(placed, state, places), jax.tree.map(placed, tuned.frozen, shardings.frozen)


def init_state(
    method: Method,
    params: Tree,
    optimizer: optax.GradientTransformation,
    rng: PRNGKeyArray,
    mesh: Mesh,
    *,
    logical_axes: Tree | None = None,
    probe: Probe = Probe(),  # noqa: B008
    precision: Precision = Precision(),  # noqa: B008
    rules: Rules = RULES,
    report: ShardingReport | None = None,
    donate: bool = False,
    offload: Collection[str] = (),
) -> tuple[TrainState, Tree]:
    """Cut `params` by `method`, place both halves on the mesh and make the optimizer's state there.

    Args:
        method: what trains and how.
        params: the model's parameters, on the mesh already or not.
        optimizer: an optax optimizer; the method's own gradient treatment is put around it here.
        rng: a typed key (`jax.random.key`), split into one for the method and one for the steps.
        mesh: see `jaxft.distributed.make_mesh`; a single device is a mesh too.
        logical_axes: `model.logical_axes()`; None places by size alone.
        probe: what the method may look at.
        precision: dtypes of masters and of frozen weights.
        rules: which axis goes where, see `jaxft.distributed.tree_shardings`.
        report: is told what could not be divided as the rules say.
        donate: the caller needs `params` no more. Otherwise trainable leaves are copied, since a step donates them.
        offload: what waits in host memory, of `Offloadable`: "optimizer", the optimizer's state between updates;
            "frozen", the frozen matrices of stacked layers, which a scan over layers fetches one layer at a time.

    Returns:
        The state and the frozen parameters. Frozen arrays that are already in place and in their dtype are the same
        buffers as in `params`.

    Raises:
        JaxftError: the method leaves nothing to train.
    """
    method_rng, step_rng = jax.random.split(rng)
    params = shard_tree(params, tree_shardings(params, logical_axes, mesh, rules=rules, report=report))
    tuned = distinct(cast_tuned(method.init(method_rng, params, probe), precision))
    if not jax.tree.leaves(tuned.trainable):
        raise JaxftError("the method leaves nothing to train")
    optimizer = wrap_optimizer(method, optimizer)
    shapes = jax.eval_shape(optimizer.init, tuned.trainable)
    shardings = tuned_shardings(tuned, logical_axes, mesh, rules=rules)
    shardings, places = _places(tuned, shapes, shardings, mesh, offload)
    tuned = shard_tree(tuned, shardings)
    trainable = tuned.trainable if donate else jax.tree.map(jnp.copy, tuned.trainable)
    opt_state = jax.jit(optimizer.init, out_shardings=places)(trainable)
    rest = (jnp.zeros((), jnp.int32), step_rng, jax.tree.map(jnp.copy, tuned.state), jnp.zeros((), jnp.int32))
    step, step_rng, method_state, skipped = shard_tree(rest, replicated(rest, mesh))
    return TrainState(step, trainable, opt_state, step_rng, method_state, skipped), tuned.frozen
