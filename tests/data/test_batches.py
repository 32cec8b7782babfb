"""Batches: epochs, order, resume, process sharding, mixtures, truncation, and what is refused."""

import collections
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxft.data import DataConfig, train_batches
from jaxft.errors import JaxftError

ROWS = [{"prompt": f"question {i}", "completion": f"answer {i}" + " word" * (i % 5)} for i in range(45)]
KEYS = ("tokens", "targets", "weights", "segment_ids", "positions")


def config(path, **options):
    options = {"seq_len": 64, "batch_size": 4, "epochs": 3} | options
    return DataConfig(sources=[{"path": path}], **options)


def segments(batch):
    """The token sequences in a batch, as tuples."""
    for tokens, ids in zip(batch["tokens"], batch["segment_ids"], strict=True):
        for segment in range(1, ids.max() + 1):
            yield tuple(tokens[ids == segment].tolist())


def assert_equal(one, other):
    assert one.keys() == other.keys() == set(KEYS)
    for name in KEYS:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.fixture
def path(write_jsonl):
    return write_jsonl(ROWS)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_epoch_has_every_example_once(path, tokenizers, packing, shuffle):
    batches = train_batches(config(path, packing=packing, shuffle=shuffle), tokenizers["base"], seed=1)
    taken = list(batches)
    assert len(taken) == batches.total_steps == 3 * batches.steps_per_epoch
    epochs = []
    for epoch in range(3):
        part = taken[epoch * batches.steps_per_epoch : (epoch + 1) * batches.steps_per_epoch]
        epochs.append([sequence for batch in part for sequence in segments(batch)])
        assert all(batch["tokens"].shape == (4, 64) for batch in part)
    expected = {tuple(tokenizers["base"](f"{r['prompt']}\n{r['completion']}<eos>")["input_ids"]) for r in ROWS}
    for epoch in epochs:
        assert len(epoch) == len(ROWS) and set(epoch) == expected
    assert (epochs[0] == epochs[1]) is not shuffle
    if not shuffle:
        assert [tokenizers["base"].decode(e).split("\n")[0] for e in epochs[0]] == [row["prompt"] for row in ROWS]


def test_packed_and_unpacked_rows_train_the_same_tokens(path, tokenizers):
    totals = []
    for packing in (True, False):
        counts = collections.Counter()
        for batch in train_batches(config(path, packing=packing, epochs=1), tokenizers["base"], seed=0):
            counts.update(batch["targets"][batch["weights"] > 0].tolist())
        totals.append(counts)
    assert totals[0] == totals[1]
    # pad is eos here: the end of every answer is a target all the same
    assert totals[0][tokenizers["base"].eos_token_id] == len(ROWS)


def test_rows_share_company_anew_every_epoch(path, tokenizers):
    batches = train_batches(config(path), tokenizers["base"], seed=1)
    taken = list(batches)
    rows = []
    for epoch in range(2):
        part = taken[epoch * batches.steps_per_epoch : (epoch + 1) * batches.steps_per_epoch]
        rows.append({frozenset(segments({k: v[i : i + 1] for k, v in b.items()})) for b in part for i in range(4)})
    assert rows[0] != rows[1]


def test_the_seed_and_nothing_else_decides_the_order(path, tokenizers):
    first, again, other = (list(train_batches(config(path), tokenizers["base"], seed=seed)) for seed in (1, 1, 2))
    for a, b in zip(first, again, strict=True):
        assert_equal(a, b)
    assert any((a["tokens"] != b["tokens"]).any() for a, b in zip(first, other, strict=True))


@pytest.fixture(scope="module")
def uninterrupted(tokenizers, tmp_path_factory):
    path = tmp_path_factory.mktemp("resume") / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    setting = config(str(path), epochs=4, batch_size=8)
    return setting, list(train_batches(setting, tokenizers["base"], seed=3))


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_resumed_at_any_step_on_any_number_of_processes(uninterrupted, tokenizers, data):
    setting, batches = uninterrupted
    step = data.draw(st.integers(0, len(batches)), "step")
    before, after = data.draw(st.sampled_from([1, 2, 4, 8])), data.draw(st.sampled_from([1, 2, 4]))
    first = train_batches(setting, tokenizers["base"], seed=3, process_index=before - 1, process_count=before)
    rows = 8 // before
    for i in range(step):
        assert_equal(next(first), {name: array[-rows:] for name, array in batches[i].items()})
    state = first.get_state()
    assert json.loads(state)["step"] == step
    first.close()
    resumed = [
        train_batches(setting, tokenizers["base"], seed=3, process_index=index, process_count=after)
        for index in range(after)
    ]
    for part in resumed:
        part.set_state(state)
    rest = list(zip(*resumed, strict=True))
    assert len(rest) == len(batches) - step
    for parts, expected in zip(rest, batches[step:], strict=True):
        assert_equal({name: np.concatenate([part[name] for part in parts]) for name in KEYS}, expected)


def test_going_back_and_forth_in_one_iterator(uninterrupted, tokenizers):
    setting, expected = uninterrupted
    batches = train_batches(setting, tokenizers["base"], seed=3)
    start = batches.get_state()
    for _ in range(3):
        next(batches)
    middle = batches.get_state()
    assert_equal(next(batches), expected[3])
    batches.set_state(start)
    assert_equal(next(batches), expected[0])
    batches.set_state(middle)
    assert_equal(next(batches), expected[3])


def test_a_far_position_is_as_near_as_the_first(path, tokenizers):
    batches = train_batches(config(path, epochs=None), tokenizers["base"], seed=0)
    assert batches.total_steps is None
    state = json.loads(batches.get_state())
    batches.set_state(json.dumps(state | {"step": 10**9}).encode())
    batch = next(batches)  # reading a thousand million batches first would not end
    assert batch["weights"].sum() > 0 and json.loads(batches.get_state())["step"] == 10**9 + 1
    batches.close()


def test_worker_processes_give_the_same_batches_and_resume(uninterrupted, tokenizers):
    setting, expected = uninterrupted
    with_workers = setting.model_copy(update={"num_workers": 1})
    batches = train_batches(with_workers, tokenizers["base"], seed=3)
    plain = train_batches(setting, tokenizers["base"], seed=3)
    for _ in range(len(expected) // 2 + 1):  # in the third epoch of four
        next(plain)
    batches.set_state(plain.get_state())
    for batch, same in zip(batches, expected[len(expected) // 2 + 1 :], strict=True):
        assert_equal(batch, same)
    batches.close()


def test_a_state_from_other_data_is_refused(path, tokenizers, write_jsonl):
    state = train_batches(config(path), tokenizers["base"], seed=0).get_state()
    other = write_jsonl(ROWS[:-1], "other.jsonl")
    for setting, seed in ((config(other), 0), (config(path), 1), (config(path, batch_size=2), 0)):
        with pytest.raises(JaxftError, match="not what it was"):
            train_batches(setting, tokenizers["base"], seed=seed).set_state(state)
    batches = train_batches(config(path), tokenizers["base"], seed=0)
    for junk in (b"", b"\xff", b"[]", b'{"version": 1}', b'{"version": 9, "step": 0, "data": ""}'):
        with pytest.raises(JaxftError, match="data state"):
            batches.set_state(junk)


def test_mixture_weights_are_shares_of_rows_and_sources_go_round_evenly(write_jsonl, tokenizers):
    small = write_jsonl([{"text": f"small {i}"} for i in range(10)], "small.jsonl")
    large = write_jsonl([{"text": f"large {i}"} for i in range(90)], "large.jsonl")
    setting = DataConfig(
        sources=[{"path": small, "weight": 3}, {"path": large, "weight": 1}],
        seq_len=32,
        batch_size=4,
        epochs=2,
        packing=False,
    )
    batches = train_batches(setting, tokenizers["base"], seed=0)
    assert batches.steps_per_epoch == 25
    seen = [tokenizers["base"].decode(tokens) for batch in batches for tokens in segments(batch)]
    assert len(seen) == 200
    counts = collections.Counter(seen)
    from_small = [counts[f"small {i}<eos>"] for i in range(10)]
    from_large = [counts[f"large {i}<eos>"] for i in range(90)]
    assert sum(from_small) == 150 and from_small == [15] * 10
    assert sum(from_large) == 50 and max(from_large) == 1
    # In every stretch, not only on the whole: batches of four hold three rows of one and one of the other.
    stretch = [text.startswith("small") for text in seen[:40]]
    assert 28 <= sum(stretch) <= 32


def test_sources_without_weights_are_read_as_one(write_jsonl, tokenizers):
    paths = [write_jsonl([{"text": f"{name} {i}"} for i in range(9)], f"{name}.jsonl") for name in ("a", "b")]
    setting = DataConfig(sources=[{"path": p} for p in paths], seq_len=32, batch_size=2, epochs=1)
    batches = train_batches(setting, tokenizers["base"], seed=0)
    texts = sorted(tokenizers["base"].decode(tokens) for batch in batches for tokens in segments(batch))
    assert texts == sorted(f"{name} {i}<eos>" for name in ("a", "b") for i in range(9))


def test_long_text_is_cut_in_windows_that_train_every_token_once(write_jsonl, tokenizers):
    words = " ".join(f"word{i}" for i in range(200))
    path = write_jsonl([{"text": words}])
    batches = train_batches(config(path, epochs=1, packing=False, shuffle=False), tokenizers["base"], seed=0)
    ids = tokenizers["base"](words)["input_ids"] + [tokenizers["base"].eos_token_id]
    targets = [t for batch in batches for row in range(4) for t in batch["targets"][row][batch["weights"][row] > 0]]
    assert targets == ids[1:]
    assert batches.report.sources[0].truncated == 1


def test_truncation_policies(write_jsonl, tokenizers):
    rows = [*ROWS, {"prompt": "long", "completion": "word " * 100}, {"prompt": "long " * 100, "completion": "cut off"}]
    path = write_jsonl(rows)
    with pytest.raises(JaxftError) as caught:
        train_batches(config(path, truncation="error"), tokenizers["base"], seed=0)
    assert "2 examples longer than seq_len=64" in str(caught.value)
    assert f"{path}:46:" in str(caught.value) and f"{path}:47:" in str(caught.value)
    dropped = train_batches(config(path, truncation="drop"), tokenizers["base"], seed=0).report.sources[0]
    assert (dropped.dropped_too_long, dropped.truncated, dropped.examples) == (2, 0, 45)
    cut = train_batches(config(path, truncation="truncate"), tokenizers["base"], seed=0)
    source = cut.report.sources[0]
    # The answer of the second was cut off whole: nothing of it trains, so it is left out and counted.
    assert (source.truncated, source.dropped_untrained, source.examples) == (2, 1, 46)
    assert max(len(tokens) for batch in cut for tokens in segments(batch)) == 64


def test_nothing_left_to_train_on(write_jsonl, tokenizers):
    path = write_jsonl([{"prompt": "long " * 100, "completion": "cut off"}])
    with pytest.raises(JaxftError, match="no example left to train on: 1 rows read.*1 dropped because none"):
        train_batches(config(path), tokenizers["base"], seed=0)


def test_malformed_rows_stop_the_run_or_are_counted(tmp_path, tokenizers):
    path = tmp_path / "data.jsonl"
    lines = [json.dumps(row) for row in ROWS]
    lines[3:3] = ["{oops", '{"prompt": "alone"}', '{"prompt": "q", "completion": null}']
    lines += ['{"prompt": 1, "completion": 2}'] * 20
    path.write_text("\n".join(lines))
    with pytest.raises(JaxftError) as caught:
        train_batches(config(str(path)), tokenizers["base"], seed=0)
    message = str(caught.value)
    assert message.startswith("23 malformed rows in 1 file:")
    for line, reason in ((4, "not JSON"), (5, "no column 'completion'"), (6, "'completion' is null"), (49, "int 1")):
        assert f"{path}:{line}: " in message and reason in message
    assert "and 13 more" in message and "on_error: skip" in message
    batches = train_batches(config(str(path), on_error="skip"), tokenizers["base"], seed=0)
    source = batches.report.sources[0]
    assert (source.rows, len(source.malformed), source.examples) == (68, 23, 45)
    assert [bad.place.line for bad in source.malformed[:4]] == [4, 5, 6, 49]


def test_rows_the_template_refuses_are_located_too(write_jsonl, tokenizers):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = write_jsonl([{"messages": messages}, {"messages": [{"role": "system", "content": "s"}, *messages]}])
    with pytest.raises(JaxftError, match=r"data.jsonl:2: the chat template refuses.*only user and assistant"):
        train_batches(config(path, batch_size=1), tokenizers["mistral"], seed=0)


def test_two_bos_are_an_error_of_the_row(write_jsonl, tokenizers):
    path = write_jsonl([{"text": "fine"}, {"text": "<bos>twice"}])
    with pytest.raises(JaxftError, match=r"data.jsonl:2: starts with two '<bos>'"):
        train_batches(config(path, batch_size=1), tokenizers["base_bos"], seed=0)


def test_messages_need_a_template(write_jsonl, tokenizers):
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    path = write_jsonl([{"messages": messages}] * 4)
    with pytest.raises(JaxftError, match="no chat template"):
        train_batches(config(path, batch_size=1), tokenizers["base"], seed=0)
    plain = train_batches(config(path, batch_size=1, chat_template="plain", epochs=1), tokenizers["base"], seed=0)
    assert tokenizers["base"].decode(next(segments(next(plain)))) == "question\nanswer<eos>"
    plain.close()


def test_less_than_a_batch_names_the_counts(write_jsonl, tokenizers):
    path = write_jsonl(ROWS[:5])
    with pytest.raises(JaxftError, match="5 examples of .* tokens fill . rows of 64: less than one batch of 16 rows"):
        train_batches(config(path, batch_size=16), tokenizers["base"], seed=0)


def test_processes_that_do_not_divide_the_batch(path, tokenizers):
    with pytest.raises(JaxftError, match="batch_size=4 rows cannot be split over 3 processes"):
        train_batches(config(path), tokenizers["base"], seed=0, process_count=3)
    with pytest.raises(JaxftError, match="process_index=2"):
        train_batches(config(path), tokenizers["base"], seed=0, process_index=2, process_count=2)


def test_empty_and_unknown_files(tmp_path, tokenizers):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(JaxftError, match="empty.jsonl: no rows"):
        train_batches(config(str(tmp_path / "empty.jsonl")), tokenizers["base"], seed=0)
    (tmp_path / "other.jsonl").write_text('{"query": "x", "reply": "y"}\n')
    with pytest.raises(JaxftError, match="other.jsonl: columns query, reply"):
        train_batches(config(str(tmp_path / "other.jsonl")), tokenizers["base"], seed=0)


def test_all_rows_broken_is_a_list_of_broken_rows(tmp_path, tokenizers):
    (tmp_path / "broken.jsonl").write_text("{\n[\n")
    with pytest.raises(JaxftError, match="2 malformed rows"):
        train_batches(config(str(tmp_path / "broken.jsonl")), tokenizers["base"], seed=0)
    with pytest.raises(JaxftError, match="no example left to train on: 2 rows read, 2 malformed"):
        train_batches(config(str(tmp_path / "broken.jsonl"), on_error="skip"), tokenizers["base"], seed=0)
