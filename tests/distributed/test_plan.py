"""Planning: topologies by name, the FLOPs a method needs, and train steps compiled for TPUs that are not here."""

import dataclasses
import importlib.util
import itertools
import json
import math
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from pydantic import ValidationError
from typer.testing import CliRunner

from jaxft.cli import app
from jaxft.config import parse_config
from jaxft.distributed import MeshConfig, MeshError, ShardingReport, hlo, make_mesh, topology
from jaxft.distributed.automatic import (
    TRAINS_FIRST,
    Needs,
    abstract_run,
    choose,
    kept_bytes,
    resolve_mesh,
    resolve_remat,
    shard_bytes,
)
from jaxft.distributed.flops import (
    attention_kernels,
    expert_rows,
    grouped_kernels,
    model_flops,
    penalty_flops,
    trained_share,
    visible_pairs,
)
from jaxft.distributed.plan import advice, compile_step, faster, lower_step, needed_bytes, plan, read_plan
from jaxft.distributed.sharding import to_host_memory
from jaxft.distributed.topology import TopologyError, parse_topology
from jaxft.errors import JaxftError
from jaxft.hub import load_model
from jaxft.methods import Method, build
from jaxft.methods.probe import Probe
from jaxft.methods.registry import methods
from jaxft.models.attention import attention
from jaxft.models.splash_attention import computed_pairs
from jaxft.partition import Tuned, combine
from jaxft.training import compilation, loss
from jaxft.training.offload import is_readable
from jaxft.training.state import abstract_state, init_state, tuned_of
from jaxft.weights import RowSplit
from jaxft.weights.rows import SOME_EXPERTS
from tests.distributed.planned import (
    DIM,
    GEMMA,
    HEAD_DIM,
    HEADS,
    INNER,
    LAYERS,
    LINEAR,
    MIXTURE,
    OTHERWISE,
    ROWS,
    SEQ,
    VOCAB,
    config,
    method_config,
    shape_for,
    sides,
    whole_matrices,
)

needs_compiler = pytest.mark.skipif(topology.compiler() is None, reason=topology.MISSING)
REMATS = ("block", "attention", "dots", "none")
# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "chips"),
    [
        ("v5e:4x4", "v5e:4x4", 16),
        ("V5P:4x4x4", "v5p:4x4x4", 64),
        ("v5e-16", "v5e:4x4", 16),
        ("v5litepod-256", "v5e:16x16", 256),
        ("v5p-128", "v5p:4x4x4", 64),
        ("4*v6e:16x16", "4*v6e:16x16", 1024),
        ("v5p:8x12x16", "v5p:8x12x16", 1536),
    ],
)
def test_topologies_by_name(name, text, chips):
    found = parse_topology(name)
    assert (str(found), found.num_chips) == (text, chips)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v7e:4x4", 'did you mean "v[0-9][ep]"'),
        ("v5e:4x5", "nearest is v5e:4x4"),
        ("v5e:4x4x4", "nearest is v5e:8x8"),
        ("v5p-100", "nearest is v5p-128"),
        ("0*v5e:4x4", "at least 1"),
        ("1000000*v5e:16x16", r"256,000,000 chips: expected at most 65,536, such as 256\*v5e:16x16"),
        ("", "GENERATION:SHAPE"),
    ],
)
def test_an_unknown_topology_is_refused_with_the_nearest(name, message):
    with pytest.raises(TopologyError, match=message):
        parse_topology(name)


def test_a_missing_compiler_is_one_sentence_that_says_what_to_install(monkeypatch, directory, tmp_path):
    for variable in topology.COMPILER_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(TopologyError, match=r'^the TPU compiler is not installed: pip install "jaxft\[tpu\]", or'):
        plan(config(directory), "v5e:2x2")
    (tmp_path / "tpu" / "libtpu").mkdir(parents=True)
    (tmp_path / "tpu" / "libtpu" / "libtpu.so").touch()
    assert topology.compiler() == tmp_path / "tpu" / "libtpu" / "libtpu.so"
    monkeypatch.setenv("JAXFT_LIBTPU", str(tmp_path / "absent.so"))
    with pytest.raises(TopologyError, match="JAXFT_LIBTPU=.*absent.so is no file"):
        plan(config(directory), "v5e:2x2")


# --- what a method needs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 1, 5, 16, 40])
def test_visible_pairs(window):
    counted = sum(k <= q and (window is None or q - k < window) for q in range(16) for k in range(16))
    assert visible_pairs(16, window) == counted


def pallas_calls(jaxpr, times=1):
    """The kernels of a jaxpr as instructions of a program with the shapes of their operands, and how often they run."""
    names = {"float32": "f32", "int32": "s32", "int8": "s8"}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            result = ", ".join(f"{names[str(v.aval.dtype)]}{list(v.aval.shape)}" for v in eqn.outvars).replace(" ", "")
            call = hlo.Instruction(f"{eqn.params['name']}.1", "custom-call", f"({result})", (), "", "", False)
            yield call, [(names[str(v.aval.dtype)], v.aval.shape) for v in eqn.invars], times
        for inner in jaxprs_in_params(eqn.params) if eqn.primitive.name != "pallas_call" else ():
            yield from pallas_calls(inner, times * eqn.params.get("length", 1))


@pytest.mark.parametrize(
    ("seq", "window", "heads", "kv_heads", "sizes", "splash", "settings", "products"),
    [
        (2048, None, 2, 2, {}, "splash", {}, 7),  # no group: blocks of 512 x 512
        (1152, None, 4, 2, {}, "splash", {}, 7),  # 9 x 128
        (2048, None, 8, 2, {"fsdp": 2, "tensor": 2, "sequence": 2}, "splash", {}, 7),  # zigzag
        (2048, 300, 8, 2, {"tensor": 2, "sequence": 2}, "splash", {}, 7),
        (2048, None, 8, 2, {"fsdp": 2, "tensor": 4}, "splash", {}, 7),  # keys and values are repeated
        (2048, 300, 4, 1, {"sequence": 2}, "splash", {"_PARTIAL": 10**6}, 9),  # two kernels backward
        # Larger blocks of keys, one head after the other.
        (2048, None, 8, 2, {}, "splash", {"_PARTIAL_BYTES": 2**21}, 7),
        (2048, 300, 8, 2, {"sequence": 2}, "splash:128x256", {}, 7),
    ],
)
def test_attention_is_counted_by_the_blocks_that_its_kernels_do_not_skip(
    monkeypatch, seq, window, heads, kv_heads, sizes, splash, settings, products
):
    made, rows, dim = [], 4, 16
    make = splash_attention.make_splash_mha
    monkeypatch.setattr(splash_attention, "make_splash_mha", lambda **given: made.append(given) or make(**given))
    for name, value in settings.items():
        monkeypatch.setattr(sys.modules[computed_pairs.__module__], name, value)
    sizes = {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1} | sizes
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * 4)
    shapes = [jax.ShapeDtypeStruct((rows, seq, n, dim), jnp.float32) for n in (heads, kv_heads, kv_heads)]

    def run(q, k, v):
        positions = np.arange(seq)[None]
        return attention(q, k, v, positions=positions, sliding_window=window, implementation=splash).sum()

    with jax.set_mesh(mesh):
        jaxpr = jax.make_jaxpr(jax.grad(run, (0, 1, 2)))(*shapes).jaxpr
    described = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim}
    described |= {"sliding_window": window, "sliding_layers": (window is not None,)}
    count = attention_kernels(types.SimpleNamespace(**described), rows, seq, mesh, splash)
    counted = sum(count(call, operands) * times for call, operands, times in pallas_calls(jaxpr))

    given, plain = made[0], splash_attention.CausalMask(made[0]["mask"].shape[1:])
    masks = len(given["mask"].masks)
    if window is not None:
        plain = splash_attention.LocalMask(plain.shape, (window - 1, 0), 0)
    plain.q_sequence = given["mask"].masks[0].q_sequence
    blocks = given["block_sizes"]
    computed = 0
    for info, other, area, times in zip(
        *(
            (kernel.fwd_mask_info, kernel.dkv_mask_info, kernel.dq_mask_info)
            for kernel in (make(**given), make(**given | {"mask": splash_attention.MultiHeadMask([plain] * masks)}))
        ),
        (
            blocks.block_q * blocks.block_kv,
            blocks.block_q_dkv * blocks.block_kv_dkv,
            (blocks.block_q_dq or 0) * (blocks.block_kv_dq or 0),
        ),
        (2, 5 if blocks.use_fused_bwd_kernel else 4, 0 if blocks.use_fused_bwd_kernel else 3),
        strict=True,
    ):
        if times:
            assert all(np.array_equal(a, b) for a, b in zip(info[:3], other[:3], strict=True) if a is not None)
            computed += 2 * times * dim * area * (np.asarray(info.block_mask[0]) > 0).sum()
    assert counted == pytest.approx(computed * masks * rows / math.prod(sizes.values()), rel=1e-12)
    assert products == (7 if blocks.use_fused_bwd_kernel else 9)


@pytest.mark.parametrize(
    ("method", "remat", "passed"),
    [
        *itertools.product(("{name: full}", "{name: hft}", "{name: lora, rank: 8}", "{name: lisa}"), REMATS, [LAYERS]),
        ("{name: layer-freezing, num_layers: 2}", "block", 2),
        ("{name: lora, on: 'layers[2:].attn', rank: 8}", "none", 4),
        ("{name: shira, rank: 8}", "block", LAYERS),
        ("{name: shira, rank: 8}", "dots", LAYERS),
        ("{name: sara}", "block", LAYERS),
    ],
)
def test_a_compiled_step_computes_what_the_method_needs(directory, method, remat, passed):
    """On the CPU, where attention is plain products over all pairs: the count is the least plus the masked pairs.
    `passed`: how many layers have a backward pass."""
    overrides = (f"model.remat={remat}", "model.compute_dtype=float32", "mesh.fsdp=1", "mesh.data=1")
    wanted = config(directory, method, *overrides)
    model = load_model(directory)
    mesh = make_mesh(wanted.mesh, jax.devices()[:1])
    compiled = compile_step(wanted, model, mesh)
    tuned = tuned_of(compiled.state, compiled.frozen)
    found = hlo.costs(hlo.parse(compiled.step.as_text()), taken=trained_share(combine(tuned)))
    least = model_flops(model.config, tuned, ROWS, SEQ, remat)
    if penalty := build(wanted.method).penalty:
        least += penalty_flops(penalty, tuned)
    # Plain attention, over all pairs: 2 products forward, 4 backward, the scores again (it keeps none), and, where
    # attention is recomputed, the mean of the values again.
    again = remat == "block"
    one = 2 * ROWS * HEADS * HEAD_DIM * SEQ**2
    seen = 4 * ROWS * HEADS * HEAD_DIM * visible_pairs(SEQ)
    least_without_attention = least - seen * (LAYERS + passed * (3.5 if again else 2.5))
    products = (found.flops - least_without_attention) / one
    assert products == pytest.approx(2 * LAYERS + passed * (6 if again else 5), abs=0.05 * LAYERS)


def test_planned_shapes_are_those_of_the_run(directory):
    """A method inits over abstract weights with the draws it makes over real ones."""
    model = load_model(directory)
    mesh = make_mesh(MeshConfig(fsdp=4), jax.devices()[:4])
    for spec in ({"name": "hft"}, [{"name": "lora", "rank": 4, "on": "layers[2:].attn.q"}, {"name": "hft"}]):
        method = build(spec)
        arguments = (jax.random.key(3), mesh)
        optimizer = optax.adamw(1e-3)
        planned = abstract_state(method, model.abstract(), optimizer, *arguments, logical_axes=model.logical_axes())
        real = init_state(
            method, model.init(jax.random.key(0)), optimizer, *arguments, logical_axes=model.logical_axes()
        )
        assert jax.tree.structure(planned) == jax.tree.structure(real)
        for a, b in zip(jax.tree.leaves(planned), jax.tree.leaves(real), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert a.sharding.is_equivalent_to(b.sharding, len(a.shape))


def test_a_method_that_must_see_values_is_refused_in_one_sentence(directory):
    mesh, model = make_mesh(MeshConfig(), jax.devices()[:1]), load_model(directory)
    method = Method(lambda rng, params, probe: Tuned(np.asarray(params["embed"]["embedding"]), {}, {}))
    with pytest.raises(JaxftError, match="before it knows its own shapes"):
        abstract_state(method, model.abstract(), optax.sgd(1.0), jax.random.key(0), mesh)


@pytest.mark.parametrize(
    ("method", "trained", "said"),
    [
        ("{name: smt, budget: 24, size: 32}", 24 * 32**2, "which blocks train follows from values"),
        ("{name: freezeasguard, frozen: 0.75}", 0.25 * LINEAR, "which matrices train follows from values"),
        ("{name: greentrainer}", LINEAR, "which tensors are open follows from gradients"),
        ("{name: lt-sft, budget: 900}", 900, TRAINS_FIRST),
        (
            "{name: select, granularity: row, budget: {cover: 0.5}}",
            0.5 * LINEAR,
            "how many rows train follows from values",
        ),
        ("{name: apet, count: 900}", 900, None),  # drawn at random: as it will be
    ],
)
def test_where_values_decide_shapes_the_plan_says_what_it_takes_for_granted(directory, method, trained, said):
    wanted = method_config(directory, method)
    report = ShardingReport()
    state, _ = abstract_run(wanted, load_model(directory), make_mesh(MeshConfig(), jax.devices()[:1]), report)
    found = sum(leaf.size for leaf in jax.tree.leaves(state.trainable))
    assert found == pytest.approx(trained, rel=0.3) and found >= trained
    assert report.assumed == [] if said is None else said in report.assumed[0]


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded ...", 20.5),
        ("RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (704.25G) exceeds available", 706.25),
    ],
)
def test_what_the_compiler_says_when_memory_runs_out(message, gib):
    assert needed_bytes(message, held=2 * 2**30) == gib * 2**30
    assert needed_bytes("INTERNAL: something else", held=0) is None


def test_a_fault_of_the_compiler_is_one_sentence_with_what_to_change(directory, monkeypatch):
    said = iter(["INTERNAL: RET_CHECK failure (target.cc:2892) valid\nand more lines", "RESOURCE_EXHAUSTED: no figure"])

    def failing(*_, **__):
        raise jax.errors.JaxRuntimeError(next(said))

    monkeypatch.setattr(jax.stages.Lowered, "compile", failing)
    wanted = config(directory, "{name: bitfit}", "mesh.fsdp=1", "training.offload=[optimizer]")
    message = (
        r"the compiler failed on this step: INTERNAL: RET_CHECK failure \(target.cc:2892\) valid\. That is a fault of "
        r"its own, .* may avoid it: training.offload=\[\], model.attention=xla, another mesh$"
    )
    mesh, model = make_mesh(wanted.mesh, jax.devices()[:1]), load_model(directory)
    with pytest.raises(JaxftError, match=message):
        compile_step(wanted, model, mesh)
    with pytest.raises(jax.errors.JaxRuntimeError, match="no figure"):  # the command line says what to do about memory
        compile_step(wanted, model, mesh)


def test_presets_are_shapes_without_weights():
    wanted = parse_config(
        "model: {path: 'preset:llama3.1-8b'}\nmethod: full\ndata: {sources: [{path: x.jsonl}]}\n"
        "training: {steps: 1, learning_rate: 1.0e-3}\noutput: out\n"
    )
    assert load_model(wanted.model.path).config.num_layers == 32
    with pytest.raises(JaxftError, match='did you mean "llama3.1-8b"'):
        load_model("preset:llama3.1-8")


# --- mesh: auto -------------------------------------------------------------------------------------------------------

GIB = 2**30
SMALL, LARGE = Needs(2 * GIB, 32, 4096, 8), Needs(100 * GIB, 32, 4096, 8)
MANY_EXPERTS = LARGE._replace(rows=64, seq_len=2048, experts=128, expert_entries=3 * 2048 * 768, width=2048)


@pytest.mark.parametrize(
    ("needs", "devices", "slices", "sizes", "reason"),
    [
        (SMALL, 16, 1, {"data": 16}, "fsdp 1: parameters and moments take 2.00 GiB, at most a quarter of a device"),
        (LARGE, 16, 1, {"fsdp": 16}, "more than a quarter of 15.8 GiB"),
        (LARGE, 128, 1, {"fsdp": 32, "sequence": 4}, "sequence 4: more devices than rows, 1024 positions on each"),
        (LARGE, 256, 1, {"fsdp": 32, "sequence": 4, "tensor": 2}, "tensor 2"),
        (LARGE._replace(rows=256), 256, 1, {"data": 4, "fsdp": 64}, "data 4: 64 devices hold a copy"),
        (Needs(400 * GIB, 512, 4096, 8), 512, 2, {"data": 4, "fsdp": 128, "dcn": 2}, "128 devices hold a copy"),
        (LARGE, 32, 2, {"data": 2, "fsdp": 16, "dcn": 2}, "only gradients travel between the 2 slices"),
        (SMALL._replace(rows=24), 16, 1, {"data": 8, "sequence": 2}, "rows over 8 devices"),
        (MANY_EXPERTS, 64, 1, {"fsdp": 8, "expert": 8}, "expert 8: 2048 tokens a device go to 16 experts on each"),
        (
            MANY_EXPERTS._replace(rows=256),
            64,
            1,
            {"fsdp": 16, "expert": 4},
            "34% of what gathering the matrices of all 128",
        ),
        (MANY_EXPERTS._replace(experts=5), 64, 1, {"fsdp": 64}, "fsdp 64"),
        (MANY_EXPERTS._replace(state_bytes=GIB), 64, 1, {"data": 64}, "fsdp 1"),
    ],
)
def test_mesh_auto_chooses_axes_and_says_why(needs, devices, slices, sizes, reason):
    found, reasons = choose(needs, devices, slices, memory=int(15.75 * GIB))
    assert found == MeshConfig(**{"data": 1, **sizes})
    assert reason in "; ".join(reasons)


@pytest.mark.parametrize(
    ("needs", "devices", "slices", "message"),
    [
        (LARGE._replace(rows=2, seq_len=1024, kv_heads=2), 16, 1, "too many for 2 rows .* to be a multiple of 8"),
        (LARGE._replace(rows=3), 32, 2, "3 rows does not divide over 2 slices"),
    ],
)
def test_mesh_auto_says_what_does_not_divide(needs, devices, slices, message):
    with pytest.raises(MeshError, match=message):
        choose(needs, devices, slices)


def test_mesh_auto_knows_what_the_method_keeps(directory):
    model = load_model(directory)
    counted = {}
    for method in ("full", "hft", "lora", "lt-sft"):
        wanted = config(directory, f"{{name: {method}}}").model_copy(update={"mesh": MeshConfig.model_validate("auto")})
        _, reasons = resolve_mesh(wanted, model, 4)
        (text,) = (r for r in reasons if r.startswith("fsdp 4"))
        counted[method] = text
        assert resolve_mesh(wanted, model, 4, memory=GIB)[0] == MeshConfig(data=4)  # a tiny model is not divided
    assert counted["full"] == counted["lt-sft"]  # which trains everything first
    assert len({counted["full"], counted["hft"], counted["lora"]}) == 3 or counted["full"].endswith("0.02 GiB")
    with pytest.raises(ValidationError, match="mesh.auto chooses the axes, and mesh.fsdp set some"):
        MeshConfig(auto=True, fsdp=2)


# --- compiled for a TPU -----------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("v5e:16x16", {"fsdp": -1}),
        ("v5p:4x4x4", {"fsdp": 32, "tensor": 2}),  # 2 is no side of the torus: one is cut
        ("v6e:8x8", {"fsdp": 16, "tensor": 4}),
        ("v5e:1x1", {}),
        ("16*v5e:16x16", {"data": 16, "dcn": 16, "fsdp": 256}),
        ("2*v5e:16x16", {"data": 8, "dcn": 2, "fsdp": 64}),
    ],
)
def test_meshes_on_topologies(name, sizes):
    where = parse_topology(name)
    mesh = make_mesh(MeshConfig(**sizes), topology.topology_devices(where))
    assert mesh.size == where.num_chips
    if where.slices > 1:  # the data axis goes from slice to slice, every other axis stays in one
        for data, row in enumerate(mesh.devices):
            assert {d.slice_index for d in row.flat} == {mesh.devices[data].flat[0].slice_index}


@needs_compiler
def test_slices_and_the_mesh_must_agree(directory):
    with pytest.raises(TopologyError, match="set mesh.dcn=2"):
        plan(config(directory), "2*v5e:2x2")


@needs_compiler
def test_the_plan_is_that_of_the_compiled_step(directory):
    found = plan(config(directory, "{name: hft}", "model.attention=splash"), "v5e:2x2")
    assert found.fits and not found.advice and found.remedy is None and found.num_chips == 4
    assert found.mesh["fsdp"] == 4
    assert found.hbm_gib_per_chip == pytest.approx(sum(found.memory_gib.values()), rel=0.05)
    assert 0 < found.memory_gib["trained"] < found.memory_gib["optimizer"]
    assert found.flops_ratio == pytest.approx(1, abs=0.15)  # one block of attention: the masked half is computed
    assert found.collective_bytes["all-gather"] + found.collective_bytes.get("collective-permute", 0) > 0
    assert 0 < found.roofline.mfu < 1
    assert json.loads(json.dumps(found.record()))["fits"] is True


@needs_compiler
@pytest.mark.parametrize(
    ("name", "where", "axes"),
    [
        ("full", "v5e:2x2", {"fsdp": 2, "tensor": 2}),
        ("lora", "v5e:4x4", {"data": 2, "fsdp": 4, "tensor": 2}),
        ("hft", "v5e:2x4", {"fsdp": 2, "sequence": 2, "tensor": 2}),
    ],
)
def test_chips_that_divide_heads_divide_positions_between_projections(name, where, axes, directory, quick_compiler):
    """Of the inputs of layers, which are kept, each holds its positions; what projections add is scattered and not
    summed everywhere; and no product is made twice, whichever axes are of one size."""
    rows, seq, model = 16, 512, load_model(directory)
    settings = ("model.attention=splash", f"data.seq_len={seq}", f"data.batch_size={rows}")

    def compiled(axes):
        wanted = config(directory, f"{{name: {name}}}", *settings, *(f"mesh.{a}={size}" for a, size in axes.items()))
        mesh = make_mesh(wanted.mesh, topology.topology_devices(parse_topology(where)))
        text = compile_step(wanted, model, mesh).step.as_text()
        attention = attention_kernels(model.config, rows, seq, mesh)
        return text, hlo.costs(hlo.parse(text), kernels=attention)

    text, found = compiled(axes)
    held = (rows // (axes.get("data", 1) * axes["fsdp"]), seq // (axes.get("sequence", 1) * axes["tensor"]), DIM)
    kept = ",".join(map(str, (LAYERS, *held)))
    assert re.search(rf"bf16\[{kept}\]\S* dynamic-update-slice", text)
    whole = sides((held[0], axes["tensor"] * held[1], DIM))
    assert whole not in {sides(dims) for c in found.collectives if c.kind == "all-reduce" for _, dims in c.result}
    _, undivided = compiled(axes | {"fsdp": 2 * axes["fsdp"], "tensor": 1})
    assert found.flops < 1.03 * undivided.flops


@needs_compiler
@pytest.mark.parametrize(
    ("tensor", "expected"), [(4, ["attention: 6 heads are not divisible by mesh.tensor = 4"]), (2, [])]
)
def test_heads_that_do_not_divide_are_named(tensor, expected, directory, quick_compiler):
    where, model = parse_topology("v5e:2x2"), load_model(directory)
    wanted = config(directory, "{name: bitfit}", "model.attention=xla", f"mesh.tensor={tensor}")
    mesh = make_mesh(wanted.mesh, topology.topology_devices(where))
    notes = read_plan(wanted, model, where, mesh, compile_step(wanted, model, mesh)).notes
    assert [note.split(",")[0] for note in notes if note.startswith("attention")] == expected


@needs_compiler
def test_layers_of_two_kinds_are_one_scan_with_a_kernel_of_each(directory, tmp_path, quick_compiler):
    """Each kernel is in a branch that half of the layers take: their counts add up to one a layer."""
    (tmp_path / "config.json").write_text(json.dumps(json.loads((directory / "config.json").read_text()) | GEMMA))
    settings = ("model.attention=splash", "data.seq_len=512", "mesh.fsdp=2", "mesh.tensor=2", "mesh.data=1")
    wanted = config(tmp_path, "{name: lora, rank: 8}", *settings)
    model = load_model(tmp_path)
    assert model.config.sliding_layers == (True, True, False) * 2
    mesh = make_mesh(wanted.mesh, topology.topology_devices(parse_topology("v5e:2x2")))
    compiled = compile_step(wanted, model, mesh)
    text = compiled.step.as_text()
    found = hlo.costs(hlo.parse(text), taken=0.5, kernels=attention_kernels(model.config, ROWS, 512, mesh))
    assert sum(found.kernels.values()) == 3 * LAYERS, "forward, forward again, backward"
    assert len(re.findall(r"%splash_mha_fwd\S* = .* custom-call\(", text)) == 2 * 2, "whatever the depth"
    assert not any(c.total_bytes for c in found.collectives if c.in_conditional), "no device waits for a branch"
    gathered = [dims for c in found.collectives if c.kind == "all-gather" for _, dims in c.result]
    assert gathered and not any(VOCAB in dims for dims in gathered), "neither a tied table nor scores"
    assert found.least_flops == found.flops == found.most_flops


@needs_compiler
def test_products_of_experts_are_counted_and_their_gradients_scattered(directory, tmp_path, quick_compiler):
    """Kernels whose inside the program does not show: each row is multiplied with the matrices of its experts."""
    experts, chosen, width = 8, 2, 384
    changes = {"model_type": "mixtral", "num_local_experts": experts, "num_experts_per_tok": chosen}
    described = json.loads((directory / "config.json").read_text()) | changes | {"intermediate_size": width}
    (tmp_path / "config.json").write_text(json.dumps(described | {"architectures": ["MixtralForCausalLM"]}))
    wanted = config(tmp_path, "{name: full}", "model.attention=xla", "mesh.fsdp=4", "mesh.data=1")
    model = load_model(tmp_path)
    mesh = make_mesh(wanted.mesh, topology.topology_devices(parse_topology("v5e:2x2")))
    module = hlo.parse(compile_step(wanted, model, mesh).step.as_text())
    found = hlo.costs(module, kernels=grouped_kernels)
    one = 2 * (ROWS * SEQ * chosen / 4) * DIM * width  # of a chip
    assert found.kernels == {"ragged-dot-none": 8 * LAYERS, "tgmm": 3 * LAYERS}, "the last is not computed again"
    assert found.flops - hlo.costs(module).flops == 11 * LAYERS * one
    gathers = [c for c in found.collectives if c.kind == "all-gather" and {experts, width} <= set(c.result[0][1])]
    assert sum(c.times for c in gathers) == 6 * LAYERS, "of each matrix one forward and one backward"
    scattered = [dims for c in found.collectives if c.kind == "reduce-scatter" for _, dims in c.result]
    assert (experts, DIM // 4, width) in scattered and (experts, width // 4, DIM) in scattered
    summed = [dims for c in found.collectives if c.kind == "all-reduce" for _, dims in c.result]
    assert not any(experts in dims and width in dims for dims in summed)


def test_rows_of_the_experts_that_train_are_those_that_count():
    named = f'metadata={{op_name="jit(step)/{SOME_EXPERTS}/pallas_call"}}'
    operands = [("bf16", (64, 512)), ("bf16", (512, 96))]
    for attributes, rows in (("", 256), (named, 256 * 2 / 8)):
        op = hlo.Instruction("tgmm.3", "custom-call", "bf16[2,64,96]", ("a", "b"), "", attributes, False)
        assert grouped_kernels(op, operands, most=256, experts=8) == 2 * 64 * rows * 96


@needs_compiler
def test_no_chip_is_sent_an_expert_of_another_for_its_entries(directory, tmp_path, quick_compiler):
    experts = 8
    changes = MIXTURE | {"num_local_experts": experts}
    (tmp_path / "config.json").write_text(json.dumps(json.loads((directory / "config.json").read_text()) | changes))
    sizes = ("mesh.expert=4", "mesh.fsdp=2", "mesh.data=1", "data.batch_size=8")
    wanted, model = config(tmp_path, "{name: spiel, budget: 0.1}", "model.attention=xla", *sizes), load_model(tmp_path)
    mesh = make_mesh(wanted.mesh, topology.topology_devices(parse_topology("v5e:2x4")))
    found = hlo.costs(hlo.parse(compile_step(wanted, model, mesh).step.as_text()))
    sent = {(dtype, sides(dims)) for c in found.collectives for dtype, dims in c.result}
    assert not any({experts, INNER} <= set(dims) or experts * DIM * INNER in dims for _, dims in sent)
    assert not [dims for dtype, dims in sent if dtype == "s32" and 3 in dims], "one position, not three coordinates"
    summed = {sides(dims) for c in found.collectives if c.kind == "all-reduce" for _, dims in c.result}
    assert not any(math.prod(dims) >= experts // 4 * DIM * INNER for dims in summed)


@needs_compiler
@pytest.mark.parametrize("experts", [8, 4], ids=["two_experts_a_chip", "one_expert_a_chip"])
def test_tokens_travel_to_experts(experts, directory, tmp_path, quick_compiler):
    """No chip is sent a matrix of another's experts; rounds that a balanced batch does not need are not counted."""
    chosen, width, rows = 2, 384, 8
    changes = {"model_type": "mixtral", "num_local_experts": experts, "num_experts_per_tok": chosen}
    described = json.loads((directory / "config.json").read_text()) | changes | {"intermediate_size": width}
    (tmp_path / "config.json").write_text(json.dumps(described | {"architectures": ["MixtralForCausalLM"]}))
    sizes = ("mesh.expert=4", "mesh.fsdp=2", "mesh.data=1", f"data.batch_size={rows}")
    wanted = config(tmp_path, "{name: full}", "model.attention=xla", *sizes)
    model = load_model(tmp_path)
    mesh = make_mesh(wanted.mesh, topology.topology_devices(parse_topology("v5e:2x4")))
    module = hlo.parse(compile_step(wanted, model, mesh).step.as_text())
    balanced = expert_rows(model.config, wanted.data.batch_size, wanted.data.seq_len, mesh)
    assert balanced == rows * SEQ * chosen / 8
    found = hlo.costs(module, kernels=lambda op, operands: grouped_kernels(op, operands, balanced))
    assert bool(found.open_loops) == (experts > 4), "one expert has at most what a round holds here"
    assert found.kernels == {"ragged-dot-none": 8 * LAYERS, "tgmm": (3 + 2) * LAYERS}
    products, sums = 11 * 2 * balanced * DIM * width, 2 * 2 * balanced * 64 * DIM
    assert found.flops - hlo.costs(module).flops == LAYERS * (products + sums)
    gathered = [dims for c in found.collectives if c.kind == "all-gather" for _, dims in c.result if width in dims]
    assert gathered and not any(experts in dims for dims in gathered)
    assert any(experts // 4 in dims for dims in gathered)
    scattered = {sides(dims) for c in found.collectives if c.kind == "reduce-scatter" for _, dims in c.result}
    assert {sides((experts // 4, DIM // 2, width)), sides((SEQ, DIM))} <= scattered
    summed = {sides(dims) for c in found.collectives if c.kind == "all-reduce" for _, dims in c.result}
    assert not any(4 * SEQ in dims for dims in summed), "tokens are sent where they came from, not everywhere"
    assert sides((experts // 4, DIM, width)) not in summed


@needs_compiler
def test_half_of_a_tied_table_trains_and_no_piece_of_the_loss_moves_it(
    directory, tmp_path, monkeypatch, quick_compiler
):
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 0)  # two pieces
    tied = json.loads((directory / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(tied))
    wanted, model = config(tmp_path, "{name: hft}", "model.attention=xla", "data.batch_size=16"), load_model(tmp_path)
    mesh = make_mesh(wanted.mesh, topology.topology_devices(parse_topology("v5e:2x2")))
    compiled = compile_step(wanted, model, mesh)
    params = combine(tuned_of(compiled.state, compiled.frozen))
    assert isinstance(params["embed"]["embedding"], RowSplit)
    found = hlo.costs(hlo.parse(compiled.step.as_text()))
    moved = [c for c in found.collectives if any(VOCAB in dims or VOCAB // 2 in dims for _, dims in c.result)]
    assert moved and all(c.times == 1 for c in moved)


@needs_compiler
def test_weights_and_inputs_of_layers_travel_beside_products(directory, tmp_path, caplog, monkeypatch):
    """Weights are gathered so, half of a matrix as a whole one; on v5p it is told to: no `all-gather` would be so
    otherwise. Inputs of layers go to host memory and come back so, and no layer is taken out of its loop for it."""
    wide = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 4, "num_key_value_heads": 2}
    described = json.loads((directory / "config.json").read_text()) | wide | {"head_dim": 128, "vocab_size": 2048}
    (tmp_path / "config.json").write_text(json.dumps(described))
    where, model = parse_topology("v5p:2x2x2"), load_model(tmp_path)
    settings = ("model.attention=xla", "model.remat=offload", "data.seq_len=256", "data.batch_size=16")
    wanted = config(tmp_path, "{name: hft}", *settings)
    mesh = make_mesh(wanted.mesh, topology.topology_devices(where))
    compiled = compile_step(wanted, model, mesh)
    (note,) = read_plan(wanted, model, where, mesh, compiled).notes
    assert note.startswith("compiler options: xla_tpu_enable_async_collective_fusion=True, ")
    text = compiled.step.as_text()
    assert len(re.findall(r"= f32\[[^\]]*\b64\]\S* cosine\(", text)) == 1, "rotary embeddings, once for all layers"
    module = hlo.parse(text)
    collectives = hlo.costs(module).collectives
    gathers = [c for c in collectives if c.kind in ("all-gather", "collective-permute")]
    assert any(c.overlapped for c in gathers if c.kind == "all-gather")
    hidden = sum(c.total_bytes for c in gathers if c.overlapped)
    assert hidden > 0.75 * sum(c.total_bytes for c in gathers)
    for opcode in ("dynamic-update-slice", "dynamic-slice"):
        ((where, beside),) = beside_host_transfers(module, opcode)
        assert where != module.entry and any(multiplies(module, op) for op in beside)

    mesh = make_mesh(MeshConfig(fsdp=4), topology.topology_devices(parse_topology("v5p:2x2x1")))
    usual = compilation.OPTIONS["TPU v5"]
    own = {"xla_enable_async_all_gather": False, "xla_tpu_enable_async_all_to_all": True}
    assert compilation.compiler_options(mesh, own) == {**usual, **own}
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_enable_async_collective_fusion=false --xla_x=1")
    assert set(usual) - set(compilation.compiler_options(mesh)) == {"xla_tpu_enable_async_collective_fusion"}
    monkeypatch.setattr(compilation, "OPTIONS", {"TPU v5": {"xla_of_another_version": True}})
    assert compilation.compiler_options(mesh) == {} and "No such compile option" in caplog.text


def beside_host_transfers(module, opcode):
    """For each copy of a part of an array in host memory: the computation, and what stands between start and done."""
    for name, order in module.computations.items():
        for i, op in enumerate(order):
            if op.opcode == f"{opcode}-start" and "S(5)" in op.result:
                (done,) = [k for k, other in enumerate(order) if op.name in other.operands]
                yield name, order[i + 1 : done]


def multiplies(module, op):
    inside = [module.computations[name] for names in op.called.values() for name in names]
    return op.opcode == "convolution" or any(multiplies(module, o) for computation in inside for o in computation)


@needs_compiler
def test_fetching_ahead_leaves_one_option_unused():
    mesh = make_mesh(MeshConfig(fsdp=4), topology.topology_devices(parse_topology("v5e:2x2")))
    usual = compilation.compiler_options(mesh)
    more = {"xla_tpu_pipeline_memory_host_transfers": False}
    assert compilation.compiler_options(mesh, ahead=True) == usual | more != usual


def test_an_option_that_the_compiler_does_not_know_is_refused():
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    known = {"xla_cpu_enable_fast_math": False}
    assert compilation.compiler_options(mesh) == {} and compilation.compiler_options(mesh, known) == known
    with pytest.raises(JaxftError, match=r"training.compiler_options.xla_cpu_fast = True: .*No such compile option"):
        compilation.compiler_options(mesh, {"xla_cpu_fast": True})


@needs_compiler
def test_the_command_prints_what_people_and_programs_read(directory, tmp_path):
    wanted = config(directory, "{name: hft}")
    (tmp_path / "run.yaml").write_text(json.dumps(wanted.resolved()))
    arguments = ["plan", str(tmp_path / "run.yaml"), "-t", "v5e:2x2"]
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False).stdout)
    wanted_keys = {"fits", "hbm_gib_per_chip", "compile_seconds", "flops_per_step", "model_flops", "collective_bytes"}
    assert wanted_keys <= set(found) and found["fits"] is True
    text = CliRunner().invoke(app, arguments, catch_exceptions=False).stdout
    assert "hft on v5e:2x2 (4 chips, mesh fsdp 4): fits" in text
    assert found["roofline"]["cautious_step_seconds"] > found["roofline"]["step_seconds"]
    assert "ms if a product hides no more than is sent while it lasts" in text


@pytest.fixture
def small_chip(monkeypatch):
    """A v5e of so many MiB, for the plan and, with the setting it returns, for the compiler."""

    def chip(mib):
        changed = dataclasses.replace(topology.CHIPS["v5e"], hbm_bytes=topology.RESERVED_HBM + mib * 2**20)
        monkeypatch.setitem(topology.CHIPS, "v5e", changed)
        return f"training.compiler_options={{xla_tpu_max_hbm_size_mib: {mib}}}"

    return chip


@needs_compiler
def test_a_job_that_does_not_fit_is_told_what_to_change(directory, small_chip):
    """Five million parameters and their moments in bfloat16 are 29 MiB, and a quarter of them on each of four chips."""
    limit = small_chip(35)
    found = plan(config(directory, "{name: full}", "mesh.fsdp=1", "mesh.data=4", limit), "v5e:2x2")
    assert not found.fits
    assert found.hbm_gib_available < found.hbm_gib_per_chip < 1.1 * found.hbm_gib_available
    assert any("mesh.fsdp=4" in text for text in found.advice)
    assert found.remedy.settings == "model.remat=offload mesh.data=1 mesh.fsdp=4"
    assert found.remedy.fits and found.remedy.hbm_gib_per_chip < found.hbm_gib_available


@needs_compiler
def test_what_the_compiler_has_placed_fits(directory, small_chip):
    """However often its analysis counts a gap: here the chip is small for the plan alone."""
    small_chip(33)
    found = plan(config(directory, "{name: full}", "mesh.fsdp=1", "mesh.data=4"), "v5e:2x2")
    assert found.fits and not found.advice
    assert found.hbm_gib_per_chip == found.hbm_gib_available == pytest.approx(sum(found.memory_gib.values()), rel=1e-3)
    assert any("counts the gaps between temporaries twice" in note for note in found.notes)


def test_where_there_is_room_the_plan_says_what_else_to_keep(directory):
    mesh, model, length = make_mesh(MeshConfig(fsdp=2), jax.devices()[:2]), load_model(directory), 16 * SEQ

    def note(room, *overrides):
        wanted = config(directory, "{name: full}", f"data.seq_len={length}", *overrides)
        tuned = build(wanted.method).init(jax.random.key(0), model.abstract(), Probe())
        return faster(wanted, model.config, tuned, mesh, room)

    held = LAYERS * ROWS * length / 2 * HEADS * 128 * 2  # heads of 64 channels fill lanes of 128, in bfloat16
    attention = 4 * HEADS * HEAD_DIM * visible_pairs(length)
    block = 8 * (LINEAR - LAYERS * DIM * INNER) + 6 * (LAYERS * DIM * INNER + DIM * VOCAB)  # `down` is not repeated
    share = LAYERS * attention / (LAYERS * 4.5 * attention + length * block)
    (found,) = note(2 * held)
    kept = config(directory, "{name: full}", f"data.seq_len={length}", "model.remat=attention")
    memory = {"trained": 0, "frozen": 0, "optimizer": 0, "temporaries": 0}
    told = advice(kept, model, mesh, parse_topology("v5e:2x2"), memory, held)
    assert any("model.remat=block: compute attention again" in text for text in told)
    assert found == f"model.remat=attention would compute {share:.1%} less, for about {held / GIB:.2g} GiB"
    assert (
        note(2 * held - 1)
        == note(2 * held, "model.remat=attention")
        == note(2 * held, f"data.seq_len={SEQ // 4}")
        == ()
    )


def test_remat_auto_keeps_the_results_of_attention_where_that_pays_and_fits(directory):
    mesh, model, length = make_mesh(MeshConfig(fsdp=2), jax.devices()[:2]), load_model(directory), 16 * SEQ

    def choice(memory, *overrides):
        wanted = config(directory, "{name: lora}", f"data.seq_len={length}", "model.remat=auto", *overrides)
        found, reasons = resolve_remat(wanted, model, mesh, memory)
        return found, *reasons

    wanted = config(directory, "{name: lora}", f"data.seq_len={length}", "model.remat=auto")
    state, frozen = abstract_run(wanted, model, mesh)
    kept = LAYERS * ROWS * length / 2 * 2 * (DIM + HEADS * 128)  # inputs, and heads that fill lanes of 128
    assert kept == sum(kept_bytes(wanted, model.config, mesh))
    needed = 2 * (shard_bytes((state, state.trainable, frozen)) + 2 * kept)
    policy, reason = choice(needed)
    assert policy == "attention" and "attention again would be" in reason
    policy, reason = choice(needed - 1)
    assert policy == "block" and "which may not fit" in reason
    assert choice(None) == ("block", "block: the memory of a device is not known")
    policy, reason = choice(needed, f"data.seq_len={SEQ // 4}")  # short rows: attention is little of a step
    assert policy == "block" and reason.startswith("block: computing attention again would be 0.")
    assert choice(needed, "model.remat=dots") == ("dots",)
    with_tensor = make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])  # it divides positions, and heads
    assert kept / 2 == sum(kept_bytes(wanted, model.config, with_tensor))


@needs_compiler
def test_a_plan_says_what_remat_auto_chose(directory, quick_compiler):
    found = plan(config(directory, "{name: full}", f"data.seq_len={16 * SEQ}", "model.remat=auto"), "v5e:2x2")
    (note,) = (text for text in found.notes if text.startswith("model.remat: auto: "))
    assert "attention: computing attention again would be" in note
    assert found.flops_ratio < 1.15  # tiles of 256 are most of what this model computes in vain


@needs_compiler
def test_what_waits_in_host_memory_is_fetched_layer_by_layer(directory, quick_compiler):
    """The stacks of frozen matrices are arguments in host memory, and nothing of their shape is on the chip."""
    where = parse_topology("v5e:2x2")
    wanted = config(directory, "{name: lora, rank: 8}", "training.offload=[optimizer, frozen]")
    mesh = make_mesh(MeshConfig(fsdp=4), topology.topology_devices(where))
    model = load_model(directory)
    compiled = compile_step(wanted, model, mesh)
    found = read_plan(wanted, model, where, mesh, compiled)
    stats = compiled.step.memory_analysis()
    in_host = GIB * (found.host_gib["optimizer"] + found.host_gib["frozen"])
    assert found.host_gib["optimizer"] > 0 and found.host_gib["frozen"] > 10 * found.memory_gib["optimizer"]
    assert stats.host_argument_size_in_bytes == pytest.approx(in_host, rel=0.3)  # rank 8 fills a tile of 128 partly
    stacks = [a for a in jax.tree.leaves(compiled.frozen["layers"]) if a.sharding.memory_kind == "pinned_host"]
    assert len(stacks) == 7
    text = compiled.step.as_text()
    for stack in stacks:
        shape = ",".join(map(str, stack.sharding.shard_shape(stack.shape)))
        layouts = re.findall(rf"bf16\[{shape}\]{{([^}}]*)}}", text)
        assert layouts and all("S(5)" in layout for layout in layouts), shape


@needs_compiler
def test_what_fills_no_tiles_is_not_fetched_from_host_memory():
    """libtpu aborts where a layer of such a stack is fetched, and fails where one is read back."""
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), topology.topology_devices(parse_topology("v5e:2x2")))
    rows, columns = PartitionSpec(None, "fsdp", "tensor"), PartitionSpec(None, "tensor", "fsdp")
    shapes = {"up": ((6, 384, 1000), rows), "gate": ((6, 384, 1024), rows), "down": ((6, 1000, 384), columns)}
    stacks = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, (shape, _) in shapes.items()}
    places = {name: NamedSharding(mesh, spec) for name, (_, spec) in shapes.items()}
    frozen = to_host_memory({"layers": stacks}, {"layers": places}, only_stacked=True)["layers"]
    assert {name for name, place in frozen.items() if place.memory_kind == "pinned_host"} == {"gate"}
    readable = {name for name, place in places.items() if is_readable(stacks[name].shape, place)}
    assert readable == {"gate"}


@needs_compiler
@pytest.mark.parametrize(("name", "axes"), [("hft", {"fsdp": 4}), ("badam", {"fsdp": 2, "tensor": 2})])
def test_a_model_that_fills_no_tiles_compiles_with_all_that_may_wait_in_host_memory(
    name, axes, directory, tmp_path, quick_compiler
):
    changed = {"hidden_size": 384, "intermediate_size": 1000}
    (tmp_path / "config.json").write_text(json.dumps(json.loads((directory / "config.json").read_text()) | changed))
    overrides = [f"mesh.{axis}={size}" for axis, size in axes.items()]
    wanted = config(tmp_path, f"{{name: {name}}}", "training.offload=[optimizer, frozen]", *overrides)
    mesh = make_mesh(wanted.mesh, topology.topology_devices(parse_topology("v5e:2x2")))
    stats = compile_step(wanted, load_model(tmp_path), mesh).step.memory_analysis()
    assert stats.host_argument_size_in_bytes > 0


@needs_compiler
def test_each_chip_of_tensor_routes_its_own_positions_of_a_mixture(directory, quick_compiler, tmp_path):
    shape = json.loads((directory / "config.json").read_text()) | MIXTURE
    (tmp_path / "config.json").write_text(json.dumps(shape | {"num_local_experts": 24}))
    axes = "mesh={data: 1, expert: 2, tensor: 2}"
    wanted = config(tmp_path, "{name: full}", "model.attention=xla", "data.seq_len=160", axes)
    mesh = make_mesh(wanted.mesh, topology.topology_devices(parse_topology("v5e:2x2")))
    text = compile_step(wanted, load_model(tmp_path), mesh).step.as_text()
    scores = re.findall(r"= \w+\[2,(\d+),24\]\S* convolution\(", text)
    assert scores and set(scores) == {"80"}


@needs_compiler
@pytest.mark.parametrize("name", methods())
def test_the_step_of_every_method_compiles_for_a_tpu(name, directory, quick_compiler, tmp_path):
    """Layers scanned, FSDP x tensor: each matrix is gathered over one of the two axes, a layer at a time, or not."""
    directory = shape_for(name, directory, tmp_path)
    spec = {"name": name, **methods()[name].example, **OTHERWISE.get(name, {})}
    wanted = method_config(directory, json.dumps(spec))
    model = load_model(directory)
    mesh = make_mesh(wanted.mesh, topology.topology_devices(parse_topology("v5e:2x2")))
    compiled = compile_step(wanted, model, mesh)
    found = hlo.costs(hlo.parse(compiled.step.as_text()))
    gathers = [c for c in found.collectives if c.kind == "all-gather"]
    whole = whole_matrices(model)
    assert gathers and not [(c.result, c.op_name) for c in gathers if whole & {sides(dims) for _, dims in c.result}]
    held = shard_bytes((compiled.state, compiled.frozen, compiled.batch))
    assert compiled.step.memory_analysis().argument_size_in_bytes >= 0.9 * held


@pytest.mark.parametrize("name", methods())
def test_the_step_of_every_method_is_traced_with_all_that_may_wait_in_host_memory(name, directory, tmp_path):
    """Gradients of what waits there, of type "host", nobody asks for: no rule may make one."""
    directory = shape_for(name, directory, tmp_path)
    spec = {"name": name, **methods()[name].example, **OTHERWISE.get(name, {})}
    wanted = method_config(directory, json.dumps(spec), "training.offload=[optimizer, frozen]")
    mesh = make_mesh(wanted.mesh, jax.devices()[:4])
    lowered, _, frozen, _ = lower_step(wanted, load_model(directory), mesh)
    assert {a.sharding.memory_kind for a in jax.tree.leaves(frozen["layers"]) if a.ndim > 2} <= {"pinned_host"}
    assert "func.func public @main" in lowered.as_text()


@needs_compiler
@pytest.mark.parametrize(
    ("name", "where", "sides_of_torus"),
    [("full", "v5e:8x8", {8}), ("hft", "v5e:8x8", {8}), ("full", "2*v5e:4x4", {4})],
)
def test_weight_gradients_are_scattered_over_a_torus(name, where, sides_of_torus, directory, quick_compiler):
    """XLA alone would sum each matrix on all chips, of all slices, and keep a row or two of it on each."""
    slices = parse_topology(where).slices
    overrides = (f"mesh.data={slices}", f"mesh.dcn={slices}", "model.attention=xla", "data.batch_size=64")
    wanted = config(directory, f"{{name: {name}}}", *overrides)
    model = load_model(directory)
    mesh = make_mesh(wanted.mesh, topology.topology_devices(parse_topology(where)))
    found = hlo.costs(hlo.parse(compile_step(wanted, model, mesh).step.as_text()))
    sums = [c for c in found.collectives if c.kind == "all-reduce" and "dot_general" in c.op_name]
    assert not whole_matrices(model) & {sides(dims) for c in sums for _, dims in c.result}
    stages = [c for c in found.collectives if c.kind == "reduce-scatter"]
    assert stages and {c.group for c in stages} == sides_of_torus, "along one axis of the torus, then the other"
    moved = [dims for c in found.collectives if c.kind != "all-reduce" for _, dims in c.result]
    assert not any(VOCAB in dims for dims in moved), "a head is divided by vocabulary, and stays where it is"
    summed = [dims for c in found.collectives if c.kind == "all-reduce" for _, dims in c.result]
    assert not any(math.prod(dims) >= 64 * SEQ * DIM / slices for dims in summed), "nor hidden states of all rows"


@needs_compiler
def test_each_chip_has_its_share_of_a_matrix_of_which_some_entries_train(directory, quick_compiler):
    wanted = config(directory, "{name: spiel, budget: 0.1}", "model.attention=xla")
    model = load_model(directory)
    mesh = make_mesh(wanted.mesh, topology.topology_devices(parse_topology("v5e:2x2")))
    module = hlo.parse(compile_step(wanted, model, mesh).step.as_text())
    kinds = [op.opcode for computation in module.computations.values() for op in computation]
    assert "scatter" in kinds and "sort" not in kinds
    found = hlo.costs(module)
    summed = {sides(dims) for c in found.collectives if c.kind == "all-reduce" for _, dims in c.result}
    assert summed and not whole_matrices(model) & summed
