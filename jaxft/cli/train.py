"""`jaxft train`: one run."""

from typing import Annotated

import typer


def train(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="The YAML file of the run, or the directory of an earlier one.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Keys to override, such as method.rank=32.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only check: print the resolved configuration and stop.")
    ] = False,
    smoke: Annotated[
        bool,
        typer.Option("--smoke", help="Try the recipe in seconds: a tiny random model, a few short steps, on the CPU."),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace the run that the output directory holds, instead of resuming it."),
    ] = False,
    coordinator: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Several processes, where nothing tells them of each other: the address of process 0.",
        ),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="How many processes there are, or must be where that is detected."),
    ] = None,
    process_id: Annotated[
        int | None, typer.Option(min=0, metavar="I", help="The number of this process, from 0.")
    ] = None,
) -> None:
    """Fine-tune a model as a YAML file says.

    The same command resumes a run that was interrupted; a directory that holds another run is refused.
    At the end, [bold]report.md[/bold] in the output directory says what the model learned and what it forgot.

    [bold]Examples[/bold]

        jaxft train configs/quickstart.yaml

        jaxft train run.yaml method=lora method.rank=32 training.learning_rate.peak=1e-3

        jaxft train run.yaml 'method=[{name: lora, rank: 8}, {name: hft}]' output=outputs/chain

        jaxft train run.yaml mesh.fsdp=4 mesh.tensor=2 model.compute_dtype=bfloat16

        jaxft train run.yaml --check      (what would run, and whether it can)

        jaxft train run.yaml --smoke      (does the recipe work at all?)

    On several machines every process runs the same command: nothing is to be added on Cloud TPU slices, GKE, Slurm
    and Open MPI. Elsewhere (the variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID do the same):

        jaxft train run.yaml --coordinator 10.0.0.2:8476 --processes 2 --process-id 0
    """
    if smoke:
        import os

        os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported
        from jaxft.smoke import smoke_test

        smoke_test(config, overrides or [])
        return
    from jaxft.config import RunConfig, check_files, load_config

    def checked() -> RunConfig:
        loaded = load_config(config, overrides or [])
        check_files(loaded)
        return loaded

    if check:
        import yaml

        typer.echo(yaml.safe_dump(checked().resolved(), sort_keys=False, allow_unicode=True), nl=False)
        return
    from jaxft.distributed import in_step, initialize
    from jaxft.training import train as run

    initialize(coordinator, processes, process_id)
    # A file may be missing on one machine only; the others must not wait for it.
    run(in_step("the configuration", checked), overwrite=overwrite)
