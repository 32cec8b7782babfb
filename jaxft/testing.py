"""Conformance checks: what every tuning method must satisfy, on any model. For the tests of this library and of yours.

    trial = Trial(my_method(), params, loss, batches)
    check_method(trial)

Each check is a function of a `Trial` and raises AssertionError with a sentence that says what is wrong. A trial trains
a few steps once and keeps what the checks look at, so use a tiny model.
"""

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxft.checkpoint import Checkpointer
from jaxft.distributed import MeshConfig, make_mesh, tree_shardings
from jaxft.methods.base import Method, Signals, wrap_optimizer
from jaxft.methods.merge import merge, unmerged_sites
from jaxft.methods.probe import Loss, Probe
from jaxft.partition import DECODER_ROLES, Roles, Tuned, combine, is_hole, key_name, mark, split
from jaxft.training.compilation import CompilationLog
from jaxft.training.state import TrainState, abstract, init_state, shardings_of, tuned_of
from jaxft.training.step import TrainStep, make_train_step
from jaxft.weights import Tree, is_node, materialize

Batch = dict[str, Any]


class Event(NamedTuple):
    """One train step or one `update` of a trial: host copies of the cut before and after, and what it compiled."""

    kind: str
    step: int
    before: Tuned
    after: Tuned
    loss: float
    programs: int


@dataclasses.dataclass(eq=False)
class Trial:
    """A method on a model for a few steps of Adam, one update after each step at which it is due.

    Args:
        method: what is checked.
        params: parameters of the model, float32.
        loss: `(params, batch, rng) -> (sum of token losses, sum of token weights, aux)`.
        batches: at least two batches of equal shapes, used in turn.
        roles: the names of the model's parts.
        logical_axes: the names of its dimensions, for the mesh (see `jaxft.distributed`); None places by size.
        identity: whether the method promises to change no output at the start.
        steps: length of the run. Choose it so that `update` is due twice.
        learning_rate: of Adam, without weight decay.
        mesh: where it runs; one device by default.
    """

    method: Method
    params: Tree
    loss: Loss
    batches: Sequence[Batch]
    roles: Roles = DECODER_ROLES
    logical_axes: Tree | None = None
    identity: bool = True
    steps: int = 6
    learning_rate: float = 1e-2
    mesh: Mesh | None = None

    @functools.cached_property
    def _steps(self) -> dict[Any, TrainStep]:
        return {}

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        return optax.adam(self.learning_rate)

    @functools.cached_property
    def _wrapped(self) -> optax.GradientTransformation:
        return wrap_optimizer(self.method, self.optimizer)

    @functools.cached_property
    def probe(self) -> Probe:
        sets = {"other": lambda: iter(self.batches[::-1])}
        return Probe(self.roles, self.loss, lambda: iter(self.batches), self._calibration_run, self.steps, sets)

    def _calibration_run(self, params: Tree, method: Method, steps: int) -> Tree:
        trial = dataclasses.replace(self, method=method, params=params, steps=steps)
        with CompilationLog() as log:
            state, frozen, step = trial.start()
            for i in range(steps):
                state, _ = step(state, frozen, self.batches[i % len(self.batches)])
            tuned = materialize(combine(tuned_of(state, frozen)))
        self._programs_of_calibration.append(log.programs)
        return tuned

    @functools.cached_property
    def _programs_of_calibration(self) -> list[int]:
        return []

    def start(self) -> tuple[TrainState, Tree, TrainStep]:
        """The first state, the frozen parameters and the train step."""
        state, frozen = init_state(
            self.method,
            _copied(self.params),
            self.optimizer,
            jax.random.key(0),
            self.mesh or make_mesh(MeshConfig(data=1), jax.devices()[:1]),
            logical_axes=self.logical_axes,
            probe=self.probe,
            donate=True,
        )
        places = shardings_of(state)
        key = (jax.tree.structure(places), tuple(jax.tree.leaves(places)))
        if key not in self._steps:  # starting again compiles nothing
            self._steps[key] = make_train_step(self.loss, self.method, self.optimizer, shardings=places)
        return state, frozen, self._steps[key]

    def train(
        self,
        *,
        after: Callable[[int, TrainState, Tree], tuple[TrainState, Tree]] = lambda _, state, frozen: (state, frozen),
        first: int = 0,
    ) -> tuple[list[Event], TrainState, Tree, TrainStep]:
        """Steps `first + 1` to `steps`; `after(step, state, frozen)` runs behind each (and at `first`, if not 0)."""
        state, frozen, train_step = self.start()
        if first:
            state, frozen = after(first, state, frozen)
        events: list[Event] = []
        now = _host(tuned_of(state, frozen))
        with CompilationLog() as log:
            for step in range(first + 1, self.steps + 1):
                before, programs = now, log.programs
                state, metrics = train_step(state, frozen, self.batches[step % len(self.batches)])
                gradients = metrics.pop("gradients", None)
                now = _host(tuned_of(state, frozen))
                loss = float(metrics["loss"])
                events.append(Event("step", step, before, now, loss, log.programs - programs))
                if self.method.update is not None and self.method.due is not None and self.method.due(step, self.steps):
                    before, programs = now, log.programs
                    signals = Signals(metrics["loss"], gradients, self.probe, donate=True, optimizer=self._wrapped)
                    rng = jax.random.fold_in(state.rng, step)
                    places = shardings_of((state, frozen))
                    tuned, opt_state = self.method.update(rng, tuned_of(state, frozen), state.opt_state, signals, step)
                    state = state._replace(trainable=tuned.trainable, opt_state=opt_state, method_state=tuned.state)
                    state, frozen = jax.device_put((state, tuned.frozen), places)
                    now = _host(tuned_of(state, frozen))
                    events.append(Event("update", step, before, now, loss, log.programs - programs))
                state, frozen = after(step, state, frozen)
        return events, state, frozen, train_step

    @functools.cached_property
    def record(self) -> tuple[list[Event], TrainState, Tree, TrainStep]:
        """The trial's run on one device, made once."""

        def keep(step: int, state: TrainState, frozen: Tree) -> tuple[TrainState, Tree]:
            if step == self.middle:
                self._middle.append(_copied((state, frozen)))
            return state, frozen

        return self.train(after=keep)

    @functools.cached_property
    def _middle(self) -> list[tuple[TrainState, Tree]]:
        return []

    @property
    def middle(self) -> int:
        """The step at which `check_resume` stops."""
        return (self.steps + 1) // 2

    @property
    def events(self) -> list[Event]:
        return self.record[0]

    @property
    def start_tuned(self) -> Tuned:
        return self.events[0].before

    @property
    def end_tuned(self) -> Tuned:
        return self.events[-1].after

    @functools.cached_property
    def mean_loss(self) -> Callable[[Tree], jax.Array]:
        """The mean token loss of a parameter tree over the first batch, jitted."""

        def mean(params: Tree) -> jax.Array:
            total, weight, _ = self.loss(params, self.batches[0], jax.random.key(0))
            return total / weight

        return jax.jit(mean)

    @functools.cached_property
    def meaning(self) -> Callable[[Tuned], tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
        """The arrays that a cut means, by path, and which of their entries move when everything that trains moves."""

        @jax.jit
        def run(tuned: Tuned, directions: Tree) -> tuple[Tree, Tree]:
            arrays, moved = jax.jvp(functools.partial(_dense, tuned), (tuned.trainable,), (directions,))
            return arrays, jax.tree.map(lambda t: t != 0, moved)

        def of(tuned: Tuned) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
            arrays, moved = run(tuned._replace(state=()), _directions(tuned.trainable))
            return _by_path(arrays), _by_path(moved)

        return of

    def live(self, tuned: Tuned) -> dict[str, np.ndarray]:
        """Which entries of the trainable leaves change what the cut means, to first order, by path."""

        @jax.jit
        def run(tuned: Tuned, back: Tree) -> Tree:
            _, pull = jax.vjp(functools.partial(_dense, tuned), tuned.trainable)
            return jax.tree.map(lambda g: g != 0, pull(back)[0])

        tuned = tuned._replace(state=())
        return _by_path(run(tuned, _directions(jax.eval_shape(_dense, tuned, tuned.trainable))))


_copied = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))


def _dense(tuned: Tuned, trainable: Tree) -> Tree:
    """The arrays that `tuned` means with other values of what trains."""
    return materialize(combine(tuned._replace(trainable=trainable)))


def _directions(tree: Tree) -> Tree:
    """Normal numbers like the arrays of `tree`. From numpy: a program that draws them takes a second to compile."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(x.dtype), tree)


def _host(tree: Tree) -> Tree:
    def copy(x: jax.Array) -> np.ndarray:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        return np.array(x)  # a copy: the train step gives the buffer away

    return jax.tree.map(copy, tree)


def _by_path(tree: Tree) -> dict[str, np.ndarray]:
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {".".join(map(key_name, path)): np.asarray(leaf) for path, leaf in flat}


def _nbytes(tree: Tree) -> int:
    def size(x: Any) -> int:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.eval_shape(jax.random.key_data, x)
        return int(np.prod(x.shape)) * x.dtype.itemsize

    return sum(size(x) for x in jax.tree.leaves(tree))


def assert_same_bits(a: Tree, b: Tree, what: str) -> None:
    """Raise AssertionError naming the first leaf in which two trees of arrays differ in structure, dtype or bits."""
    a, b = _host(a), _host(b)
    assert jax.tree.structure(a) == jax.tree.structure(b), f"{what}: the trees have different structures"
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        same = x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
        assert same, f"{what}: {jax.tree_util.keystr(path)} differs"


# --- the checks -------------------------------------------------------------------------------------------------------


def check_init(trial: Trial) -> None:
    """`init` cuts the tree in complementary halves, leaves its input alone, and depends on its arguments only. Called
    again it compiles nothing, except for the runs it trains: else values of weights are constants of its programs."""
    given = _host(trial.params)
    tuned = trial.method.init(jax.random.key(2), trial.params, trial.probe)
    assert_same_bits(trial.params, given, "init changed the parameters it was given")
    assert jax.tree.leaves(tuned.trainable), "nothing trains"
    positions = jax.tree.structure(tuned.trainable, is_leaf=is_hole)
    assert positions == jax.tree.structure(tuned.frozen, is_leaf=is_hole), "the halves have different structures"
    halves = [jax.tree.leaves(half, is_leaf=is_hole) for half in (tuned.trainable, tuned.frozen)]
    for t, f in zip(*halves, strict=True):
        # A position may be empty in both halves: an optional part of a module that is not there.
        assert t is None or f is None, "an array is in both halves"
    assert len(jax.tree.leaves(combine(tuned))) == sum(x is not None for half in halves for x in half)
    assert_same_bits(split(mark(tuned), tuned.state), tuned, "split does not invert mark")
    calibration = sum(trial._programs_of_calibration)
    with CompilationLog() as log:
        again = trial.method.init(jax.random.key(2), trial.params, trial.probe)
    programs = log.programs - (sum(trial._programs_of_calibration) - calibration)
    assert not programs, f"a second init compiled {programs} programs"
    assert_same_bits(again, tuned, "two inits from one key differ")


def check_identity(trial: Trial) -> None:
    """At the start the model computes what it computed before, unless the method says otherwise."""
    base = float(trial.mean_loss(trial.params))
    tuned = float(trial.mean_loss(combine(trial.start_tuned)))
    same = abs(tuned - base) <= 1e-6 * abs(base)
    if trial.identity:
        assert same, f"the loss of the base is {base}, with the method at the start {tuned}: not the identity"
    else:
        assert not same, "the method is declared to change outputs at the start (identity=False), and does not"


def check_law(trial: Trial) -> None:
    """After training: the tuned forward pass, the one of materialised arrays and that of merged parameters agree."""
    tuned = trial.end_tuned
    fast = float(trial.mean_loss(combine(tuned)))
    start = float(trial.mean_loss(combine(trial.start_tuned)))
    assert abs(fast - start) > 1e-4 * abs(start), f"training changed nothing to speak of: {start} -> {fast}"
    merged = merge(tuned, roles=trial.roles)
    nodes = {type(w).__name__ for w in jax.tree.leaves(merged, is_leaf=is_node) if is_node(w)}
    assert bool(nodes) == bool(unmerged_sites(merged)), f"merged parameters still hold {nodes}"
    for name, params in (("materialised", materialize(combine(tuned))), ("merged", merged)):
        slow = float(trial.mean_loss(params))
        assert abs(slow - fast) <= 1e-5 * abs(fast), f"loss {fast} as tuned, {slow} {name}"


def check_frozen(trial: Trial) -> None:
    """What does not train is bitwise what it was, step by step, through updates, and against the start of the run."""
    base = _by_path(trial.params)
    never: dict[str, Any] = {}  # the entries that never trained
    for event in trial.events:
        (before, reach), (after, reach_after) = trial.meaning(event.before), trial.meaning(event.after)
        if event.kind == "update":
            reach = {p: r | reach_after[p] for p, r in reach.items()}
        for path, moves in reach.items():
            changed = ~moves & (before[path].view(np.uint32) != after[path].view(np.uint32))
            assert not changed.any(), f"{event.kind} {event.step} changed {changed.sum()} frozen entries of {path}"
            never[path] = never.get(path, True) & ~moves
    end, _ = trial.meaning(trial.end_tuned)
    for path in base.keys() & end.keys():
        same = base[path].view(np.uint32) == end[path].view(np.uint32)
        assert same[never[path]].all(), f"entries of {path} never trained and are not those of the base"


def check_trains(trial: Trial) -> None:
    """Everything that trains moves: each leaf, and each slice of its first axis that has a gradient at the end."""
    held = [e for e in trial.events if e.kind == "step"]
    since = max((e.step for e in trial.events if e.kind == "update" and e.step < trial.steps), default=0)
    before, after = _by_path(held[since].before.trainable), _by_path(held[-1].after.trainable)
    squares = _by_path(optax.tree.get(trial.record[1].opt_state, "nu"))  # of the gradients, as Adam sums them up
    for path, last in after.items():
        moved = before[path] != last
        rest = tuple(range(1, moved.ndim))
        stuck = (squares[path] != 0).any(rest) & ~moved.any(rest)
        if moved.any() and not stuck.any():
            continue
        live = trial.live(trial.end_tuned)[path]  # behind a closed gate, nothing has to move
        assert moved.any() or not live.any(), f"{path} trains and did not move"
        stuck = ((squares[path] != 0) & live).any(rest) & ~moved.any(rest)
        assert not stuck.any(), f"{path}: slices {np.flatnonzero(stuck)[:5]} have a gradient and did not move"


def check_memory(trial: Trial) -> None:
    """Optimizer state and outputs of the step are as large as what trains, and hold nothing frozen."""
    _, state, frozen, step = trial.record
    trained, opt_state = _nbytes(state.trainable), _nbytes(state.opt_state)
    assert opt_state <= 2 * trained + 1024, f"{trained} bytes train, Adam keeps {opt_state}"
    out, metrics = jax.eval_shape(step, state, frozen, trial.batches[0])
    assert _nbytes(out) == _nbytes(state), "the step returns another state than it got"
    if "gradients" in trial.method.needs:
        metrics = {k: v for k, v in metrics.items() if k != "gradients"}
    assert _nbytes(metrics) < 1024, "the step returns more than scalars beside its state"


def check_compilation(trial: Trial) -> None:
    """One program for all train steps, before and after updates; an update compiles on its first call only."""
    step: Any = trial.record[3]  # a jitted function; jax knows how many programs it holds
    assert step._cache_size() == 1, f"the train step was compiled {step._cache_size()} times"
    for kind in ("step", "update"):
        events = [e for e in trial.events if e.kind == kind]
        again = [e.step for e in events[1:] if e.programs]
        assert not again, f"the {kind}s after steps {again} compiled again"
    if trial.method.update is not None:
        updates = sum(e.kind == "update" for e in trial.events)
        assert updates >= 2, f"a run of {trial.steps} steps has {updates} updates: choose options for which it has two"


def check_resume(trial: Trial) -> None:
    """Stopped in the middle, saved, restored into a fresh start and continued: the same bits as without the stop."""
    _, whole_state, whole_frozen, _ = trial.record
    with tempfile.TemporaryDirectory() as directory, Checkpointer(directory) as checkpointer:
        checkpointer.save(trial.middle, trial._middle[0], {})
        checkpointer.wait()

        def restore(step: int, state: TrainState, frozen: Tree) -> tuple[TrainState, Tree]:
            if step != trial.middle:
                return state, frozen
            restored = checkpointer.restore(abstract((state, frozen)))
            assert restored is not None, "the checkpoint that was saved is not there"
            return restored.tree

        events, state, frozen, _ = trial.train(after=restore, first=trial.middle)
    assert_same_bits((state, frozen), (whole_state, whole_frozen), "resumed and uninterrupted runs")
    losses = {e.step: e.loss for e in trial.events}
    assert all(e.loss == losses[e.step] for e in events), "resumed and uninterrupted runs have different losses"


def check_sharded(trial: Trial, mesh: Mesh | None = None) -> None:
    """On a mesh (all devices by default: fsdp, tensor and data) the losses are those of one device.

    As in a run, the parameters are divided over the mesh before the method sees them, and it is the ambient one. With
    one device there is nothing to compare.
    """
    if mesh is None:
        count = len(jax.devices())
        fsdp, tensor = 2 if count % 2 == 0 else 1, 2 if count % 4 == 0 else 1
        mesh = make_mesh(MeshConfig(data=-1, fsdp=fsdp, tensor=tensor))
    if mesh.size == 1:
        return
    places = tree_shardings(trial.params, trial.logical_axes, mesh)
    with jax.set_mesh(mesh):
        events, *_ = dataclasses.replace(trial, params=jax.device_put(trial.params, places), mesh=mesh).train()
    for one, many in zip(trial.events, events, strict=True):
        # A first step of Adam (anew in each round of some methods) has the signs of gradients, be they but rounding.
        near = abs(one.loss - many.loss) <= 5e-5 * abs(one.loss)
        assert near, f"step {one.step}: loss {one.loss} on one device, {many.loss} on {mesh.size}"
    step = events[-1]
    assert jax.tree.structure(step.after) == jax.tree.structure(trial.end_tuned)


CHECKS = (
    check_init,
    check_identity,
    check_law,
    check_frozen,
    check_trains,
    check_memory,
    check_compilation,
    check_resume,
    check_sharded,
)


def check_method(trial: Trial) -> None:
    """All of `CHECKS`. Raises AssertionError at the first that fails."""
    for check in CHECKS:
        check(trial)
