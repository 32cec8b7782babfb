"""Optimizers and schedules by their optax name, with their options checked before anything runs."""

import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from pydantic import BaseModel, ConfigDict, Field, model_validator

from jaxft.errors import nearest
from jaxft.partition import DECODER_ROLES, Roles, key_name
from jaxft.weights.memory import fetch

Tree = Any
Schedule = Callable[[Any], Any]

# --- what optax has ---------------------------------------------------------------------------------------------------

# These need more than gradients, parameters and the loss (a line search, a Hessian, per-example gradients, another
# optimizer, shapes of their own).
_UNFIT = ("lbfgs", "sophia", "dpsgd", "optimistic_gradient_descent", "schedule_free", "galore")
# Set by this module, so not options of a config.
_SET_HERE = ("learning_rate", "mask", "weight_decay_mask", "muon_weight_dimension_numbers", "adam_learning_rate")
_MASKS = ("mask", "weight_decay_mask")
# What an option must lie in wherever it has this name: the upper bound is excluded.
_RANGES = {
    **dict.fromkeys(("b1", "b2", "b3", "decay", "momentum"), (0.0, 1.0)),
    **dict.fromkeys(("eps", "eps_root", "weight_decay", "weight_decay_rate"), (0.0, math.inf)),
}
_DTYPES = ("mu_dtype", "accumulator_dtype", "dtype_momentum", "state_dtype")  # what `*moment_dtype` is here
# The fields of the states of optax that hold running means of gradients, and of their squares.
_FIRST_MOMENTS = ("mu", "m", "m1", "m2", "trace", "ema", "exp_avg")
_SECOND_MOMENTS = ("nu", "nu_max", "n", "exp_avg_sq", "e_g", "v_row", "v_col", "v")
_MOMENT_CHOICES = ("float32", "bfloat16")
_SLOWEST_DECAY = 0.99  # of a bfloat16 number: from 0.997 on rounding undoes it (8 significant bits)


def _functions(*modules: Any) -> dict[str, Callable]:
    found: dict[str, Callable] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # optax names moved to optax.contrib warn when touched
        for module in reversed(modules):
            public = {n: getattr(module, n) for n in dir(module) if not n.startswith("_")}
            found |= {n: f for n, f in public.items() if inspect.isfunction(f)}
    return found


def optimizers() -> dict[str, Callable]:
    """Every optimizer of optax and optax.contrib that a train step can drive, by name."""
    return {
        name: f
        for name, f in _functions(optax, optax.contrib).items()
        if "learning_rate" in inspect.signature(f).parameters and name not in _UNFIT and not name.startswith("scale_by")
    }


def _own_schedules() -> dict[str, Callable]:
    return {
        "constant": _constant,
        "linear": _linear,
        "cosine": _cosine,
        "warmup_constant": _constant,
        "warmup_linear_decay": _linear,
        "warmup_cosine_decay": _cosine,
    }


def schedules() -> dict[str, Callable]:
    """The schedules of optax by name, and the short forms of this module."""
    named = {n: f for n, f in _functions(optax).items() if n.endswith("_schedule") or n == "exponential_decay"}
    unfit = ("scale_by_schedule", "piecewise_interpolate_schedule", "sgdr_schedule", "inject_stateful_hyperparams")
    return {n: f for n, f in named.items() if n not in unfit} | _own_schedules()


def _check_options(kind: str, name: str, function: Callable, options: dict[str, Any], taken: tuple[str, ...]) -> None:
    """Raise ValueError (which pydantic reports with the key's path) for an unknown, missing or ill-typed option."""
    parameters = {n: p for n, p in inspect.signature(function).parameters.items() if n not in taken}
    for option, value in options.items():
        if option not in parameters:
            raise ValueError(f'{kind} "{name}" has no option "{option}": {nearest(option, parameters)}')
        default = parameters[option].default
        if isinstance(default, bool) and not isinstance(value, bool):
            raise ValueError(f'option "{option}" of {kind} "{name}" is {value!r}: expected true or false')
        if (
            isinstance(default, int | float)
            and not isinstance(default, bool)
            and (isinstance(value, bool) or not isinstance(value, int | float | None))
        ):
            raise ValueError(f'option "{option}" of {kind} "{name}" is {value!r}: expected a number')
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f'option "{option}" of {kind} "{name}" is {value}: expected a finite number')
        low, high = _RANGES.get(option, (-math.inf, math.inf))
        if isinstance(value, int | float) and not low <= value < high:
            bounds = f"at least {low:g}" + (f" and below {high:g}" if high < math.inf else "")
            raise ValueError(f'option "{option}" of {kind} "{name}" is {value!r}: expected a number {bounds}')
    missing = [n for n, p in parameters.items() if p.default is inspect.Parameter.empty and n not in options]
    if missing:
        raise ValueError(f'{kind} "{name}" needs the option "{missing[0]}"')


# --- schedules --------------------------------------------------------------------------------------------------------


def _warmup_steps(warmup: float, total_steps: int) -> int:
    return round(warmup * total_steps) if warmup < 1 else int(warmup)


def _warmed(after: Schedule, peak: float, warmup: float, total_steps: int) -> Schedule:
    steps = _warmup_steps(warmup, total_steps)
    if not steps:
        return after
    # Step 0 already learns: the rate is peak / steps there, and peak at step `steps - 1`.
    rise = optax.linear_schedule(peak / steps, peak, max(steps - 1, 1))
    return optax.join_schedules([rise, after], [steps])


def _constant(total_steps: int, peak: float, warmup: float = 0.0) -> Schedule:
    return _warmed(optax.constant_schedule(peak), peak, warmup, total_steps)


def _linear(total_steps: int, peak: float, warmup: float = 0.0, end: float = 0.0) -> Schedule:
    rest = max(total_steps - _warmup_steps(warmup, total_steps), 1)
    return _warmed(optax.linear_schedule(peak, end * peak, rest), peak, warmup, total_steps)


def _cosine(total_steps: int, peak: float, warmup: float = 0.0, end: float = 0.0) -> Schedule:
    rest = max(total_steps - _warmup_steps(warmup, total_steps), 1)
    return _warmed(optax.cosine_decay_schedule(peak, rest, alpha=end), peak, warmup, total_steps)


class ScheduleConfig(BaseModel):
    """The learning rate over the optimizer's updates. A bare number is a constant rate.

    Short forms `constant`, `linear`, `cosine` (`warmup_linear_decay` and `warmup_cosine_decay` are the same): `peak`;
    `warmup`, below 1 a fraction of the run, else steps; `end`, the last rate as a fraction of the peak. Any other name
    is a schedule of optax with its own options (https://optax.readthedocs.io/en/latest/api/optimizer_schedules.html);
    `decay_steps` and `transition_steps` are the length of the run unless given.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = Field("constant", description="`constant`, `linear`, `cosine`, or the name of an optax schedule.")

    @model_validator(mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return {"name": "constant", "peak": value}
        if not isinstance(value, dict | ScheduleConfig):
            shown = f"{value!r} (text)" if isinstance(value, str) else "null" if value is None else repr(value)
            raise ValueError(f"expected a number, or a schedule such as {{name: cosine, peak: 1e-3}}, got {shown}")
        return value

    @model_validator(mode="after")
    def _check(self) -> "ScheduleConfig":
        known = schedules()
        if self.name not in known:
            raise ValueError(f'no schedule "{self.name}": {nearest(self.name, known)}')
        options = self.options()
        lengths = {n: 1 for n in ("decay_steps", "transition_steps") if n not in options}
        parameters = inspect.signature(known[self.name]).parameters
        filled = options | {n: v for n, v in lengths.items() if n in parameters}
        _check_options("schedule", self.name, known[self.name], filled, ("total_steps",))
        for option in ("peak", "peak_value", "value"):
            if options.get(option, 0) < 0:
                raise ValueError(f'option "{option}" of schedule "{self.name}" is negative: {options[option]}')
        if options.get("warmup", 0) < 0:
            raise ValueError(f"warmup = {options['warmup']}: expected a fraction of the run below 1, or a step count")
        return self

    def options(self) -> dict[str, Any]:
        """The options beside the name."""
        return dict(self.__pydantic_extra__ or {})


def make_schedule(config: ScheduleConfig, total_steps: int) -> Schedule:
    """The learning rate as a function of the number of optimizer updates made (from 0), of a run of `total_steps`."""
    function, options = schedules()[config.name], config.options()
    parameters = inspect.signature(function).parameters
    for length in ("total_steps", "decay_steps", "transition_steps"):
        if length in parameters and length not in options:
            options[length] = total_steps
    return function(**options)


# --- optimizers -------------------------------------------------------------------------------------------------------


class OptimizerConfig(BaseModel):
    """An optimizer of optax or optax.contrib by name, with its own options beside the name.

    See https://optax.readthedocs.io/en/latest/api/optimizers.html for names and options.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = Field("adamw", description="adamw, sgd, lion, adafactor, muon, schedule_free_adamw, ...")
    decay_vectors: bool = Field(False, description="Whether weight decay applies to norm scales and biases too.")
    moment_dtype: str | None = Field(
        None,
        description="Dtype in which the first moment (momentum) is kept, float32 or bfloat16; null: that of the "
        "trained parameters, float32 by default. Updates are computed in float32.",
    )
    second_moment_dtype: str | None = Field(
        None,
        description="The same for the second moment. bfloat16 needs a `b2` of at most 0.99: it has no numbers close "
        "enough for a slower decay.",
    )

    @model_validator(mode="before")
    @classmethod
    def _bare_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> "OptimizerConfig":
        known = optimizers()
        if self.name not in known:
            raise ValueError(f'no optimizer "{self.name}": {nearest(self.name, known)}')
        function = known[self.name]
        _check_options("optimizer", self.name, function, self.options(), _SET_HERE + _DTYPES)
        for key, value, fields in self._moments():
            if value not in _MOMENT_CHOICES:
                raise ValueError(f'{key} = "{value}": {nearest(value, _MOMENT_CHOICES)}')
            if not _has_moments(self, fields):
                raise ValueError(f'optimizer "{self.name}" keeps no such moment with these options: drop {key}')
        for name in {"b2", "adam_b2"} & set(inspect.signature(function).parameters):
            decay = self.options().get(name, inspect.signature(function).parameters[name].default)
            if self.second_moment_dtype == "bfloat16" and decay > _SLOWEST_DECAY:
                raise ValueError(
                    f'second_moment_dtype = "bfloat16" with {name} = {decay}: a bfloat16 number times {decay} is '
                    f"rounded to itself, so that the moment would never fall; expected {name} of at most "
                    f"{_SLOWEST_DECAY}, or float32"
                )
        return self

    def _moments(self) -> list[tuple[str, str, tuple[str, ...]]]:
        """`(key, dtype, fields of optimizer states)` for each dtype that is given."""
        given = [
            ("moment_dtype", self.moment_dtype, _FIRST_MOMENTS),
            ("second_moment_dtype", self.second_moment_dtype, _SECOND_MOMENTS),
        ]
        return [(key, value, fields) for key, value, fields in given if value is not None]

    def options(self) -> dict[str, Any]:
        """The options of the optax function."""
        return dict(self.__pydantic_extra__ or {})


def matrix_mask(params: Tree, roles: Roles = DECODER_ROLES) -> Tree:
    """True for what is a matrix or more once its layer axis is set aside; False for norm scales and biases.

    Which leaves are stacked is a matter of their path (`roles.stacked`): a norm scale `[layers, dim]` is a vector.
    """
    return jax.tree_util.tree_map_with_path(lambda keys, a: _rank(keys, a, roles) >= 2, params)


def _rank(keys: tuple, a: Any, roles: Roles) -> int:
    return a.ndim - roles.is_stacked(".".join(map(key_name, keys)))


def _muon_dimensions(params: Tree, roles: Roles) -> Tree:
    """Muon orthogonalises the matrices of layers, one by one along their stack; the rest is left to its Adam."""

    def one(keys: tuple, a: Any) -> Any:
        stacked = roles.is_stacked(".".join(map(key_name, keys)))
        is_matrix = stacked and _rank(keys, a, roles) >= 2
        return optax.contrib.MuonDimensionNumbers(a.ndim - 2, a.ndim - 1) if is_matrix else None

    return jax.tree_util.tree_map_with_path(one, params)


def make_optimizer(
    config: OptimizerConfig, learning_rate: float | Schedule, *, roles: Roles = DECODER_ROLES
) -> optax.GradientTransformation:
    """The optimizer a config describes, for the trainable leaves of a parameter tree.

    Weight decay leaves vectors (norm scales, biases) alone unless `decay_vectors`. Clipping is the train step's.
    """
    function, options = optimizers()[config.name], config.options()
    parameters = inspect.signature(function).parameters
    options["learning_rate"] = learning_rate
    if not config.decay_vectors:
        for name in _MASKS:
            if name in parameters:
                options[name] = lambda params: matrix_mask(params, roles)
    if "muon_weight_dimension_numbers" in parameters:
        options["muon_weight_dimension_numbers"] = lambda params: _muon_dimensions(params, roles)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        optimizer = function(**options)
    dtypes = {field: jnp.dtype(value) for _, value, fields in config._moments() for field in fields}
    return keep_in(optimizer, dtypes) if dtypes else optimizer


def keep_in(optimizer: optax.GradientTransformation, dtypes: dict[str, Any]) -> optax.GradientTransformationExtraArgs:
    """`optimizer` with the floating arrays below some fields of its states kept in other dtypes between updates.

    Updates see them in float32.
    """
    inner = optax.with_extra_args_support(optimizer)

    def cast(state: Any, to: Callable[[Any], Any]) -> Any:
        def one(keys: tuple, a: Any) -> Any:
            field = next((k.name for k in reversed(keys) if getattr(k, "name", None) in dtypes), None)
            return a if field is None or not jnp.issubdtype(a.dtype, jnp.floating) else a.astype(to(dtypes[field]))

        return jax.tree_util.tree_map_with_path(one, state)

    def init(params: Tree) -> Any:
        return cast(inner.init(params), lambda dtype: dtype)

    def update(updates: Tree, state: Any, params: Tree | None = None, **extra: Any) -> tuple[Tree, Any]:
        updates, state = inner.update(updates, cast(state, lambda _: jnp.float32), params, **extra)
        return updates, cast(state, lambda dtype: dtype)

    return optax.GradientTransformationExtraArgs(init, update)


def _has_moments(config: OptimizerConfig, fields: tuple[str, ...]) -> bool:
    """Whether the state of an optimizer has any of these fields, which may depend on its options."""
    params = {name: jax.ShapeDtypeStruct((2, 128, 128), jnp.float32) for name in ("layers", "other")}  # muon divides
    plain = config.model_copy(update={"moment_dtype": None, "second_moment_dtype": None})
    state = jax.eval_shape(make_optimizer(plain, 1.0).init, params)
    return any(
        getattr(k, "name", None) in fields for keys, _ in jax.tree_util.tree_leaves_with_path(state) for k in keys
    )


def evaluation_parameters(opt_state: Any, trainable: Tree) -> Tree:
    """The trainable leaves to evaluate and export: those of a schedule-free optimizer are an average it keeps.

    (Defazio et al. 2024, arXiv:2405.15682.) For any other optimizer, `trainable` itself.
    """
    is_free = lambda s: isinstance(s, optax.contrib.ScheduleFreeState)  # noqa: E731
    for state in jax.tree.leaves(opt_state, is_leaf=is_free):
        if is_free(state):
            return optax.contrib.schedule_free_eval_params(fetch(state), trainable)
    return trainable
