"""Every implementation of attention computes the same function."""

import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxft.errors import JaxftError
from jaxft.models.attention import PROMPT_SEGMENT, attention, parse_implementation
from jaxft.models.splash_attention import from_zigzag, tiling, to_zigzag, zigzag_positions

module = sys.modules[tiling.__module__]


def inputs(batch=2, seq=128, heads=4, kv_heads=2, dim=16, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(batch, seq, heads, dim), (batch, seq, kv_heads, dim), (batch, seq, kv_heads, dim)]
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def reference(q, k, v, segment_ids, sliding_window, softcap, scale=0.25):
    """The definition, one head and one query at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, seq, heads, _ = q.shape
    out = np.zeros(q.shape)
    for b, h, t in np.ndindex(batch, heads, seq):
        head = h // (heads // k.shape[2])
        first = 0 if sliding_window is None else max(0, t - sliding_window + 1)
        seen = [s for s in range(first, t + 1) if segment_ids[b, s] == segment_ids[b, t] != 0]
        if seen:
            scores = k[b, seen, head] @ q[b, t, h] * scale
            scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
            weights = np.exp(scores - scores.max())
            out[b, t, h] = weights / weights.sum() @ v[b, seen, head]
    return out


def packed(batch, seq):
    segments = np.ones((batch, seq), np.int32)
    segments[0, seq // 3 :] = 2
    segments[0, seq - 5 :] = 0
    segments[1, : seq // 2] = 4
    return segments


def positions_of(segments):
    positions = np.zeros_like(segments)
    for b, t in np.ndindex(*segments.shape):
        if t and segments[b, t] == segments[b, t - 1]:
            positions[b, t] = positions[b, t - 1] + 1
    return positions


@pytest.mark.parametrize("sliding_window", [None, 4])
@pytest.mark.parametrize(("softcap", "scale"), [(None, None), (2.0, None), (2.0, 0.4)])
def test_xla_is_the_definition(sliding_window, softcap, scale):
    q, k, v = inputs(seq=24)
    segments = packed(2, 24)
    out = attention(
        q,
        k,
        v,
        positions=positions_of(segments),
        segment_ids=segments,
        sliding_window=sliding_window,
        scale=scale,
        softcap=softcap,
        implementation="xla",
    )
    np.testing.assert_allclose(out, reference(q, k, v, segments, sliding_window, softcap, scale or 0.25), atol=1e-5)


@pytest.mark.parametrize(
    ("sliding_window", "softcap", "scale", "heads", "kv_heads", "seq", "splash", "settings", "expected"),
    [
        # Expected are granule, rows, keys, fused keys, and heads at a time.
        (None, None, None, 2, 2, 1024, "splash", {}, (512, 512, 512, 512, 2)),
        (None, None, None, 4, 2, 512, "splash", {}, (256, 512, 256, 256, 2)),
        (200, 5.0, 0.1, 4, 1, 512, "splash", {}, (256, 1024, 256, 256, 1)),
        (None, None, None, 8, 1, 512, "splash", {}, (128, 1024, 256, 256, 1)),
        (40, None, None, 6, 2, 128, "splash", {}, (128, 384, 128, 128, 2)),  # what does not divide: a group of three,
        (200, 5.0, None, 8, 2, 384, "splash", {}, (128, 512, 128, 128, 2)),  # an odd number of blocks
        (None, None, None, 1, 1, 384, "splash", {}, (128, 128, 128, 128, 1)),
        # Two kernels, as for windows.
        (200, 5.0, None, 4, 2, 512, "splash", {"_PARTIAL": 10**6}, (256, 512, 256, None, 2)),
        # Larger blocks of keys, and one head after the other, as for long rows.
        (None, 5.0, None, 8, 2, 1024, "splash", {"_PARTIAL_BYTES": 2**19}, (256, 1024, 256, 512, 1)),
        (None, None, None, 8, 1, 512, "splash:128x128", {}, (128, 1024, 128, 128, 1)),  # as asked for
        (200, 5.0, 0.1, 4, 2, 1536, "splash:512x768", {}, (512, 1024, 768, 768, 2)),
    ],
)
def test_splash_equals_xla_in_values_and_gradients(
    monkeypatch, sliding_window, softcap, scale, heads, kv_heads, seq, splash, settings, expected
):
    for name, value in settings.items():
        monkeypatch.setattr(module, name, value)
    cut = tiling(2, seq, heads, kv_heads, 16, sliding_window, parse_implementation(splash)[1])
    assert (cut.granule, cut.rows, cut.keys, cut.fused_keys, cut.heads) == expected
    q, k, v = inputs(seq=seq, heads=heads, kv_heads=kv_heads)
    segments = packed(2, seq)
    real = (segments > 0)[:, :, None, None]

    def run(implementation):
        def loss(q, k, v):
            out = attention(
                q,
                k,
                v,
                positions=positions_of(segments),
                segment_ids=segments,
                sliding_window=sliding_window,
                scale=scale,
                softcap=softcap,
                implementation=implementation,
            )
            return jnp.sum(jnp.sin(out) * real), out * real

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    for a, b in zip(jax.tree.leaves(run(splash)), jax.tree.leaves(run("xla")), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("prompt", "sliding_window", "softcap", "kv_heads", "mesh"),
    [
        (20, None, None, 2, {}),
        (128, None, None, 2, {}),
        (20, 100, 5.0, 4, {}),
        (20, None, 5.0, 4, {"fsdp": 2, "tensor": 2, "sequence": 2}),
        (20, 100, None, 2, {"fsdp": 2, "tensor": 4}),
    ],
)
def test_splash_with_a_soft_prompt_equals_xla_in_values_and_gradients(prompt, sliding_window, softcap, kv_heads, mesh):
    """Whether its length makes a multiple of 128 of a row or not, every segment sees it; a window may end inside it."""
    seq = 512
    q, k, v = inputs(seq=prompt + seq, heads=4, kv_heads=kv_heads)
    tokens = packed(2, seq)
    segments = np.concatenate([np.full((2, prompt), PROMPT_SEGMENT, np.int32), tokens], axis=1)
    positions = np.concatenate([np.broadcast_to(np.arange(prompt), (2, prompt)), prompt + positions_of(tokens)], axis=1)
    given = {"positions": positions, "segment_ids": segments, "prompt": prompt, "sliding_window": sliding_window}
    real = (segments != 0)[:, :, None, None]

    def step(implementation):
        def loss(q, k, v):
            out = attention(q, k, v, **given, softcap=softcap, implementation=implementation)
            return jnp.sum(jnp.sin(out) * real), out * real

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))

    expected = step("xla")(q, k, v)
    shape = mesh or {"data": 1}
    auto, devices = (AxisType.Auto,) * len(shape), jax.devices()[: math.prod(shape.values())]
    with jax.set_mesh(jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=auto, devices=devices)):
        found = step("splash")(q, k, v)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5)
        assert np.abs(np.asarray(b)[:, :prompt]).max() > 1e-3


def kernel_operands(jaxpr):
    """The shapes of the operands of every Pallas kernel in a jaxpr."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            found.append([v.aval.shape for v in eqn.invars])
        else:
            found += [shapes for inner in jaxprs_in_params(eqn.params) for shapes in kernel_operands(inner)]
    return found


@pytest.mark.parametrize(
    ("seq", "window", "keys", "fused", "heads"),
    [(2048, None, 256, 256, 8), (4096, None, 256, 512, 8), (16384, None, 256, 1024, 4), (32768, None, 512, 1024, 1),
     (5120, None, 256, 512, 8), (131072, None, 1024, None, 8), (2048, 1024, 256, 256, 8), (16384, 1024, 256, None, 8)],
)  # fmt: skip
def test_blocks_of_keys_grow_with_the_sequence_while_they_fit(seq, window, keys, fused, heads):
    cut = tiling(1, seq, 32, 8, 128, window)
    assert (cut.granule, cut.rows, cut.keys, cut.fused_keys, cut.heads) == (256, 1024, keys, fused, heads)


def test_blocks_of_keys_are_smaller_where_that_costs_and_needs_little():
    """Of half as many heads the gradients by block of 256 keys take 256 MiB."""
    few, many = tiling(1, 4096, 16, 8, 128), tiling(2, 4096, 16, 8, 128)
    assert (few.fused_keys, few.heads) == (256, 8)
    assert (many.fused_keys, many.heads) == (512, 8)


def test_splash_reads_each_key_and_value_head_once_for_its_group():
    """No copy of them for each query head, forward or backward."""
    q, k, v = inputs(heads=8, kv_heads=2, dim=32)

    def loss(q, k, v):
        return attention(q, k, v, positions=np.arange(128)[None], implementation="splash").sum()

    kernels = kernel_operands(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v).jaxpr)
    assert len(kernels) == 2
    forward, backward = sorted(kernels, key=len)
    queries, keys = (2, 2, 4 * 128, 32), (2, 2, 128, 32)
    assert (forward.count(queries), forward.count(keys)) == (1, 2)  # keys and values
    assert (backward.count(queries), backward.count(keys)) == (2, 2)  # and the gradient of the result


@pytest.mark.parametrize(("tensor", "shares"), [(4, 4), (3, 1)])
@pytest.mark.parametrize("implementation", ["splash", "xla"])
def test_few_keys_are_repeated_where_many_devices_share_the_queries(implementation, tensor, shares):
    """Each device computes the attention of its own query heads only, or of all where these do not divide."""
    q, k, v = inputs(seq=256, heads=8, kv_heads=2)
    segments = packed(2, 256)
    real = (segments > 0)[:, :, None, None]
    mesh = jax.make_mesh((tensor,), ("tensor",), axis_types=(AxisType.Auto,), devices=jax.devices()[:tensor])
    layout = NamedSharding(mesh, PartitionSpec(None, None, None, "tensor" if tensor == 4 else None))  # of projections

    def loss(q, k, v):
        given = {"positions": positions_of(segments), "segment_ids": segments}
        return jnp.sum(jnp.sin(attention(q, k, v, **given, implementation=implementation)) * real)

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    expected = step(q, k, v)
    with jax.set_mesh(mesh):
        arguments = jax.device_put((q, k, v), layout)
        found, text = step(*arguments), step.lower(*arguments).compile().as_text()
        kernels = kernel_operands(jax.make_jaxpr(loss)(q, k, v).jaxpr)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5)
    whole = re.findall(r"f32\[2,(?:8|2,4),256,256\]", text)
    if implementation == "xla":
        assert bool(whole) == (shares == 1), "scores of all heads"
    else:  # the rows of a device: all positions of its query heads, by key/value head
        keys = 1 if shares == 4 else 2
        assert any(shape[:3] == (2, keys, 8 // shares // keys * 256) for shape in kernels[0])


@pytest.mark.parametrize(("seq", "sliding_window", "heads"), [(512, None, 2), (256, 100, 2), (1024, None, 8)])
def test_splash_on_a_mesh(seq, sliding_window, heads):
    """Batch, heads and query positions (in zigzag, without a window) cut over 8 devices: the same result as on one."""
    if jax.device_count() < 8:
        pytest.skip("needs 8 (virtual) devices")
    q, k, v = inputs(batch=2, seq=seq, heads=heads)
    segments = packed(2, seq)
    real = (segments > 0)[:, :, None, None]
    arguments = {"positions": positions_of(segments), "segment_ids": segments, "sliding_window": sliding_window}
    shape = {"data": 1, "fsdp": 2, "tensor": 2, "sequence": 2}
    mesh = jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * 4)

    def run(implementation):
        def loss(q, k, v):
            out = attention(q, k, v, **arguments, implementation=implementation)
            return jnp.sum(jnp.sin(out) * real), out * real

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    expected = run("xla")
    with jax.set_mesh(mesh):
        found = run("splash")
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5)


def test_gradients_of_keys_and_values_are_scattered_over_the_sequence_axis():
    q, k, v = inputs(seq=512)
    mesh = jax.make_mesh((2,), ("sequence",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])

    def loss(q, k, v):
        return attention(q, k, v, positions=np.arange(512)[None], implementation="splash").sum()

    with jax.set_mesh(mesh):
        program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, v).as_text()
    assert program.count("stablehlo.reduce_scatter") == 2 and "stablehlo.all_reduce" not in program


@pytest.mark.parametrize("shards", [2, 3, 8])
def test_zigzag_gives_every_shard_the_same_work_and_comes_back(shards):
    positions = zigzag_positions(8 * shards, shards)
    assert sorted(positions) == list(range(8 * shards))
    seen = (positions + 1).reshape(shards, -1).sum(1)  # keys that the queries of each shard see
    assert len(set(seen.tolist())) == 1
    mesh = jax.make_mesh((shards,), ("sequence",), axis_types=(AxisType.Auto,), devices=jax.devices()[:shards])
    options = {"mesh": mesh, "in_specs": PartitionSpec(None, "sequence"), "out_specs": PartitionSpec(None, "sequence")}
    x = jnp.stack([jnp.arange(8 * shards), -jnp.arange(8 * shards)])
    there = jax.shard_map(lambda x: to_zigzag(x, 1, "sequence"), **options)(x)
    np.testing.assert_array_equal(there[0], positions)
    np.testing.assert_array_equal(jax.shard_map(lambda x: from_zigzag(x, 1, "sequence"), **options)(there), x)


def test_a_row_without_any_key_is_finite_and_has_no_gradient():
    q, k, v = inputs(seq=8)
    segments = np.zeros((2, 8), np.int32)

    def loss(q, k, v):
        return attention(q, k, v, positions=np.arange(8)[None], segment_ids=segments, implementation="xla").sum()

    value, gradients = jax.value_and_grad(loss, argnums=(0, 1, 2))(q, k, v)
    assert value == 0
    assert all(np.all(np.asarray(g) == 0) for g in gradients)


def test_every_segment_sees_the_prompt():
    q, k, v = inputs(seq=6, batch=1)
    segments = np.array([[PROMPT_SEGMENT, PROMPT_SEGMENT, 1, 1, 2, 2]])
    positions = np.array([[0, 1, 2, 3, 2, 3]])
    out = attention(q, k, v, positions=positions, segment_ids=segments, implementation="xla")
    alone = attention(
        *(x[:, [0, 1, 4, 5]] for x in (q, k, v)),
        positions=np.arange(4)[None],
        segment_ids=np.ones((1, 4), np.int32),
        implementation="xla",
    )
    np.testing.assert_allclose(out[:, [0, 1, 4, 5]], alone, atol=1e-6)


def test_half_precision_is_close_and_keeps_its_dtype():
    q, k, v = inputs(seq=16, dtype=jnp.bfloat16)
    out = attention(q, k, v, positions=np.arange(16)[None], implementation="xla")
    assert out.dtype == jnp.bfloat16
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    np.testing.assert_allclose(out.astype(jnp.float32), reference(*wide, np.ones((2, 16), int), None, None), atol=0.02)


@pytest.mark.parametrize(
    ("implementation", "seq", "message"),
    [
        ("splash", 24, "the sequence length 24 is not a multiple of 128"),
        ("cudnn", 24, "there is no GPU"),
        ("flash", 24, 'attention "flash" is unknown: did you mean "splash"'),
        ("splash:100x128", 256, 'attention "splash:100x128" cannot .* 100 positions are no side .*: 128, 256 are'),
        ("splash:128x384", 512, "384 keys are no side of a tile: 128, 256, 512 are"),
        ("splash:2048x0", 2048, "2048 positions"),
        ("splash:128x0", 256, "0 keys"),
        ("splash:128", 256, 'tiles are .* positions x keys, as in "splash:128x256"'),
        ("xla:128x128", 256, "tiles are those of splash attention"),
    ],
)
def test_what_cannot_run_says_why(implementation, seq, message):
    if implementation == "cudnn" and jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    q, k, v = inputs(seq=seq)
    with pytest.raises(JaxftError, match=message):
        attention(q, k, v, positions=np.arange(seq)[None], implementation=implementation)


@pytest.mark.parametrize("dtype", [jnp.bfloat16])
@pytest.mark.parametrize("sliding_window", [None, 40])
@pytest.mark.parametrize("segmented", [False, True])
def test_cudnn_equals_xla(dtype, sliding_window, segmented):
    if jax.default_backend() != "gpu":
        pytest.skip("needs a GPU")
    q, k, v = inputs(seq=256, dim=64, dtype=dtype)
    segments = packed(2, 256) if segmented else None
    positions = positions_of(segments) if segmented else np.arange(256)[None]
    real = (segments > 0)[:, :, None, None] if segmented else 1.0

    def run(implementation):
        def loss(q, k, v):
            out = attention(
                q,
                k,
                v,
                positions=positions,
                segment_ids=segments,
                sliding_window=sliding_window,
                implementation=implementation,
            ).astype(jnp.float32)
            return jnp.sum(jnp.sin(out) * real), out * real

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    for a, b in zip(jax.tree.leaves(run("cudnn")), jax.tree.leaves(run("xla")), strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=0.06)


@pytest.mark.parametrize(("segmented", "kind"), [(True, "ScaleBias"), (False, "")])
def test_cudnn_is_called_for_a_gpu_that_is_not_here(segmented, kind, monkeypatch):
    """One call forward and one backward. Segments are its bias; causality and windows it knows by itself."""
    monkeypatch.setattr(sys.modules[attention.__module__], "platform", lambda: "gpu")
    library = "jax._src.cudnn.fused_attention_stablehlo"
    monkeypatch.setattr(f"{library}.check_cudnn_version", lambda: 90500)
    monkeypatch.setattr(f"{library}.check_compute_capability", lambda capability: True)
    q, k, v = inputs(seq=256, dim=64, dtype=jnp.bfloat16)
    segments = packed(2, 256) if segmented else None
    given = {"positions": positions_of(segments) if segmented else np.arange(256)[None], "segment_ids": segments}

    def loss(q, k, v):
        return attention(q, k, v, **given, sliding_window=40, implementation="auto").astype(jnp.float32).sum()

    text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()
    assert re.findall(r"@__cudnn\$fmha(\w+)", text) == [f"{kind}Softmax", f"{kind}SoftmaxBackward"]


@pytest.mark.parametrize(
    ("axes", "segmented", "sliding_window"),
    [
        ({"fsdp": 2, "sequence": 2, "tensor": 2}, True, 40),
        ({"fsdp": 2, "sequence": 2, "tensor": 2}, False, None),
        ({"sequence": 2, "tensor": 4}, False, None),  # two key/value heads for four devices: each has one
        ({"fsdp": 2, "tensor": 2}, True, 40),
        ({"fsdp": 4, "tensor": 2}, False, None),  # two rows do not divide: every device has both
    ],
)
def test_each_device_calls_cudnn_for_its_rows_parts_and_heads(axes, segmented, sliding_window, monkeypatch):
    """What cuDNN is asked for is computed by XLA here, of the same arguments."""
    calls, plain = [], jax.nn.dot_product_attention

    def call(q, k, v, *, implementation, **others):
        calls.append((q.shape, k.shape))
        assert implementation == "cudnn"
        return plain(q, k, v, implementation="xla", **others)

    monkeypatch.setattr(sys.modules[attention.__module__], "platform", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", call)
    q, k, v = inputs(seq=128, dim=64, dtype=jnp.bfloat16)
    segments = packed(2, 128) if segmented else None
    given = {"positions": positions_of(segments) if segmented else np.arange(128)[None], "segment_ids": segments}
    real = (segments > 0)[:, :, None, None] if segmented else 1.0

    def loss(q, k, v, implementation):
        out = attention(q, k, v, **given, sliding_window=sliding_window, implementation=implementation)
        out = out.astype(jnp.float32) * real
        return jnp.sum(jnp.sin(out)), out

    run = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True), static_argnums=3)
    expected = run(q, k, v, "xla")
    sizes = {axis: axes.get(axis, 1) for axis in ("data", "fsdp", "sequence", "tensor", "expert")}
    devices = jax.devices()[: math.prod(axes.values())]
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes), devices=devices)
    with jax.set_mesh(mesh):
        found = run(q, k, v, "cudnn")
    rows = 2 // axes.get("fsdp", 1) or 2
    positions, heads = 128 // axes.get("sequence", 1), 4 // axes["tensor"]
    assert set(calls) == {((rows, positions, heads, 64), (rows, 128, max(2 // axes["tensor"], 1), 64))}
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=0.06, rtol=0.02)
