"""What a run needs on TPUs or GPUs, before they are rented: the train step that will run, compiled ahead of time.

`plan(config, topology)` builds the model, the method and the optimizer of a configuration as shapes, compiles the train
step with XLA's own compiler and reads the result: memory of a chip and what for, FLOPs, collectives, and a roofline
estimate of the step time.
"""

import dataclasses
import math
import re
import time
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from jaxft.distributed import hlo
from jaxft.distributed.automatic import (
    UNKNOWN_LENGTH,
    abstract_run,
    attention_again,
    kept_bytes,
    loss_of,
    resolve_mesh,
    resolve_remat,
    shard_bytes,
    with_settings,
)
from jaxft.distributed.flops import RECOMPUTED, kernel_flops, model_flops, penalty_flops, trained_share
from jaxft.distributed.mesh import make_mesh
from jaxft.distributed.sharding import ShardingReport, batch_spec, check_batch, fit_spec, row_shards
from jaxft.distributed.topology import (
    GIB,
    Topology,
    TopologyError,
    assumed_cudnn,
    parse_topology,
    topology_devices,
)
from jaxft.errors import JaxftError
from jaxft.hub import load_model
from jaxft.methods import build
from jaxft.models.expert_parallel import SPARE
from jaxft.partition import combine
from jaxft.training.compilation import compiler_options, fetches_ahead
from jaxft.training.optimizer import make_optimizer, make_schedule
from jaxft.training.state import shardings_of, tuned_of
from jaxft.training.step import make_train_step

Tree = Any


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The time of a step if every unit ran at its peak; a real step takes longer.

    Seconds of matrix products, of reading memory, of sending to other chips (all, and what no computation hides), of
    the network between slices. `cautious_step_seconds`: if a product hides no more than is sent while it lasts, where
    `step_seconds` has all that is sent beside any hidden. `mfu`: FLOPs of the model without recomputation over those
    the chips could do in `step_seconds`. `assumptions`: what the estimate takes for granted.
    """

    compute_seconds: float
    memory_seconds: float
    collective_seconds: float
    exposed_collective_seconds: float
    network_seconds: float
    step_seconds: float
    cautious_step_seconds: float
    mfu: float
    tokens_per_second: float
    assumptions: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Remedy:
    """Settings with which a job that does not fit was compiled again, and what came of it."""

    settings: str
    fits: bool
    hbm_gib_per_chip: float
    compile_seconds: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run on a topology. Memory in GiB of one chip, FLOPs of all chips, collective bytes sent by one chip a step.

    fits: whether the program fits the memory of a chip. hbm_gib_per_chip: arguments, results that are not written in
    place, and temporaries, at most; where the compiler gave up for lack of memory, what it would have needed.
    memory_gib: the same by purpose: trained, frozen, optimizer, batch, results, temporaries (activations, gradients,
    gathered weights). host_gib: what waits in host memory for one chip, by purpose. compile_cpu_seconds: of all cores,
    what `compile_seconds` depends on besides the machine's load. flops_per_step, flops_ratio: what the compiled step
    computes, and that over `model_flops`; None where it did not compile. model_flops: the least the method needs:
    forward, gradients of activations, gradients of the weights that train, what `remat` recomputes, and the products
    of the method's penalty as it is written.
    collective_share_overlapped: of the bytes, those sent while matrix products run. advice: what to change, best
    first; empty if it fits.
    """

    topology: str
    num_chips: int
    mesh: dict[str, int]
    method: str
    parameters: int
    trained_parameters: int
    tokens_per_step: int
    fits: bool
    hbm_gib_per_chip: float
    hbm_gib_available: float
    memory_gib: dict[str, float]
    host_gib: dict[str, float]
    compile_seconds: float
    compile_cpu_seconds: float
    flops_per_step: float | None
    model_flops: float
    flops_ratio: float | None
    collective_bytes: dict[str, float]
    collective_share_overlapped: float
    roofline: Roofline | None
    advice: tuple[str, ...]
    notes: tuple[str, ...]
    remedy: Remedy | None = None

    def record(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A train step compiled for a topology, and the shapes it was compiled for."""

    step: Any  # jax.stages.Compiled, or None where the compiler ran out of memory
    needed_bytes: int | None  # what the compiler said it would need, where it ran out of memory
    seconds: float
    cpu_seconds: float
    state: Tree
    frozen: Tree
    batch: Tree


def plan(config: Any, topology: str | Topology) -> Plan:
    """Compile the train step of a configuration for a topology and report what it needs.

    Args:
        config: a checked configuration (`jaxft.config.load_config`); `model.path` may be `preset:NAME`, for the shapes
            of a well-known model. Data is not read.
        topology: a name such as `v5e:4x4` or `h100:8` (see `parse_topology`).

    Raises:
        TopologyError: an unknown topology, or its compiler is not installed.
        MeshError: the mesh or the batch does not divide over the topology.
        JaxftError: the model or the method cannot be planned.
    """
    topology = parse_topology(topology) if isinstance(topology, str) else topology
    devices = topology_devices(topology)
    if len(devices) != topology.num_chips:
        raise TopologyError(
            f"the TPU compiler shows the {topology.num_chips} chips of {topology} as {len(devices)} devices, two a "
            "chip, which is not how they run: plan for v5e, v5p or v6e"
        )
    model = load_model(config.model.path)
    # Slices of TPUs must be told from one another. Nodes of GPUs need not be: NCCL knows them.
    is_gpu = topology.chip.is_gpu
    slices = config.mesh.dcn if is_gpu else topology.slices
    axes, reasons = resolve_mesh(config, model, topology.num_chips, slices, topology.chip.usable_bytes)
    if axes.dcn != topology.slices and not (is_gpu and axes.dcn == 1):
        raise TopologyError(
            f"{topology} has {topology.slices} slices and mesh.dcn = {axes.dcn}: set mesh.dcn={topology.slices}"
            + (f" and mesh.data to a multiple of {topology.slices}" if topology.slices > 1 else "")
        )
    notes = tuple(f"mesh: auto: {reason}" for reason in reasons)
    config = with_settings(config, {"mesh": axes})
    found = _compiled_plan(config, model, topology, devices, notes)
    if found.fits:
        return found
    settings = remedy(config, found)
    if not settings:
        return found
    # The advice is an estimate; that which changes no result of the run is compiled too, so that it is known to help.
    try:
        tried = _compiled_plan(with_settings(config, settings), model, topology, devices, ())
    except JaxftError:  # it does not divide after all
        return found
    text = " ".join(f"{key}={getattr(value, 'value', value)}" for key, value in settings.items())
    return dataclasses.replace(found, remedy=Remedy(text, tried.fits, tried.hbm_gib_per_chip, tried.compile_seconds))


def _compiled_plan(
    config: Any, model: Any, topology: Topology, devices: list[jax.Device], notes: tuple[str, ...]
) -> Plan:
    mesh = make_mesh(config.mesh, devices)
    check_batch(config.data.batch_size, config.data.seq_len, mesh, config.training.accumulation)
    remat, reasons = resolve_remat(config, model, mesh, topology.chip.usable_bytes)
    notes += tuple(f"model.remat: auto: {reason}" for reason in reasons)
    config = with_settings(config, {"model.remat": remat})
    report = ShardingReport()
    compiled = compile_step(config, model, mesh, report)
    return read_plan(config, model, topology, mesh, compiled, (*notes, *str(report).splitlines()))


def remedy(config: Any, plan: Plan) -> dict[str, Any]:
    """The settings that make room and change no result but by rounding, where a plan does not fit; {} if none is left.

    Everything is divided as far as it goes, one row a device at a time, layers recomputed; dtypes stay.
    """
    mesh, found = plan.mesh, {}
    if config.model.remat != "offload":
        found["model.remat"] = "offload"
    slices = config.mesh.dcn
    shards = mesh["data"] * mesh["fsdp"]
    if mesh["data"] > slices:
        found |= {"mesh.data": slices, "mesh.fsdp": shards // slices}
    rows = config.data.batch_size // (shards * mesh["expert"])
    if config.training.accumulation < rows:
        found["training.accumulation"] = rows
    return found


def abstract_batch(rows: int, seq_len: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and shardings of a training batch of packed rows."""
    sharding = NamedSharding(mesh, fit_spec("batch", (rows, seq_len), batch_spec(2), mesh))
    dtypes = {"tokens": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
    dtypes |= {"segment_ids": jnp.int32, "positions": jnp.int32}
    return {name: jax.ShapeDtypeStruct((rows, seq_len), kind, sharding=sharding) for name, kind in dtypes.items()}


def lower_step(
    config: Any, model: Any, mesh: Mesh, report: ShardingReport | None = None
) -> tuple[Any, Tree, Tree, Tree]:
    """The train step of a configuration, lowered for the devices of `mesh`, which need not be here; and the shapes of
    its state, its frozen parameters and a batch."""
    training = config.training
    method = build(config.method)
    schedule = make_schedule(training.learning_rate, training.steps or UNKNOWN_LENGTH)
    optimizer = make_optimizer(training.optimizer, schedule)
    loss = loss_of(config, model, row_shards(mesh))
    state, frozen = abstract_run(config, model, mesh, report)
    step = make_train_step(
        loss,
        method,
        optimizer,
        accumulation=training.accumulation,
        clip_norm=training.clip_norm,
        schedule=schedule,
        shardings=shardings_of(state),
        options=training.compiler_options,
        ahead=fetches_ahead(config),
    )
    batch = abstract_batch(config.data.batch_size, config.data.seq_len, mesh)
    with jax.set_mesh(mesh), assumed_cudnn(mesh.devices.flat):
        return step.lower(state, frozen, batch), state, frozen, batch


def compile_step(config: Any, model: Any, mesh: Mesh, report: ShardingReport | None = None) -> Compiled:
    """The train step of a configuration, compiled for the devices of `mesh`, which need not be here.

    Raises:
        JaxftError: the compiler failed for another reason than memory.
    """
    start, cpu_start = time.perf_counter(), time.process_time()
    lowered, state, frozen, batch = lower_step(config, model, mesh, report)
    try:
        with warnings.catch_warnings():
            # A program for devices that are not here cannot be read from the compilation cache; it is compiled then.
            warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache")
            compiled, needed = lowered.compile(), None
    except jax.errors.JaxRuntimeError as error:
        compiled, needed = None, needed_bytes(str(error), shard_bytes((state, frozen, batch)))
        if needed is None and "RESOURCE_EXHAUSTED" in str(error):
            raise
        if needed is None:
            first = str(error).splitlines()[0][:300]
            raise JaxftError(
                f"the compiler failed on this step: {first}. That is a fault of its own, not of the configuration; "
                f"settings that change the program may avoid it: {_other_programs(config)}"
            ) from error
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return Compiled(compiled, needed, seconds, cpu_seconds, state, frozen, batch)


def _other_programs(config: Any) -> str:
    """The settings that are not chosen already and with which the same is computed by another program."""
    settings = {
        "training.offload=[]": bool(config.training.offload),
        "model.remat=block": config.model.remat != "block",
        "model.attention=xla": config.model.attention != "xla",
    }
    return ", ".join([text for text, is_other in settings.items() if is_other] + ["another mesh"])


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}


def needed_bytes(message: str, held: int) -> int | None:
    """How much memory the compiler says the program needs, in the message with which it gives up; else None.

    It names the whole, or the temporaries alone, to which the `held` bytes of arguments come.
    """
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    if found := re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message):
        return int(float(found[1]) * _UNITS[found[2]])
    if found := re.search(r"memory required for HLO temporaries \(([\d.]+)([KMGT]?)\)", message):
        return held + int(float(found[1]) * _UNITS[found[2]])
    return None


def read_plan(
    config: Any, model: Any, topology: Topology, mesh: Mesh, compiled: Compiled, notes: tuple[str, ...] = ()
) -> Plan:
    """The figures of a compiled step."""
    rows, seq_len = config.data.batch_size, config.data.seq_len
    tuned = tuned_of(compiled.state, compiled.frozen)
    chip = topology.chip
    available = chip.usable_bytes
    memory = {
        "trained": shard_bytes(compiled.state.trainable),
        "frozen": shard_bytes(compiled.frozen),
        "optimizer": shard_bytes(compiled.state.opt_state),
        "batch": shard_bytes(compiled.batch),
    }
    host = {
        "frozen": shard_bytes(compiled.frozen, host=True),
        "optimizer": shard_bytes(compiled.state.opt_state, host=True),
        "temporaries": 0,
    }
    held = sum(memory.values())
    if told := compiler_options(mesh, config.training.compiler_options, ahead=fetches_ahead(config)):
        notes += ("compiler options: " + ", ".join(f"{name}={value}" for name, value in told.items()),)
    if chip.is_gpu and config.training.offload:
        notes += ("training.offload: jax knows no host memory of a GPU that is not here, so all is planned in its own",)
    if (heads := model.config.num_heads) % (tensor := mesh.shape["tensor"]):
        notes += (
            f"attention: {heads} heads are not divisible by mesh.tensor = {tensor}, so each of those chips computes "
            f"all of them; nearest that divides both: {math.gcd(heads, tensor)}",
        )
    useful = model_flops(model.config, tuned, rows, seq_len, "none")
    least = model_flops(model.config, tuned, rows, seq_len, config.model.remat)
    if penalty := build(config.method).penalty:
        least += penalty_flops(penalty, tuned)
    flops, moved, overlapped, roofline = None, {}, 0.0, None
    if compiled.step is None:
        assert compiled.needed_bytes is not None  # the compiler said so when it gave up
        needed = compiled.needed_bytes
        memory |= {"results": 0, "temporaries": max(needed - held, 0)}
    else:
        stats = compiled.step.memory_analysis()
        results, temporaries = stats.output_size_in_bytes - stats.alias_size_in_bytes, stats.temp_size_in_bytes
        needed = stats.argument_size_in_bytes + results + temporaries
        if needed > available and not chip.is_gpu:
            notes += (
                f"the analysis of the compiler says {needed / GIB:.1f} GiB, in which it counts the gaps between "
                "temporaries twice; it has placed them all in the memory of a chip",
            )
            temporaries -= needed - available
            needed = available
        host["temporaries"] = stats.host_temp_size_in_bytes
        memory |= {"results": results, "temporaries": temporaries}
        costs = hlo.costs(
            hlo.parse(compiled.step.as_text()),
            taken=trained_share(combine(tuned)),
            kernels=kernel_flops(
                model.config, rows // config.training.accumulation, seq_len, mesh, config.model.attention
            ),
            flops_meanwhile=lambda sent: sent.bytes_sent / bandwidth(sent, topology, mesh) * chip.flops,
        )
        if costs.unread:
            notes += (
                f"{len(costs.unread)} computations with collectives could not be read: more is sent than is said",
            )
        if costs.open_loops:
            notes += (
                "not counted: rounds that the fullest device needs beyond the first, where experts get more than "
                f"{SPARE:g} times the tokens of a balanced batch ({len(costs.open_loops)} loops)",
            )
        flops = costs.flops * topology.num_chips
        moved = costs.bytes_by_kind()
        total = sum(moved.values())
        overlapped = sum(c.total_bytes for c in costs.collectives if c.overlapped) / total if total else 1.0
        passes = 3 if config.model.remat in RECOMPUTED else 2
        weights = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves((compiled.state.trainable, compiled.frozen)))
        read = passes * config.training.accumulation * weights / mesh.shape["tensor"] / mesh.shape["expert"]
        read += 2 * (memory["trained"] + memory["optimizer"])
        gradients = 4 * sum(a.size for a in jax.tree.leaves(compiled.state.trainable)) / mesh.shape["fsdp"]
        roofline = estimate(topology, mesh, costs, read, gradients, useful, rows * seq_len)
    # The TPU compiler gives up where arguments and temporaries are more than a chip has, the GPU compiler does not.
    fits = compiled.step is not None and (not chip.is_gpu or needed <= available)
    if fits:
        notes += faster(config, model.config, tuned, mesh, available - needed)
    return Plan(
        topology=str(topology),
        num_chips=topology.num_chips,
        mesh={axis: size for axis, size in mesh.shape.items()},
        method=" + ".join(m["name"] for m in config.method),
        parameters=sum(math.prod(a.shape) for a in jax.tree.leaves(model.abstract())),
        trained_parameters=sum(math.prod(a.shape) for a in jax.tree.leaves(compiled.state.trainable)),
        tokens_per_step=rows * seq_len,
        fits=fits,
        hbm_gib_per_chip=needed / GIB,
        hbm_gib_available=available / GIB,
        memory_gib={name: size / GIB for name, size in memory.items()},
        host_gib={name: size / GIB for name, size in host.items()},
        compile_seconds=compiled.seconds,
        compile_cpu_seconds=compiled.cpu_seconds,
        flops_per_step=flops,
        model_flops=least,
        flops_ratio=None if flops is None else flops / least,
        collective_bytes=moved,
        collective_share_overlapped=overlapped,
        roofline=roofline,
        advice=() if fits else advice(config, model, mesh, topology, memory, needed - available),
        notes=notes,
    )


# --- roofline ---------------------------------------------------------------------------------------------------------


def bandwidth(collective: hlo.Collective, topology: Topology, mesh: Mesh) -> float:
    """Bytes that a chip sends a second in a collective. Between nodes of GPUs it runs in as many rings as it has GPUs
    in each, of which every one leaves a node at another network adapter."""
    chip = topology.chip
    if not chip.is_gpu or topology.slices == 1:
        return chip.ring_bandwidth
    node = [device.process_index for device in mesh.devices.flat]
    groups = collective.groups or [list(range(mesh.size))]
    spread = [(len(group), len({node[i] for i in group})) for group in groups]
    if all(nodes == 1 for _, nodes in spread):
        return chip.ring_bandwidth
    rings = min(count / nodes for count, nodes in spread)
    return min(chip.ring_bandwidth, rings * chip.network_bandwidth)


def estimate(
    topology: Topology,
    mesh: Mesh,
    costs: hlo.Costs,
    read_bytes: float,
    gradient_bytes: float,
    useful_flops: float,
    tokens: int,
) -> Roofline:
    """The roofline of a step on one chip of a topology.

    Args:
        mesh: of the devices of the topology.
        costs: of the compiled step.
        read_bytes: memory traffic of weights and optimizer state, of one chip.
        gradient_bytes: gradients that one chip exchanges with its peers of other slices.
        useful_flops: of the model without recomputation, on all chips.
        tokens: of a step.
    """
    chip = topology.chip
    compute = costs.flops / chip.flops
    memory = read_bytes / chip.hbm_bandwidth
    taken = [(c, c.total_bytes / bandwidth(c, topology, mesh)) for c in costs.collectives]
    collective = sum(seconds for _, seconds in taken)
    overlapped = sum(seconds for c, seconds in taken if c.overlapped)
    hidden = sum(seconds * c.hidden for c, seconds in taken)
    network = 0.0
    if topology.slices > 1 and not chip.is_gpu:
        network = 2 * (topology.slices - 1) / topology.slices * gradient_bytes / chip.network_bandwidth
    step = max(compute, memory, overlapped) + collective - overlapped + network
    links = f"all {chip.links} links" if chip.is_gpu else "both directions of one ring of links"
    between = f"{chip.network_bandwidth / 1e9:g} GB/s a chip"
    return Roofline(
        compute_seconds=compute,
        memory_seconds=memory,
        collective_seconds=collective,
        exposed_collective_seconds=collective - overlapped,
        network_seconds=network,
        step_seconds=step,
        cautious_step_seconds=max(compute, memory) + collective - hidden + network,
        mfu=useful_flops / (step * chip.flops * topology.num_chips),
        tokens_per_second=tokens / step,
        assumptions=(
            f"{chip.generation}: {chip.flops / 1e12:.0f} TFLOP/s bf16, {chip.hbm_bandwidth / 1e9:.0f} GB/s memory, "
            f"{chip.link_bandwidth / 1e9:.0f} GB/s a link and direction ({chip.source})",
            "matrix products at peak; weights are read once a pass, optimizer state read and written once",
            f"collectives use {links}, and those the compiler overlaps with matrix products cost nothing unless they "
            "take longer than those; in the cautious figure, than those beside them",
            "copies to and from host memory cost nothing",
            f"between nodes, collectives run at {between} for each that takes part, and no faster than within one"
            if chip.is_gpu
            else f"between slices, the exchange of gradients is not overlapped and runs at {between}",
        ),
    )


# --- advice -----------------------------------------------------------------------------------------------------------


def faster(config: Any, shapes: Any, tuned: Any, mesh: Mesh, room: float) -> tuple[str, ...]:
    """A note of what else could be kept in `room` bytes of a chip, so that less is computed again."""
    if config.model.remat != "block":
        return ()
    _, more = kept_bytes(config, shapes, mesh)
    again = attention_again(config, shapes, tuned)
    if 2 * more > room or again < 0.01:  # the compiler took up to twice as much, for what it fetches ahead
        return ()
    return (f"model.remat=attention would compute {again:.1%} less, for about {more / GIB:.2g} GiB",)


def advice(
    config: Any, model: Any, mesh: Mesh, topology: Topology, memory: Mapping[str, float], excess: float
) -> tuple[str, ...]:
    """What to change where a run needs `excess` bytes more than a chip has: settings, with the GiB each would save."""
    inputs, attended = kept_bytes(config, model.config, mesh)
    found: list[tuple[float, str]] = []
    weights = memory["trained"] + memory["frozen"] + memory["optimizer"]
    temporaries = memory["temporaries"]
    chips, shards = topology.num_chips, row_shards(mesh)

    def propose(saves: float, text: str) -> None:
        if saves > 0:
            found.append((saves, f"{text} (saves about {saves / GIB:.1f} GiB a chip)"))

    if config.model.remat not in RECOMPUTED:
        propose(temporaries * 0.6, "model.remat=block: keep only the input of each layer")
    elif config.model.remat == "attention":
        propose(attended, "model.remat=block: compute attention again, too")
    elif config.model.remat == "block":
        propose(inputs, "model.remat=offload: keep the input of each layer in host memory")
    most = chips // (mesh.shape["tensor"] * mesh.shape["sequence"] * mesh.shape["expert"]) // topology.slices
    if mesh.shape["fsdp"] < most:
        saved = weights * (1 - mesh.shape["fsdp"] / most)
        propose(saved, f"mesh.data={topology.slices} mesh.fsdp={most}: divide parameters and moments over more chips")
    rows = config.data.batch_size // shards
    pieces = rows // config.training.accumulation
    if pieces > 1:
        share = 1 - 1 / pieces
        propose(temporaries * share * 0.8, f"training.accumulation={rows}: one row a chip at a time")
    if config.model.compute_dtype == "float32":
        propose(temporaries * 0.4, "model.compute_dtype=bfloat16")
    if config.model.param_dtype == "float32":
        if config.model.frozen_dtype in (None, "float32"):
            propose(memory["frozen"] / 2, "model.frozen_dtype=bfloat16: frozen weights need no more")
        if config.training.optimizer.moment_dtype is None:
            propose(memory["optimizer"] / 4, "training.optimizer.moment_dtype=bfloat16: a smaller first moment")
        half = (memory["trained"] + memory["optimizer"]) / 2
        propose(half, "model.param_dtype=bfloat16: masters and moments of half the size, updates are rounded")
    offload = config.training.offload
    for name, what in (("optimizer", "optimizer's state"), ("frozen", "frozen layers")):
        if name not in offload:
            setting = "[" + ", ".join([*offload, name]) + "]"
            propose(memory[name] * 0.8, f"training.offload={setting}: keep the {what} in host memory")
    names = [m["name"] for m in config.method]
    if "full" in names:
        propose((weights - memory["frozen"]) / 2, "method=hft: half of the parameters train, the rest has no moments")
    if not {"lora"} & set(names):
        saved = memory["optimizer"] * 0.97 + memory["trained"] * 0.5
        propose(saved, "method=lora: adapters train, the model is frozen")
    if pieces <= 1 and mesh.shape["sequence"] == 1 and temporaries > weights:
        propose(temporaries / 2, "mesh.sequence=2: two chips share each row")
    needed = weights + temporaries
    larger = math.ceil(chips * needed / max(needed - excess, 1))
    found.append((0.0, f"a topology of at least about {larger} chips of this kind, or one with more memory a chip"))
    enough = [text for saves, text in found if saves >= excess]
    rest = [text for saves, text in sorted(found, key=lambda f: -f[0]) if saves < excess]
    return (*enough, *rest)
