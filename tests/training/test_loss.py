"""The chunked cross-entropy against the dense one, its memory, and its edges."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.distributed import MeshConfig, hlo, make_mesh
from jaxft.models import DecoderConfig, LanguageModel
from jaxft.training.loss import chunks_for, cross_entropy, language_model_loss
from jaxft.weights import LowRank, RowSplit, linear, materialize, unembed

BATCH, SEQ, DIM, VOCAB = 3, 10, 8, 37


def example(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (BATCH, SEQ, DIM)).astype(dtype)
    targets = jax.random.randint(keys[1], (BATCH, SEQ), 0, VOCAB)
    weights = jax.random.uniform(keys[2], (BATCH, SEQ)) * (jnp.arange(SEQ) % 3 > 0)
    return hidden, targets, weights


def dense(hidden, targets, weights, head, z_loss=0.0):
    logits = head(hidden).astype(jnp.float32)
    partition = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(weights * (partition - target + z_loss * partition**2))


def heads():
    keys = jax.random.split(jax.random.key(1), 4)
    matrix = jax.random.normal(keys[0], (DIM, VOCAB))
    low_rank = LowRank(matrix, jax.random.normal(keys[1], (DIM, 2)), jax.random.normal(keys[2], (2, VOCAB)), 0.5)
    return {
        "array": (matrix, lambda w, h: linear(h, w)),
        "lora": (low_rank, lambda w, h: linear(h, w)),
        "tied": (matrix.T, lambda w, h: unembed(h, w)),
    }


@pytest.mark.parametrize("chunks", [None, 1, 2, 3, 10])
@pytest.mark.parametrize("kind", ["array", "lora", "tied"])
def test_equals_dense_in_value_and_gradients(kind, chunks):
    hidden, targets, weights = example()
    w, apply = heads()[kind]
    z_loss = 1e-2 if chunks == 3 else 0.0

    def chunked(w, hidden, weights):
        head = functools.partial(apply, w)
        return cross_entropy(hidden, targets, weights, head, chunks=chunks, z_loss=z_loss).loss

    def reference(w, hidden, weights):
        return dense(hidden, targets, weights, functools.partial(apply, w), z_loss)

    got = jax.jit(jax.value_and_grad(chunked, (0, 1, 2)))(w, hidden, weights)
    expected = jax.jit(jax.value_and_grad(reference, (0, 1, 2)))(w, hidden, weights)
    # where the weight is 0 the loss of the token is defined as 0, so its gradient with respect to the weight is too
    expected = (expected[0], (*expected[1][:2], jnp.where(weights == 0, 0, expected[1][2])))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_counts_weights_and_correct_tokens():
    hidden, targets, weights = example()
    w, apply = heads()["array"]
    found = cross_entropy(hidden, targets, weights, functools.partial(apply, w), chunks=3)
    best = jnp.argmax(hidden @ w, axis=-1)
    targets = jnp.where(jnp.arange(SEQ) < 5, best, targets)
    mixed = cross_entropy(hidden, targets, weights, functools.partial(apply, w), chunks=3)
    np.testing.assert_allclose(found.weight, jnp.sum(weights), rtol=1e-6)
    assert mixed.correct == jnp.sum((best == targets) & (weights != 0))
    assert mixed.correct > found.correct


def matmuls(function, *arguments):
    return str(jax.make_jaxpr(function)(*arguments)).count("dot_general")


@pytest.mark.parametrize("order", ["grad of jit", "jit of grad"])
def test_a_frozen_head_gets_no_gradient_matmul(order):
    hidden, targets, weights = example()
    w, apply = heads()["array"]

    def loss(hidden, w):
        return cross_entropy(hidden, targets, weights, functools.partial(apply, w), chunks=2).loss

    def gradient(argnums):
        return jax.grad(jax.jit(loss), argnums) if order == "grad of jit" else jax.jit(jax.grad(loss, argnums))

    assert matmuls(loss, hidden, w) == 1
    assert matmuls(gradient(0), hidden, w) == 2  # logits, hidden
    assert matmuls(gradient((0, 1)), hidden, w) == 3  # logits, hidden, head: nothing is computed twice


def test_only_the_trained_factor_of_a_head_gets_a_gradient():
    hidden, targets, weights = example()
    node, apply = heads()["lora"]

    def loss(b):
        return cross_entropy(hidden, targets, weights, functools.partial(apply, node.replace(b=b)), chunks=2).loss

    def reference(b):
        return dense(hidden, targets, weights, functools.partial(apply, materialize(node.replace(b=b))))

    np.testing.assert_allclose(jax.grad(loss)(node.b), jax.grad(reference)(node.b), rtol=1e-5, atol=1e-5)
    # three products forward and one for the factor that trains; that of the hidden states is not asked for
    compiled = jax.jit(jax.grad(loss)).lower(node.b).compile()
    rank = node.b.shape[0]
    needed = DIM * VOCAB + DIM * rank + 2 * rank * VOCAB
    assert hlo.costs(hlo.parse(compiled.as_text())).flops == 2 * BATCH * SEQ * needed


def test_a_batch_without_targets_has_loss_and_gradients_zero():
    hidden, targets, _ = example()
    w, apply = heads()["array"]

    def loss(w, hidden):
        return cross_entropy(hidden, targets, jnp.zeros((BATCH, SEQ)), functools.partial(apply, w), chunks=2).loss

    value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(w, 1e4 * hidden)
    assert value == 0
    assert all(np.all(np.asarray(g) == 0) for g in gradients)


def compiled_temp(batch, seq, dim, vocab):
    shapes = (
        jax.ShapeDtypeStruct((batch, seq, dim), jnp.float32),
        jax.ShapeDtypeStruct((dim, vocab), jnp.float32),
        jax.ShapeDtypeStruct((batch, seq), jnp.int32),
        jax.ShapeDtypeStruct((batch, seq), jnp.float32),
    )

    def loss(hidden, w, targets, weights):
        return cross_entropy(hidden, targets, weights, lambda h: linear(h, w)).loss

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_does_not_grow_with_vocabulary_times_tokens():
    batch, dim, vocab = 2, 32, 16384
    short, long = compiled_temp(batch, 2048, dim, vocab), compiled_temp(batch, 8192, dim, vocab)
    per_token = batch * dim * 4  # one float32 hidden state a row
    assert long - short <= 6 * (8192 - 2048) * per_token
    assert long < batch * 8192 * vocab * 4 / 5  # the logits in full would be 1 GiB
    wide = compiled_temp(batch, 4096, dim, 4 * vocab)
    assert wide < batch * 4096 * 4 * vocab * 4 / 2.5


@pytest.mark.parametrize(
    ("rows", "seq_len", "vocab", "shards"), [(1, 1, 2, 1), (16, 512, 4096, 1), (256, 4096, 128256, 64), (8, 7, 99, 1)]
)
def test_chunks_are_a_power_of_two_and_no_more_than_the_sequence(rows, seq_len, vocab, shards):
    chunks = chunks_for(rows, seq_len, vocab, shards)
    assert 1 <= chunks <= seq_len
    assert chunks == seq_len or chunks & (chunks - 1) == 0
    tokens = rows * seq_len / chunks / shards
    assert tokens <= max(1024, 2**23 / vocab)


def test_a_divided_head_has_smaller_pieces_of_each_shard():
    """What a device computes with is the tokens of all shards that divide the head."""
    assert chunks_for(1, 2048, 128256) == 2  # 1024 tokens
    assert chunks_for(1, 2048, 262144) == 4  # 512, or their logits would be 1 GiB
    assert chunks_for(16, 2048, 128256, 16, 16) == 16  # 16 shards of 128
    assert chunks_for(16, 2048, 128256, 16, 2) == 4  # 2 shards of 512, eight times


def test_bfloat16_inputs_at_a_large_vocabulary_agree_with_float64():
    vocab, tokens, dim = 262_144, 24, 16
    keys = jax.random.split(jax.random.key(2), 3)
    hidden = (3 * jax.random.normal(keys[0], (2, tokens // 2, dim))).astype(jnp.bfloat16)
    w = jax.random.normal(keys[1], (dim, vocab)).astype(jnp.bfloat16)
    targets = jax.random.randint(keys[2], (2, tokens // 2), 0, vocab)
    wide = np.asarray(hidden, np.float64) @ np.asarray(w, np.float64)
    top = wide.max(-1, keepdims=True)
    losses = np.log(np.exp(wide - top).sum(-1)) + top[..., 0]
    losses -= np.take_along_axis(wide, np.asarray(targets)[..., None], -1)[..., 0]

    def head(h):
        return jnp.matmul(h, w, preferred_element_type=jnp.float32)

    found = jax.jit(lambda h: cross_entropy(h, targets, jnp.ones(targets.shape), head).loss)(hidden)
    np.testing.assert_allclose(float(found), losses.sum(), rtol=1e-5)


def test_pieces_of_a_bfloat16_head_are_summed_in_float32():
    # 1 + 2**-9 many times: a bfloat16 running sum would stop at 1
    chunks, dim, vocab = 64, 1, 2
    hidden = jnp.ones((1, chunks, dim), jnp.bfloat16)
    weights = jnp.full((1, chunks), 2.0**-9).at[0, 0].set(1.0)
    targets = jnp.zeros((1, chunks), jnp.int32)

    def loss(w):
        return cross_entropy(hidden, targets, weights, lambda h: linear(h, w), chunks=chunks).loss

    gradient = jax.grad(loss)(jnp.zeros((dim, vocab), jnp.bfloat16))
    expected = -0.5 * float(jnp.sum(weights))
    assert abs(float(gradient[0, 0]) / expected - 1) < 2**-8


@pytest.mark.parametrize("devices", [1, 4])
def test_of_a_tied_table_only_the_rows_that_train_have_a_gradient(devices):
    """The same as in the gradient of the whole table, from a product of its own."""
    words, dim, padding = 96, 40, 4
    model = LanguageModel(
        DecoderConfig(
            model_type="llama", vocab_size=words, hidden_size=dim, intermediate_size=56, num_layers=1, num_heads=2,
            num_kv_heads=1, head_dim=24, tie_embeddings=True, final_logit_softcapping=2.0,
        )
    )  # fmt: skip
    params, rng = model.init(jax.random.key(0)), np.random.default_rng(0)
    index = np.concatenate([rng.permutation(words)[:44], np.full(padding, words)]).astype(np.int32)
    rows = rng.normal(size=(48, dim)).astype(np.float32)
    batch = {name: rng.integers(0, words, (4, 16)) for name in ("tokens", "targets")}
    batch["weights"] = (rng.random((4, 16)) > 0.3).astype(np.float32)
    loss = language_model_loss(model, chunks=2, z_loss=1e-2, remat="none")
    table = RowSplit(params["embed"]["embedding"], jnp.asarray(rows), jnp.asarray(index))

    def of(table):
        total, _, aux = loss({**params, "embed": {"embedding": table}}, batch, jax.random.key(0))
        return total, aux["correct"]

    def of_rows(rows):
        return of(table.replace(rows=rows))

    with jax.set_mesh(make_mesh(MeshConfig(fsdp=devices), jax.devices()[:devices])):
        compiled = jax.jit(jax.value_and_grad(of_rows, has_aux=True)).lower(table.rows).compile()
        (value, correct), got = compiled(table.rows)
    (expected_value, expected_correct), whole = jax.jit(jax.value_and_grad(of, has_aux=True))(materialize(table))
    assert value == pytest.approx(float(expected_value), rel=1e-5) and correct == expected_correct
    expected = np.concatenate([whole[index[:-padding]], np.zeros((padding, dim))])
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    products = [
        sorted(n for n in op.shapes[0][1] if n > 1)
        for instructions in hlo.parse(compiled.as_text()).computations.values()
        for op in instructions
        if op.opcode == "dot"
    ]
    of_a_device = {dim, words // devices}
    assert not [dims for dims in products if set(dims) == of_a_device] and sorted([dim, 48 // devices]) in products
