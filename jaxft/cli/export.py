"""`jaxft export`: a tuned model for others to use."""

from typing import Annotated

import typer

from jaxft.errors import JaxftError, nearest

DTYPES = ("float32", "bfloat16", "float16")


def export(
    source: Annotated[
        str, typer.Argument(metavar="RUN", help="Output directory of a run, or a delta; with --add also a model.")
    ],
    output: Annotated[
        str, typer.Argument(metavar="OUTPUT", help="Directory to write (new or empty); with --sparse a file.")
    ],
    delta: Annotated[
        bool, typer.Option("--delta", help="Only what was trained, to be used with the base model.")
    ] = False,
    sparse: Annotated[
        bool, typer.Option("--sparse", help="Only the entries that changed, as a small file that adds up with others.")
    ] = False,
    add: Annotated[
        list[str] | None, typer.Option("--add", metavar="FILE", help="A --sparse file to add; may be repeated.")
    ] = None,
    subtract: Annotated[
        list[str] | None, typer.Option("--subtract", metavar="FILE", help="A --sparse file to take off again.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help=f"Of the weights: {', '.join(DTYPES)}; default: as trained.")
    ] = None,
    base: Annotated[str | None, typer.Option("--base", help="Where the base model is, if it moved.")] = None,
    step: Annotated[
        str | None,
        typer.Option("--step", metavar="best|N", help="Which checkpoint of a run; default: the latest."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an export that is there.")] = False,
) -> None:
    """Write what a run trained: merged into a Hugging Face directory, or as a delta.

    A merged export is read back and its logits are compared with the tuned model's before it appears under its name.
    Methods whose result no weight of the architecture can hold (soft prompts) export with --delta; `jaxft generate` and
    `jaxft eval` read deltas, and a delta can be merged later.

    [bold]Examples[/bold]

        jaxft export outputs/run my-model

        jaxft export outputs/run my-model --dtype bfloat16 --overwrite

        jaxft export outputs/run my-best --step best

        jaxft export outputs/run my-delta --delta

        jaxft export my-delta my-model

        jaxft export outputs/task task.npz --sparse

        jaxft export meta-llama/Llama-3.2-1B my-model --add task.npz --add language.npz
    """
    if dtype is not None and dtype not in DTYPES:
        raise JaxftError(f"--dtype {dtype}: {nearest(dtype, DTYPES)}")
    if delta and dtype is not None:
        raise JaxftError("--delta keeps the dtypes of training, so that nothing is lost: drop --dtype")
    if sparse and (delta or dtype is not None):
        raise JaxftError("--sparse writes the entries that changed, in float32: drop --delta and --dtype")
    added, taken = add or [], subtract or []
    if delta and (added or taken):
        raise JaxftError("--delta writes what a run trained: --add and --subtract go with a merged model or --sparse")
    from pathlib import Path

    from jaxft import deltas, runs
    from jaxft.training.compilation import enable_compilation_cache

    enable_compilation_cache()
    if not (runs.is_run(source) or runs.is_delta(source) or added or taken):
        raise JaxftError(f"{source} is not the output directory of a run (no config.yaml) nor a delta (no delta.json)")
    if not overwrite and not sparse:
        runs.refuse_occupied(Path(output), None)  # before the model is loaded
    changes = [deltas.load(file) for file in added] + [deltas.scale(deltas.load(file), -1) for file in taken]
    loaded = runs.load(source, base=base, step=step)
    if changes:
        loaded = runs.with_changes(loaded, deltas.add(*changes))
    if sparse:
        found_changes = runs.sparse_changes(loaded)
        written = deltas.save(found_changes, output, note={"source": source}, overwrite=overwrite)
        typer.echo(f"Wrote {deltas.size(found_changes):,} changed entries of {source} to {output}: {written:,} bytes.")
        typer.echo(f"Try:  jaxft export BASE MERGED --add {output}")
        return
    if delta:
        written = runs.save_delta(loaded, output, overwrite=overwrite)
        typer.echo(
            f"Wrote what {source} trained in {loaded.step} steps to {output}: {written / 2**20:.2f} MiB of arrays."
        )
        typer.echo(f"Try:  jaxft generate {output} -p '...'   or   jaxft export {output} MERGED")
        return
    found = runs.export(loaded, output, dtype=dtype, overwrite=overwrite)
    typer.echo(
        f"Wrote step {loaded.step} to {output}, read it back, and compared its logits with the tuned model's on "
        f"{found.prompts} x {found.tokens} tokens: they differ by at most "
        f"{found.largest_difference:.2g} (their standard deviation is "
        f"{found.logit_deviation:.2g})."
    )
    typer.echo(
        f"Load it with transformers' AutoModelForCausalLM.from_pretrained({output!r}), or: jaxft generate "
        f"{output} -p '...'"
    )
