"""Evaluation sets: nothing lost or counted twice, whatever the batch size; multiple choice."""

import numpy as np
import pytest
from pydantic import ValidationError

from jaxft.data import DataConfig, EvaluationSetConfig, FormatConfig, evaluation_batches, train_batches
from jaxft.errors import JaxftError

ROWS = [{"prompt": f"question {i}", "completion": f"answer {i}" + " word" * (i % 5)} for i in range(23)]


def measure(batches):
    """Sum of an arbitrary function of (target, position) over weights, and the sum of weights."""
    value = sum((b["weights"] * np.sin(b["targets"] + 0.1 * b["positions"])).sum(dtype=np.float64) for b in batches)
    return value, sum(b["weights"].sum() for b in batches)


def test_the_measure_does_not_depend_on_batch_size_packing_or_processes(write_jsonl, tokenizers):
    path = write_jsonl(ROWS)
    expected = None
    for batch_size in (1, 4, 7, 64):
        for packing in (True, False):
            setting = EvaluationSetConfig(path=path, packing=packing)
            batches = evaluation_batches(setting, tokenizers["base"], seq_len=64, batch_size=batch_size)
            assert all(batch["tokens"].shape == (batch_size, 64) for batch in batches)
            value = measure(batches)
            expected = expected or value
            np.testing.assert_allclose(value, expected, rtol=1e-12)
    whole = evaluation_batches(setting, tokenizers["base"], seq_len=64, batch_size=8)
    parts = [
        evaluation_batches(setting, tokenizers["base"], seq_len=64, batch_size=8, process_index=i, process_count=4)
        for i in range(4)
    ]
    assert {len(part) for part in parts} == {len(whole)}
    for step, batch in enumerate(whole):
        np.testing.assert_array_equal(batch["tokens"], np.concatenate([part[step]["tokens"] for part in parts]))


def test_a_held_out_part_shares_no_row_with_training(write_jsonl, tokenizers):
    path = write_jsonl(ROWS)
    train = DataConfig(sources=[{"path": path, "holdout": 0.3}], seq_len=64, batch_size=1, epochs=1, packing=False)
    held = EvaluationSetConfig(path=path, holdout=0.3, part="holdout", packing=False)
    seen = [tuple(b["tokens"][0].tolist()) for b in train_batches(train, tokenizers["base"], seed=0)]
    kept = [
        tuple(b["tokens"][0].tolist()) for b in evaluation_batches(held, tokenizers["base"], seq_len=64, batch_size=1)
    ]
    assert len(kept) == 7 and len(seen) == 16 and not set(seen) & set(kept)


def test_max_examples_is_a_fixed_draw(write_jsonl, tokenizers):
    path = write_jsonl(ROWS)
    setting = EvaluationSetConfig(path=path, max_examples=5, packing=False)
    one, two = (evaluation_batches(setting, tokenizers["base"], seq_len=64, batch_size=5) for _ in range(2))
    assert len(one) == 1
    np.testing.assert_array_equal(one[0]["tokens"], two[0]["tokens"])
    first = evaluation_batches(
        EvaluationSetConfig(path=path, limit=5, packing=False), tokenizers["base"], seq_len=64, batch_size=5
    )
    assert (first[0]["tokens"] != one[0]["tokens"]).any()


def test_format_options_are_those_of_the_data_unless_given(write_jsonl, tokenizers):
    path = write_jsonl(ROWS)
    data = FormatConfig(loss_on="all", add_eos=False)
    inherited = EvaluationSetConfig(path=path)
    own = EvaluationSetConfig(path=path, loss_on="answers")
    counts = [
        measure(evaluation_batches(setting, tokenizers["base"], seq_len=64, batch_size=4, data=data))[1]
        for setting in (inherited, own)
    ]
    assert counts[0] > counts[1]
    assert own.text_format(data) == FormatConfig(loss_on="answers", add_eos=False)


@pytest.mark.parametrize("family", ["base", "chatml", "mistral", "qwen3"])
def test_multiple_choice(write_jsonl, tokenizers, family):
    tokenizer = tokenizers[family]
    rows = [
        {"question": "What is the capital?", "choices": ["Paris", "the fox", "hello world"], "answer": 0},
        {"question": "Another?", "choices": ["yes", "no"], "answer": "B"},
    ]
    setting = EvaluationSetConfig(path=write_jsonl(rows), task="multiple_choice")
    batches = evaluation_batches(setting, tokenizer, seq_len=96, batch_size=4)
    assert len(batches) == 2 and all(batch["tokens"].shape == (4, 96) for batch in batches)
    flat = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    assert flat["question"].tolist() == [0, 0, 0, 1, 1, -1, -1, -1]
    assert flat["choice"].tolist()[:5] == [0, 1, 2, 0, 1] and flat["correct"].tolist()[:5] == [0, 0, 0, 1, 1]
    assert flat["weights"][5:].sum() == 0
    scored = [tokenizer.decode(t[w > 0]).strip() for t, w in zip(flat["targets"][:5], flat["weights"][:5], strict=True)]
    assert [text.rsplit("\n", 1)[-1] for text in scored] == ["Paris", "the fox", "hello world", "yes", "no"]


def test_multiple_choice_needs_its_columns(write_jsonl, tokenizers):
    setting = EvaluationSetConfig(path=write_jsonl(ROWS), task="multiple_choice")
    with pytest.raises(JaxftError, match="needs columns question, choices and answer"):
        evaluation_batches(setting, tokenizers["base"], seq_len=64, batch_size=4)


def test_malformed_rows_are_an_error_here_too(write_jsonl, tokenizers):
    path = write_jsonl([*ROWS, {"prompt": "x"}])
    with pytest.raises(JaxftError, match=r"data.jsonl:24: no column 'completion'"):
        evaluation_batches(EvaluationSetConfig(path=path), tokenizers["base"], seq_len=64, batch_size=4)
    batches = evaluation_batches(
        EvaluationSetConfig(path=path, on_error="skip"), tokenizers["base"], seq_len=64, batch_size=4
    )
    assert len(batches.report.malformed) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"path": "x", "weigth": 1}, "Extra inputs"),
        ({"path": ""}, "at least 1 character"),
        ({"path": "x", "holdout": 1.5}, "between 0 and 1"),
        ({"path": "x", "holdout": 0}, "at least 1"),
        ({"path": "x", "part": "holdout"}, "needs holdout"),
        ({"path": "x", "columns": {"promt": "q"}}, 'did you mean "prompt"'),
        ({"path": "x", "weight": 0}, "greater than 0"),
    ],
)
def test_sources_that_make_no_sense(values, message):
    with pytest.raises(ValidationError, match=message):
        DataConfig(sources=[values])


def test_weights_for_some_sources_only():
    with pytest.raises(ValidationError, match="no weight for b"):
        DataConfig(sources=[{"path": "a", "weight": 1}, {"path": "b"}])


def test_every_option_is_described():
    for model in (DataConfig, EvaluationSetConfig, *[DataConfig.model_fields["sources"].annotation.__args__[0]]):
        assert all(field.description for field in model.model_fields.values()), model
