"""`jaxft compare`: several runs side by side."""

from typing import Annotated

import typer

from jaxft.errors import JaxftError


def compare(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="The YAML file that the runs share.")],
    assignments: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY=A,B,...", help="Values to compare, such as method=full,hft,lora; one value holds for all."
        ),
    ],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Train again what is finished or was another run.")
    ] = False,
) -> None:
    """Train several variants of one configuration and compare what they learned, forgot and cost.

    Each run has its own directory inside [bold]output[/bold] and its own process. Finished runs are reused and
    interrupted ones resume when the command is repeated. At the end there are compare.md, compare.json and compare.png.

    A method with a tested learning rate of its own is trained with it, unless the command line sets
    training.learning_rate, or the section compare.overrides of the configuration says otherwise.

    [bold]Examples[/bold]

        jaxft compare configs/quickstart.yaml method=full,hft,lora

        jaxft compare run.yaml method=lora method.rank=4,16,64 training.steps=200

        jaxft compare run.yaml 'method=hft,[{name: lora, rank: 8}, {name: hft}]' seed=0,1,2
    """
    from rich.console import Console

    from jaxft.compare import plan, run_all, summarize

    console = Console(highlight=False)
    variants = plan(config, assignments)
    console.print(f"{len(variants)} runs: {', '.join(v.name for v in variants)}", markup=False)
    outcomes = run_all(config, variants, overwrite=overwrite, console=console)
    finished = [outcome for outcome in outcomes if outcome.report is not None]
    if finished:
        for line in summarize(config, finished):
            console.print(line, markup=False, soft_wrap=True)
    failed = [outcome for outcome in outcomes if outcome.report is None]
    if failed:
        raise JaxftError("\n".join(f"run {o.variant.name} failed: {o.error}" for o in failed))
