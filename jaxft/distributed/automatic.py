"""`mesh: auto` and `model.remat: auto`: the axes of the mesh and what is recomputed, chosen for a run, and why."""

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxft.distributed.flops import model_flops
from jaxft.distributed.mesh import MeshConfig, MeshError, make_mesh
from jaxft.distributed.sharding import ShardingReport, row_shards
from jaxft.errors import JaxftError
from jaxft.methods import Probe, build
from jaxft.training.loss import Loss, language_model_loss
from jaxft.training.optimizer import make_optimizer, make_schedule
from jaxft.training.precision import Precision, dtype
from jaxft.training.state import abstract_state, tuned_of
from jaxft.weights import Tree
from jaxft.weights.memory import HOST_MEMORY
from jaxft.weights.reduction import FEWEST

UNKNOWN_LENGTH = 1000  # steps of a schedule whose length depends on the data; changes one constant of the program
REPLICATED_SHARE = 0.25  # of a device's memory, up to which every device holds all parameters and moments
WORTH_KEEPING = 0.02  # of a step's FLOPs that attention takes, from which its results are kept
MIN_POSITIONS = 1024  # of a sequence on one device, down to which sequences are cut rather than matrices


class Needs(NamedTuple):
    """What a run asks of a mesh: bytes of parameters and optimizer state together, rows of a micro-batch, their length,
    and the key/value heads that tensor parallelism would divide; of a mixture also its experts, the entries of the
    matrices of one of them, and the width of a token."""

    state_bytes: int
    rows: int
    seq_len: int
    kv_heads: int
    experts: int = 0
    expert_entries: int = 0
    width: int = 0


def choose(
    needs: Needs, devices: int, slices: int = 1, memory: int | None = None
) -> tuple[MeshConfig, tuple[str, ...]]:
    """The mesh of a run on `devices` devices in `slices` slices, and a sentence for every choice.

    Rows go over as many devices as they divide into, whole slices first: that needs no communication within a layer.
    What is left cuts sequences while `MIN_POSITIONS` stay on a device, then matrices by key/value heads. Parameters
    are divided (FSDP) over the devices of a slice that share a batch, unless all of them take at most
    `REPLICATED_SHARE` of the `memory` (bytes) of one device; of very many devices, over as many as that takes. Where
    memory is unknown they are divided. Of these devices, as many hold different experts of a mixture as makes a layer
    send least.

    Raises:
        MeshError: rows, positions and heads together do not divide over the devices.
    """
    reasons = []
    if needs.rows % slices:
        raise MeshError(
            f"mesh: auto: a micro-batch of {needs.rows} rows does not divide over {slices} slices; expected a multiple "
            f"of {slices} in data.batch_size / training.accumulation"
        )
    inner = devices // slices
    shards = math.gcd(needs.rows // slices, inner)
    left = inner // shards
    reasons.append(f"rows over {shards * slices} devices: {needs.rows} rows a micro-batch, {devices} devices")
    sequence = math.gcd(left, max(needs.seq_len // MIN_POSITIONS, 1), needs.seq_len)
    if sequence > 1:
        reasons.append(f"sequence {sequence}: more devices than rows, {needs.seq_len // sequence} positions on each")
    left //= sequence
    tensor = math.gcd(left, needs.kv_heads)
    if tensor > 1:
        reasons.append(f"tensor {tensor}: more devices than rows and {needs.seq_len} positions to cut")
    if left != tensor:
        raise MeshError(
            f"mesh: auto: {devices} devices are too many for {needs.rows} rows of {needs.seq_len} positions and "
            f"{needs.kv_heads} key/value heads; expected data.batch_size / training.accumulation to be a multiple of "
            f"{shards * left // tensor * slices}"
        )
    held = needs.state_bytes / tensor
    gib = f"parameters and moments take {held / 2**30:.2f} GiB"
    expert, why = 1, tuple[str, ...]()
    if shards == 1:
        fsdp = 1
    elif memory is not None and held <= REPLICATED_SHARE * memory:
        fsdp = 1
        reasons.append(f"fsdp 1: {gib}, at most a quarter of a device, so nothing is gathered")
    else:
        holders = _holders(held, shards, memory)
        expert, why = _expert_axis(needs, holders, needs.rows * needs.seq_len // (slices * shards * sequence))
        fsdp = holders // expert
        reasons.append(f"fsdp {fsdp}: {gib}" + ("" if memory is None else f", more than a quarter of {_gib(memory)}"))
        if holders < shards:
            reasons.append(f"data {shards // holders}: {holders} devices hold a copy, a quarter of each at most")
    reasons.extend(why)
    data = slices * shards // (fsdp * expert)
    if slices > 1:
        reasons.append(f"data {data}: only gradients travel between the {slices} slices")
    return (
        MeshConfig(data=data, fsdp=fsdp, sequence=sequence, tensor=tensor, expert=expert, dcn=slices),
        tuple(reasons),
    )


def _holders(held: float, devices: int, memory: int | None) -> int:
    """Over how many of the devices that share a batch parameters are divided, of which all take `held` bytes.

    Up to `FEWEST` hold one copy. Of more, each group of as many does, or of more where that leaves no room for the rest
    of a step: what its devices hold, and send in a layer and for the loss, does not grow with the number of groups.
    """
    if memory is None or devices <= FEWEST:
        return devices
    sizes = (n for n in range(FEWEST, devices + 1) if devices % n == 0 and held <= n * REPLICATED_SHARE * memory)
    return next(sizes, devices)


def _expert_axis(needs: Needs, devices: int, tokens: int) -> tuple[int, tuple[str, ...]]:
    """Over how many of the devices that divide the parameters experts are divided, and why.

    A step gathers the matrices of a device's experts three times (forward, recomputed, backward) and sums their
    gradient once; of the tokens of a group it gathers inputs twice and gradients once, and sums results once and
    gradients once.
    """
    if not needs.experts:
        return 1, ()

    def sent(expert: int) -> float:
        matrices = needs.experts * needs.expert_entries * (1 / expert - 1 / devices)
        return 4 * matrices + 5 * (expert - 1) * tokens * needs.width

    found = min((e for e in range(1, devices + 1) if devices % e == 0 and needs.experts % e == 0), key=sent)
    if found == 1:
        return 1, ()
    return found, (
        f"expert {found}: {tokens} tokens a device go to {needs.experts // found} experts on each, which sends "
        f"{sent(found) / sent(1):.0%} of what gathering the matrices of all {needs.experts} would",
    )


def _gib(size: float) -> str:
    return f"{size / 2**30:.3g} GiB"


def resolve_mesh(
    config: Any, model: Any, devices: int, slices: int = 1, memory: int | None = None
) -> tuple[MeshConfig, tuple[str, ...]]:
    """`config.mesh`, or the mesh that `choose` takes for the run where it is `auto`, with the reasons.

    Args:
        config: a checked run configuration.
        model: its language model.
        devices: how many there are.
        slices: into how many slices the network cuts them.
        memory: bytes of one device, where known.

    Raises:
        MeshError: see `choose`.
    """
    if not config.mesh.auto:
        return config.mesh, ()
    needs = Needs(
        state_bytes=_state_bytes(config, model),
        rows=config.data.batch_size // config.training.accumulation,
        seq_len=config.data.seq_len,
        kv_heads=model.config.num_kv_heads,
        experts=model.config.num_experts,
        expert_entries=3 * model.config.hidden_size * model.config.moe_intermediate_size,
        width=model.config.hidden_size,
    )
    found, reasons = choose(needs, devices, slices, memory)
    return found.model_copy(update={"process_timeout": config.mesh.process_timeout}), reasons


def _state_bytes(config: Any, model: Any) -> int:
    report, params = ShardingReport(), model.abstract(dtype(config.model.param_dtype))
    held = (params, params, params)  # as if everything trained
    with contextlib.suppress(JaxftError):  # a method that must see values before it knows its shapes
        state, frozen = abstract_run(config, model, make_mesh(MeshConfig(data=1), jax.devices()[:1]), report)
        if TRAINS_FIRST not in report.assumed:
            held = (state.trainable, state.opt_state, frozen)
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(held))


def resolve_remat(config: Any, model: Any, mesh: Mesh, memory: int | None = None) -> tuple[str, tuple[str, ...]]:
    """`config.model.remat`, or what is chosen for the run where it is `auto`, with the reason.

    "attention" where computing attention again would be `WORTH_KEEPING` of the FLOPs of a step or more, and what is
    kept of the layers leaves half of a device's `memory` for a layer at work and the loss; else "block". The compiler
    fetches ahead of what was kept, and takes up to twice as much for it.

    Args:
        config: a checked run configuration.
        model: its language model.
        mesh: of the run; its devices need not be here.
        memory: bytes of one device, where known.
    """
    if config.model.remat != "auto":
        return config.model.remat, ()
    if memory is None:
        return "block", ("block: the memory of a device is not known",)
    try:
        state, frozen = abstract_run(config, model, mesh)
    except JaxftError:
        return "block", ("block: the method must see values before it knows its shapes",)
    again = attention_again(config, model.config, tuned_of(state, frozen))
    share = f"computing attention again would be {again:.1%} of a step"
    if again < WORTH_KEEPING:
        return "block", (f"block: {share}",)
    held = shard_bytes((state, state.trainable, frozen))  # the gradients are as large as what trains
    inputs, attended = kept_bytes(config, model.config, mesh)
    if held + 2 * (inputs + attended) > memory / 2:
        return "block", (f"block: {share}, but its results take {_gib(attended)}, which may not fit",)
    return "attention", (f"attention: {share}, and its results take {_gib(attended)} of {_gib(memory)}",)


def attention_again(config: Any, shapes: Any, tuned: Any) -> float:
    """The part of a step's FLOPs that attention takes which `remat: block` computes again, and `attention` does not."""
    batch = config.data.batch_size, config.data.seq_len
    kept, recomputed = (model_flops(shapes, tuned, *batch, remat) for remat in ("attention", "block"))
    return 1 - kept / recomputed


def kept_bytes(config: Any, shapes: Any, mesh: Mesh) -> tuple[float, float]:
    """What the inputs of all layers take of a chip, and what the results of their attention (in lanes of 128)."""
    tokens = config.data.batch_size * config.data.seq_len / config.training.accumulation
    held = tokens / row_shards(mesh) / mesh.shape["sequence"] * shapes.num_layers
    held *= jnp.dtype(config.model.compute_dtype).itemsize
    lanes = -(-shapes.head_dim // 128) * 128
    tensor = mesh.shape["tensor"]  # divides heads, and of inputs positions
    divides = config.data.seq_len % (mesh.shape["sequence"] * tensor) == 0
    return held * shapes.hidden_size / (tensor if divides else 1), held * shapes.num_heads * lanes / tensor


def shard_bytes(tree: Tree, *, host: bool = False) -> int:
    """Bytes of the arrays of an abstract tree that one device holds, or that wait for it in host memory."""
    total = 0
    for a in jax.tree.leaves(tree):
        if (a.sharding.memory_kind == HOST_MEMORY) != host:
            continue
        itemsize = 8 if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else np.dtype(a.dtype).itemsize
        total += math.prod(a.sharding.shard_shape(a.shape)) * itemsize
    return total


def with_settings(config: Any, settings: Mapping[str, Any]) -> Any:
    """A copy of a configuration with other values for some keys, `{"model.remat": "block"}`; they are not checked."""
    for key, value in settings.items():
        name, _, rest = key.partition(".")
        value = with_settings(getattr(config, name), {rest: value}) if rest else value
        config = config.model_copy(update={name: value})
    return config


def loss_of(config: Any, model: Any, row_shards: int = 1) -> Loss:
    """The training loss of a configuration."""
    settings = config.model
    return language_model_loss(
        model,
        compute_dtype=dtype(settings.compute_dtype),
        remat=settings.remat,
        attention=settings.attention,
        z_loss=config.training.z_loss,
        row_shards=row_shards,
        router_aux_loss=settings.router_aux_loss,
    )


def abstract_run(config: Any, model: Any, mesh: Any, report: ShardingReport | None = None) -> tuple[Any, Any]:
    """State and frozen parameters of a run as shapes with shardings (see `abstract_state`)."""
    training, settings = config.training, config.model
    schedule = make_schedule(training.learning_rate, training.steps or UNKNOWN_LENGTH)
    return abstract_state(
        build(config.method),
        model.abstract(dtype(settings.param_dtype)),
        make_optimizer(training.optimizer, schedule),
        jax.random.key(config.seed),
        mesh,
        logical_axes=model.logical_axes(),
        # Answers have the same shapes whatever is recomputed, which may not have been chosen yet.
        probe=shape_probe(loss_of(with_settings(config, {"model.remat": "block"}), model), config, report),
        precision=Precision(settings.param_dtype, settings.frozen_dtype, settings.compute_dtype),
        report=report,
        offload=training.offload,
    )


TRAINS_FIRST = "the method makes a training run of its own first, which is not planned: this is the run after it"


def shape_probe(loss: Loss, config: Any, report: ShardingReport | None = None) -> Probe:
    """A probe whose answers have the shapes they will have and no values: traced, it computes nothing.

    What a method makes of the answers without leaving JAX is planned as it will be. Where values decide shapes, a
    selection takes something for granted, and says so in the report; what must see values fails, as there are none.
    """
    kinds = {"tokens": np.int32, "targets": np.int32, "weights": np.float32, "segment_ids": np.int32}
    batch = {name: np.ones((1, config.data.seq_len), kind) for name, kind in (kinds | {"positions": np.int32}).items()}

    def batches() -> Iterator[dict]:
        return itertools.repeat(batch)  # one row stands for any number: no answer has a dimension for rows

    assume = (ShardingReport() if report is None else report).assumed.append

    def trainer(params: Any, method: Any, steps: int) -> Any:
        assume(TRAINS_FIRST)
        return params

    return Probe(
        loss_fn=loss,
        batches=batches,
        trainer=trainer,
        total_steps=config.training.steps or UNKNOWN_LENGTH,
        sets={name: batches for name in config.evaluation.sets},
        assume=assume,
    )
