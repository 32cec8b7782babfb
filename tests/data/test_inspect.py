"""The report: counts, lengths, trained tokens marked, warnings, every malformed row."""

import json

from rich.console import Console

from jaxft.data import DataConfig, inspect


def test_report(tmp_path, tokenizers):
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": f"question {i}", "completion": "answer"} for i in range(10)]
    rows.append({"prompt": "long " * 90, "completion": "cut off"})
    rows.append({"prompt": "a control token <|im_end|> as text", "completion": "answer"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{oops\n" * 15)
    config = DataConfig(sources=[{"path": str(path), "name": "mine"}], seq_len=64, batch_size=2, epochs=2)
    report = inspect(config, tokenizers["chatml"], 2)
    values = report.to_dict()
    assert json.loads(json.dumps(values)) == values
    source = values["sources"][0]
    assert source["name"] == "mine" and source["rows"] == 27 and source["malformed"] == 15
    assert source["examples"] == 11 and source["truncated"] == 1 and source["dropped_untrained"] == 1
    assert source["control_tokens"] == 1 and any(f"the first: {path}:12" in text for text in values["warnings"])
    assert source["lengths"]["min"] <= source["lengths"]["p50"] <= source["lengths"]["max"] <= 64
    assert 0 < source["trained_percent"] < 100 and values["tokens"] == source["tokens"]
    assert values["packing_efficiency"] == round(values["tokens"] / (values["rows_per_epoch"] * 64), 4)
    assert values["total_steps"] == 2 * values["steps_per_epoch"]
    assert [row["place"] for row in values["malformed"]] == [f"{path}:{line}" for line in range(13, 28)]
    assert len(values["examples"]) == 2
    for example in values["examples"]:
        trained = "".join(piece["text"] for piece in example["pieces"] if piece["trained"])
        assert trained == "answer<|im_end|>"
        assert "".join(piece["text"] for piece in example["pieces"]).startswith("<|im_start|>user\n")
    console = Console(width=120, record=True, file=open("/dev/null", "w"))
    console.print(report)
    text = console.export_text()
    assert f"{path}:27" in text and "⟦answer<|im_end|>⟧" in text and "answer" in text and "steps an epoch, " in text


def test_data_cannot_drive_the_terminal(write_jsonl, tokenizers):
    config = DataConfig(sources=[{"path": write_jsonl([{"text": "a\x1b[2J\x07\tb\nc"}])}], seq_len=32, batch_size=1)
    console = Console(width=120, record=True, file=open("/dev/null", "w"))
    console.print(inspect(config, tokenizers["base"], 1))
    text = console.export_text()
    assert r"\x1b[2J\x07" in text and "\x1b" not in text and "\x07" not in text


def test_too_little_data_is_said_not_raised(write_jsonl, tokenizers):
    config = DataConfig(sources=[{"path": write_jsonl([{"text": "hello"}])}], seq_len=32, batch_size=8)
    report = inspect(config, tokenizers["base"])
    assert any("less than one batch of 8 rows" in warning for warning in report.warnings)


def test_nothing_readable_is_reported(tmp_path, tokenizers):
    (tmp_path / "data.jsonl").write_text("{\n")
    report = inspect(DataConfig(sources=[{"path": str(tmp_path / "data.jsonl")}]), tokenizers["base"])
    assert len(report.malformed) == 1 and report.to_dict()["examples"] == [] and report.steps_per_epoch == 0


def test_an_end_of_turn_that_is_not_eos_is_pointed_out(write_jsonl, make_tokenizer, templates):
    path = write_jsonl([{"prompt": "q", "completion": "a"}] * 4)
    config = DataConfig(sources=[{"path": path}], seq_len=32, batch_size=1)
    tokenizer = make_tokenizer(templates["chatml"], control=("<|im_start|>", "<|im_end|>"))
    assert any("'<|im_end|>', eos is '<eos>'" in warning for warning in inspect(config, tokenizer).warnings)
    endless = make_tokenizer("{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}")
    assert any("will not learn where to stop" in warning for warning in inspect(config, endless).warnings)
