"""From what a run left behind to a model that can be used: restore it, export it, or export only what it trained.

A *run* is the output directory of `jaxft train`; a *delta* is what `save_delta` writes: the arrays that are not bit
for bit the base model's, with the method's configuration and the base's name and hash. Both are read the same way:
the method rewrites the base again, which gives the structure, and the saved arrays take their places in it.
"""

import dataclasses
import importlib.metadata
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxft.checkpoint import Checkpointer, CheckpointError, checksums, fingerprint, named_leaves, rebuildable
from jaxft.deltas import Delta, difference
from jaxft.deltas import apply as apply_changes
from jaxft.distributed import MeshConfig, make_mesh, tree_shardings
from jaxft.errors import JaxftError
from jaxft.hub import load_model, load_pretrained, load_tokenizer, save_pretrained, to_host
from jaxft.hub.save import follow_umask
from jaxft.methods import Method, Probe, build, merge, unmerged_sites
from jaxft.partition import Tuned, combine
from jaxft.structure import describe, left_out_of, rebuild, take_from_base, tuned_in
from jaxft.training.loop import fresh_key
from jaxft.training.optimizer import evaluation_parameters, make_optimizer, make_schedule
from jaxft.training.precision import Precision, cast_floating, dtype
from jaxft.training.state import TrainState, init_state, lay_out, tuned_of
from jaxft.weights import Tree, materialize

logger = logging.getLogger(__name__)
DELTA_FORMAT = 1
DELTA_WEIGHTS, DELTA_RECORD = "delta.safetensors", "delta.json"


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model ready to use.

    Attributes:
      model, tokenizer: as `jaxft.hub` loads them.
      params: what the model runs on, with weight nodes where a method put them.
      base: parameters of the base model; the same object as `params` for a plain model.
      tuned: both halves of a tuned model, None for a plain one.
      config: the configuration of the run (`jaxft.config.RunConfig`), None without one.
      step: optimizer steps done, 0 for a plain model.
      source: what was asked for, for messages.
    """

    model: Any
    tokenizer: Any
    params: Tree
    base: Tree
    tuned: Tuned | None
    config: Any
    step: int
    source: str


def is_run(path: str | Path) -> bool:
    """Whether a path is the output directory of a run."""
    return (Path(path).expanduser() / "config.yaml").is_file()


def is_delta(path: str | Path) -> bool:
    """Whether a path is a directory that `save_delta` wrote."""
    return (Path(path).expanduser() / DELTA_RECORD).is_file()


def load(source: str, *, base: str | None = None, dtype: Any = jnp.float32, step: int | str | None = None) -> Loaded:
    """A run, a delta, a Hugging Face directory, a hub id, or an embedded model.

    Args:
      source: which.
      base: where the base model of a run or delta is now, if it moved.
      dtype: of a plain model's parameters; a tuned one has the dtypes it was trained in.
      step: which checkpoint of a run: its step, "best", or None for the latest.

    Raises:
      JaxftError: it is none of these, it has no checkpoint yet, or the base is not the one it was tuned from.
    """
    if is_run(source):
        return load_run(source, base=base, step=step)
    if step is not None:
        raise JaxftError(f"{source} is not the output directory of a run, so it has no checkpoints to choose from")
    if is_delta(source):
        return load_delta(source, base=base)
    if base is not None:
        raise JaxftError(f"{source} is neither a run nor a delta, so it has no base model")
    model, params = _base(source, dtype)
    return Loaded(model, load_tokenizer(source), params, params, None, None, 0, source)


def local_mesh() -> Mesh:
    """All devices as one FSDP group, however many there are. CPU devices share one memory, so the first is enough."""
    devices = jax.devices()
    return make_mesh(MeshConfig(fsdp=-1), devices[:1] if devices[0].platform == "cpu" else devices)


def _base(path: str, dtype: Any, fresh_seed: int | None = None) -> tuple[Any, Tree]:
    """A model spread over the devices of this machine, however many; with a seed: the weights that a run drew."""
    model = load_model(path)
    shardings = tree_shardings(model.abstract(dtype), model.logical_axes(), local_mesh())
    if fresh_seed is not None:
        return model, jax.jit(lambda rng: model.init(rng, dtype), out_shardings=shardings)(fresh_key(fresh_seed))
    return load_pretrained(path, dtype=dtype, sharding=shardings)


def load_run(directory: str | Path, *, base: str | None = None, step: int | str | None = None) -> Loaded:
    """The tuned model of a run, which may be training: nothing in its directory is changed.

    Args:
      directory: the output directory of the run.
      base: the base model, if it is not where it was.
      step: which checkpoint: its step, "best", or None for the latest good one.

    Raises:
      JaxftError: there is no such checkpoint, or none that is whole and of this base model.
    """
    from jaxft.config import load_config  # config reads this room's neighbours, and only runs need it

    directory = Path(directory).expanduser()
    config = load_config(directory, [f"model.path={json.dumps(base)}"] if base else [])
    checkpoints = Path(config.checkpoint.directory or directory / "checkpoints")
    if not checkpoints.is_dir():
        raise JaxftError(f"{directory}: the run has no checkpoint yet; `jaxft train {directory}` goes on with it")
    precision = Precision(config.model.param_dtype, config.model.frozen_dtype, config.model.compute_dtype)
    fresh_seed = config.seed if config.model.init == "random" else None
    model, params = _base(config.model.path, jnp.dtype(precision.param_dtype), fresh_seed)
    method = build(config.method)
    refused: list[str] = []
    restored = None
    with Checkpointer(checkpoints, config.checkpoint, read_only=True) as checkpointer:
        for number in _candidates(checkpointer, step, directory):
            optimizer = make_optimizer(config.training.optimizer, make_schedule(config.training.learning_rate, number))
            try:
                document = checkpointer.record(number)
                target = _target(document, method, params, model, optimizer, config.seed, precision)
                restored = checkpointer.restore(target, base=config.model.path, step=number)
                break
            except CheckpointError as error:
                refused.append(str(error))
    if restored is None:
        raise JaxftError("\n".join(refused))
    for reason in refused:
        logger.warning("%s; step %d is used instead", reason, restored.step)
    state, frozen = restored.tree["state"], restored.tree["frozen"]
    trainable = evaluation_parameters(state.opt_state, state.trainable)
    tuned = tuned_of(state._replace(trainable=trainable), frozen)
    tokenizer = load_tokenizer(config.model.path)
    return Loaded(model, tokenizer, combine(tuned), params, tuned, config, restored.step, str(directory))


def _candidates(checkpointer: Checkpointer, step: int | str | None, directory: Path) -> list[int]:
    """The steps to try, in order."""
    steps = checkpointer.steps()
    if not steps:
        raise JaxftError(f"{directory}: the run has no checkpoint yet; `jaxft train {directory}` goes on with it")
    kept = f"there are checkpoints of the steps {', '.join(map(str, steps))}"
    if step is None:
        return steps[::-1]
    if step == "best":
        best = checkpointer.best_step()
        if best is None:
            raise JaxftError(f"{directory}: no checkpoint was saved with a metric to rank it by; {kept}")
        return [best]
    if not str(step).isdecimal() or int(step) not in steps:
        raise JaxftError(f"{directory} has no checkpoint of step {step}; {kept}, or say best")
    return [int(step)]


def _target(
    document: Mapping[str, Any],
    method: Method,
    params: Tree,
    model: Any,
    optimizer: optax.GradientTransformation,
    seed: int,
    precision: Precision,
) -> Tree:
    """What the checkpoint of a document is restored into: abstract, with what it leaves to the base taken from it."""
    if (tuned := tuned_in(document)) is not None:
        key, axes = jax.random.key(seed), model.logical_axes()
        state, frozen = lay_out(tuned, method, optimizer, key, local_mesh(), logical_axes=axes)
        frozen = take_from_base(frozen, left_out_of(document), params, _base_sums(params, precision))
        if frozen is not None:
            return {"state": state, "frozen": frozen}
    leaves = document["leaves"]
    paths = {name.removeprefix("state.trainable.") for name in leaves if name.startswith("state.trainable.")}
    state, frozen = _rewritten(method, params, model, optimizer, seed, precision, paths)
    return _shaped_as({"state": state, "frozen": frozen}, leaves)


def _base_sums(params: Tree, precision: Precision) -> dict[str, str]:
    """Checksums of the base, and of its arrays in the dtype that frozen weights are kept in (`"PATH cast"`)."""
    sums = checksums(params)
    if precision.frozen_dtype not in (None, precision.param_dtype):
        cast = dtype(precision.frozen_dtype)
        sums |= {
            f"{name} cast": checksums({"x": cast_floating(x, cast)})["x"] for name, x in named_leaves(params).items()
        }
    return sums


def _rewritten(
    method: Method,
    params: Tree,
    model: Any,
    optimizer: optax.GradientTransformation,
    seed: int,
    precision: Precision,
    trained: set[str],
) -> tuple[TrainState, Tree]:
    """The structure of a training state of `method`: its values are those before the first step, or meaningless.

    Methods that look at data or train first to choose (LT-SFT) are given an answer that costs nothing and under which
    they choose the weights in `trained` again; which entries of those they chose is in the saved arrays.
    """

    def moved(current: Tree, _method: Method, _steps: int) -> Tree:
        rng = np.random.default_rng(0)

        def one(path: tuple, x: Any) -> Any:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            chosen = any(t == name or t.startswith(f"{name}.") for t in trained)
            return x + jnp.asarray(rng.uniform(1, 2, x.shape), x.dtype) if chosen else x

        return jax.tree_util.tree_map_with_path(one, current)

    mesh = local_mesh()
    probe = Probe(trainer=moved, total_steps=1)
    rng = jax.random.key(seed)
    return init_state(
        method, params, optimizer, rng, mesh, logical_axes=model.logical_axes(), probe=probe, precision=precision
    )


def _shaped_as(tree: Tree, leaves: Mapping[str, Mapping[str, Any]]) -> Tree:
    """`tree` as a target to restore into: stored leaves abstract, with the shapes they were saved in."""
    names = list(named_leaves(tree))

    def one(name: str, x: Any) -> Any:
        saved = leaves.get(name)
        if saved is None or not saved["stored"]:
            return x
        shape = tuple(saved["shape"])
        sharding = x.sharding if shape == x.shape else jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding)

    return jax.tree.unflatten(
        jax.tree.structure(tree), [one(name, x) for name, x in zip(names, jax.tree.leaves(tree), strict=True)]
    )


# --- export -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Verification:
    """How an export was checked: the largest difference of its logits from the tuned model's, and their spread."""

    largest_difference: float
    logit_deviation: float
    prompts: int
    tokens: int


# How far logits may be off, in standard deviations of the logits, by rounding to the exported dtype.
TOLERANCE = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.5}


def export(loaded: Loaded, output: str | Path, *, dtype: str | None = None, overwrite: bool = False) -> Verification:
    """Write a tuned model as a Hugging Face directory, read it back, and compare its logits with the tuned model's.

    Args:
      loaded: as `load` gives it.
      output: a directory that does not exist or is empty.
      dtype: of the exported weights; None: that of the parameters.
      overwrite: replace a model that is there.

    Raises:
      JaxftError: the directory is not empty; a module of the method has no place in the architecture (use
        `save_delta`); training changed nothing; or the exported model does not compute what the tuned one does.
        Nothing is left then.
    """
    output = Path(output).expanduser().absolute()
    refuse_occupied(output, "config.json" if overwrite else None)
    merged = merge(loaded.tuned) if loaded.tuned is not None else loaded.params
    if sites := unmerged_sites(merged):
        raise JaxftError(
            f"{', '.join(sites)} cannot be merged into the weights of a {loaded.model.config.model_type} model: "
            "export what was trained with --delta"
        )
    _require_change(loaded, merged)
    merged = materialize(merged)
    output.parent.mkdir(parents=True, exist_ok=True)
    # Process 0 writes and all verify, so the name is the same everywhere.
    temporary = output.with_name(f".{output.name}.export")
    if jax.process_index() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
    try:
        save_pretrained(temporary, loaded.model, merged, loaded.tokenizer, jnp.dtype(dtype) if dtype else None)
        found = _verify(loaded, temporary)
        if jax.process_index() == 0:
            _replace(temporary, output)
    except (JaxftError, OSError) as error:  # of the directory that was asked for, not of the one beside it
        raise JaxftError(str(error).replace(str(temporary), str(output))) from error
    finally:
        if jax.process_index() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
    return found


def refuse_occupied(output: Path, ours: str | None) -> None:
    """Raise JaxftError unless `output` is free, or holds the file `ours`, by which it may be overwritten."""
    if output.is_dir() and any(output.iterdir()):
        if ours is None:
            raise JaxftError(f"{output} is not empty: choose another directory, or pass --overwrite")
        if not (output / ours).is_file():
            raise JaxftError(f"{output} has no {ours}, so it is nothing that an export wrote: it stays as it is")
    elif output.exists() and not output.is_dir():
        raise JaxftError(f"{output} is a file: expected a directory")


def _replace(temporary: Path, output: Path) -> None:
    follow_umask(temporary)
    aside = None
    if output.exists():
        aside = Path(tempfile.mkdtemp(prefix=f".{output.name}.old.", dir=output.parent)) / "old"
        os.replace(output, aside)
    try:
        os.replace(temporary, output)
    except OSError:
        if aside is not None:
            os.replace(aside, output)
        raise
    finally:
        if aside is not None:
            shutil.rmtree(aside.parent, ignore_errors=True)


def _require_change(loaded: Loaded, merged: Tree) -> None:
    """An export that equals its base after training is the sign of a merge that lost what was trained."""
    if loaded.tuned is None or loaded.step == 0:
        return
    before, after = checksums(loaded.base), checksums(materialize(merged))
    if all(after.get(name) == value for name, value in before.items()):
        raise JaxftError(
            f"{loaded.source}: after {loaded.step} steps the merged model equals its base bit for bit; nothing "
            f"was learned "
            "(a learning rate of 0?), so nothing is exported"
        )


def _verify(loaded: Loaded, directory: Path) -> Verification:
    """Logits of what was written against the tuned model's, on random tokens, in float32."""
    model, params = _base(str(directory), jnp.float32)
    prompts, length = 4, min(32, model.config.max_position_embeddings)
    tokens = jax.random.randint(jax.random.key(0), (prompts, length), 0, loaded.model.config.vocab_size)
    wanted = _logits(loaded.model, loaded.params, tokens)
    found = _logits(model, params, tokens)[..., : wanted.shape[-1]]
    difference, deviation = float(np.abs(found - wanted).max()), float(wanted.std())
    stored = json.loads((directory / "config.json").read_text())
    kind = stored.get("dtype") or stored.get("torch_dtype") or "float32"
    if not difference <= TOLERANCE[kind] * max(deviation, 1e-6):
        raise JaxftError(
            f"the exported model is not the tuned one: its logits differ by up to {difference:.3g}, and the "
            f"tuned model's "
            f"logits have a standard deviation of {deviation:.3g}. Nothing was written; this is a bug worth reporting"
        )
    return Verification(difference, deviation, prompts, length)


def _logits(model: Any, params: Tree, tokens: Any) -> np.ndarray:
    def forward(params: Tree, tokens: Any) -> Any:
        return model.logits(params, model.hidden(params, tokens, dtype=jnp.float32, remat="none"))

    return to_host(jax.jit(forward)(params, tokens))


# --- sparse changes ---------------------------------------------------------------------------------------------------


def with_changes(loaded: Loaded, changes: Delta) -> Loaded:
    """A model with sparse changes on top, merged: those of other tasks, or of another base of the same shapes.

    Raises:
      JaxftError: the changes do not fit its shapes, or a module of the method cannot be merged.
    """
    return dataclasses.replace(loaded, params=apply_changes(_merged(loaded), changes), tuned=None)


def sparse_changes(loaded: Loaded) -> Delta:
    """The entries in which a model differs from its base, whatever method changed them.

    An entry that is the base's in the dtype that frozen weights are kept in did not change. Raises JaxftError where a
    module of the method cannot be merged.
    """
    merged = _merged(loaded)
    kept = loaded.config.model.frozen_dtype if loaded.config is not None else None

    @jax.jit
    def before(new: jax.Array, base: jax.Array) -> jax.Array:
        same = base if kept is None else base.astype(dtype(kept))
        return jnp.where(new == same.astype(new.dtype), new, base.astype(new.dtype))

    return difference(merged, jax.tree.map(before, merged, loaded.base))


def _merged(loaded: Loaded) -> Tree:
    merged = merge(loaded.tuned) if loaded.tuned is not None else loaded.params
    if sites := unmerged_sites(merged):
        raise JaxftError(f"{', '.join(sites)} cannot be merged into the weights, so it is no change of their entries")
    return materialize(merged)


# --- what was trained, alone ------------------------------------------------------------------------------------------


def save_delta(loaded: Loaded, output: str | Path, *, overwrite: bool = False) -> int:
    """Write only what a run changed: `delta.safetensors` and `delta.json`. Returns the bytes of the arrays.

    Every array of the tuned model is stored but those that are bit for bit the base model's. The record holds the
    method's configuration, the base model and its hash, dtypes and seed: with the base, `load_delta` has the tuned
    model again.
    """
    if loaded.tuned is None:
        raise JaxftError(f"{loaded.source} is a plain model: there is no delta to a base")
    output = Path(output).expanduser().absolute()
    refuse_occupied(output, DELTA_RECORD if overwrite else None)
    halves = {"trainable": loaded.tuned.trainable, "frozen": loaded.tuned.frozen}
    leaves = named_leaves(halves)
    base_sums = checksums(loaded.base)
    trained_bytes = sum(x.nbytes for x in jax.tree.leaves(loaded.tuned.trainable))
    config, settings = loaded.config, loaded.config.model
    precision = Precision(settings.param_dtype, settings.frozen_dtype, settings.compute_dtype)
    left_out = rebuildable(loaded.tuned.frozen, _base_sums(loaded.base, precision), trained_bytes)
    stored = {
        n: np.asarray(to_host(x))
        for n, x in leaves.items()
        if n.startswith("trainable.") or n.removeprefix("frozen.") not in left_out
    }
    record = {
        "format": DELTA_FORMAT,
        "jaxft": importlib.metadata.version("jaxft") if _installed() else "source",
        "base": settings.path,
        "fresh_seed": config.seed if settings.init == "random" else None,
        "base_fingerprint": fingerprint(base_sums),
        "method": config.method,
        "seed": config.seed,
        "step": loaded.step,
        "param_dtype": settings.param_dtype,
        "frozen_dtype": settings.frozen_dtype,
        "compute_dtype": settings.compute_dtype,
        "leaves": {
            name: {
                "shape": list(x.shape),
                "dtype": str(x.dtype),
                "stored": name in stored,
                "checksum": left_out.get(name.removeprefix("frozen."), ""),
            }
            for name, x in leaves.items()
        },
        "structure": describe(halves),
    }
    if jax.process_index() == 0:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = None
        try:
            temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
            save_file({n: np.ascontiguousarray(x) for n, x in stored.items()}, temporary / DELTA_WEIGHTS)
            (temporary / DELTA_RECORD).write_text(json.dumps(record, indent=2) + "\n")
            _replace(temporary, output)
        except (OSError, SafetensorError) as error:
            raise JaxftError(f"{output} could not be written: {error}") from error
        finally:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)
    return sum(x.nbytes for x in stored.values())


def _installed() -> bool:
    try:
        importlib.metadata.version("jaxft")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def load_delta(directory: str | Path, *, base: str | None = None) -> Loaded:
    """A tuned model from a delta and its base.

    Args:
      directory: what `save_delta` wrote.
      base: the base model, if it is not where it was.

    Raises:
      JaxftError: the files are damaged or of another format, or the base is not the one that was tuned.
    """
    directory = Path(directory).expanduser()
    try:
        record = json.loads((directory / DELTA_RECORD).read_text())
        with safe_open(directory / DELTA_WEIGHTS, framework="numpy") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise JaxftError(f"{directory}: not a readable delta ({error})") from error
    if record.get("format") != DELTA_FORMAT:
        raise JaxftError(f"{directory}: the delta has format {record.get('format')}, this version reads {DELTA_FORMAT}")
    precision = Precision(record["param_dtype"], record["frozen_dtype"], record["compute_dtype"])
    path = base or record["base"]
    model, params = _base(path, jnp.dtype(precision.param_dtype), record["fresh_seed"])
    here = fingerprint(checksums(params))
    if here != record["base_fingerprint"]:
        raise JaxftError(
            f"{directory} was tuned from {record['base']} with the hash {record['base_fingerprint']}; {path} "
            f"has {here}. "
            "Name the right base model with --base"
        )
    leaves = record["leaves"]
    missing = sorted(name for name, leaf in leaves.items() if leaf["stored"] and name not in stored)
    if missing:
        raise JaxftError(f"{directory / DELTA_WEIGHTS} lacks arrays that {DELTA_RECORD} lists: {missing[:5]}")
    if (found := _described_halves(record, params, precision)) is not None:
        halves, method_state = found, ()
    else:
        trained = {name.removeprefix("trainable.") for name in leaves if name.startswith("trainable.")}
        state, frozen = _rewritten(
            build(record["method"]), params, model, optax.identity(), record["seed"], precision, trained
        )
        halves, method_state = {"trainable": state.trainable, "frozen": frozen}, state.method_state
    named = named_leaves(halves)
    if sorted(named) != sorted(leaves):
        odd = sorted(set(named) ^ set(leaves))
        raise JaxftError(f"{directory}: its arrays are not those that its method makes of {path}: {odd[:5]}")
    values = [jax.device_put(stored[n], _place(x, stored[n])) if leaves[n]["stored"] else x for n, x in named.items()]
    halves = jax.tree.unflatten(jax.tree.structure(halves), values)
    tuned = Tuned(halves["trainable"], halves["frozen"], method_state)
    return Loaded(model, load_tokenizer(path), combine(tuned), params, tuned, None, record["step"], str(directory))


def _described_halves(record: Mapping[str, Any], params: Tree, precision: Precision) -> Tree | None:
    """Both halves of a delta's cut, abstract but for what is taken from the base; None where the record cannot say."""
    if record.get("structure") is None:
        return None
    leaves, one_device = record["leaves"], jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def abstract(name: str) -> jax.ShapeDtypeStruct:
        leaf = leaves[name]
        return jax.ShapeDtypeStruct(tuple(leaf["shape"]), jnp.dtype(leaf["dtype"]), sharding=one_device)

    halves = jax.tree.map(abstract, rebuild(record["structure"]))
    left_out = {name: leaf["checksum"] for name, leaf in leaves.items() if not leaf["stored"]}
    frozen = take_from_base(halves["frozen"], left_out, params, _base_sums(params, precision))
    return None if frozen is None else {**halves, "frozen": frozen}


def _place(like: jax.Array, value: np.ndarray) -> Any:
    return like.sharding if like.shape == value.shape else jax.devices()[0]


# --- prompts ----------------------------------------------------------------------------------------------------------


def chat_prompts(loaded: Loaded, messages: Sequence[Sequence[Mapping[str, Any]]]) -> list[list[int]]:
    """Token ids of conversations that the model is to answer, written as a run writes them for training.

    A run's own chat template holds, else the tokenizer's; without one, contents are joined by newlines.
    """
    from jaxft.data import FormatConfig
    from jaxft.data.templates import resolve_template

    text_format: Any = loaded.config.data if loaded.config is not None else FormatConfig(add_eos=False)
    template = resolve_template(text_format, loaded.tokenizer)
    prompts = []
    for conversation in messages:
        turns = list(conversation)
        if template.system is not None and turns[0]["role"] != "system":
            turns = [{"role": "system", "content": template.system}, *turns]
        if template.plain:
            text = "".join(turn["content"] + "\n" for turn in turns)
            prompts.append([*template.prefix, *loaded.tokenizer(text, add_special_tokens=False)["input_ids"]])
        else:
            text = loaded.tokenizer.apply_chat_template(
                turns,
                chat_template=template.chat_template,
                add_generation_prompt=True,
                tokenize=False,
                **template.options,
            )
            prompts.append(loaded.tokenizer(text, add_special_tokens=False)["input_ids"])
    return prompts
