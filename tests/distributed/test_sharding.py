"""Where parameters, optimizer state and batches are put."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxft.distributed import (
    MeshConfig,
    MeshError,
    ShardingReport,
    check_batch,
    make_mesh,
    optimizer_shardings,
    shard_batch,
    shard_tree,
    tree_shardings,
    tuned_shardings,
)
from jaxft.distributed.sharding import logical_spec
from jaxft.errors import JaxftError
from jaxft.methods import Probe, bitfit, hft, lora, prompt_tuning, ssf
from jaxft.models import DecoderConfig, LanguageModel
from jaxft.partition import combine, weights_by_path
from jaxft.weights import LowRank, Split

MODEL = LanguageModel(DecoderConfig("llama", 64, 16, 32, 4, 4, 2, 4))


def params():
    return MODEL.init(jax.random.key(0))


def mesh_of(**sizes):
    return make_mesh(MeshConfig(**sizes))


def specs_by_path(shardings):
    return {path: s.spec for path, s in weights_by_path(shardings).items()}


def test_decoder_specs():
    specs = specs_by_path(tree_shardings(params(), MODEL.logical_axes(), mesh_of(fsdp=2, tensor=4)))
    assert specs["embed.embedding"] == P("tensor", "fsdp")
    assert specs["layers.attn.q.kernel"] == P(None, "fsdp", "tensor")
    assert specs["layers.mlp.down.kernel"] == specs["layers.attn.o.kernel"] == P(None, ("tensor", "fsdp"))
    assert specs["head.kernel"] == P(None, ("tensor", "fsdp"))
    assert specs["final_norm.scale"] == P("fsdp")


def test_axes_of_size_one_are_not_named():
    specs = specs_by_path(tree_shardings(params(), MODEL.logical_axes(), mesh_of(data=8)))
    assert set(specs.values()) == {P()}


def test_a_dimension_that_does_not_divide_is_replicated_and_reported():
    model = LanguageModel(DecoderConfig("llama", 66, 16, 32, 4, 4, 2, 4))
    report = ShardingReport()
    shardings = tree_shardings(model.abstract(), model.logical_axes(), mesh_of(fsdp=2, tensor=4), report=report)
    assert specs_by_path(shardings)["embed.embedding"] == P(None, "fsdp")
    assert specs_by_path(shardings)["head.kernel"] == P()
    assert [r[:3] for r in report.replicated] == [
        ("embed.embedding", 66, ("tensor",)),
        ("head.kernel", 66, ("tensor", "fsdp")),
    ]
    assert "embed.embedding: a dimension of 66 is not divisible by tensor = 4" in str(report)
    # of two axes the first that divides stays
    specs = specs_by_path(tree_shardings(model.abstract(), model.logical_axes(), mesh_of(fsdp=4, tensor=2)))
    assert specs["head.kernel"] == P(None, "tensor")


def test_nodes_derive_their_specs_from_the_leaf_they_replace():
    tuned = lora(rank=4).init(jax.random.key(0), params(), Probe())
    shardings = tuned_shardings(tuned, MODEL.logical_axes(), mesh_of(fsdp=2, tensor=4))
    kernel = combine(shardings)["layers"]["mlp"]["up"]["kernel"]
    assert isinstance(kernel, LowRank)
    assert kernel.base.spec == P(None, "fsdp", "tensor")
    assert kernel.a.spec == P(None, "fsdp") and kernel.b.spec == P(None, None, ("tensor", "fsdp"))
    tuned = hft().init(jax.random.key(0), params(), Probe())
    shardings = tuned_shardings(tuned, MODEL.logical_axes(), mesh_of(fsdp=2, tensor=4))
    kernel = combine(shardings)["layers"]["mlp"]["up"]["kernel"]
    assert isinstance(kernel, Split)
    assert kernel.trainable.spec == kernel.frozen.spec == P(None, "fsdp", "tensor")
    assert kernel.is_trainable.spec == P()


@pytest.mark.parametrize("method", [lora(rank=2), hft(), bitfit(), ssf(), prompt_tuning(num_tokens=3)])
def test_every_array_of_a_cut_has_a_sharding_and_every_hole_is_one(method):
    tuned = method.init(jax.random.key(0), params(), Probe())
    mesh = mesh_of(fsdp=2, tensor=2)
    shardings = tuned_shardings(tuned, MODEL.logical_axes(), mesh)
    for half in ("trainable", "frozen"):
        assert jax.tree.structure(getattr(tuned, half)) == jax.tree.structure(getattr(shardings, half))
    placed = shard_tree(tuned, shardings)
    jax.tree.map(lambda a, s: a.sharding.is_equivalent_to(s, a.ndim) or pytest.fail(str(s)), placed, shardings)
    jax.tree.map(np.testing.assert_array_equal, placed, tuned)


@pytest.mark.parametrize("method", [lora(rank=4), hft()], ids=["lora", "hft"])
def test_moments_live_where_their_parameters_do(method):
    mesh = mesh_of(fsdp=2, tensor=4)
    tuned = method.init(jax.random.key(0), params(), Probe())
    shardings = tuned_shardings(tuned, MODEL.logical_axes(), mesh)

    def place(optimizer):
        state = jax.eval_shape(optimizer.init, tuned.trainable)
        return optimizer_shardings(state, tuned.trainable, shardings.trainable, mesh)

    adam = place(optax.chain(optax.clip(1.0), optax.adamw(1e-3)))[1][0]
    wanted = jax.tree.leaves(shardings.trainable)
    assert jax.tree.leaves(adam.mu) == jax.tree.leaves(adam.nu) == wanted
    assert len({s.spec for s in wanted}) > 2
    assert adam.count.spec == P()
    assert jax.tree.leaves(place(optax.contrib.schedule_free_adamw(1e-3)).z) == wanted
    # of adafactor's state the factors are small and replicated
    factored = place(optax.adafactor(1e-3, min_dim_size_to_factor=4))
    assert {s.spec for s in jax.tree.leaves(factored)} >= {P()}


def test_large_arrays_without_names_are_divided_and_small_ones_are_not():
    tree = {"big": jax.ShapeDtypeStruct((7, 2**18), jnp.float32), "small": jax.ShapeDtypeStruct((64, 64), jnp.float32)}
    shardings = tree_shardings(tree, None, mesh_of(fsdp=8))
    assert shardings["big"].spec == P(None, "fsdp") and shardings["small"].spec == P()


def test_an_unknown_logical_axis_is_named():
    with pytest.raises(JaxftError, match='no sharding rule for the logical axis "vocabulary": did you mean "vocab"'):
        logical_spec(("vocabulary", "embed"))


def test_a_mesh_axis_is_used_once():
    assert logical_spec(("embed", "embed")) == P("fsdp", None)


def test_batches_are_divided_over_rows_and_positions():
    batch = {"tokens": np.arange(64, dtype=np.int32).reshape(8, 8), "length": np.arange(8, dtype=np.int32)}
    placed = shard_batch(batch, mesh_of(data=2, fsdp=2, sequence=2))
    assert placed["tokens"].sharding.spec == P(("data", "fsdp"), "sequence")
    assert placed["length"].sharding.spec == P(("data", "fsdp"))
    for name in batch:
        np.testing.assert_array_equal(placed[name], batch[name])


def test_batches_that_do_not_divide_are_refused_with_the_nearest_sizes():
    mesh = mesh_of(data=2, fsdp=2, sequence=2)
    check_batch(16, 8, mesh, accumulation=4)
    with pytest.raises(MeshError, match="a batch of 18 rows.*expected a multiple of 16, nearest: 16 or 32"):
        check_batch(18, 8, mesh, accumulation=4)
    with pytest.raises(MeshError, match="sequences of 7 tokens cannot be divided over mesh.sequence = 2"):
        check_batch(16, 7, mesh)
    with pytest.raises(MeshError, match=r'batch\["tokens"\] has 6 rows'):
        shard_batch({"tokens": np.zeros((6, 8), np.int32)}, mesh)
