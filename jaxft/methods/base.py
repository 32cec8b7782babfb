"""`Method`: a tuning method as a NamedTuple of pure functions, in the manner of `optax.GradientTransformation`."""

import functools
import math
import zlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, PRNGKeyArray

from jaxft.errors import JaxftError
from jaxft.methods.probe import Probe
from jaxft.partition import (
    Roles,
    Selector,
    Tuned,
    combine,
    has_marks,
    is_matrix,
    key_name,
    map_weights,
    mark,
    select,
    shape_of,
    split,
    weights_by_path,
)
from jaxft.weights import (
    BlockSplit,
    Gated,
    RowSplit,
    SiteModule,
    SparseDelta,
    Tree,
    Weight,
    is_node,
    let_through,
    trained_from,
)


class Signals(NamedTuple):
    """What an `update` may look at.

    `loss`: the last step's loss. `gradients`: the last step's gradients of the trainable half, if the method `needs`
    them, else None. `probe`: calibration passes over the current model, run only when asked for. `donate`: whether the
    caller gives up the buffers of what it passes in (a training loop that owns them does), so that the update holds
    one copy in memory instead of two. `optimizer`: what made the optimizer state (`wrap_optimizer`), the same object at
    every update; without it, moments that restart or begin are zero, which is not where every optimizer begins.
    """

    loss: Array | float
    gradients: Tree | None
    probe: Probe
    donate: bool = False
    optimizer: optax.GradientTransformation | None = None


class Method(NamedTuple):
    """A tuning method. Every field but `init` is optional.

    init: `(rng, params, probe) -> Tuned`. `params` may carry `Trains` marks of earlier methods of a chain; a method
        rewrites only what is not marked, and hands the marks on.
    update: `(rng, tuned, opt_state, signals, step) -> (tuned, opt_state)`: re-select, grow, drop, merge and restart.
        Runs between steps; shapes and structure stay, so nothing recompiles.
    due: `(step, total_steps) -> bool`: whether `update` runs after step `step` (counted from 1).
    penalty: `tuned -> scalar`, added to the loss.
    gradients: an `optax.GradientTransformation` put before the optimizer, or a function from optimizer to optimizer.
        Its update is offered `value` (the loss), `frozen` (the frozen half) and `rng` (new at each step) as extra
        arguments.
    batch: `(rng, batch) -> batch`, inside the train step.
    needs: what `update` needs collected: `"gradients"`.
    """

    init: Callable[[PRNGKeyArray, Tree, Probe], Tuned]
    update: Callable[..., tuple[Tuned, Any]] | None = None
    due: Callable[[int, int], bool] | None = None
    penalty: Callable[[Tuned], Array] | None = None
    gradients: optax.GradientTransformation | Callable[..., optax.GradientTransformation] | None = None
    batch: Callable[[PRNGKeyArray, dict], dict] | None = None
    needs: frozenset[str] = frozenset()


def wrap_optimizer(method: Method, optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer with the method's treatment of gradients before or around it."""
    if method.gradients is None:
        return optimizer
    if isinstance(method.gradients, optax.GradientTransformation):
        return optax.chain(method.gradients, optimizer)
    return method.gradients(optimizer)


def chain(*methods: Method) -> Method:
    """Methods one after the other: each rewrites what the ones before it left frozen.

    `Tuned.state` is the tuple of the methods' states; penalties add up; batch and gradient treatments apply in order.
    """
    if not methods:
        raise JaxftError("chain() needs at least one method")
    if len(methods) == 1:
        return methods[0]

    def init(rng: PRNGKeyArray, params: Tree, probe: Probe) -> Tuned:
        states = []
        for i, method in enumerate(methods):
            tuned = method.init(fold_in(rng, i), params, probe)
            states.append(tuned.state)
            # A method that trains upper layers ends the backward pass there; another may train, or measure, below.
            params = let_through(mark(tuned))
        return split(params, tuple(states))

    due = [m.due or (lambda step, total: False) for m in methods]

    def update(rng: PRNGKeyArray, tuned: Tuned, opt_state: Any, signals: Signals, step: int) -> tuple[Tuned, Any]:
        states = list(tuned.state)
        for i, method in enumerate(methods):
            if method.update is not None and due[i](step, signals.probe.total_steps):
                own = tuned._replace(state=states[i])
                tuned, opt_state = method.update(jax.random.fold_in(rng, i), own, opt_state, signals, step)
                states[i] = tuned.state
        return tuned._replace(state=tuple(states)), opt_state

    def penalty(tuned: Tuned) -> Array:
        return sum(
            (m.penalty(tuned._replace(state=s)) for m, s in zip(methods, tuned.state, strict=True) if m.penalty),
            start=jnp.zeros(()),
        )

    def gradients(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
        for method in reversed(methods):
            optimizer = wrap_optimizer(method, optimizer)
        return optimizer

    def batch(rng: PRNGKeyArray, batch: dict) -> dict:
        for i, method in enumerate(methods):
            if method.batch is not None:
                batch = method.batch(jax.random.fold_in(rng, i), batch)
        return batch

    return Method(
        init=init,
        update=update if any(m.update for m in methods) else None,
        due=(lambda step, total: any(d(step, total) for d in due)) if any(m.due for m in methods) else None,
        penalty=penalty if any(m.penalty for m in methods) else None,
        gradients=gradients if any(m.gradients for m in methods) else None,
        batch=batch if any(m.batch for m in methods) else None,
        needs=frozenset().union(*(m.needs for m in methods)),
    )


# --- parts that methods are made of -----------------------------------------------------------------------------------


def fold_in(rng: PRNGKeyArray, number: int) -> PRNGKeyArray:
    """`jax.random.fold_in` that stays a value while `init` is traced over abstract weights.

    A method draws its structure (which layers, which rows) on the host. When a run is planned before there are
    weights, `init` runs under `jax.eval_shape` with a real key, and the draw needs the numbers of that key.
    """
    if isinstance(rng, jax.core.Tracer):
        return jax.random.fold_in(rng, number)
    with jax.ensure_compile_time_eval():
        return jax.random.fold_in(rng, number)


def path_key(rng: PRNGKeyArray, path: str) -> PRNGKeyArray:
    """A key of its own for the weight at a path, whatever other weights there are."""
    return fold_in(rng, zlib.crc32(path.encode()))


def rewrite(
    params: Tree,
    on: Selector,
    fn: Callable[..., Weight],
    *,
    roles: Roles,
    nodes: bool = True,
    layers: bool = False,
    matrices: bool = False,
) -> Tree:
    """Replace every selected frozen weight `w` at path `p` by `fn(p, w)`; what already trains is left alone.

    Args:
        nodes: whether nodes (quantised bases, other methods' rewrites) are candidates too, or arrays only.
        layers: whether `fn` takes the selected layers as third argument (True or `bool[L]`). Otherwise a selector with
            a layer range is refused, because the rewrite has no way to obey it.
        matrices: whether `fn` is for matrices only: `attn.*` then leaves the norms of queries and keys alone.

    Raises:
        JaxftError: the selector matches nothing, no matrix where one is wanted, or nothing that is still frozen.
    """
    chosen = select(params, on, roles=roles)
    if matrices:
        weights = weights_by_path(params)
        found = {path: which for path, which in chosen.items() if is_matrix(path, weights[path])}
        if not found:
            path = min(chosen)
            raise JaxftError(
                f'"{on}" selects no matrix: "{path}" has shape {shape_of(weights[path])}; select kernels, e.g. @linear'
            )
        chosen = found
    done: list[str] = []

    def one(path: str, w: Weight) -> Weight:
        if path not in chosen or has_marks(w) or isinstance(w, SiteModule) or (is_node(w) and not nodes):
            return w
        done.append(path)
        if layers:
            return fn(path, w, chosen[path])
        if chosen[path] is not True:
            raise JaxftError(f'"{path}" is selected for some layers only, which this method cannot do: drop the range')
        return fn(path, w)

    params = map_weights(one, params)
    if not done:
        raise JaxftError(f'everything selected by "{on}" is already taken by an earlier method of the chain')
    return params


def others_below(tuned: Tuned, own: Collection[str], roles: Roles) -> bool:
    """Whether anything but the weights at `own` trains that a layer may sit on: in the stack, the embedding, a site."""
    trained = {p for p, w in weights_by_path(mark(tuned)).items() if has_marks(w)} - set(own)
    embedding = roles.names.get("embedding")
    feeds = select(combine(tuned), embedding, roles=roles, allow_empty=True) if embedding else {}
    return any(roles.is_stacked(p) or p in feeds or "sites" in p.split(".") for p in trained)


def stop_below(tuned: Tuned, chosen: Mapping[str, bool | np.ndarray], roles: Roles) -> Tuned:
    """`tuned`, whose backward pass ends at the lowest of the layers in which something trains.

    `chosen`: what trains in the stack, by path, in all layers (True) or some, as of `select`. Where anything else
    trains that feeds a layer (the embedding, a prompt), nothing changes.
    """
    own = {path: layers for path, layers in chosen.items() if roles.is_stacked(path)}
    first = min((0 if layers is True else int(np.argmax(layers)) for layers in own.values()), default=0)
    if not first or others_below(tuned, own, roles):
        return tuned
    return split(trained_from(mark(tuned), first), tuned.state)


def map_moments(opt_state: Any, trainable: Tree, fn: Callable[..., Tree], *others: Any) -> Any:
    """Apply `fn` to every part of an optimizer state that has the structure of `trainable` (moments, averages).

    `fn` gets and returns a tree like `trainable`, with None for leaves that the optimizer keeps no moment of; with
    `others` (states of the same optimizer), the same part of each as further arguments. Counters and scalars stay.

    Raises:
        JaxftError: a moment has another shape than its parameter (factored moments).
    """
    known = _leaves_by_path(trainable)

    def whole(x: Any) -> Tree:
        moments = _leaves_by_path(x)
        for path, m in moments.items():
            if m.shape != known[path].shape:
                raise JaxftError(
                    f'the optimizer keeps a moment of shape {m.shape} for "{".".join(path)}" of shape '
                    f"{known[path].shape}: it cannot follow its entries, restart it instead"
                )
        return jax.tree_util.tree_map_with_path(lambda p, _: moments.get(_names(p)), trainable)

    def move(x: Any, *rest: Any) -> Any:
        if not _is_moments(x, known):
            return x
        moved = _leaves_by_path(fn(whole(x), *map(whole, rest)))
        return jax.tree_util.tree_map_with_path(lambda p, _: moved[_names(p)], x)

    return jax.tree.map(move, opt_state, *others, is_leaf=lambda x: _is_moments(x, known))


def _names(path: tuple) -> tuple[str, ...]:
    return tuple(map(key_name, path))


def _leaves_by_path(tree: Tree) -> dict[tuple[str, ...], Array]:
    return {_names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _is_moments(x: Any, known: dict) -> bool:
    """Whether `x` holds one array for each trainable leaf, or for some of them (optimizers that treat leaves apart)."""
    found = _leaves_by_path(x)
    return bool(found) and found.keys() <= known.keys()


def restart_moments(opt_state: Any, trainable: Tree, optimizer: optax.GradientTransformation | None = None) -> Any:
    """An optimizer state as if it had just been initialised; learning-rate schedules keep counting.

    A state that holds moments restarts with its own scalars, such as its step count, so that bias correction fits (Adam
    with old counts and zero moments would take steps several times too long).

    Args:
        opt_state: what restarts.
        trainable: what it belongs to. An optimizer may keep parameters beside moments (the iterate of schedule-free
            ones, the start of Prodigy): they become these.
        optimizer: what made `opt_state`; without it moments become zero and of the scalars only `count` restarts.
    """
    known = _leaves_by_path(trainable)
    fresh = jax.tree.map(jnp.zeros_like, opt_state) if optimizer is None else optimizer.init(trainable)

    def is_moments(x: Any) -> bool:
        return _is_moments(x, known)

    def restart(x: Any, new: Any) -> Any:
        if is_moments(x):
            return new
        if isinstance(x, tuple) and hasattr(x, "_fields"):
            fields = {name: restart(getattr(x, name), getattr(new, name)) for name in x._fields}
            if any(is_moments(getattr(x, name)) for name in x._fields):
                scalars = {name for name in x._fields if hasattr(fields[name], "shape") and fields[name].ndim == 0}
                again = scalars & {"count"} if optimizer is None else scalars
                fields |= {name: getattr(new, name) for name in again}
            return type(x)(**fields)
        if isinstance(x, dict):
            return {k: restart(v, new[k]) for k, v in x.items()}
        return type(x)(map(restart, x, new)) if isinstance(x, (list, tuple)) else x

    return restart(opt_state, fresh)


@functools.cache
def _jitted(fn: Callable, shardings: Any, donate: bool, static: tuple) -> Callable:
    shardings = jax.tree.unflatten(shardings[0], shardings[1])
    donated = (0, 1) if donate else ()
    return jax.jit(lambda *args: fn(*args, *static), out_shardings=shardings, donate_argnums=donated)


def update_like(
    fn: Callable, tuned: Tuned, opt_state: Any, arrays: Tree, *static: Any, donate: bool = False
) -> tuple[Tuned, Any]:
    """`fn(tuned, opt_state, arrays, *static)` jitted once, its results laid out as the inputs were.

    The train step that follows sees the same shapes and shardings and does not recompile.
    """
    args = jax.tree.map(jnp.asarray, (tuned, opt_state))
    leaves, structure = jax.tree.flatten(args)
    places = [x.sharding for x in leaves]
    widest = max(places, key=lambda place: place.num_devices)
    if isinstance(widest, NamedSharding):  # what a method made on one device joins the mesh
        whole = NamedSharding(widest.mesh, PartitionSpec())
        places = [place if place.device_set == widest.device_set else whole for place in places]
        args = jax.tree.unflatten(structure, jax.device_put(leaves, places))
    jitted = _jitted(fn, (structure, tuple(places)), donate, static)
    return distinct(jitted(*args, arrays))  # JAX hands on what of `arrays` comes out as it went in


def distinct(tree: Tree) -> Tree:
    """`tree` with copies of the arrays that occur in it before: a buffer cannot be given away (donated) twice."""
    seen: set[int] = set()

    def own(x: Any) -> Any:
        if id(x) in seen:
            return jnp.copy(x)
        seen.add(id(x))
        return x

    return jax.tree.map(own, tree)


def _nodes_in(tree: Tree) -> list[Any]:
    """All nodes of a tree, those inside others too."""
    found = [w for w in jax.tree.leaves(tree, is_leaf=is_node) if is_node(w)]
    return found + [inner for w in found for inner in _nodes_in(list(vars(w).values()))]


def count_trainable(tuned: Tuned) -> int:
    """The number of scalars that train. Padding of sparse, row and block nodes is not counted, nor closed gates."""
    total = sum(int(x.size) for x in jax.tree.leaves(tuned.trainable))
    for w in _nodes_in(combine(tuned)):
        if isinstance(w, SparseDelta):
            held = int(jnp.sum(w.indices < math.prod(shape_of(w)[w.indices.ndim - 1 :])))
            total -= jax.tree.leaves(w.values)[0].size - held
        elif isinstance(w, BlockSplit):
            blocks = jax.tree.leaves(w.blocks)[0]  # the array itself, or what is packed in it
            block = math.prod(blocks.shape[-2:])
            total -= blocks.size - block * int(jnp.sum(w.index < math.prod(shape_of(w)[-2:]) // block))
        elif isinstance(w, RowSplit):
            slices, entries = shape_of(w)[w.axis], math.prod(shape_of(w)[w.index.ndim - 1 :])
            held = entries // slices * int(jnp.sum(w.index < slices))
            total -= jax.tree.leaves(w.rows)[0].size - held
        elif isinstance(w, Gated):
            total -= w.value.size // max(w.is_open.size, 1) * int(jnp.sum(~w.is_open))
    return total
