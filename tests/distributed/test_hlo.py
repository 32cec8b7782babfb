"""Compiled programs read back: what they compute is known, so what is counted must be equal."""

# ruff: noqa: E501  (HLO has long lines)

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxft.distributed import hlo


def compiled(function, *args):
    return hlo.parse(jax.jit(function).lower(*args).compile().as_text())


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_products_in_a_loop_count_as_often_as_they_run():
    def function(x, ws):
        def body(x, w):
            return jnp.tanh(x @ w), None

        return jax.lax.scan(body, x, ws)[0]

    found = hlo.costs(compiled(function, array(32, 64), array(5, 64, 64)))
    assert found.flops == 5 * 2 * 32 * 64 * 64


def test_loops_within_loops_multiply():
    def function(x, ws):
        def outer(x, _):
            return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0], None

        return jax.lax.scan(outer, x, None, length=3)[0]

    assert hlo.costs(compiled(function, array(32, 64), array(5, 64, 64))).flops == 3 * 5 * 2 * 32 * 64 * 64


def test_a_conditional_counts_by_the_share_it_is_taken():
    def function(x, w, train):
        return x @ w + jax.lax.cond(train, lambda: (x @ w) @ w, lambda: jnp.zeros_like(x))

    module = compiled(function, array(32, 64), array(64, 64), array(dtype=bool))
    product = 2 * 32 * 64 * 64
    least, half, most = (hlo.costs(module, taken=t).flops for t in (0.0, 0.5, 1.0))
    assert most - least in (product, 2 * product)  # XLA may share the first product with the branch
    assert half == (least + most) / 2
    found = hlo.costs(module, taken=0.25)
    assert (found.least_flops, found.most_flops) == (least, most)


def test_a_loop_up_to_a_number_of_the_data_is_named_and_not_counted():
    def function(x, n):
        return jax.lax.fori_loop(1, n, lambda i, x: jnp.tanh(x @ x), x @ x)

    found = hlo.costs(compiled(function, array(16, 16), array(dtype=jnp.int32)))
    assert found.flops == 2 * 16**3 and len(found.open_loops) == 1


def test_a_loop_that_depends_on_data_is_refused():
    def function(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) > 0, lambda x: jnp.tanh(x @ x), x)

    with pytest.raises(ValueError, match="trip count"):
        hlo.costs(compiled(function, array(16, 16)))


@pytest.fixture(scope="module")
def mesh():
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    return jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))


def test_collectives_by_kind_and_bytes(mesh):
    def function(x):
        total = jax.lax.psum(x, "fsdp")
        whole = jax.lax.all_gather(x, "fsdp", tiled=True)
        moved = jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 8) for i in range(8)])
        return total, whole, moved

    specs = dict(mesh=mesh, in_specs=P("fsdp"), out_specs=(P(), P(None), P("fsdp")), check_vma=False)
    x = array(8 * 128, 64)
    found = hlo.costs(compiled(jax.shard_map(function, **specs), x)).bytes_by_kind()
    shard = 128 * 64 * 4
    assert found == {
        "all-gather": 7 * shard,
        "all-reduce": 2 * 7 / 8 * shard,
        "collective-permute": shard,
    }


def test_a_gather_of_a_whole_stack_is_found_and_one_of_a_layer_is_not(mesh):
    stack = jax.ShapeDtypeStruct((4, 256, 256), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp")))
    x = jax.ShapeDtypeStruct((8, 256), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))

    def layer_by_layer(x, stack):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]

    def at_once(x, stack):
        return layer_by_layer(x, jax.lax.with_sharding_constraint(stack, NamedSharding(mesh, P())))

    limit = 256 * 256 * 4
    assert not hlo.costs(compiled(layer_by_layer, x, stack)).full_gathers(limit)
    assert [c.result for c in hlo.costs(compiled(at_once, x, stack)).full_gathers(limit)]


def tpu_module():
    return hlo.parse(tpu_text())


def tpu_text():
    """Forms in which the TPU compiler writes things: products as convolutions, a gather spread over fusions."""
    return """HloModule step, is_scheduled=true

%start (p.1: bf16[1,256,64]) -> (bf16[1,256,64], bf16[1,1024,64]) {
  %p.1 = bf16[1,256,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  %gather.1 = bf16[1,1024,64]{2,1,0:T(8,128)(2,1)S(1)} all-gather(%p.1), channel_id=7, replica_groups=mesh['a'=4,'b'=1] {'a'}, dimensions={1}, frontend_attributes={chain_id="0"}, metadata={op_name="jit(step)/dot_general"}
  ROOT %custom-call.1 = (bf16[1,256,64]{2,1,0}, bf16[1,1024,64]{2,1,0}) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%continue (p.2: bf16[1,256,64], x: bf16[2048,1,2,256], w: bf16[4,128,2,256]) -> bf16[2048,4,128,1] {
  %p.2 = bf16[1,256,64]{2,1,0} parameter(0)
  %x = bf16[2048,1,2,256]{3,2,1,0} parameter(1)
  %w = bf16[4,128,2,256]{3,2,1,0} parameter(2)
  %gather.2 = bf16[1,1024,64]{2,1,0} all-gather(%p.2), channel_id=7, replica_groups=mesh['a'=4,'b'=1] {'a'}, dimensions={1}, frontend_attributes={chain_id="0"}
  ROOT %convolution.1 = bf16[2048,4,128,1]{3,2,1,0} convolution(%x, %w), window={size=4x2 pad=3_3x0_0 rhs_reversal=1x0}, dim_labels=b01f_0o1i->b0f1
}

%all-reduce-scatter.1 (g: f32[1024,64]) -> f32[256,64] {
  %g = f32[1024,64]{1,0} parameter(0)
  %reduced = f32[1024,64]{1,0} all-reduce(%g), channel_id=8, replica_groups=[4,4]<=[16], to_apply=%add
  ROOT %slice = f32[256,64]{1,0} slice(%reduced), slice={[0:256], [0:64]}
}

%body (state: (s32[], bf16[1,256,64], f32[1024,64])) -> (s32[], bf16[1,256,64], f32[1024,64]) {
  %state = (s32[], bf16[1,256,64]{2,1,0}, f32[1024,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %shard = bf16[1,256,64]{2,1,0} get-tuple-element(%state), index=1
  %g.1 = f32[1024,64]{1,0} get-tuple-element(%state), index=2
  %started = (bf16[1,256,64]{2,1,0}, bf16[1,1024,64]{2,1,0}) fusion(%shard), kind=kCustom, calls=%start
  %scattered = f32[256,64]{1,0} fusion(%g.1), kind=kCustom, calls=%all-reduce-scatter.1
  %permute-start = (bf16[1,256,64]{2,1,0}, bf16[1,256,64]{2,1,0}, u32[], u32[]) collective-permute-start(%shard), channel_id=9, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %a = f32[8,16]{1,0} constant({...})
  %b = f32[16,4]{1,0} constant({...})
  %product = f32[8,4]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %permute-done = bf16[1,256,64]{2,1,0} collective-permute-done(%permute-start)
  ROOT %out = (s32[], bf16[1,256,64]{2,1,0}, f32[1024,64]{1,0}) tuple(%next, %permute-done, %g.1)
}

%condition (state.1: (s32[], bf16[1,256,64], f32[1024,64])) -> pred[] {
  %state.1 = (s32[], bf16[1,256,64]{2,1,0}, f32[1024,64]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %limit = s32[] constant(10)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (w.1: bf16[1,256,64], g.2: f32[1024,64]) -> (s32[], bf16[1,256,64], f32[1024,64]) {
  %w.1 = bf16[1,256,64]{2,1,0} parameter(0)
  %g.2 = f32[1024,64]{1,0} parameter(1)
  %first = s32[] constant(2)
  %from = s32[] copy(%first)
  %initial = (s32[], bf16[1,256,64]{2,1,0}, f32[1024,64]{1,0}) tuple(%from, %w.1, %g.2)
  ROOT %while.1 = (s32[], bf16[1,256,64]{2,1,0}, f32[1024,64]{1,0}) while(%initial), condition=%condition, body=%body
}
"""


def test_a_loop_is_counted_from_where_it_starts():
    assert hlo.costs(tpu_module()).flops == 8 * 2 * 8 * 4 * 16  # from 2 to 10


def test_a_loop_that_xla_unrolled_counts_its_step():
    text = tpu_text().replace("%one = s32[] constant(1)", "%one = s32[] constant(3)")
    assert hlo.costs(hlo.parse(text)).flops == 3 * 2 * 8 * 4 * 16  # 2, 5, 8


def test_collectives_as_the_tpu_compiler_writes_them():
    found = {c.kind: c for c in hlo.costs(tpu_module()).collectives}
    assert set(found) == {"all-gather", "reduce-scatter", "collective-permute"}
    gather, scatter, permute = found["all-gather"], found["reduce-scatter"], found["collective-permute"]
    assert (gather.group, gather.times, gather.bytes_sent) == (4, 8, 1024 * 64 * 2 * 3 / 4)
    assert gather.is_async and not gather.overlapped and gather.op_name == "jit(step)/dot_general"
    assert (scatter.group, scatter.bytes_sent, scatter.is_async) == (4, 1024 * 64 * 4 * 3 / 4, False)
    assert permute.is_async and permute.overlapped and permute.bytes_sent == 256 * 64 * 2


def test_a_product_hides_what_is_sent_meanwhile():
    """Of a gather spread over fusions, those that continue it; of what is waited for first, first."""
    text = tpu_text()
    after = "  %scattered ="
    assert text.count(after) == 1
    fused = "  %more = bf16[2048,4,128,1]{3,2,1,0} fusion(%shard, %x.1, %w.1), kind=kCustom, calls=%continue\n"
    second = "  %second-start = (bf16[1,256,64]{2,1,0}, bf16[1,256,64]{2,1,0}, u32[], u32[]) collective-permute-start(%shard)\n"
    waited = "  %second-done = bf16[1,256,64]{2,1,0} collective-permute-done(%second-start)\n"
    text = text.replace(after, fused + second + after).replace("  ROOT %out", waited + "  ROOT %out")
    module = hlo.parse(text)

    def hidden(flops_per_byte):
        found = hlo.costs(module, flops_meanwhile=lambda c: c.bytes_sent * flops_per_byte).collectives
        return {kind: [c.hidden for c in found if c.kind == kind] for kind in {c.kind for c in found}}

    convolution, product, sent = 2 * 2048 * 4 * 128 * 256 * 2, 2 * 8 * 4 * 16, 256 * 64 * 2
    everything = {"all-gather": [1], "collective-permute": [1, 1], "reduce-scatter": [0]}
    assert hidden(0) == everything
    found = hidden(0.75 * product / sent)
    assert found["all-gather"] == [1] and found["collective-permute"] == [pytest.approx(1 / 3), 1]
    gathered = 1024 * 64 * 2 * 3 / 4
    assert hidden(4 * convolution / gathered)["all-gather"] == [pytest.approx(1 / 4)]


def test_a_gather_is_spread_over_a_loop():
    """Its parts are in the body; what hides a permute of the body hides nothing else."""
    text = tpu_text()
    (started,) = (line for line in text.splitlines() if line.startswith("  %started"))
    more = "  %more = bf16[2048,4,128,1]{3,2,1,0} fusion(%shard, %x.1, %w.1), kind=kCustom, calls=%continue"
    text = text.replace(started, more)
    text = text.replace("  %first = s32[]", started.replace("%shard", "%w.1") + "\n  %first = s32[]")
    convolution, gathered, permuted = 2 * 2048 * 4 * 128 * 256 * 2, 1024 * 64 * 2 * 3 / 4, 256 * 64 * 2

    def gather(text, flops_per_byte):
        found = hlo.costs(hlo.parse(text), flops_meanwhile=lambda c: c.bytes_sent * flops_per_byte).collectives
        (one,) = (c for c in found if c.kind == "all-gather")
        assert one.times == 1 and one.overlapped
        return one.hidden

    assert gather(text, 4 * 8 * convolution / gathered) == pytest.approx(1 / 4)
    beside_permute = text.replace(more + "\n", "").replace("  %a = f32[8,16]", more + "\n  %a = f32[8,16]")
    flops_per_byte = 15 / 16 * convolution / permuted
    left = 8 * convolution / 16  # of eight runs of the body
    assert gather(beside_permute, flops_per_byte) == pytest.approx(left / (flops_per_byte * gathered), rel=1e-4)


OFFLOADED = """
%offloaded (p.9: f32[1024,64]) -> f32[256,64] {
  %p.9 = f32[1024,64]{1,0} parameter(0)
  ROOT %sum.9 = f32[256,64]{1,0} reduce-scatter(%p.9), channel_id=10, replica_groups=[4,4]<=[16], dimensions={0}, to_apply=%add
}, execution_thread="sparsecore"

%body ("""


@pytest.mark.parametrize("hidden", [True, False])
def test_collectives_that_another_core_runs(hidden):
    """A TPU's sparse cores run them beside what is between the start and the done."""
    start = """  %beside = ((f32[1024,64]{1,0}), f32[256,64]{1,0}) call-start(%g.1), async_execution_thread="sparsecore", to_apply=%offloaded
"""
    done = "  %beside-done = f32[256,64]{1,0} call-done(%beside)\n"
    text = tpu_text().replace("\n%body (", OFFLOADED)
    before, after = text.split("  %a = f32[8,16]")
    after = "  %a = f32[8,16]" + after
    if hidden:
        after = after.replace("  %permute-done", done + "  %permute-done", 1)
    found = hlo.costs(hlo.parse(before + start + ("" if hidden else done) + after))
    [beside] = [c for c in found.collectives if c.kind == "reduce-scatter" and c.is_async]
    assert (beside.times, beside.overlapped, beside.bytes_sent) == (8, hidden, 1024 * 64 * 4 * 3 / 4)
    assert "offloaded" not in found.unread


def test_collectives_that_run_in_a_way_not_known_are_named():
    assert "offloaded" in hlo.costs(hlo.parse(tpu_text().replace("\n%body (", OFFLOADED))).unread


def test_padding_of_a_convolution_costs_nothing():
    """Four heads are four positions of a kernel that slides over padding: one product each, not seven."""
    module = tpu_module()
    scope = {i.name: i for i in module.computations["continue"]}
    operation = next(i for i in scope.values() if i.opcode == "convolution")
    assert hlo.convolution_flops(operation, scope) == 2 * 2048 * (4 * 128) * (2 * 256)


MESH = "replica_groups=mesh['axis_0'=4,'axis_1'=2]"


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
        ("replica_groups=[2,4]<=[8], dimensions={1}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        (MESH + " {'axis_0','axis_1'}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        (MESH + " {'axis_1'}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        (MESH + " {'axis_0'}, dimensions={0}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        (MESH + ", device_ids=([2,4]T(1,0)) {'axis_1'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        (MESH + ", device_ids=(7,6,5,4,3,2,1,0) {'axis_1'}", [[7, 6], [5, 4], [3, 2], [1, 0]]),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(1)2,'axis_0':(4)2}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("dimensions={0}", []),
        ("replica_groups={}", []),
    ],
)
def test_which_devices_exchange_something(text, groups):
    assert hlo.replica_groups(text) == groups


def test_text_that_is_no_module_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.parse("nothing here")
