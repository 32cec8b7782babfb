"""`Probe`: what a method may look at before (and between) training steps, computed only when asked for."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from jaxft.errors import JaxftError, nearest
from jaxft.partition import DECODER_ROLES, Roles, Selector, map_weights, select, shape_of, weights_by_path
from jaxft.weights import Observed, Tally, Tree, add_site, materialize

Loss = Callable[[Tree, dict, PRNGKeyArray], tuple[Array, Array, Any]]


def identity(gradient: Array) -> Array:
    return gradient


def _mean_loss(loss_fn: Loss, params: Tree, batch: dict) -> Array:
    total, weight, _ = loss_fn(params, batch, jax.random.key(0))
    return total / jnp.maximum(weight, 1)


# The passes are compiled once a loss, not once a call: a method that looks at every re-selection does not recompile.
@functools.lru_cache(maxsize=16)
def _loss_pass(loss_fn: Loss) -> Callable:
    return jax.jit(functools.partial(_mean_loss, loss_fn))


@functools.lru_cache(maxsize=16)
def _gradient_pass(loss_fn: Loss, transform: Callable[[Array], Array]) -> Callable:
    def add(total: dict, chosen: dict, params: Tree, batch: dict, share: Array) -> dict:
        def loss(chosen: dict) -> Array:
            return _mean_loss(loss_fn, map_weights(lambda p, w: chosen.get(p, w), params), batch)

        gradient = jax.grad(loss)(chosen)
        return jax.tree.map(lambda t, g: t + transform(g.astype(jnp.float32)) * share, total, gradient)

    return jax.jit(add)


@functools.lru_cache(maxsize=16)
def _energy_pass(loss_fn: Loss) -> Callable:
    def total(energy: dict, params: Tree, batch: dict) -> Array:
        def observe(path: str, w: Any) -> Any:
            return Observed(w, energy[path]) if path in energy else w

        # The sum, not the mean: a loss may scale the gradient of the head by what divides it.
        return loss_fn(map_weights(observe, params), batch, jax.random.key(0))[0]

    return jax.jit(jax.grad(total))


@functools.lru_cache(maxsize=16)
def _gate_pass(loss_fn: Loss, site: str, layers: str) -> Callable:
    def total(tally: Tally, params: Tree, batch: dict) -> Array:
        return loss_fn(add_site(params, site, tally, layers=layers), batch, jax.random.key(0))[0]

    return jax.jit(jax.grad(total))


@dataclasses.dataclass(frozen=True)
class Probe:
    """Calibration passes over a model.

    Args:
        roles: the names of the model's parts.
        loss_fn: `(params, batch, rng) -> (sum of token losses, sum of token weights, aux)`.
        batches: calibration batches, each call a fresh iterator over the same ones.
        trainer: `(params, method, steps) -> params`: a training run on the job's own data, materialised.
        total_steps: length of the training run.
        sets: batches of the evaluation sets by name, each call a fresh iterator.
        assume: where a run is planned, so that answers have shapes and no values: takes a sentence that says what a
            method takes for granted instead. None where answers have values.

    A probe without `loss_fn` answers nothing but `roles`: enough for methods that look at weights alone.
    """

    roles: Roles = DECODER_ROLES
    loss_fn: Loss | None = None
    batches: Callable[[], Iterable[dict]] | None = None
    trainer: Callable[[Tree, Any, int], Tree] | None = None
    total_steps: int = 0
    sets: Mapping[str, Callable[[], Iterable[dict]]] = dataclasses.field(default_factory=dict)
    assume: Callable[[str], None] | None = None

    def on(self, name: str) -> "Probe":
        """The same probe over the batches of one of the `sets`. Raises JaxftError if there is none of that name."""
        if name not in self.sets:
            known = nearest(name, self.sets) if self.sets else "there is none; name one in evaluation.sets"
            raise JaxftError(f'this method looks at the evaluation set "{name}": {known}')
        return dataclasses.replace(self, batches=self.sets[name])

    def _batches(self, n: int) -> Iterator[dict]:
        if self.loss_fn is None or self.batches is None:
            raise JaxftError("this method looks at data before training: give its probe a loss_fn and batches")
        if n < 1:
            raise JaxftError(f"this method looks at data before training: {n} calibration batches are none")
        found = list(itertools.islice(self.batches(), n))
        if len(found) < n:
            raise JaxftError(f"the probe was asked for {n} calibration batches and there are {len(found)}")
        return iter(found)

    def loss(self, params: Tree, n: int = 1) -> Array:
        """The mean loss of `params` over `n` batches (mean of batch means), a float32 scalar."""
        batches = self._batches(n)
        return jnp.mean(jnp.stack([_loss_pass(self.loss_fn)(params, batch) for batch in batches]))

    def gradients_of(
        self, params: Tree, paths: Iterable[str], n: int = 1, transform: Callable[[Array], Array] = identity
    ) -> dict[str, Array]:
        """The mean over `n` batches of `transform(gradient)` with respect to the weights at `paths`, float32, by path.

        Those weights are materialised (a gradient is of a dense array), the others stay the nodes they are and cost no
        gradient. A `transform` defined once, not at each call, compiles once.
        """
        weights, batches = weights_by_path(params), self._batches(n)
        chosen = {p: materialize(weights[p]) for p in paths}
        total = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), chosen)
        # Beside what is differentiated, so that it is not passed in twice.
        rest = map_weights(lambda p, w: np.float32(0) if p in chosen else w, params)
        add = _gradient_pass(self.loss_fn, transform)
        for batch in batches:
            total = add(total, chosen, rest, batch, jnp.float32(1 / n))
        return total

    def gradients(self, params: Tree, n: int = 1, transform: Callable[[Array], Array] = identity) -> Tree:
        """The mean over `n` batches of `transform(gradient)` with respect to every dense weight.

        Nodes are materialised first: the result has the structure of `materialize(params)`, float32. With
        `transform=jnp.square` it is the diagonal of the empirical Fisher information over batches.
        """
        dense = materialize(params)
        found = self.gradients_of(dense, weights_by_path(dense), n, transform)
        return map_weights(lambda p, _: found[p], dense)

    def activations(self, params: Tree, n: int = 1, on: Selector = "@linear") -> dict[str, Array]:
        """Root mean square of the inputs of the selected matrices, per input channel: path -> float32 `[..., d_in]`.

        Averaged over all tokens of `n` batches, padding included.
        """
        chosen, batches = select(params, on, roles=self.roles), self._batches(n)
        paths = {p: shape_of(w)[:-1] for p, w in weights_by_path(params).items() if p in chosen}
        energy = {p: jnp.zeros(s, jnp.float32) for p, s in paths.items()}
        summed, tokens = energy, 0
        for batch in batches:
            summed = jax.tree.map(jnp.add, summed, _energy_pass(self.loss_fn)(energy, params, batch))
            tokens += int(np.prod(batch["tokens"].shape))
        return {p: jnp.sqrt(e / tokens) for p, e in summed.items()}

    def gates(self, params: Tree, n: int = 1) -> tuple[Array, Array]:
        """Of a mixture of experts: the sum of the gates of each expert and how many tokens went to it, over `n` batches
        without their padding, both float32 `[layers, experts]`.

        Raises:
            JaxftError: the model has no experts.
        """
        found = {}
        if "router" in self.roles.names:
            found = select(params, "@router", roles=self.roles, allow_empty=True)
        if not found:
            raise JaxftError("this method asks which experts tokens go to, and the model has none (no @router)")
        (path,) = found
        layers, *names, _ = path.split(".")
        shape = shape_of(weights_by_path(params)[path])
        zero = jnp.zeros((shape[0], shape[-1]), jnp.float32)
        total = Tally(zero, zero)
        counted = _gate_pass(self.loss_fn, ".".join(names), layers)
        for batch in self._batches(n):
            total = jax.tree.map(jnp.add, total, counted(Tally(zero, zero), params, batch))
        return total.mass, total.count

    def train(self, params: Tree, method: Any, steps: int) -> Tree:
        """`params` after `steps` of training with `method` on the job's own data: plain arrays, float32 masters.

        The result lies where `materialize(params)` lies.
        """
        if self.trainer is None:
            raise JaxftError("this method trains once before it selects: give its probe a trainer")

        def beside(new: Array, old: Array) -> Array:
            if isinstance(old, jax.core.Tracer):  # planned, not run: it lies nowhere
                return new
            return jax.device_put(new, jnp.asarray(old).sharding)

        return jax.tree.map(beside, self.trainer(params, method, steps), materialize(params))
