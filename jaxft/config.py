"""The configuration of a run: one YAML file, checked whole before anything is compiled.

`load_config("run.yaml", ["method.rank=32"])` returns a `RunConfig` or raises `ConfigError` with everything that is
wrong: file and line, key, value, what is allowed and the nearest name. Each room of the library defines its own
section; a method's options are the keyword arguments of its factory in the registry.

A relative path in `model`, `data` or `evaluation` is looked for beside the configuration file first, then in the
current directory; the resolved configuration holds the absolute path that was found. `output` is always relative to the
current directory.
"""

import dataclasses
import glob
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, field_validator

from jaxft.checkpoint import CheckpointConfig
from jaxft.config_source import (
    ConfigError,
    KeyPath,
    Problem,
    Source,
    override,
    parse_yaml,
    problems_of,
    read_yaml,
)
from jaxft.data import DataConfig, RowsConfig, locate, read_template
from jaxft.distributed import MeshConfig
from jaxft.errors import JaxftError, nearest
from jaxft.evaluation import EvaluationConfig
from jaxft.hub import load_model, resolve
from jaxft.hub.load import EMBEDDED, PRESET
from jaxft.methods.registry import get_method, methods
from jaxft.models.attention import parse_implementation
from jaxft.training.loop import TrainingConfig
from jaxft.training.metrics import LoggingConfig

MethodOptions = dict[str, Any]


class ModelConfig(BaseModel):
    """Section `model`: which model is tuned, and in which dtypes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(
        "nano",
        min_length=1,
        description="`nano` (embedded; `nano-moe`: the same as a mixture of experts), a Hugging Face directory with "
        "safetensors, or a hub id.",
    )
    init: Literal["pretrained", "random"] = Field(
        "pretrained",
        description="Where the weights come from; random: fresh ones drawn by `seed`, only config and tokenizer "
        "are read "
        "from `path` (pretraining).",
    )
    param_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Of what trains; its optimizer updates are made in this dtype."
    )
    frozen_dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="Of what does not train; null: as loaded in `param_dtype`."
    )
    compute_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Of activations and matrix products. bfloat16 on TPU and GPU."
    )
    attention: str = Field(
        "auto",
        description="Attention implementation: auto, xla, splash or cudnn; auto: splash on TPU, cudnn on GPU, xla "
        "elsewhere. splash:128x256 computes tiles of 128 positions and 256 keys (docs/planning.md).",
    )
    remat: Literal["auto", "none", "block", "attention", "dots", "offload"] = Field(
        "auto",
        description="What the backward pass recomputes. none: nothing; dots: all but projections and attention; "
        "attention: all but attention, which pays for long rows; block: all of a layer; offload: likewise, and the "
        "inputs of layers wait in host memory, which needs the least. auto: attention where it pays and a device has "
        "room, block elsewhere.",
    )
    router_aux_loss: float | None = Field(
        None,
        ge=0,
        description="Coefficient of the load-balancing loss of a mixture of experts; null: `router_aux_loss_coef` of "
        "the model's config.json if `output_router_logits` is set there, else 0.",
    )

    @field_validator("attention")
    @classmethod
    def _is_implementation(cls, value: str) -> str:
        try:
            parse_implementation(value)
        except JaxftError as error:
            raise ValueError(str(error)) from None
        return value


def _method_options(value: Any) -> MethodOptions:
    """One method with every option filled in. Pydantic reports a nested ValidationError at the right key."""
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping):
        raise ValueError("a method is a name, or a mapping `{name: ..., options}`; see `jaxft methods`")
    options = dict(value)
    if not isinstance(options.get("name"), str):
        written = next((key for key in options if key in methods()), None)
        hint = (
            f"; write {{name: {written}, ...}} with its options beside the name"
            if len(options) == 1 and written
            else ""
        )
        raise ValueError(f"the key `name` is missing; `jaxft methods` lists the names{hint}")
    entry = get_method(options.pop("name"))
    checked = entry.options_model().model_validate(options).model_dump()
    entry.factory(**checked)  # what the method itself refuses, such as a negative rank
    return {"name": entry.id, **checked}


class CompareConfig(BaseModel):
    """Section `compare`: settings of one method among those that `jaxft compare` runs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    overrides: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="Method name -> {dotted key: value}, applied to the runs of that method only: "
        "`{lora: {training.learning_rate.peak: 3e-3}}`.",
    )


class RunConfig(BaseModel):
    """Everything a run depends on. The defaults are a run; `data.sources` and `output` are what a user must give."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: ModelConfig = Field(default_factory=ModelConfig, description="Which model is tuned, and in which dtypes.")
    method: list[Annotated[MethodOptions, PlainValidator(_method_options)]] = Field(
        min_length=1,
        description="`{name: ..., options}` or just a name; a list is a chain. `jaxft methods` lists names and "
        "options.",
    )
    data: DataConfig = Field(description="What it is trained on.")
    evaluation: EvaluationConfig = Field(
        default_factory=EvaluationConfig, description="Named sets that are scored during and after training."
    )
    training: TrainingConfig = Field(description="How long, with which optimizer and schedule.")
    mesh: MeshConfig = Field(default_factory=MeshConfig, description="How devices are arranged.")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="What is saved, and how often.")
    logging: LoggingConfig = Field(default_factory=LoggingConfig, description="Where the numbers go.")
    compare: CompareConfig = Field(default_factory=CompareConfig, description="Settings of `jaxft compare`.")
    output: str = Field(min_length=1, description="Directory of the run, relative to the current directory.")
    seed: int = Field(0, ge=0, lt=2**32, description="Of every random choice of the run.")

    @field_validator("method", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return value if isinstance(value, list) else [value]

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, as plain values for YAML or JSON."""
        return self.model_dump(mode="json")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read, override and check the configuration in a YAML file.

    Args:
      path: the file, or the output directory of a run, whose `config.yaml` is read.
      overrides: `key.sub=value` each, see `jaxft.config_source.override`.

    Raises:
      ConfigError: everything that is wrong with it.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "config.yaml"
    return check_source(read_yaml(path), overrides, path.parent)


def parse_config(
    text: str, overrides: Sequence[str] = (), *, name: str = "config", directory: str | Path = "."
) -> RunConfig:
    """`load_config` of a text; relative paths are looked for in `directory` first."""
    return check_source(parse_yaml(text, name), overrides, Path(directory))


def check_source(source: Source, overrides: Sequence[str], directory: Path) -> RunConfig:
    """A checked configuration from a tree as it was written. Raises ConfigError."""
    source = override(source, overrides, bare="method")
    tree = {key: value for key, value in source.tree.items() if value is not None}  # `evaluation:` with nothing in it
    source = dataclasses.replace(source, tree=_absolute_paths(tree, directory))
    try:
        config = RunConfig.model_validate(source.tree)
    except ValidationError as error:
        raise ConfigError(problems_of(error, RunConfig, source, _method_schemas(source.tree.get("method")))) from None
    problems = [Problem(source.where(key), ".".join(map(str, key)), text) for key, text in impossible(config)]
    if problems:
        raise ConfigError(problems)
    return config


def _method_schemas(value: Any) -> dict[KeyPath, type[BaseModel]]:
    """The schema of every method whose name is known, by the key path where it was written."""
    written = {("method", i): item for i, item in enumerate(value)} if isinstance(value, list) else {("method",): value}
    found: dict[KeyPath, type[BaseModel]] = {}
    for path, item in written.items():
        try:
            found[path] = get_method(item["name"] if isinstance(item, Mapping) else item).options_model()
        except (JaxftError, KeyError, TypeError):
            continue  # reported as an unknown name
    return found


def _absolute_paths(tree: dict[str, Any], directory: Path) -> dict[str, Any]:
    """The tree with every relative `path` that exists, beside the file or in the current directory, made absolute."""

    def found(text: str) -> str:
        if not text or "://" in text or Path(text).expanduser().is_absolute():
            return text
        for base in (directory, Path(".")):
            candidate = base / text
            if candidate.exists() or glob.glob(str(candidate), recursive=True):
                return str(candidate.absolute())
        return text  # a hub id, the embedded model, or missing: whoever opens it says so

    def walk(value: Any, key: str) -> Any:
        if isinstance(value, dict):
            return {k: walk(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [walk(v, key) for v in value]
        return found(value) if isinstance(value, str) and key in PATH_KEYS else value

    sections = ("model", "data", "evaluation")
    return {k: walk(v, k) if k in sections else v for k, v in tree.items()}


PATH_KEYS = ("path", "chat_template", "baseline")


def impossible(config: RunConfig) -> list[tuple[KeyPath, str]]:
    """What no machine could run, though every key by itself is right: (key path, what is wrong and what would do)."""
    data, training = config.data, config.training
    found: list[tuple[KeyPath, str]] = []
    if data.epochs is not None:
        found.append(
            (("data", "epochs"), "the length of a run is set in one place: use training.epochs (or training.steps)")
        )
    if data.batch_size % training.accumulation:
        found.append((
            ("training", "accumulation"),
            f"data.batch_size = {data.batch_size} rows cannot be cut into {training.accumulation} equal micro-batches; "
            f"possible: {_divisors(data.batch_size)}",
        ))  # fmt: skip
    warmup = training.learning_rate.options().get("warmup", 0)
    if training.steps is not None and warmup > training.steps:
        found.append((
            ("training", "learning_rate"),
            f"a warm-up of {warmup} steps is longer than the run of {training.steps}: its peak is never reached",
        ))  # fmt: skip
    if "frozen" in training.offload and config.model.remat == "none":
        found.append((
            ("training", "offload"),
            "with model.remat = none every frozen layer that was fetched stays on the device for the backward pass; "
            "expected model.remat block, attention, dots or offload",
        ))  # fmt: skip
    for name in config.compare.overrides:
        if name not in methods():
            found.append((("compare", "overrides", name), f'unknown method "{name}": {nearest(name, methods())}'))
    mesh = config.mesh
    rows = max(mesh.data, 1) * max(mesh.fsdp, 1) * max(mesh.expert, 1)
    if data.batch_size % (rows * training.accumulation) and not data.batch_size % training.accumulation:
        found.append((
            ("data", "batch_size"),
            f"{data.batch_size} rows cannot be divided over {rows} devices (mesh.data * fsdp * expert) in "
            f"{training.accumulation} micro-batches; expected a multiple of {rows * training.accumulation}",
        ))  # fmt: skip
    if mesh.sequence > 1 and data.seq_len % mesh.sequence:
        found.append(
            (("data", "seq_len"), f"{data.seq_len} tokens cannot be divided over mesh.sequence = {mesh.sequence}")
        )
    for name in config.evaluation.sets:
        if "." in name or not name.strip():
            found.append(
                (("evaluation", "sets", name), "the name of a set has no dot in it: metrics are called set.metric")
            )
    metric = config.checkpoint.metric
    if metric is not None:
        set_name, _, field = metric.rpartition(".")
        known = [f"{name}.loss" for name in config.evaluation.sets]
        if set_name not in config.evaluation.sets:
            found.append(
                (("checkpoint", "metric"), f'"{metric}" is no metric of an evaluation set; {nearest(metric, known)}')
            )
        elif field not in _fields_of(config.evaluation.sets[set_name].task):
            fields = [f"{set_name}.{f}" for f in _fields_of(config.evaluation.sets[set_name].task)]
            found.append((("checkpoint", "metric"), f'"{metric}" is not measured; {nearest(metric, fields)}'))
    found += _beyond_the_model(config)
    return found


def check_files(config: RunConfig) -> None:
    """Raises ConfigError for every data file, chat template or baseline that is not there, before anything is read.

    Apart from `load_config`, because a run can be evaluated and exported where its training data is not.
    """
    rows: list[tuple[KeyPath, RowsConfig]] = [(("data", "sources", i), s) for i, s in enumerate(config.data.sources)]
    rows += [(("evaluation", "sets", name), one) for name, one in config.evaluation.sets.items()]
    problems = []
    for key, source in rows:
        try:
            locate(source)
        except JaxftError as error:
            problems.append(Problem("", ".".join(map(str, (*key, "path"))), str(error)))
    templates = {"data.chat_template": config.data.chat_template}
    templates |= {f"evaluation.sets.{n}.chat_template": one.chat_template for n, one in config.evaluation.sets.items()}
    for name, template in templates.items():
        try:
            read_template(template)
        except JaxftError as error:
            problems.append(Problem("", name, str(error)))
    baseline = config.evaluation.baseline
    if baseline is not None and not Path(baseline).is_file():
        problems.append(Problem("", "evaluation.baseline", f"{baseline}: no such file"))
    if problems:
        raise ConfigError(problems)


def _fields_of(task: str) -> tuple[str, ...]:
    common = ("loss", "perplexity")
    return common if task == "perplexity" else (*common, "accuracy", "accuracy_per_token")


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def _beyond_the_model(config: RunConfig) -> list[tuple[KeyPath, str]]:
    """What the model's own config.json rules out. A model that is not on this disk yet is checked when it is loaded."""
    path = Path(config.model.path).expanduser()
    if config.model.path not in EMBEDDED and not config.model.path.startswith(PRESET) and not path.is_dir():
        looks_like_a_path = config.model.path.startswith((".", "/", "~")) or config.model.path.count("/") > 1
        if looks_like_a_path or "/" not in config.model.path:
            try:
                resolve(config.model.path, weights=False)
            except JaxftError as error:
                return [(("model", "path"), str(error))]
        return []
    try:
        model = load_model(config.model.path)
    except JaxftError as error:
        return [(("model", "path"), str(error))]
    longest = model.config.max_position_embeddings
    if config.data.seq_len > longest:
        return [
            (("data", "seq_len"), f"{config.data.seq_len} tokens are more than the {longest} positions of this model")
        ]
    return []
