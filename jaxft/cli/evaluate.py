"""`jaxft eval`: scores of a run, a delta or a model on named sets."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxft.errors import JaxftError


def evaluate(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_MODEL", help="Directory of a run or delta, a Hugging Face directory, a hub id, or nano."
        ),
    ],
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="[CONFIG]", help="YAML file with the sets; default: that of the run.", show_default=False
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Keys to override, such as evaluation.batch_size=4."),
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="Where the base model of a run or delta is, if it moved.")
    ] = None,
    step: Annotated[
        str | None,
        typer.Option("--step", metavar="best|N", help="Which checkpoint of a run; default: the latest."),
    ] = None,
    against_base: Annotated[
        bool,
        typer.Option("--against-base/--alone", help="Score the base model too, and say what was learned and forgot."),
    ] = True,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write the scores to this JSON file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print machine-readable JSON.")] = False,
) -> None:
    """Perplexity and multiple-choice accuracy on the sets of a configuration.

    A run or delta is compared with its base model: learned is the fall of the loss on target sets, forgot the rise on
    retained sets, in nats a token.

    [bold]Examples[/bold]

        jaxft eval outputs/run

        jaxft eval outputs/run --step best

        jaxft eval nano configs/quickstart.yaml

        jaxft eval outputs/run other.yaml evaluation.batch_size=64 --json
    """
    from jaxft import runs
    from jaxft.config import load_config

    given = list(overrides or [])
    if config is not None and "=" in config and not Path(config).exists():
        given, config = [config, *given], None
    if config is None and not runs.is_run(source):
        raise JaxftError(f"{source} is not a run, so it says nothing about what to evaluate on: name a CONFIG")
    settings = load_config(config or source, given)
    if not settings.evaluation.sets:
        raise JaxftError(f"{config or source}: evaluation.sets is empty, there is nothing to evaluate on")
    import jax
    import jax.numpy as jnp

    from jaxft.evaluation import against_base as compared_to
    from jaxft.evaluation import make_evaluation
    from jaxft.training.compilation import enable_compilation_cache
    from jaxft.training.output import json_text, write_atomically

    enable_compilation_cache()
    loaded = runs.load(source, base=base, dtype=jnp.dtype(settings.model.param_dtype), step=step)
    mesh = runs.local_mesh()
    with jax.set_mesh(mesh):
        score = make_evaluation(
            settings.evaluation,
            settings.data,
            loaded.tokenizer,
            loaded.model,
            mesh,
            dtype=jnp.dtype(settings.model.compute_dtype),
            attention=settings.model.attention,
        )
        results = score(loaded.params)
        before = score(loaded.base) if loaded.tuned is not None and against_base else None
    kinds = {name: one.kind for name, one in settings.evaluation.sets.items()}
    changes = compared_to(results, before, kinds) if before is not None else None
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, json_text(results) + "\n")
    if as_json:
        typer.echo(json_text({"source": source, "step": loaded.step, "results": results, "against_base": changes}))
    else:
        _print(results, before, changes, kinds)


def _print(
    results: dict[str, Any], before: dict[str, Any] | None, changes: dict[str, Any] | None, kinds: Mapping[str, str]
) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = ["loss", "perplexity", *(("base", "change") if before else ())]
    choices = any("accuracy" in found for found in results.values())
    columns += ["accuracy", "per token"] if choices else []
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("set", "kind"):
        table.add_column(column, no_wrap=True)
    for column in (*columns, "tokens"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, found in results.items():
        cells = [f"{found['loss']:.4f}", f"{found['perplexity']:.2f}"]
        if before:
            cells += [f"{before[name]['loss']:.4f}", f"{found['loss'] - before[name]['loss']:+.4f}"]
        if choices:
            cells += [f"{found[key]:.1%}" if key in found else "" for key in ("accuracy", "accuracy_per_token")]
        table.add_row(name, kinds[name], *cells, f"{found['tokens']:,.0f}")
    console = Console(highlight=False)
    console.print(table)
    if changes and changes["learned"] is not None:
        console.print(f"learned: {changes['learned']:+.4f} nats a token on the target sets (more is better)")
    if changes and changes["forgot"] is not None:
        console.print(f"forgot:  {changes['forgot']:+.4f} nats a token on the retained sets (less is better)")
