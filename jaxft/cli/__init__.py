"""The command line, `jaxft`. One file a command; jax is imported only when a command starts to work."""

import os
import sys
import traceback

import typer

from jaxft.cli.compare import compare
from jaxft.cli.data import data
from jaxft.cli.evaluate import evaluate
from jaxft.cli.export import export
from jaxft.cli.generate import generate
from jaxft.cli.methods import methods
from jaxft.cli.plan import plan
from jaxft.cli.train import train
from jaxft.errors import JaxftError

app = typer.Typer(
    name="jaxft",
    help=(
        "Fine-tune pretrained language models with JAX: half of the parameters at a time, adapters, sparse sets, "
        "or everything, by one program, on a laptop or a TPU pod.\n\n"
        "A run is one YAML file. Any key of it is overridden on the command line as [bold]key.sub=value[/bold], and "
        "the whole of it is checked before anything is compiled.\n\n"
        "Put [bold]--debug[/bold] anywhere to see the full traceback of an error."
    ),
    epilog=(
        "Start with:  jaxft methods  ·  jaxft data configs/quickstart.yaml  ·  jaxft train configs/quickstart.yaml"
    ),
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. An error that the user can act on is one message on stderr and exit code 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that torch is missing is as it should be
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")  # of a GPU's memory; jax takes 0.75
    try:
        app([argument for argument in arguments if argument != "--debug"])
    except Exception as error:
        message = _message(error)
        if debug or message is None:
            _leave_job(1, error)
            raise
        from rich.console import Console

        # soft_wrap keeps a long line whole, so that a path in it can be copied.
        Console(stderr=True).print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
        _leave_job(2)
        sys.exit(2)


def _leave_job(code: int, error: Exception | None = None) -> None:
    """Ends a process of a job of several, which on the orderly way out would wait for others that may be gone."""
    processes = sys.modules.get("jaxft.distributed.processes")
    if processes is not None and processes.in_a_job():
        if error is not None:
            traceback.print_exception(error)
        processes.leave(code)


def _message(error: Exception) -> str | None:
    """What to tell the user, or None for an error that is ours: that one keeps its traceback."""
    if isinstance(error, JaxftError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    if "RESOURCE_EXHAUSTED" in str(error):
        first = str(error).splitlines()[0]
        return (
            f"the device ran out of memory ({first}). Lower data.batch_size or raise training.accumulation, lower "
            "data.seq_len, set model.remat=block, or spread the model with mesh.fsdp"
        )
    return None


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the versions of jaxft and of what it runs on."),
) -> None:
    if version:
        from importlib.metadata import PackageNotFoundError
        from importlib.metadata import version as installed

        for package in ("jaxft", "jax", "flax", "optax", "orbax-checkpoint", "transformers"):
            try:
                typer.echo(f"{package} {installed(package)}")
            except PackageNotFoundError:
                typer.echo(f"{package} (not installed)")
        raise typer.Exit


app.command("train")(train)
app.command("compare")(compare)
app.command("eval")(evaluate)
app.command("generate")(generate)
app.command("export")(export)
app.command("data")(data)
app.command("plan")(plan)
app.command("methods")(methods)
