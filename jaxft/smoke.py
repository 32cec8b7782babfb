"""`jaxft train --smoke`: does a recipe work at all? Its own method, data and settings, on a model of random weights
small enough for any CPU, for a few short steps, in a directory that is thrown away."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

STEPS = 4
SEQ_LEN = 64
ROWS = 64  # of every source and evaluation set


def smoke_overrides(config_path: str, overrides: Sequence[str], directory: Path) -> list[str]:
    """The overrides that make a recipe small, after the user's own; writes the tiny model into `directory`.

    The model keeps the architecture, vocabulary and tokenizer of the recipe's; width, depth and head count shrink.
    """
    import jax

    from jaxft.config import load_config
    from jaxft.hub import load_model, load_tokenizer, save_pretrained
    from jaxft.models import LanguageModel

    config = load_config(config_path, overrides)
    shapes = load_model(config.model.path).config
    groups = 2 if shapes.num_kv_heads < shapes.num_heads else 1
    layers = min(4, shapes.num_layers)
    kinds = shapes.sliding_layers
    other = next((kind for kind in kinds if kind != kinds[0]), kinds[0])
    tiny = shapes.replace(
        hidden_size=64,
        intermediate_size=128,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=4 // groups,
        head_dim=16,
        sliding_layers=(*kinds[: layers - 1], other),  # of both kinds, where the model has both
    )
    model = LanguageModel(tiny)
    tokenizer = load_tokenizer(config.model.path)
    save_pretrained(directory / "model", model, model.init(jax.random.key(0)), tokenizer)
    data, training = config.data, config.training
    seq_len = min(SEQ_LEN, data.seq_len)
    changes = {
        "model.path": str(directory / "model"),
        "model.init": "pretrained",
        "output": str(directory / "run"),
        "data.seq_len": seq_len,
        "data.batch_size": max(2, jax.device_count()) * training.accumulation,
        "training.steps": STEPS,
        "training.epochs": None,
        "evaluation.every": None,
        "evaluation.batch_size": 4,
        "evaluation.baseline": None,
        "checkpoint.directory": None,
        "logging.every": 1,
        "logging.wandb": False,
        "mesh": {"data": -1},
    }
    for i, source in enumerate(data.sources):
        changes[f"data.sources.{i}.limit"] = min(ROWS, source.limit or ROWS)
        if isinstance(source.holdout, int):
            changes[f"data.sources.{i}.holdout"] = 0.2
    for name, one in config.evaluation.sets.items():
        changes[f"evaluation.sets.{name}.max_examples"] = min(ROWS, one.max_examples or ROWS)
    for i, spec in enumerate(config.method):
        where = f"method.{i}." if len(config.method) > 1 else "method."
        # A search that is as long as the run it prepares is cut like the run.
        changes |= {f"{where}{key}": 2 for key in ("search_steps", "period") if key in spec}
    return [*overrides, *(f"{key}={json.dumps(value)}" for key, value in changes.items())]


def smoke_test(config_path: str, overrides: Sequence[str]) -> None:
    """Run a recipe small, from loading to report. Raises what the run raises."""
    from rich.console import Console

    from jaxft.config import load_config
    from jaxft.training import train

    with tempfile.TemporaryDirectory(prefix="jaxft-smoke-") as name:
        config = load_config(config_path, smoke_overrides(config_path, overrides, Path(name)))
        report = train(config)
    Console(highlight=False).print(
        f"\nSmoke test passed: {config_path} loads, trains {report.trained_parameters:,} of "
        f"{report.parameters:,} parameters of "
        f"a tiny random model for {report.steps} steps, evaluates and saves. Nothing of it was kept.",
        soft_wrap=True,
    )
