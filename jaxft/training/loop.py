"""The training run: `train(config)` builds everything, resumes where it stopped, steps, evaluates, saves and reports.

Follow a batch: `train_batches` yields the rows of this process, `shard_batch` puts them on the mesh, `train_step` turns
state and batch into the next state. Between steps, on the host: the method's `update`, evaluation, checkpoints,
metrics.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import PyTree
from pydantic import BaseModel, ConfigDict, Field, model_validator

from jaxft.checkpoint import (
    CheckpointConfig,
    Checkpointer,
    CheckpointError,
    checksums,
    fingerprint,
    named_leaves,
    rebuildable,
    stored_bytes,
)
from jaxft.data import DataConfig, TrainBatches, evaluation_batches, train_batches
from jaxft.data.report import check_vocabulary
from jaxft.distributed import (
    MeshConfig,
    ShardingReport,
    agree,
    barrier,
    check_batch,
    data_partition,
    from_first,
    gather,
    in_step,
    initialize,
    make_mesh,
    row_shards,
    set_process_timeout,
    shard_batch,
    shard_tree,
    together,
    tree_shardings,
)
from jaxft.errors import JaxftError, nearest
from jaxft.evaluation import EvaluationConfig, Results, against_base, make_evaluation
from jaxft.hub import load_model, load_pretrained, load_tokenizer
from jaxft.methods import Method, Probe, Signals, build, count_trainable, wrap_optimizer
from jaxft.partition import Tuned
from jaxft.picture import draw_selection
from jaxft.selected import selected
from jaxft.structure import cut_structure, left_out_of, take_from_base, tuned_in
from jaxft.training.compilation import CompilationLog, enable_compilation_cache, fetches_ahead
from jaxft.training.consistency import file_facts, start_facts
from jaxft.training.loss import Loss, language_model_loss
from jaxft.training.metrics import LoggingConfig, Meter, Terminal, make_writers, memory_bytes, read_metrics
from jaxft.training.optimizer import (
    OptimizerConfig,
    ScheduleConfig,
    evaluation_parameters,
    make_optimizer,
    make_schedule,
)
from jaxft.training.output import RunDirectory, config_fingerprint
from jaxft.training.precision import Precision, cast_floating, dtype
from jaxft.training.preemption import Interrupted, StopRequest
from jaxft.training.report import Report, report_markdown
from jaxft.training.state import (
    Offloadable,
    TrainState,
    abstract,
    init_state,
    lay_out,
    parameters,
    shardings_of,
    tuned_of,
)
from jaxft.training.step import Schedule, TrainStep, make_train_step
from jaxft.weights import materialize
from jaxft.weights.memory import fetch

logger = logging.getLogger(__name__)
_FRESH = 2**31 - 2  # the stream of random numbers of fresh weights
_UPDATES = 2**31 - 1  # the stream of random numbers of `Method.update`; the train step's streams are step numbers


class ProfileConfig(BaseModel):
    """Which steps to trace with the JAX profiler, for TensorBoard or Perfetto."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    start: int = Field(10, ge=1, description="First step traced (counted from 1); let compilation pass before.")
    steps: int = Field(3, ge=1, description="How many steps.")


class TrainingConfig(BaseModel):
    """Section `training` of a run's configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int | None = Field(None, ge=1, description="Optimizer steps; this or `epochs`.")
    epochs: float | None = Field(None, gt=0, description="Passes over the training data; this or `steps`.")
    optimizer: OptimizerConfig = Field(
        default_factory=OptimizerConfig, description="An optimizer of optax and its options."
    )
    learning_rate: ScheduleConfig = Field(description="A number, or a schedule of optax and its options.")
    accumulation: int = Field(
        1, ge=1, description="Micro-batches that a batch is cut into; changes memory, not the result."
    )
    clip_norm: float | None = Field(1.0, gt=0, description="Largest global norm of the gradient; null: no clipping.")
    z_loss: float = Field(
        0.0, ge=0, description="Weight of the squared log-partition, which keeps logits from drifting."
    )
    offload: list[Offloadable] = Field(
        default_factory=list,
        description="What waits in host memory: `optimizer`, the optimizer's state, fetched and stored parameter by "
        "parameter at every update; `frozen`, the frozen matrices of layers, fetched layer by layer (not with "
        "`model.remat: none`, which keeps them; on a TPU those stay of which a chip has columns that fill no tiles of "
        "128). Less memory of the device for transfers in every step; on a CPU it is the same memory, and nothing is "
        "gained.",
    )
    compiler_options: dict[str, bool | int | float | str] = Field(
        default_factory=dict,
        description="Options of XLA for the train step, by their names without dashes, beside those that jaxft sets "
        "for the device (docs/planning.md).",
    )
    profile: ProfileConfig | None = Field(None, description="Trace some steps with the JAX profiler; null: none.")

    @model_validator(mode="after")
    def _one_length(self) -> "TrainingConfig":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("set exactly one of training.steps and training.epochs")
        return self


class RunSettings(Protocol):
    """What `train` reads of a configuration; `jaxft.config.RunConfig` is one."""

    @property
    def model(self) -> Any: ...
    @property
    def method(self) -> list[dict[str, Any]]: ...
    @property
    def data(self) -> DataConfig: ...
    @property
    def evaluation(self) -> EvaluationConfig: ...
    @property
    def training(self) -> TrainingConfig: ...
    @property
    def mesh(self) -> MeshConfig: ...
    @property
    def checkpoint(self) -> CheckpointConfig: ...
    @property
    def logging(self) -> LoggingConfig: ...
    @property
    def output(self) -> str: ...
    @property
    def seed(self) -> int: ...

    def resolved(self) -> dict[str, Any]: ...


def train(config: RunSettings, *, overwrite: bool = False) -> Report:
    """Trains as `config` says, in its output directory, from the start or from the latest good checkpoint there.

    Args:
      config: a checked configuration.
      overwrite: replace the run that the output directory holds instead of resuming it.

    Returns:
      The report, as written to `report.json`. A run that is finished already is not run again: its report is returned.

    Raises:
      JaxftError: something in the configuration, the data, the output directory or a checkpoint is wrong.
      Interrupted: SIGTERM or SIGINT came; a checkpoint was saved and the same command resumes.
    """
    initialize()
    set_process_timeout(config.mesh.process_timeout)
    enable_compilation_cache()
    resolved = config.resolved()
    with contextlib.ExitStack() as stack:
        stack.enter_context(together())
        if jax.process_count() > 1:
            agree("configuration or code", start_facts(resolved))
        run = stack.enter_context(RunDirectory(config.output, resolved, overwrite=overwrite))
        if (found := run.read("report.json")) is not None:
            report = Report(**found)
            Terminal(report.steps, report.steps, 1).say(
                f"The run in {run.path} is finished ({report.steps} steps): nothing to do. Its report is "
                f"{run.path / 'report.md'}; to train again, set `output` to another directory or overwrite this one."
            )
            return report
        mesh = stack.enter_context(_on(make_mesh(_axes(config))))
        compiled = stack.enter_context(CompilationLog())
        stop = stack.enter_context(StopRequest())
        job = prepare(config, mesh, resolved)
        report = run_job(job, run, compiled, stop, stack)
    return report


def _memory() -> int | None:
    """Bytes of the smallest device of all processes, where devices say so."""
    found = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in jax.local_devices()]
    return min(gather("memory of devices", min(found))) or None


def _axes(config: RunSettings) -> MeshConfig:
    """The axes of the mesh; with `mesh: auto` chosen here, by every process from the same facts."""
    from jaxft.distributed.automatic import resolve_mesh  # it builds what this room holds

    if not config.mesh.auto:
        return config.mesh
    model = load_model(config.model.path)
    return resolve_mesh(config, model, jax.device_count(), config.mesh.dcn, _memory())[0]


def _with_remat(config: RunSettings, mesh: Mesh) -> RunSettings:
    """The configuration with what is recomputed; with `model.remat: auto` chosen here, as the mesh is."""
    from jaxft.distributed.automatic import resolve_remat, with_settings

    if config.model.remat != "auto":
        return config
    found, _ = resolve_remat(config, load_model(config.model.path), mesh, _memory())
    return with_settings(config, {"model.remat": found})


@contextlib.contextmanager
def _on(mesh: Mesh) -> Iterator[Mesh]:
    with jax.set_mesh(mesh):
        yield mesh


# Building what a run needs


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything that is fixed before the first step."""

    config: RunSettings
    resolved: Mapping[str, Any]
    mesh: Mesh
    model: Any
    method: Method
    optimizer: optax.GradientTransformation
    schedule: Schedule
    precision: Precision
    loss: Loss
    probe: Probe
    stream: TrainBatches  # the training data, at its start
    evaluate: Callable[[PyTree], Results]
    steps: int
    steps_per_epoch: float


def prepare(config: RunSettings, mesh: Mesh, resolved: Mapping[str, Any]) -> Job:
    """Loads model and data, builds method, optimizer, loss and evaluation. Compiles nothing large."""
    config = _with_remat(config, mesh)
    training, settings = config.training, config.model
    check_batch(config.data.batch_size, config.data.seq_len, mesh, training.accumulation)
    if jax.process_count() > 1:
        agree("their files", file_facts(config))
    precision = Precision(settings.param_dtype, settings.frozen_dtype, settings.compute_dtype)
    method = build(config.method)
    tokenizer = load_tokenizer(settings.path)
    index, count = data_partition(mesh)

    def batches() -> TrainBatches:
        return train_batches(config.data, tokenizer, seed=config.seed, process_index=index, process_count=count)

    stream = batches()
    agree("the training data as read", {"tokens": json.loads(stream.get_state())["data"]})
    per_epoch = stream.steps_per_epoch
    steps = training.steps
    if steps is None:
        assert training.epochs is not None  # the section has one of the two
        steps = max(1, round(training.epochs * per_epoch))
    if stream.total_steps is not None and steps > stream.total_steps:
        raise JaxftError(
            f"training for {steps} steps needs {steps / per_epoch:.2f} epochs, and data.epochs = {config.data.epochs} "
            f"ends after {stream.total_steps} steps; raise data.epochs or set it to null"
        )
    model = load_model(settings.path)
    check_vocabulary(stream.report, model.config.vocab_size)
    compute = dtype(settings.compute_dtype)
    loss = language_model_loss(
        model,
        compute_dtype=compute,
        remat=settings.remat,
        attention=settings.attention,
        z_loss=training.z_loss,
        row_shards=row_shards(mesh),
        router_aux_loss=settings.router_aux_loss,
    )

    def set_batches(name: str) -> Iterator[dict]:
        found = evaluation_batches(
            config.evaluation.sets[name],
            tokenizer,
            seq_len=config.data.seq_len,
            batch_size=config.data.batch_size,
            data=config.data,
            process_index=index,
            process_count=count,
        )
        choices = ("question", "choice", "correct")
        return (shard_batch({k: x for k, x in batch.items() if k not in choices}, mesh) for batch in found)

    schedule = make_schedule(training.learning_rate, steps)
    job = Job(
        config=config,
        resolved=resolved,
        mesh=mesh,
        model=model,
        method=method,
        optimizer=make_optimizer(training.optimizer, schedule),
        schedule=schedule,
        precision=precision,
        loss=loss,
        probe=Probe(),
        stream=stream,
        evaluate=make_evaluation(
            config.evaluation, config.data, tokenizer, model, mesh, dtype=compute, attention=settings.attention
        ),
        steps=steps,
        steps_per_epoch=per_epoch,
    )
    return dataclasses.replace(
        job,
        probe=Probe(
            loss_fn=loss,
            batches=lambda: (shard_batch(batch, mesh) for batch in batches()),
            trainer=lambda params, method, steps: short_run(job, batches(), params, method, steps),
            total_steps=steps,
            sets={name: functools.partial(set_batches, name) for name in config.evaluation.sets},
        ),
    )


def fresh_key(seed: int) -> jax.Array:
    """The key from which a run with `model.init: random` draws its first weights."""
    return jax.random.fold_in(jax.random.key(seed), _FRESH)


def load_base(job: Job) -> tuple[PyTree, ShardingReport]:
    """The base model's parameters on the mesh, and what of them could not be divided over it as the rules say."""
    settings, report = job.config.model, ShardingReport()
    param_dtype = dtype(settings.param_dtype)
    shardings = tree_shardings(job.model.abstract(param_dtype), job.model.logical_axes(), job.mesh, report=report)
    if settings.init == "random":
        fresh = jax.jit(lambda rng: job.model.init(rng, param_dtype), out_shardings=shardings)
        return fresh(fresh_key(job.config.seed)), report
    _, params = load_pretrained(settings.path, dtype=param_dtype, sharding=shardings)
    return params, report


def start(job: Job, method: Method, params: PyTree, *, donate: bool = False) -> tuple[TrainState, PyTree]:
    """The first state and the frozen parameters of `method` on `params`."""
    return init_state(
        method,
        params,
        job.optimizer,
        jax.random.key(job.config.seed),
        job.mesh,
        logical_axes=job.model.logical_axes(),
        probe=job.probe,
        precision=job.precision,
        donate=donate,
        offload=job.config.training.offload,
    )


def make_step(job: Job, method: Method, state: TrainState) -> TrainStep:
    """The train step of `method`, which leaves every array of the state where it is."""
    return make_train_step(
        job.loss,
        method,
        job.optimizer,
        accumulation=job.config.training.accumulation,
        clip_norm=job.config.training.clip_norm,
        schedule=job.schedule,
        shardings=shardings_of(state),
        options=job.config.training.compiler_options,
        ahead=fetches_ahead(job.config),
    )


def short_run(job: Job, batches: TrainBatches, params: PyTree, method: Method, steps: int) -> PyTree:
    """`params` after `steps` steps of `method` on `batches`: the calibration run that a probe offers."""
    state, frozen = start(job, method, params)
    train_step = make_step(job, method, state)
    for _, batch in zip(range(steps), batches, strict=False):
        state, _ = train_step(state, frozen, shard_batch(batch, job.mesh))
    return materialize(parameters(state, frozen))


# Running


def run_job(
    job: Job, run: RunDirectory, compiled: CompilationLog, stop: StopRequest, stack: contextlib.ExitStack
) -> Report:
    """The loop: resume, step, update, evaluate, save; then the report."""
    config, method, stream, total = job.config, job.method, job.stream, job.steps
    checkpointer = stack.enter_context(
        Checkpointer(config.checkpoint.directory or run.path / "checkpoints", config.checkpoint)
    )
    begun = begin(job, run, checkpointer)
    state, frozen, first = begun.state, begun.frozen, begun.step
    train_step = make_step(job, method, state)
    wrapped = wrap_optimizer(method, job.optimizer)
    if begun.data is not None:
        stream.set_state(begun.data.encode())

    terminal = Terminal(total, first, config.logging.every)
    stack.callback(terminal.close)
    writers = [
        stack.enter_context(contextlib.closing(w)) for w in make_writers(config.logging, run.path, job.resolved, first)
    ]
    meter = Meter(writers, terminal, total, config.logging.every, skipped=int(state.skipped))
    counts = {
        "trained_parameters": count_trainable(tuned_of(state, frozen)),
        "parameters": sum(x.size for x in jax.tree.leaves(job.model.abstract())),  # the base model's
    }
    write_selection(job, run, state, frozen, first)
    for line in [*describe(job, counts, begun), *(f"warning: {text}" for text in begun.warnings)]:
        terminal.say(line)

    def save(step: int, results: Results | None) -> None:
        meter.pause()
        record = {
            "base": begun.base,
            "config": config_fingerprint(job.resolved),
            "method": config.method,
            "data": stream.get_state().decode(),
            "results": results,
            "structure": cut_structure(tuned_of(state, frozen)),
        }
        metric = watched(config, results) if results else None
        checkpointer.save(step, {"state": state, "frozen": frozen}, record, begun.left_out, metric)

    def tuned_params() -> PyTree:
        averaged = evaluation_parameters(state.opt_state, state.trainable)
        return parameters(state._replace(trainable=averaged), frozen)

    results = begun.results if first == total else None
    for step in range(first + 1, total + 1):
        checkpointer.check()
        profile(config.training.profile, step, first, run.path)
        meter.begin()
        batch = shard_batch(next(stream), job.mesh)
        programs = compiled.programs
        state, metrics = train_step(state, frozen, batch)
        recompiled = compiled.programs > programs
        if recompiled and step > first + 1:
            shapes = {name: x.shape for name, x in batch.items()}
            terminal.say(f"warning: the train step was compiled again at step {step} (batch {shapes})")
        gradients = metrics.pop("gradients", None)
        meter.add(step, metrics, timed=not recompiled)
        if step == first + 1:
            terminal.say(
                f"{compiled.programs} programs in {compiled.seconds:.1f} s, {compiled.cached} of them from the cache"
            )
        if method.update is not None and method.due is not None and method.due(step, total):
            meter.pause()
            state, frozen = update(job, method, wrapped, state, frozen, step, metrics["loss"], gradients)
        asked = stop.after_step()
        results = None
        if (config.evaluation.every and step % config.evaluation.every == 0) or step == total:
            meter.pause()
            results = job.evaluate(tuned_params())
            meter.evaluation(step, results)
        if save_due(config.checkpoint, checkpointer, step, results) or asked is not None or step == total:
            save(step, results)
        if asked is not None and step < total:
            checkpointer.wait()
            message = (
                f"stopped after step {step} of {total} and saved {checkpointer.path(step)}; the same command resumes"
            )
            terminal.say(message)
            barrier("the end of the run")
            raise Interrupted(asked, message)
    profile(config.training.profile, total + 1, first, run.path)
    checkpointer.wait()
    if results is None:
        results = job.evaluate(tuned_params())
    if method.update is not None:
        write_selection(job, run, state, frozen, total)
    return finish(job, run, terminal, counts, state, results, begun)


@dataclasses.dataclass(frozen=True)
class Begun:
    """Where a run begins: before the first step, or after `step` steps of a checkpoint."""

    state: TrainState
    frozen: PyTree
    step: int
    base: str  # name and hash of the base model
    base_results: Results
    left_out: Mapping[str, str]  # leaves that need not be saved, see `jaxft.checkpoint.rebuildable`
    warnings: tuple[str, ...] = ()
    data: str | None = None  # position in the training data
    results: Results | None = None  # of an evaluation at `step`


def begin(job: Job, run: RunDirectory, checkpointer: Checkpointer) -> Begun:
    """The latest good checkpoint, else the base model rewritten by the method."""
    begun = from_checkpoint(job, run, checkpointer) or from_base(job, run, checkpointer)
    watched(job.config, begun.base_results)  # a wrong checkpoint.metric is an error now, not after the first evaluation
    return begun


def from_checkpoint(job: Job, run: RunDirectory, checkpointer: Checkpointer) -> Begun | None:
    """Goes on from a checkpoint that holds everything, without loading the base model; None where that cannot be.

    The method's `init` does not run again: the checkpoint says what its arrays make up.
    """
    steps, base_results = checkpointer.steps(), run.read("baseline.json")
    if not steps or base_results is None:
        return None
    try:
        record = in_step("the latest record", lambda: checkpointer.record(steps[-1]))
        if left_out_of(record) or (tuned := tuned_in(record)) is None:
            return None
        state, frozen = laid_out(job, tuned)
        return restored_from(job, checkpointer, state, frozen, {}, "unknown", base_results)
    except JaxftError:  # it cannot be read, or an older checkpoint is the good one, and needs the base
        return None


def laid_out(job: Job, tuned: Tuned) -> tuple[TrainState, PyTree]:
    """The abstract state and frozen half of an abstract cut, where the run would have put them."""
    key, axes = jax.random.key(job.config.seed), job.model.logical_axes()
    offload = job.config.training.offload
    return lay_out(tuned, job.method, job.optimizer, key, job.mesh, logical_axes=axes, offload=offload)


def from_checkpoint_on_base(
    job: Job, checkpointer: Checkpointer, params: PyTree, base_sums: Mapping[str, str]
) -> tuple[TrainState, PyTree, dict[str, str]] | None:
    """What the latest checkpoint is restored into, with the leaves it leaves out taken from the base; None if unknown.

    So that a method that searched before it selected does not search again.
    """
    try:
        steps = checkpointer.steps()
        documents = [in_step(f"record {step}", functools.partial(checkpointer.record, step)) for step in steps]
    except JaxftError:  # restoring will say what is wrong with it
        return None
    if (tuned := tuned_in(documents[-1])) is None:
        return None
    left_out = {name: value for document in documents for name, value in left_out_of(document).items()}
    state, frozen = laid_out(job, tuned)
    frozen = take_from_base(frozen, left_out, params, base_sums)
    return None if frozen is None else (state, frozen, left_out)


def from_base(job: Job, run: RunDirectory, checkpointer: Checkpointer) -> Begun:
    """Loads the base model, evaluates it, rewrites it, and restores a checkpoint over the result if there is one."""
    params, not_divided = load_base(job)
    base_results = baseline(job, run, params)
    base_sums = checksums(params)
    base = f"{job.config.model.path} ({fingerprint(base_sums)})"
    base_sums |= _cast_sums(job.precision, params)
    if checkpointer.steps() and (made := from_checkpoint_on_base(job, checkpointer, params, base_sums)) is not None:
        state, frozen, left_out = made
        del params
        begun = restored_from(job, checkpointer, state, frozen, left_out, base, base_results)
        return dataclasses.replace(begun, warnings=(*str(not_divided).splitlines(), *begun.warnings))
    state, frozen = start(job, job.method, params, donate=True)
    del params  # what is frozen lives on in `frozen`, the rest is free
    left_out = rebuildable(frozen, base_sums, sum(x.nbytes for x in jax.tree.leaves(state.trainable)))
    left_out = {f"frozen.{name}": value for name, value in left_out.items()}
    kept = job.config.checkpoint.keep_last + job.config.checkpoint.keep_best
    warning = run.require_space(
        checkpointer.directory, stored_bytes({"state": state, "frozen": frozen}, left_out), kept
    )
    warnings = (*str(not_divided).splitlines(), *([warning] if warning else []))
    if not checkpointer.steps():
        return Begun(state, frozen, 0, base, base_results, left_out, warnings)
    # What the checkpoint holds is dropped here first, so that it is never in memory twice.
    emptied_state = _emptied(state)
    emptied = [leaf if f"frozen.{name}" in left_out else _emptied(leaf) for name, leaf in named_leaves(frozen).items()]
    frozen = jax.tree.unflatten(jax.tree.structure(frozen), emptied)
    del state
    begun = restored_from(job, checkpointer, emptied_state, frozen, left_out, base, base_results)
    return dataclasses.replace(begun, warnings=warnings + begun.warnings)


def _emptied(tree: PyTree) -> PyTree:
    """Shapes, dtypes and shardings of a tree whose buffers are given up."""
    shapes = abstract(tree)
    jax.tree.map(lambda x: x.delete(), tree)
    return shapes


def restored_from(
    job: Job,
    checkpointer: Checkpointer,
    state: PyTree,
    frozen: PyTree,
    left_out: Mapping[str, str],
    base: str,
    base_results: Results,
) -> Begun:
    """What the latest good checkpoint makes of abstract `state` and `frozen` (what it does not hold: arrays)."""
    restored = checkpointer.restore({"state": state, "frozen": frozen}, base=base)
    assert restored is not None  # both callers have seen its steps
    record = restored.record
    if record["config"] != config_fingerprint(job.resolved):
        raise CheckpointError(
            f"checkpoint {checkpointer.path(restored.step)} belongs to a run with another configuration"
        )
    return Begun(
        state=restored.tree["state"],
        frozen=restored.tree["frozen"],
        step=restored.step,
        base=record["base"],
        base_results=base_results,
        left_out=left_out,
        warnings=restored.warnings,
        data=record["data"],
        results=record["results"],
    )


def baseline(job: Job, run: RunDirectory, params: PyTree) -> Results:
    """The evaluation of the base model, from `baseline.json` where an earlier start (or the configuration) left it."""
    found = run.read("baseline.json")
    if found is None and job.config.evaluation.baseline:
        found = json.loads(Path(job.config.evaluation.baseline).read_text())
        missing = set(job.config.evaluation.sets) - set(found)
        if missing:
            raise JaxftError(f"evaluation.baseline: {job.config.evaluation.baseline} lacks the sets {sorted(missing)}")
    if found is None:
        found = job.evaluate(params)
    run.write("baseline.json", found)
    return found


def _cast_sums(precision: Precision, params: PyTree) -> dict[str, str]:
    """Checksums of the base in the dtype that frozen weights are kept in, one leaf at a time."""
    if precision.frozen_dtype in (None, precision.param_dtype):
        return {}
    to = dtype(precision.frozen_dtype)
    return {f"{name} cast": checksums({"x": cast_floating(x, to)})["x"] for name, x in named_leaves(params).items()}


def update(
    job: Job,
    method: Method,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    frozen: PyTree,
    step: int,
    loss: Any,
    gradients: PyTree | None,
) -> tuple[TrainState, PyTree]:
    """The method's `update` after `step`; everything stays where it was on the mesh, so that nothing recompiles.

    `optimizer` is the one that made the state: the job's, wrapped by the method once for the run.
    """
    assert method.update is not None  # what is due
    places = shardings_of((state, frozen))
    rng = jax.random.fold_in(jax.random.fold_in(state.rng, _UPDATES), step)
    signals = Signals(loss, gradients, job.probe, donate=True, optimizer=optimizer)
    state, frozen = fetch((state, frozen))
    tuned, opt_state = method.update(rng, tuned_of(state, frozen), state.opt_state, signals, step)
    state = state._replace(trainable=tuned.trainable, opt_state=opt_state, method_state=tuned.state)
    return shard_tree((state, tuned.frozen), places)


def watched(config: RunSettings, results: Results) -> float | None:
    """The value by which checkpoints are ranked: `checkpoint.metric`, else the mean loss of the target sets."""
    if config.checkpoint.metric is not None:
        known = {f"{name}.{field}": value for name, found in results.items() for field, value in found.items()}
        if config.checkpoint.metric not in known:
            raise JaxftError(
                f'checkpoint.metric = "{config.checkpoint.metric}": {nearest(config.checkpoint.metric, known)}'
            )
        return known[config.checkpoint.metric]
    losses = [results[name]["loss"] for name, one in config.evaluation.sets.items() if one.kind == "target"]
    return sum(losses) / len(losses) if losses else None


def save_due(config: CheckpointConfig, checkpointer: Checkpointer, step: int, results: Results | None) -> bool:
    """Whether to save after `step`: by steps, by minutes, or because there is something to rank it by."""
    by_steps = config.every is not None and step % config.every == 0
    by_time = config.minutes is not None and time.monotonic() - checkpointer.last_time >= 60 * config.minutes
    if config.minutes is not None:  # clocks differ: the first process decides
        by_time = from_first("the clock", by_time)
    return by_steps or by_time or (bool(results) and config.keep_best > 0)


def profile(config: ProfileConfig | None, step: int, first: int, directory: Path) -> None:
    """Starts and stops the profiler around the steps asked for."""
    if config is None:
        return
    begin = max(config.start, first + 1)
    if step == begin:
        jax.profiler.start_trace(str(directory / "profile"))
    elif step == begin + config.steps:
        jax.profiler.stop_trace()


def write_selection(job: Job, run: RunDirectory, state: TrainState, frozen: PyTree, step: int) -> None:
    """Writes what the method selects to `selection.json` and, as a picture, `selection.png`; nothing if all trains."""
    found = selected(tuned_of(state, frozen), job.probe.roles)
    if not found.is_partial:
        return
    record = found.record()
    run.write("selection.json", {"step": step, **record})
    if jax.process_index() == 0:
        names = " + ".join(method["name"] for method in job.config.method)
        (run.path / "selection.png").write_bytes(draw_selection(record, f"{names}, step {step} of {job.steps}"))


def describe(job: Job, counts: Mapping[str, int], begun: Begun) -> list[str]:
    """What is about to happen, in a few lines."""
    shape = ", ".join(f"{axis} {size}" for axis, size in job.mesh.shape.items() if size > 1) or "one device"
    trained, whole = counts["trained_parameters"], counts["parameters"]
    epochs = job.steps / job.steps_per_epoch
    names = " + ".join(method["name"] for method in job.config.method)
    kept = job.precision.frozen_dtype or job.precision.param_dtype
    lines = [
        f"model {begun.base}, method {names}: "
        f"{trained:,} of {whole:,} parameters train ({100 * trained / whole:.2f} %)",
        f"{job.steps} steps = {epochs:.2f} epochs of {job.steps_per_epoch} steps; "
        f"batch {job.config.data.batch_size} x {job.config.data.seq_len}; mesh: {shape}",
        f"optimizer {job.config.training.optimizer.name}; dtypes: trained {job.precision.param_dtype}, frozen {kept}, "
        f"computation {job.precision.compute_dtype}; remat: {job.config.model.remat}",
    ]
    if begun.step:
        lines.append(f"resuming after step {begun.step}")
    return lines


def finish(
    job: Job,
    run: RunDirectory,
    terminal: Terminal,
    counts: Mapping[str, int],
    state: TrainState,
    results: Results,
    begun: Begun,
) -> Report:
    """Writes and returns the report of a run whose last step is saved."""
    kinds = {name: one.kind for name, one in job.config.evaluation.sets.items()}
    compared = against_base(results, {name: begun.base_results[name] for name in results}, kinds)
    records = read_metrics(run.path / "metrics.jsonl") if jax.process_index() == 0 else []
    steps = [r for r in records if "loss" in r]
    peak, of = memory_bytes()
    report = Report(
        base=begun.base,
        method=job.config.method,
        steps=job.steps,
        epochs=job.steps / job.steps_per_epoch,
        learned=compared["learned"],
        forgot=compared["forgot"],
        sets=compared["sets"],
        final_loss=steps[-1]["loss"] if steps else None,
        step_seconds=_median(steps, "step_seconds"),
        tokens_per_second=_median(steps, "tokens_per_second"),
        target_tokens_per_second=_median(steps, "target_tokens_per_second"),
        peak_memory_bytes=peak,
        peak_memory_of=of,
        skipped_steps=int(state.skipped),
        data=job.stream.report.to_dict(),
        output=str(run.path),
        **counts,
    )
    report = Report(**from_first("the report", dataclasses.asdict(report)))
    run.write("report.md", report_markdown(report))
    run.write("report.json", dataclasses.asdict(report))
    terminal.close()
    terminal.say(report_markdown(report))
    return report


def _median(records: list[dict[str, Any]], key: str) -> float | None:
    values = sorted(r[key] for r in records if key in r and math.isfinite(r[key]))
    return float(np.median(values)) if values else None
