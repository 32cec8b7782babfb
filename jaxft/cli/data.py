"""`jaxft data`: what a run would train on."""

import json
from typing import Annotated

import typer


def data(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="The YAML file of the run.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Keys to override.")] = None,
    examples: Annotated[int, typer.Option("--examples", "-n", min=0, help="How many examples to show.")] = 3,
    evaluation: Annotated[bool, typer.Option("--evaluation", help="Report the evaluation sets too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print machine-readable JSON.")] = False,
) -> None:
    """Read the data of a run and show what it becomes, without training.

    Decoded examples with the tokens that train marked; rows, lengths and tokens of every source; what is dropped or
    truncated; packing; steps an epoch; and every malformed row by file and line. Nothing is skipped silently, and
    malformed rows are listed here whatever [bold]data.on_error[/bold] says; the exit code is 1 if a run would refuse
    them.

    [bold]Examples[/bold]

        jaxft data run.yaml

        jaxft data run.yaml data.seq_len=2048 data.packing=false -n 10

        jaxft data run.yaml --json | jq .malformed
    """
    from rich.console import Console
    from rich.text import Text

    from jaxft.config import load_config
    from jaxft.data import evaluation_batches, inspect
    from jaxft.hub import load_model, load_tokenizer

    loaded = load_config(config, overrides or [])
    tokenizer = load_tokenizer(loaded.model.path)
    report = inspect(loaded.data, tokenizer, examples, seed=loaded.seed)
    vocab_size = load_model(loaded.model.path).config.vocab_size
    if report.largest_token >= vocab_size:
        report.warnings.append(f"token {report.largest_token} is in no embedding of the model, which has {vocab_size}")
    sets = {}
    if evaluation:
        size = loaded.evaluation.batch_size or loaded.data.batch_size
        for name, one in loaded.evaluation.sets.items():
            sets[name] = evaluation_batches(
                one, tokenizer, seq_len=loaded.data.seq_len, batch_size=size, data=loaded.data
            ).report
    if as_json:
        document = report.to_dict() | ({"evaluation": {n: r.to_dict() for n, r in sets.items()}} if sets else {})
        typer.echo(json.dumps(document, indent=2, ensure_ascii=False))
    else:
        console = Console(highlight=False)
        console.print(report)
        for name, found in sets.items():
            console.print(Text(f"\nevaluation set {name} ({loaded.evaluation.sets[name].kind})", style="bold"))
            console.print(found)
    if report.malformed and loaded.data.on_error == "raise":
        if not as_json:
            typer.echo(
                f"\n{len(report.malformed)} malformed rows: a run would stop here. Repair them, or set "
                f"data.on_error=skip.",
                err=True,
            )
        raise typer.Exit(1)
