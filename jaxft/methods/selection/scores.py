"""Scores: what makes an entry worth training. Each is a pure function of weights and probe; the highest train."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from jaxft.errors import JaxftError, nearest
from jaxft.methods.base import path_key
from jaxft.methods.probe import Probe
from jaxft.methods.selection.full import full
from jaxft.methods.selection.layers import balanced_draw, generator, spread
from jaxft.methods.selection.units import check_choice
from jaxft.partition import select, weights_by_path
from jaxft.weights import Split, Tree, Weight, materialize


class Dense(Mapping[str, Array]):
    """Weights by path as dense arrays, each made when it is asked for: a score that needs none makes none."""

    def __init__(self, weights: Mapping[str, Weight]) -> None:
        self._weights = weights

    def __getitem__(self, path: str) -> Array:
        return materialize(self._weights[path])

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


class Candidates(NamedTuple):
    """What may train.

    weights: dense arrays by path (`Dense`).
    params: the whole model, without marks: what passes over data run on.
    units: `[pools, n]`, the shape of the units that are chosen from, by path.
    decide: whether shapes of what trains follow from the scores, so that draws are values also where `init` is traced
        over abstract weights.
    """

    weights: Mapping[str, Array]
    params: Tree
    units: dict[str, tuple[int, int]]
    decide: bool = True


Score = Callable[[PRNGKeyArray, Candidates, Probe], dict[str, Array]]
"""`(rng, candidates, probe) -> scores by path`: of entries, in the shape of the weight (the caller reduces them to
units), or of the units themselves."""


class Random:
    """Uniform noise: any unit as likely as another. How many of a matrix are among the best follows from numbers alone
    (`jaxft.methods.selection.units.drawn_counts`)."""

    def __call__(self, rng: PRNGKeyArray, candidates: Candidates, probe: Probe) -> dict[str, Array]:
        with jax.ensure_compile_time_eval() if candidates.decide else contextlib.nullcontext():
            return {p: _uniform(path_key(rng, p), shape) for p, shape in candidates.units.items()}


def random() -> Score:
    """See `Random`."""
    return Random()


@functools.partial(jax.jit, static_argnums=1)
def _uniform(key: PRNGKeyArray, shape: tuple[int, int]) -> Float[Array, "pools n"]:
    """Uniform noise, divided over the ambient mesh: of the entries of a large model no device has room for all."""
    noise, mesh = jax.random.uniform(key, shape), jax.sharding.get_abstract_mesh()
    if mesh.empty or shape[1] % mesh.size:
        return noise
    return jax.lax.with_sharding_constraint(noise, PartitionSpec(None, mesh.axis_names))


def balanced(fraction: float = 0.5) -> Score:
    """1 for a random `fraction` of the matrices of each category, 0 for the others (HFT), the same part of every layer
    and of every leaf, to the next whole number: give the budget the same fraction and share it `per` category.

    When drawn again, every leaf has as many as it has now.
    """
    if not 0 < fraction < 1:
        raise JaxftError(f"score balanced: fraction={fraction} must lie between 0 and 1 (exclusive)")

    def score(rng: PRNGKeyArray, candidates: Candidates, probe: Probe) -> dict[str, Array]:
        _only_whole("balanced", candidates)
        draws, params = generator(rng), candidates.params
        found: dict[str, np.ndarray] = {}
        groups = [select(params, s, roles=probe.roles, allow_empty=True) for s in probe.roles.categories.values()]
        inside = {p for group in groups for p in group}
        for group in [*groups, *([p] for p in candidates.units if p not in inside)]:
            paths = [p for p in group if p in candidates.units]
            if not paths:
                continue
            layers, before = candidates.units[paths[0]][0], [layers_now(params, p) for p in paths]
            counts = [int(mask.sum()) for mask in before if mask is not None]
            if len(counts) < len(paths):
                columns = spread(round(layers * len(paths) * fraction), len(paths), draws)
            else:
                columns = np.array(counts, int)
            drawn = balanced_draw(draws, spread(columns.sum(), layers, draws), columns)
            found |= {p: drawn[:, [i]] for i, p in enumerate(paths)}
        return _values(found)

    return score


Order = Literal["ascending", "descending", "random"]


def cyclic(order: Order = "ascending", start: int | None = None) -> Score:
    """The sooner the turn of a layer, the higher (BAdam): after the layers that train now come those behind them,
    or in front of them, or a random one of the others."""
    check_choice("score cyclic: order", order, Order)

    def score(rng: PRNGKeyArray, candidates: Candidates, probe: Probe) -> dict[str, Array]:
        _only_whole("cyclic", candidates)
        found = {}
        for path, (layers, _) in candidates.units.items():
            if start is not None and not 0 <= start < layers:
                raise JaxftError(f"score cyclic: start={start}, but the layers are 0 to {layers - 1}")
            now = layers_now(candidates.params, path)
            wait = _wait(layers, order, start, now, generator(rng))
            found[path] = -wait[:, None]
        return _values(found)

    return score


def _wait(
    layers: int, order: Order, start: int | None, now: np.ndarray | None, draws: np.random.Generator
) -> np.ndarray:
    """How many turns each layer waits."""
    if order == "random":
        wait = draws.permutation(layers) + 1
        if now is not None:
            return wait + layers * now
        return wait if start is None else np.where(np.arange(layers) == start, 0, wait)
    step = 1 if order == "ascending" else -1
    first = (0 if step > 0 else layers - 1) if start is None else start
    if now is not None:  # behind the last of the run of layers that train
        first = np.flatnonzero(now & ~np.roll(now, -step))[0] + step
    return (step * (np.arange(layers) - first)) % layers


def _values(scores: dict[str, np.ndarray]) -> dict[str, Array]:
    with jax.ensure_compile_time_eval():
        return {p: jnp.asarray(s, jnp.float32) for p, s in scores.items()}


def layers_now(params: Tree, path: str) -> Bool[np.ndarray, " layers"] | None:
    """Which layers of a leaf train now; None where nothing has been drawn yet."""
    w = weights_by_path(params)[path]
    return np.asarray(w.is_trainable) if isinstance(w, Split) else None


def _only_whole(name: str, candidates: Candidates) -> None:
    for path, (_, n) in candidates.units.items():
        if n != 1:
            raise JaxftError(f'score {name} is of whole matrices or layers, and "{path}" has {n} units in each layer')


def magnitude() -> Score:
    """|w|."""
    return lambda rng, candidates, probe: {p: jnp.abs(w) for p, w in candidates.weights.items()}


def gradient(batches: int = 1) -> Score:
    """|g|, g the mean gradient over `batches` calibration batches."""

    def score(rng: PRNGKeyArray, candidates: Candidates, probe: Probe) -> dict[str, Array]:
        found = probe.gradients_of(candidates.params, candidates.weights, batches)
        return {p: jnp.abs(g) for p, g in found.items()}

    return score


def absolute_gradient(batches: int = 1) -> Score:
    """The mean of |g| over `batches` calibration batches (of single batches, so that signs do not cancel)."""
    return lambda rng, candidates, probe: probe.gradients_of(candidates.params, candidates.weights, batches, jnp.abs)


def fisher(batches: int = 8) -> Score:
    """The mean of g**2 over `batches` calibration batches: the diagonal of the empirical Fisher information."""
    return lambda rng, candidates, probe: probe.gradients_of(candidates.params, candidates.weights, batches, jnp.square)


def first_order(batches: int = 1) -> Score:
    """|w g|: the change of the loss, to first order, if the entry were zero (SNIP)."""

    def score(rng: PRNGKeyArray, candidates: Candidates, probe: Probe) -> dict[str, Array]:
        found = probe.gradients_of(candidates.params, candidates.weights, batches)
        return {p: jnp.abs(g * candidates.weights[p]) for p, g in found.items()}

    return score


def low_rank(rank: int = 128) -> Score:
    """|w_r|, w_r the best approximation of the matrix of rank `rank` (singular value decomposition)."""
    if rank < 1:
        raise JaxftError(f"score low_rank: rank={rank} must be at least 1")
    return lambda rng, candidates, probe: {p: _low_rank(w, rank) for p, w in candidates.weights.items()}


def _low_rank(w: Array, rank: int) -> Array:
    if w.ndim < 2:
        return jnp.abs(w)
    if isinstance(w, jax.core.Tracer) or not w.is_fully_addressable:
        return _reduced(w, rank)
    # A decomposition does not divide: on one device, rather than the same one on all of them at once.
    device = min(w.devices(), key=lambda d: d.id)
    with jax.set_mesh(Mesh(np.array([device]), ("device",))):  # in the place of the run's
        found = _reduced(jax.device_put(w, device), rank)
    return jax.device_put(found, w.sharding)


def _reduced(w: Array, rank: int) -> Array:
    u, s, v = jnp.linalg.svd(w.astype(jnp.float32), full_matrices=False)
    return jnp.abs((u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :])


def change(steps: int = 100, relative: bool = False) -> Score:
    """|w' - w| after `steps` steps of full tuning on the job's own data, which are then undone.

    `relative` divides by the root mean square of the matrix, so that leaves of different scale compare.
    """
    if steps < 1:
        raise JaxftError(f"score change: steps={steps} must be at least 1")

    def score(rng: PRNGKeyArray, candidates: Candidates, probe: Probe) -> dict[str, Array]:
        start = materialize(candidates.params)
        trained = probe.train(start, full(on="|".join(candidates.weights)), steps)
        after = weights_by_path(trained)
        return {path: _moved(after[path], w, relative) for path, w in candidates.weights.items()}

    return score


@functools.partial(jax.jit, static_argnums=2)
def _moved(after: Array, before: Array, relative: bool) -> Array:
    after, before = after.astype(jnp.float32), before.astype(jnp.float32)
    moved = jnp.abs(after - before)
    axes = tuple(range(max(before.ndim - 2, 0), before.ndim))
    norm = jnp.sqrt(jnp.mean(jnp.square(before), axis=axes, keepdims=True))
    return moved / jnp.maximum(norm, 1e-12) if relative else moved


def activation(batches: int = 8) -> Score:
    """|w| ||x||: magnitude times the root mean square of the input channel (Wanda)."""

    def score(rng: PRNGKeyArray, candidates: Candidates, probe: Probe) -> dict[str, Array]:
        inputs = probe.activations(candidates.params, batches, on=list(candidates.weights))
        return {p: jnp.abs(w) * inputs[p][..., None] for p, w in candidates.weights.items()}

    return score


GateKind = Literal["token", "gate"]


def routing_shares(params: Tree, probe: Probe, kind: GateKind, batches: int) -> Float[Array, "layers experts"]:
    """What part of a layer's routing each expert has: of its tokens, or of its gates. Rows sum up to 1."""
    mass, count = probe.gates(params, batches)
    found = count if kind == "token" else mass
    return found / jnp.sum(found, axis=-1, keepdims=True)


def gate(kind: GateKind = "token", batches: int = 8) -> Score:
    """The share of a layer's tokens (or gates) that go to an expert of a mixture (ESFT); for granularity expert."""
    check_choice("score gate: kind", kind, GateKind)

    def score(rng: PRNGKeyArray, candidates: Candidates, probe: Probe) -> dict[str, Array]:
        shares = routing_shares(candidates.params, probe, kind, batches)
        for path, shape in candidates.units.items():
            if shape != shares.shape:
                raise JaxftError(
                    f'score gate scores the {shares.shape[1]} experts of {shares.shape[0]} layers, and "{path}" has '
                    f"{shape[0]} x {shape[1]} units: use granularity expert and on: '@experts'"
                )
        return dict.fromkeys(candidates.units, shares)

    return score


SCORES: dict[str, Callable[..., Score]] = {
    "random": random,
    "balanced": balanced,
    "cyclic": cyclic,
    "magnitude": magnitude,
    "gradient": gradient,
    "absolute_gradient": absolute_gradient,
    "fisher": fisher,
    "first_order": first_order,
    "low_rank": low_rank,
    "change": change,
    "activation": activation,
    "gate": gate,
}


def make_score(spec: str | dict[str, Any] | Score) -> Score:
    """A score from its name, from `{name: ..., options}`, or as it is.

    Raises:
        JaxftError: the name or an option is unknown; the message names the nearest.
    """
    if callable(spec):
        return spec
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = options.pop("name", None)
    if name not in SCORES:
        raise JaxftError(f'unknown score "{name}": {nearest(str(name), SCORES)}')
    known = inspect.signature(SCORES[name]).parameters
    for option in options:
        if option not in known:
            raise JaxftError(f'score "{name}" has no option "{option}": {nearest(option, known)}')
    hints = get_type_hints(SCORES[name])
    fields: dict[str, Any] = {option: (hints[option], known[option].default) for option in known}
    try:
        checked = pydantic.create_model(f"{name}_options", **fields)(**options)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise JaxftError(f'score "{name}", option {first["loc"][0]}={first["input"]!r}: {first["msg"]}') from None
    return SCORES[name](**{option: getattr(checked, option) for option in options})
