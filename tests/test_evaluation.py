import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.data import DataConfig, EvaluationSetConfig, evaluation_batches
from jaxft.distributed import MeshConfig, make_mesh, shard_tree, tree_shardings
from jaxft.errors import JaxftError
from jaxft.evaluation import (
    EvaluationConfig,
    against_base,
    make_evaluation,
    make_row_sums,
    multiple_choice,
    perplexity,
    token_losses,
)
from jaxft.hub import load_pretrained, load_tokenizer
from tests.training.tiny import WORDS, write_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    directory = write_tiny(tmp_path_factory.mktemp("tiny"))
    model, params = load_pretrained(directory / "model", dtype=jnp.float32)
    # The initial weights are too small to prefer anything: make the logits spread.
    params = jax.tree.map(lambda x: x * 3 if x.ndim > 1 else x, params)
    return directory, model, params, load_tokenizer(directory / "model")


def batches(directory, tokenizer, batch_size, **options):
    config = EvaluationSetConfig(path=str(directory / "held_out.jsonl"), **options)
    return evaluation_batches(config, tokenizer, seq_len=32, batch_size=batch_size)


def reference_loss(model, params, found):
    """The mean loss by the definition: all logits at once, in float64 on the host."""
    total = weight = 0.0
    for batch in found:
        hidden = model.hidden(params, batch["tokens"], batch["positions"], batch["segment_ids"], remat="none")
        logits = np.asarray(model.logits(params, hidden), np.float64)
        log_z = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
        picked = np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
        total += ((log_z - picked) * batch["weights"]).sum()
        weight += batch["weights"].sum()
    return total / weight, weight


def test_perplexity_is_the_mean_over_tokens_for_every_batch_size(tiny):
    directory, model, params, tokenizer = tiny
    expected, tokens = reference_loss(model, params, batches(directory, tokenizer, 12))
    for batch_size in (1, 5, 32):
        found = perplexity(make_row_sums(model), params, batches(directory, tokenizer, batch_size))
        assert found["tokens"] == tokens
        assert found["loss"] == pytest.approx(expected, rel=1e-6)
        assert found["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)


@pytest.mark.parametrize("axes", [{"data": 8}, {"fsdp": 8}, {"fsdp": 2, "tensor": 2, "sequence": 2, "data": 1}])
def test_perplexity_is_the_same_on_every_mesh(tiny, axes):
    directory, model, params, tokenizer = tiny
    alone = perplexity(make_row_sums(model), params, batches(directory, tokenizer, 4))
    mesh = make_mesh(MeshConfig(**axes))
    spread = shard_tree(params, tree_shardings(params, model.logical_axes(), mesh))
    # Batches of 3 rows divide over none of these meshes, and the last one is short.
    found = perplexity(make_row_sums(model, mesh), spread, batches(directory, tokenizer, 3))
    assert found["tokens"] == alone["tokens"]
    assert found["loss"] == pytest.approx(alone["loss"], rel=1e-5)


def test_packing_does_not_change_the_measure(tiny):
    directory, model, params, tokenizer = tiny
    packed = perplexity(make_row_sums(model), params, batches(directory, tokenizer, 4, packing=True))
    apart = perplexity(make_row_sums(model), params, batches(directory, tokenizer, 4, packing=False))
    assert packed["tokens"] == apart["tokens"]
    assert packed["loss"] == pytest.approx(apart["loss"], rel=1e-5)


def test_a_short_last_batch_from_elsewhere_is_filled_up(tiny):
    directory, model, params, tokenizer = tiny
    whole = list(batches(directory, tokenizer, 4))
    cut = [*whole[:-1], *({k: v[i : i + 1] for k, v in whole[-1].items()} for i in range(4))]
    assert perplexity(make_row_sums(model), params, cut)["loss"] == pytest.approx(
        perplexity(make_row_sums(model), params, whole)["loss"], rel=1e-6
    )


def test_rows_without_weight_may_hold_anything(tiny):
    _, model, params, _ = tiny
    batch = {name: np.zeros((2, 8), np.int32) for name in ("tokens", "targets", "positions", "segment_ids")}
    batch["segment_ids"][0], batch["positions"][0] = 1, np.arange(8)
    broken = jax.tree.map(lambda x: x, params) | {"head": {"kernel": params["head"]["kernel"].at[:, 5].set(jnp.nan)}}
    batch["weights"] = np.zeros((2, 8), np.float32)
    loss, weight = make_row_sums(model)(broken, batch)
    assert (loss == 0).all() and (weight == 0).all()
    with pytest.raises(JaxftError, match="no token"):
        perplexity(make_row_sums(model), params, [batch])


@pytest.mark.parametrize("chunk_tokens", [1, 24])
def test_pieces_of_the_logits_do_not_change_the_losses(tiny, chunk_tokens):
    directory, model, params, tokenizer = tiny
    batch = batches(directory, tokenizer, 4)[0]
    expected = token_losses(model, params, batch)
    found = token_losses(model, params, batch, chunk_tokens=chunk_tokens)
    assert found.shape == batch["tokens"].shape
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_multiple_choice_agrees_with_scoring_choices_one_by_one(tiny, tmp_path):
    directory, model, params, tokenizer = tiny
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(14):
        choices = [" ".join(rng.choice(WORDS, rng.integers(1, 6))) for _ in range(3)]
        rows.append({"question": " ".join(rng.choice(WORDS, 5)), "choices": choices, "answer": int(rng.integers(3))})
    (tmp_path / "quiz.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = EvaluationSetConfig(path=str(tmp_path / "quiz.jsonl"), task="multiple_choice")

    @jax.jit
    def log_probabilities(ids):
        return jax.nn.log_softmax(model.logits(params, model.hidden(params, ids[None], remat="none"))[0])

    raw = normalised = 0
    for row in rows:
        scores = []
        for choice in row["choices"]:
            head = tokenizer(row["question"] + "\n")["input_ids"]
            ids = head + tokenizer(choice, add_special_tokens=False)["input_ids"]
            # Padded behind to one length, which a causal model does not see.
            log_p = np.asarray(log_probabilities(jnp.asarray((ids[:-1] + [0] * 16)[:16])))
            picked = [log_p[i, ids[i + 1]] for i in range(len(head) - 1, len(ids) - 1)]
            scores.append((sum(picked), sum(picked) / len(picked)))
        raw += int(np.argmax([s[0] for s in scores])) == row["answer"]
        normalised += int(np.argmax([s[1] for s in scores])) == row["answer"]

    for batch_size in (7, 64):
        found = multiple_choice(
            make_row_sums(model), params, evaluation_batches(config, tokenizer, seq_len=32, batch_size=batch_size)
        )
        assert found["questions"] == 14
        assert found["accuracy"] == pytest.approx(raw / 14)
        assert found["accuracy_per_token"] == pytest.approx(normalised / 14)
    assert raw != normalised  # or the test does not tell the two rules apart


def test_named_sets_are_scored_apart_and_errors_name_the_set(tiny, tmp_path):
    directory, model, params, tokenizer = tiny
    data = DataConfig(sources=[{"path": str(directory / "train.jsonl")}], seq_len=32, batch_size=4)
    sets = {
        "one": {"path": str(directory / "held_out.jsonl")},
        "two": {"path": str(directory / "other.jsonl"), "kind": "retained"},
    }
    mesh = make_mesh(MeshConfig(fsdp=-1))
    spread = shard_tree(params, tree_shardings(params, model.logical_axes(), mesh))
    found = make_evaluation(EvaluationConfig(sets=sets), data, tokenizer, model, mesh)(spread)
    assert found["one"] == pytest.approx(
        perplexity(make_row_sums(model), params, batches(directory, tokenizer, 4)), rel=1e-5
    )
    assert found["two"]["loss"] != found["one"]["loss"]
    (tmp_path / "bad.jsonl").write_text("{broken\n")
    with pytest.raises(JaxftError, match=r"(?s)evaluation\.sets\.bad: .*bad\.jsonl:1"):
        make_evaluation(
            EvaluationConfig(sets={"bad": {"path": str(tmp_path / "bad.jsonl")}}), data, tokenizer, model, mesh
        )


def test_learned_and_forgot():
    base = {"a": {"loss": 3.0}, "b": {"loss": 2.0, "accuracy": 0.25}, "c": {"loss": 1.0}}
    after = {"a": {"loss": 2.0}, "b": {"loss": 1.5, "accuracy": 0.5}, "c": {"loss": 1.25}}
    found = against_base(after, base, {"a": "target", "b": "target", "c": "retained"})
    assert found["learned"] == pytest.approx(0.75) and found["forgot"] == pytest.approx(0.25)
    assert found["sets"]["b"] == {
        "kind": "target", "base_loss": 2.0, "loss": 1.5, "change": -0.5, "base_accuracy": 0.25, "accuracy": 0.5,
    }  # fmt: skip
    assert against_base({"a": after["a"]}, base, {"a": "target"})["forgot"] is None
