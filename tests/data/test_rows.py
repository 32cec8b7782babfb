"""Reading files: every format, hold-out and limit, and every kind of broken row by file and line."""

import gzip
import json

import pytest

from jaxft.data import sources
from jaxft.data.config import SourceConfig
from jaxft.data.sources import BadRow, Row, read_rows
from jaxft.errors import JaxftError

ROWS = [{"text": f"row {i}", "number": i} for i in range(20)]


def good(path, **options):
    rows = list(read_rows(SourceConfig(path=str(path), **options)))
    assert all(isinstance(row, Row) for row in rows), rows
    return [row.values for row in rows]


def bad(path, **options):
    rows = read_rows(SourceConfig(path=str(path), **options))
    return {row.place.line: row.reason for row in rows if isinstance(row, BadRow)}


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_formats_agree(tmp_path):
    import csv

    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "a.jsonl").write_text(lines(ROWS))
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "wrapped.json").write_text(json.dumps({"version": "1", "data": ROWS}))
    (tmp_path / "really_lines.json").write_text(lines(ROWS))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(ROWS).encode()))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.json", "wrapped.json", "really_lines.json", "a.jsonl.gz", "a.parquet"):
        assert good(tmp_path / name) == ROWS, name
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        with open(tmp_path / name, "w", newline="") as file:
            writer = csv.DictWriter(file, ROWS[0], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)
        assert good(tmp_path / name) == [{"text": row["text"], "number": str(row["number"])} for row in ROWS]
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "saved")
    assert good(tmp_path / "saved") == ROWS
    datasets.DatasetDict({"train": data, "test": data.select([3])}).save_to_disk(tmp_path / "splits")
    assert good(tmp_path / "splits") == ROWS and good(tmp_path / "splits", split="test") == ROWS[3:4]
    with pytest.raises(JaxftError, match='no split tset; did you mean "test"'):
        good(tmp_path / "splits", split="tset")
    with pytest.raises(JaxftError, match="saved as one split"):
        good(tmp_path / "saved", split="train")


def test_directories_and_globs_are_read_in_sorted_order(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.jsonl").write_text(lines(ROWS[:2]))
    (tmp_path / "a.jsonl").write_text(lines(ROWS[2:4]))
    (tmp_path / "sub" / "c.jsonl").write_text(lines(ROWS[4:5]))
    (tmp_path / "README").write_text("not data")
    expected = ROWS[2:4] + ROWS[:2] + ROWS[4:5]
    assert good(tmp_path) == expected
    assert good(tmp_path / "*.jsonl") == expected[:4]
    assert good(tmp_path / "**" / "*.jsonl") == expected


def test_a_directory_of_split_files_is_a_dataset_when_a_split_is_named(tmp_path):
    (tmp_path / "train.jsonl").write_text(lines(ROWS[:2]))
    (tmp_path / "test.jsonl").write_text(lines(ROWS[2:3]))
    assert good(tmp_path, split="test") == ROWS[2:3]


def test_text_files_by_document_paragraph_and_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("first line\nsecond\n\n\nthird\n")
    assert good(path) == [{"text": "first line\nsecond\n\n\nthird\n"}]
    paragraphs = list(read_rows(SourceConfig(path=str(path), sample_by="paragraph")))
    assert [(str(row.place), row.values["text"]) for row in paragraphs] == [
        (f"{path}:1", "first line\nsecond"),
        (f"{path}:5", "third"),
    ]
    assert [row["text"] for row in good(path, sample_by="line")] == ["first line", "second", "third"]


def test_hostile_lines_are_located(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 2**20)
    path = tmp_path / "hostile.jsonl"
    deep = b"[" * 200_000 + b"]" * 200_000
    content = [
        b'\xef\xbb\xbf{"text": "after a byte order mark"}',
        b"",
        b"   ",
        b'{"text": "unclosed',
        b'["a", "list"]',
        b"null",
        b'{"text": "\xff\xfe"}',
        deep,
        b'{"text": "' + b"x" * 2**21 + b'"}',
        b'{"text": "two"} {"text": "objects"}',
        b'{"text": "windows line end"}\r',
        b'{"number": ' + b"9" * 10_000 + b"}",
        b'{"text": "first", "text": "second"}',
        b'{"text": "x", "meta": {"id": 1, "id": 2}, oops',
        b'{"text": "last line without newline"}',
    ]
    path.write_bytes(b"\n".join(content))
    rows = list(read_rows(SourceConfig(path=str(path))))
    assert [row.place.line for row in rows if isinstance(row, Row)] == [1, 11, 15]
    assert rows[0].values == {"text": "after a byte order mark"}
    reasons = {row.place.line: row.reason for row in rows if isinstance(row, BadRow)}
    expected = {
        4: "not JSON",
        5: "list",
        6: "NoneType",
        7: "0xff",
        8: "JSON",
        9: "longer than",
        10: "Extra",
        12: "digits",
        13: "'text' is written twice",
        14: "not JSON",
    }
    assert reasons.keys() == expected.keys()
    for line, word in expected.items():
        assert word in reasons[line], (line, reasons[line])


def test_json_arrays_locate_items_and_the_syntax_error(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[\n {"text": "one"},\n 7,\n {"text": "two"}\n {"text": "three"}]')
    assert bad(path).keys() == {3, 5} and "','" in bad(path)[5]
    path.write_text('[\n {"text": "one"},\n {"text": oops}]')
    assert bad(path).keys() == {3} and "rest is not read" in bad(path)[3]
    path.write_bytes(b'[\n {"text": "\xff"}]')
    assert bad(path).keys() == {2} and "0xff" in bad(path)[2]
    path.write_text('[{"text": "one"}] trailing')
    assert bad(path).keys() == {1}
    path.write_text('[\n {"text": "one", "text": "two"},\n {"text": "three"}]')
    assert bad(path).keys() == {2} and "twice" in bad(path)[2]


def test_broken_tables(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'text,label\r\n"two\r\nlines",1\r\nonly one\r\na,b,c\r\n\r\nlast,2\r\n')
    assert bad(path) == {4: "1 fields, the header has 2", 5: "3 fields, the header has 2"}
    rows = [row for row in read_rows(SourceConfig(path=str(path))) if isinstance(row, Row)]
    assert [(row.place.line, row.values["text"]) for row in rows] == [(2, "two\r\nlines"), (7, "last")]
    path.write_text("text,text\na,b\n")
    with pytest.raises(JaxftError, match="column twice"):
        bad(path)
    path.write_text("prompt;completion\na;b\n")
    with pytest.raises(JaxftError, match="separated by ';'"):
        bad(path)
    cut = tmp_path / "a.jsonl.gz"
    cut.write_bytes(gzip.compress(b'{"text": "one"}\n' * 1000)[:-20])
    with pytest.raises(JaxftError, match="cannot be read"):
        bad(cut)
    broken = tmp_path / "a.parquet"
    broken.write_bytes(b"PAR1 not really")
    assert "not Parquet" in bad(broken)[1]


def test_holdout_is_disjoint_complete_and_keeps_equal_rows_together(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"text": f"row {i % 30}"} for i in range(60)]
    path.write_text(lines(rows))
    train = good(path, holdout=0.2)
    held = good(path, holdout=0.2, part="holdout")
    assert sorted(row["text"] for row in train + held) == sorted(row["text"] for row in rows)
    assert not {row["text"] for row in train} & {row["text"] for row in held}
    assert len(held) == 12 and train == good(path, holdout=0.2)
    assert len(good(path, holdout=7, part="holdout")) in (7, 8)  # an equal row comes along
    # A limit on one side moves nothing to the other.
    assert good(path, holdout=0.2, part="holdout", limit=3) == held[:3]
    with pytest.raises(JaxftError, match="both need at least one"):
        good(path, holdout=60)


def test_holdout_does_not_depend_on_malformed_rows(tmp_path):
    path, broken = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    path.write_text(lines(ROWS))
    broken.write_text("{oops\n" + lines(ROWS))
    held = [
        row.values for row in read_rows(SourceConfig(path=str(broken), holdout=5, part="holdout")) if type(row) is Row
    ]
    assert held == good(path, holdout=5, part="holdout")


def test_limit_counts_readable_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("{oops\n" + lines(ROWS))
    rows = list(read_rows(SourceConfig(path=str(path), limit=2)))
    assert [type(row) for row in rows] == [BadRow, Row, Row]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("data.jsnl", "cannot tell the format"),
        ("dat.jsonl", 'did you mean "data.jsonl"'),
        ("missing/data.jsonl", "no folder"),
        ("*.parquet", "no file matches"),
        ("empty", "no data file in this directory"),
    ],
)
def test_nothing_there(tmp_path, path, words):
    (tmp_path / "data.jsonl").write_text("{}\n")
    (tmp_path / "data.jsnl").write_text("{}\n")
    (tmp_path / "empty").mkdir()
    with pytest.raises(JaxftError, match=words):
        good(tmp_path / path)


def test_a_mistyped_path_in_a_folder_that_is_there_is_no_hub_id(tmp_path, monkeypatch):
    (tmp_path / "data" / "train").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(JaxftError, match='data/trian: no such file or directory; did you mean "train"'):
        good("data/trian")


def test_split_of_plain_files_is_refused_not_ignored(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(ROWS))
    with pytest.raises(JaxftError, match="split and subset are for Hugging Face datasets"):
        good(tmp_path / "a.jsonl", split="train")


def test_hub_id_without_a_network_is_a_sentence(monkeypatch):
    import datasets

    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(JaxftError, match="someone/no-such-set: neither a file .* Without a network, give a local path"):
        good("someone/no-such-set")


def test_builtin_sources(monkeypatch):
    import sys
    import types

    module = types.ModuleType("jaxft.data.builtin")
    module.BUILTIN_SOURCES = {"numbers": lambda: iter(ROWS)}
    monkeypatch.setitem(sys.modules, "jaxft.data.builtin", module)
    assert good("builtin:numbers", limit=4) == ROWS[:4]
    with pytest.raises(JaxftError, match='did you mean "numbers"'):
        good("builtin:nubmers")
