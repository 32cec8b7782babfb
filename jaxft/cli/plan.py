"""`jaxft plan`: does the run fit some TPUs or GPUs, and how fast would it be?"""

import json
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from jaxft.distributed.plan import Plan

PURPOSES = {
    "trained": "parameters that train",
    "frozen": "parameters that do not",
    "optimizer": "optimizer state",
    "batch": "batch",
    "results": "results not written in place",
    "temporaries": "activations, gradients, gathered weights",
}


def plan(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="The YAML file of the run.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Keys to override, such as mesh.fsdp=16.")
    ] = None,
    topology: Annotated[
        str,
        typer.Option(
            "--topology",
            "-t",
            help="GENERATION:SHAPE of the TPU slice, 4*v5e:16x16 is four slices; h100:8 are eight GPUs of a machine.",
        ),
    ] = "v5e:4x4",
    as_json: Annotated[bool, typer.Option("--json", help="Print machine-readable JSON.")] = False,
) -> None:
    """Compile the train step of a run for TPUs or GPUs that are not here, and say whether it fits.

    Needs the compiler for TPUs (`pip install "jaxft\\[tpu]"`) or for GPUs (`pip install "jaxft\\[cuda]"`).
    No weights: `model.path=preset:llama3.1-8b` stands for the shapes of a well-known model. The program is the one
    that `jaxft train` would run.

    [bold]Examples[/bold]

        jaxft plan configs/llama3.1-8b-hft.yaml --topology v5e:4x4

        jaxft plan configs/llama3.1-70b-lora.yaml mesh.tensor=4 -t v5p:4x4x4 --json

        jaxft plan run.yaml model.path=preset:qwen3-8b -t v6e-16

        jaxft plan configs/llama3.1-8b-full.yaml mesh=auto -t h100:8
    """
    from jaxft.config import load_config
    from jaxft.distributed.plan import plan as make_plan
    from jaxft.distributed.topology import parse_topology

    where = parse_topology(topology)  # before anything slow
    found = make_plan(load_config(config, overrides or []), where)
    typer.echo(json.dumps(found.record(), indent=2) if as_json else _text(found))


def _by_purpose(gib: dict[str, float]) -> list[str]:
    return [f"    {size:8.2f}  {PURPOSES[name]}" for name, size in gib.items() if size >= 0.005]


def _text(plan: "Plan") -> str:
    """The report that people read."""
    verdict = "fits" if plan.fits else "does not fit"
    in_host = sum(plan.host_gib.values())
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    lines = [
        f"{plan.method} on {plan.topology} ({plan.num_chips} chips, mesh {mesh}): {verdict}",
        f"  {plan.hbm_gib_per_chip:.2f} GiB a chip of {plan.hbm_gib_available:.2f}",
        *_by_purpose(plan.memory_gib),
        *([f"  {in_host:.2f} GiB a chip in host memory", *_by_purpose(plan.host_gib)] if in_host >= 0.005 else []),
        f"  {plan.trained_parameters:,} of {plan.parameters:,} parameters train",
        f"  {plan.tokens_per_step:,} tokens a step",
        f"  compiled in {plan.compile_seconds:.0f} s ({plan.compile_cpu_seconds:.0f} s of CPU time)",
    ]
    if plan.flops_per_step is not None:
        lines.append(
            f"  {plan.flops_per_step / 1e12:,.1f} TFLOP a step, {plan.flops_ratio:.3f} times the least the method needs"
        )
        total = sum(plan.collective_bytes.values())
        kinds = ", ".join(f"{kind} {size / 2**30:.2f}" for kind, size in plan.collective_bytes.items())
        lines.append(f"  {total / 2**30:.2f} GiB sent by each chip a step ({kinds or 'none'}),")
        lines.append(f"    {plan.collective_share_overlapped:.0%} of it while matrix products run")
    else:
        lines.append(f"  at least {plan.model_flops / 1e12:,.1f} TFLOP a step")
    if plan.roofline is not None:
        r = plan.roofline
        lines.append(
            f"  at best {r.step_seconds * 1e3:,.0f} ms a step, {r.tokens_per_second:,.0f} tokens/s, MFU {r.mfu:.0%} "
            f"(products {r.compute_seconds * 1e3:,.0f}, memory {r.memory_seconds * 1e3:,.0f}, "
            f"collectives {r.collective_seconds * 1e3:,.0f} of which exposed "
            f"{r.exposed_collective_seconds * 1e3:,.0f}, network {r.network_seconds * 1e3:,.0f} ms);\n"
            f"    {r.cautious_step_seconds * 1e3:,.0f} ms if a product hides no more than is sent while it lasts"
        )
        lines += [f"    assuming {text}" for text in r.assumptions]
    if plan.remedy is not None:
        again = plan.remedy
        lines.append(
            f"  Compiled with {again.settings}: {'fits' if again.fits else 'does not fit either'}, "
            f"{again.hbm_gib_per_chip:.2f} GiB a chip"
        )
    if plan.advice:
        lines += ["  To make it fit:", *(f"    - {text}" for text in plan.advice)]
    lines += [f"  note: {text}" for text in plan.notes]
    return "\n".join(lines)
