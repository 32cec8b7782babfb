"""Planning for GPUs: names, memory, links, and train steps compiled for GPUs that are not here."""

import dataclasses
import importlib.util
import json
import math
import os
import re
import sys

import jax
import pytest

from jaxft.distributed import hlo, make_mesh, topology
from jaxft.distributed.flops import CUDNN_TILE, kernel_flops, visible_pairs
from jaxft.distributed.mesh import MeshConfig
from jaxft.distributed.plan import bandwidth, compile_step, plan, read_plan
from jaxft.distributed.sharding import row_shards
from jaxft.distributed.topology import CHIPS, TopologyError, parse_topology, topology_devices
from jaxft.hub import load_model
from jaxft.methods.registry import methods
from jaxft.training.compilation import compiler_options
from tests.distributed.planned import (
    DIM,
    GEMMA,
    HEAD_DIM,
    HEADS,
    INNER,
    LAYERS,
    OTHERWISE,
    ROWS,
    SEQ,
    config,
    method_config,
    shape_for,
)

needs_compiler = pytest.mark.skipif(not topology.find_cuda_plugin(), reason=topology.MISSING_CUDA)


def compiled(wanted, where):
    mesh = make_mesh(wanted.mesh, topology_devices(parse_topology(where)))
    model = load_model(wanted.model.path)
    return model, mesh, compile_step(wanted, model, mesh).step.as_text()


# --- names and figures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "gpus"),
    [
        ("h100", "h100:1", 1),
        ("H200:8", "h200:8", 8),
        ("a100-4", "a100:4", 4),
        ("a100-40gb:8", "a100-40gb:8", 8),
        ("4*b200:8", "4*b200:8", 32),
    ],
)
def test_gpus_by_name(name, text, gpus):
    found = parse_topology(name)
    assert (str(found), found.num_chips) == (text, gpus)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("h100:16", r'no topology "16": expected 1 to 8 GPUs of a node, such as h100:8; 2\*h100:8 are two nodes'),
        ("h100:2x4", 'no topology "2x4"'),
        ("h100:0", "1 to 8 GPUs"),
        ("h300:8", 'did you mean "h200"|"h100"'),
        ("0*h100:8", "at least 1"),
    ],
)
def test_gpus_that_do_not_exist_are_refused(name, message):
    with pytest.raises(TopologyError, match=message):
        parse_topology(name)


def test_a_program_may_have_the_part_of_the_memory_that_jax_takes(monkeypatch):
    monkeypatch.delenv(topology.MEMORY_FRACTION_VARIABLE, raising=False)
    assert CHIPS["h100"].usable_bytes == int(0.9 * CHIPS["h100"].hbm_bytes)
    monkeypatch.setenv(topology.MEMORY_FRACTION_VARIABLE, ".5")
    assert CHIPS["h100"].usable_bytes == CHIPS["h100"].hbm_bytes // 2
    assert CHIPS["v5e"].usable_bytes == CHIPS["v5e"].hbm_bytes - topology.RESERVED_HBM


def test_the_command_line_gives_programs_what_plans_count_on(monkeypatch):
    from jaxft.cli import main

    monkeypatch.setenv(topology.MEMORY_FRACTION_VARIABLE, "")  # and unset again behind the test
    monkeypatch.delenv(topology.MEMORY_FRACTION_VARIABLE)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert float(os.environ[topology.MEMORY_FRACTION_VARIABLE]) == topology.GPU_MEMORY_FRACTION


def test_a_missing_plugin_is_one_sentence_that_says_what_to_install(monkeypatch, directory, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    expected = (
        f"the GPU compiler.* is not installed: pip install jax-cuda13-plugin=={re.escape(jax.__version__)}, which"
    )
    with pytest.raises(TopologyError, match=expected):
        plan(config(directory), "h100:2")


# --- compiled ---------------------------------------------------------------------------------------------------------


TILES = 3 * CUDNN_TILE**2  # of 2 x 2 in a row of 256, those that are not above the diagonal


@needs_compiler
@pytest.mark.parametrize("method", ["full", "hft", "lora"])
def test_a_plan_for_gpus_is_that_of_the_compiled_step(method, directory):
    """Its FLOPs are the least but for what attention computes in tiles that are seen in part."""
    found = plan(config(directory, f"{{name: {method}}}", "data.seq_len=256", "mesh.fsdp=4"), "h100:4")
    assert found.fits and found.mesh["fsdp"] == 4 and found.num_chips == 4
    unseen = LAYERS * 2 * (2 + 2 + 5) * ROWS * HEADS * HEAD_DIM * (TILES - visible_pairs(256))
    assert found.flops_per_step == pytest.approx(found.model_flops + unseen, rel=0.005)
    assert found.collective_bytes["all-gather"] > 0 and "reduce-scatter" in found.collective_bytes
    assert sum(found.memory_gib.values()) == pytest.approx(found.hbm_gib_per_chip, rel=0.02)
    assert found.roofline.step_seconds > 0 and "all 18 links" in " ".join(found.roofline.assumptions)
    told = "xla_gpu_enable_latency_hiding_scheduler=True, xla_gpu_enable_pipelined_all_reduce=True"
    assert found.notes[0] == f"compiler options: {told}"


def runs(costs, name):
    """How often kernels of a name run."""
    return sum(count for kernel, count in costs.kernels.items() if name in kernel)


@needs_compiler
@pytest.mark.parametrize(("where", "head_dim", "is_used"), [("h100:2", 256, True), ("a100:2", 256, False)])
def test_attention_is_that_of_cudnn_where_it_can_compute_it(where, head_dim, is_used, directory, tmp_path):
    described = json.loads((directory / "config.json").read_text()) | {"head_dim": head_dim}
    (tmp_path / "config.json").write_text(json.dumps(described))
    wanted = config(tmp_path, "{name: bitfit}", "data.seq_len=256", "mesh.fsdp=2")
    model, mesh, text = compiled(wanted, where)
    module = hlo.parse(text)
    costs = hlo.costs(module, kernels=kernel_flops(model.config, ROWS, 256, mesh))
    assert ("__cudnn$fmhaScaleBiasSoftmaxBackward" in text) == is_used
    assert runs(costs, "attention_fwd") == 2 * LAYERS * is_used and runs(costs, "attention_bwd") == LAYERS * is_used
    attention = costs.flops - hlo.costs(module).flops
    assert attention == is_used * LAYERS * 2 * (2 + 2 + 5) * (ROWS // 2) * HEADS * head_dim * TILES


@needs_compiler
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_step_writes_its_state_in_place(method, directory):
    """Nothing returns a copy of parameters or moments; what is left of a stack are its gradients."""
    wanted = config(directory, f"{{name: {method}}}", "mesh.fsdp=1", "data.batch_size=1")
    model, _, text = compiled(wanted, "h100")
    module = hlo.parse(text)
    stack = 2 * LAYERS * DIM * INNER
    large = [op for op in module.computations[module.entry] if hlo.num_bytes(op.shapes) >= stack]
    assert {"copy", "conditional"}.isdisjoint(op.opcode for op in large)


@needs_compiler
def test_rows_that_are_cut_have_no_scores_in_memory(directory):
    """Each GPU has the scores of its positions with all keys in tiles only."""
    wanted = config(directory, "{name: lora}", "data.seq_len=2048", "mesh={fsdp: 2, sequence: 2}")
    _, _, text = compiled(wanted, "h100:4")
    assert "__cudnn$fmhaScaleBiasSoftmaxBackward" in text
    scores = ROWS // 2 * HEADS * (2048 // 2) * 2048
    largest = max(
        math.prod(dims) for ops in hlo.parse(text).computations.values() for op in ops for _, dims in op.shapes
    )
    assert largest < scores


@needs_compiler
def test_layers_of_two_kinds_gather_no_rows(directory, tmp_path):
    """A conditional around the kernels: no GPU needs what others compute."""
    (tmp_path / "config.json").write_text(json.dumps(json.loads((directory / "config.json").read_text()) | GEMMA))
    wanted = config(tmp_path, "{name: lora}", "data.seq_len=256", "mesh={data: 4}")
    _, _, text = compiled(wanted, "h100:4")
    assert "__cudnn$fmha" in text
    assert {c.kind for c in hlo.costs(hlo.parse(text)).collectives} == {"all-reduce"}


EXPERTS, CHOSEN = 8, 2


@needs_compiler
@pytest.mark.parametrize(("where", "axes"), [("a100:4", "{fsdp: 4}"), ("b200:4", "{fsdp: 2, expert: 2}")])
def test_each_row_is_multiplied_with_the_matrices_of_its_experts_alone(where, axes, directory, tmp_path):
    """XLA would multiply all rows with the matrices of all experts."""
    changes = {"model_type": "mixtral", "num_local_experts": EXPERTS, "num_experts_per_tok": CHOSEN}
    described = json.loads((directory / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(described | {"architectures": ["MixtralForCausalLM"]}))
    wanted = config(tmp_path, "{name: full}", "model.attention=xla", f"mesh={axes}")
    model, topology = load_model(tmp_path), parse_topology(where)
    mesh = make_mesh(wanted.mesh, topology_devices(topology))
    step = compile_step(wanted, model, mesh)
    module = hlo.parse(step.step.as_text())
    costs = hlo.costs(module, kernels=kernel_flops(model.config, ROWS, SEQ, mesh, "xla"))
    one = 2 * (ROWS * SEQ * CHOSEN / row_shards(mesh)) * DIM * INNER  # of a GPU
    assert runs(costs, "pallas_call") == 11 * LAYERS, "the last product is not computed again"
    assert costs.flops - hlo.costs(module).flops == pytest.approx(11 * LAYERS * one)
    assert 1 <= read_plan(wanted, model, topology, mesh, step).flops_ratio < 1.05, "and plain attention"


# One of each kind of weight that has rules of its own for products, gathers or scatters.
KINDS = ("hft", "shira", "smt", "s2ft", "esft", "prompt-tuning", "spt")


@needs_compiler
@pytest.mark.parametrize("name", KINDS)
def test_weights_of_every_kind_compile_for_a_gpu(name, directory, quick_compiler, tmp_path):
    spec = {"name": name, **methods()[name].example, **OTHERWISE.get(name, {})}
    wanted = method_config(shape_for(name, directory, tmp_path), json.dumps(spec), "model.attention=auto")
    _, _, text = compiled(wanted, "h100:4")
    assert "__cudnn$fmha" in text and "all-gather" in text


# --- memory, nodes ----------------------------------------------------------------------------------------------------


@needs_compiler
def test_a_job_that_does_not_fit_a_gpu_is_told_what_to_change(directory, monkeypatch):
    wanted = config(directory, "{name: full}", "data.seq_len=1024", "mesh={data: 2}", "model.remat=none")
    needed = plan(wanted, "h100:2").hbm_gib_per_chip
    small = int(0.7 * needed * 2**30 / topology.GPU_MEMORY_FRACTION)
    monkeypatch.setitem(CHIPS, "h100", dataclasses.replace(CHIPS["h100"], hbm_bytes=small))
    found = plan(wanted, "h100:2")
    assert not found.fits and found.hbm_gib_per_chip > found.hbm_gib_available
    assert any("model.remat=block" in text for text in found.advice)
    assert found.remedy is not None and found.remedy.fits


@needs_compiler
def test_nodes_may_share_parameters_and_a_collective_is_as_fast_as_its_way(directory):
    """Over the network goes what leaves a node; each GPU of a node has an adapter of its own."""
    found = plan(config(directory, "{name: full}", "mesh.fsdp=4"), "2*h100:2")
    assert found.mesh["fsdp"] == 4 and "between nodes" in " ".join(found.roofline.assumptions)
    where = parse_topology("2*h100:2")
    mesh = make_mesh(MeshConfig(fsdp=4), topology_devices(where))
    chip = where.chip

    def speed(groups):
        return bandwidth(hlo.Collective("all-gather", 1, [], groups, 1, True, True, 1, False, ""), where, mesh)

    assert speed([[0, 1], [2, 3]]) == chip.ring_bandwidth == 18 * 25e9
    assert speed([[0, 2], [1, 3]]) == chip.network_bandwidth
    assert speed([[0, 1, 2, 3]]) == speed([]) == 2 * chip.network_bandwidth


@needs_compiler
def test_options_are_for_several_gpus_and_left_to_the_environment(monkeypatch):
    names = {"xla_gpu_enable_latency_hiding_scheduler", "xla_gpu_enable_pipelined_all_reduce"}
    devices = topology_devices(parse_topology("h100:2"))
    assert compiler_options(make_mesh(MeshConfig(fsdp=2), devices)) == dict.fromkeys(names, True)
    assert compiler_options(make_mesh(MeshConfig(), devices[:1])) == {}
    monkeypatch.setenv("XLA_FLAGS", " ".join(f"--{name}=false" for name in names))
    assert compiler_options(make_mesh(MeshConfig(fsdp=2), devices)) == {}


@needs_compiler
def test_gathers_run_beside_products_on_an_a100_too(directory):
    found = plan(config(directory, "{name: full}", "data.seq_len=2048", "mesh.fsdp=4"), "a100:4")
    assert found.collective_share_overlapped > 0.2, "none without the option"


@needs_compiler
def test_what_cannot_be_planned_for_gpus_is_said(directory):
    found = plan(config(directory, "{name: full}", "mesh.fsdp=2", "training.offload=[optimizer]"), "h100:2")
    assert any(note.startswith("training.offload: jax knows no host memory") for note in found.notes)
    assert sum(found.host_gib.values()) == 0
