"""Files and datasets -> rows, each with its place; a row that cannot be read is a `BadRow`, never a lost one."""

import csv
import glob
import gzip
import hashlib
import importlib
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from jaxft.data.config import RowsConfig
from jaxft.errors import JaxftError, nearest

SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
}
MAX_LINE_BYTES = 64 * 2**20  # a longer "line" is a broken file; reading it whole could exhaust the memory


class Place(NamedTuple):
    """Where a row is: `file:line`, counted from 1; `unit` says row where the format has no lines."""

    file: str
    line: int
    unit: str = "line"

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.unit == "line" else f"{self.file}:{self.unit} {self.line}"


class Row(NamedTuple):
    place: Place
    values: dict[str, Any]


class BadRow(NamedTuple):
    place: Place
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


# ---- which files -----------------------------------------------------------------------------------------------------


def _suffix(path: str) -> str:
    return Path(path.removesuffix(".gz")).suffix.lower()


def _format_of(path: str, given: str) -> str:
    if given != "auto":
        return given
    if _suffix(path) not in SUFFIXES:
        raise JaxftError(
            f"{path}: cannot tell the format from the name; known endings: {', '.join(SUFFIXES)} (also .gz). "
            "Say it in the source's format"
        )
    return SUFFIXES[_suffix(path)]


def _is_saved_dataset(path: str) -> bool:
    return any(os.path.isfile(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json"))


def _files(source: RowsConfig) -> list[str] | None:
    """The files of a source in sorted order, or None where it is a dataset for the `datasets` library."""
    path = os.path.expanduser(source.path)
    if source.format == "dataset":
        return None
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        if _is_saved_dataset(path) or source.split is not None or source.subset is not None:
            return None
        found = sorted(str(p) for p in Path(path).rglob("*") if p.is_file() and not p.name.startswith("."))
        files = [p for p in found if source.format != "auto" or _suffix(p) in SUFFIXES]
        if not files:
            raise JaxftError(f"{path}: no data file in this directory; known endings: {', '.join(SUFFIXES)}")
        return files
    if glob.has_magic(path):
        files = sorted(p for p in glob.glob(path, recursive=True) if os.path.isfile(p))
        if not files:
            raise JaxftError(f"{path}: no file matches this pattern (working directory {os.getcwd()})")
        return files
    folder = os.path.dirname(path)
    # What can be a hub id is one, unless its first part is a folder here: then it is a file mistyped, and no network
    # has to time out to say so.
    if _suffix(path) in SUFFIXES or os.path.isdir(folder) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        folder = folder or "."
        near = nearest(os.path.basename(path), os.listdir(folder)) if os.path.isdir(folder) else f"no folder {folder}"
        raise JaxftError(f"{path}: no such file or directory; {near}")
    return None


def _read_files(files: list[str], source: RowsConfig) -> Iterator[Row | BadRow]:
    readers = {"jsonl": _jsonl, "json": _json, "parquet": _parquet, "csv": _csv, "text": _text}
    for path in files:
        reader = readers[_format_of(path, source.format)]
        try:
            yield from reader(path, source)
        except (OSError, EOFError, zlib.error) as error:  # the last two: a gzip file cut short or damaged
            raise JaxftError(f"{path}: cannot be read: {error}") from error


def _open(path: str) -> BinaryIO:
    return gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb")  # type: ignore[return-value]


# ---- JSON ------------------------------------------------------------------------------------------------------------


class _Decoder(json.JSONDecoder):
    """JSON that notes a name written twice in an object, of which json would keep the last value in silence."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=self._object)
        self.twice: str | None = None

    def raw_decode(self, s: str, idx: int = 0) -> tuple[Any, int]:
        self.twice = None
        return super().raw_decode(s, idx)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            self.twice = next(name for name in names if names.count(name) > 1)
        return found

    def row(self, place: Place, value: Any) -> Row | BadRow:
        """A row of what was just decoded."""
        if self.twice is not None:
            return BadRow(place, f"{self.twice[:60]!r} is written twice in one object; keep one")
        if isinstance(value, dict):
            return Row(place, value)
        return BadRow(place, f"expected an object with columns, found {type(value).__name__}")


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8: byte 0x{error.object[error.start]:02x} at byte {error.start + 1}"


def _jsonl(path: str, source: RowsConfig) -> Iterator[Row | BadRow]:
    decoder = _Decoder()
    with _open(path) as file:
        for number in itertools.count(1):
            line = file.readline(MAX_LINE_BYTES + 1)
            if not line:
                return
            place = Place(path, number)
            if len(line) > MAX_LINE_BYTES:
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE_BYTES)
                yield BadRow(place, f"line longer than {MAX_LINE_BYTES >> 20} MiB")
                continue
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not line.strip():
                continue
            try:
                yield decoder.row(place, decoder.decode(line.decode("utf-8")))
            except UnicodeDecodeError as error:
                yield BadRow(place, _not_utf8(error))
            except json.JSONDecodeError as error:
                yield BadRow(place, f"not JSON: {error.msg} at column {error.colno}")
            except (RecursionError, ValueError) as error:
                yield BadRow(place, f"not JSON that can be read: {error}")


def _json(path: str, source: RowsConfig) -> Iterator[Row | BadRow]:
    """A list of objects, `{"name": [objects]}`, one object, or JSON lines under the wrong name."""
    with _open(path) as file:
        content = file.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield BadRow(Place(path, content.count(b"\n", 0, error.start) + 1), _not_utf8(error))
        return
    body, decoder = text.lstrip(), _Decoder()
    if body.startswith("["):
        yield from _json_array(path, text, len(text) - len(body))
        return
    try:
        value = decoder.decode(body)
    except (ValueError, RecursionError):
        yield from _jsonl(path, source)  # "Extra data": one object a line
        return
    lists = (
        [v for v in value.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
        if isinstance(value, dict)
        else []
    )
    if len(lists) == 1 and len(value) <= 2 and not {"messages", "conversations"} & set(value):
        for number, item in enumerate(lists[0], 1):
            yield decoder.row(Place(path, number, "row"), item)
    else:
        yield decoder.row(Place(path, 1), value)


def _json_array(path: str, text: str, start: int) -> Iterator[Row | BadRow]:
    """Items decoded one by one, so that each has its line."""
    decoder, space = _Decoder(), re.compile(r"\s*")
    at, line, counted = start + 1, 1, 0
    while True:
        at = space.match(text, at).end()  # type: ignore[union-attr]
        line, counted = line + text.count("\n", counted, at), at
        if text[at : at + 1] == "]":
            if text[at + 1 :].strip():
                yield BadRow(Place(path, line), "text after the end of the list")
            return
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            # Past a syntax error the borders of the following items are unknown.
            yield BadRow(
                Place(path, error.lineno), f"not JSON: {error.msg} at column {error.colno}; the rest is not read"
            )
            return
        except (RecursionError, ValueError) as error:
            yield BadRow(Place(path, line), f"not JSON that can be read: {error}; the rest is not read")
            return
        yield decoder.row(Place(path, line), value)
        at = space.match(text, at).end()  # type: ignore[union-attr]
        if text[at : at + 1] == ",":
            at += 1
        elif text[at : at + 1] != "]":
            place = Place(path, line + text.count("\n", counted, at))
            yield BadRow(place, "not JSON: expected ',' or ']'; the rest is not read")
            return


# ---- tables and text -------------------------------------------------------------------------------------------------


def _csv(path: str, source: RowsConfig) -> Iterator[Row | BadRow]:
    # Bytes that are not UTF-8 become lone surrogates, which the columns' check reports for the row they are in.
    csv.field_size_limit(MAX_LINE_BYTES)
    with _open(path) as file, io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="") as text:
        reader = csv.reader(text, delimiter="\t" if _suffix(path) == ".tsv" else ",", strict=True)
        header: list[str] | None = None
        while True:
            place = Place(path, reader.line_num + 1)
            try:
                fields = next(reader, None)
            except csv.Error as error:
                yield BadRow(place, f"not CSV: {error}")
                continue
            if fields is None:
                return
            if not fields:
                continue
            if header is None:
                header = fields
                if len(set(header)) < len(header):
                    raise JaxftError(f"{place}: the header names a column twice: {', '.join(header)}")
                if len(header) == 1 and (other := next((s for s in ";|\t" if s in header[0]), None)):
                    raise JaxftError(
                        f"{place}: the header is one column, {header[0]!r}: its names look separated by {other!r}; "
                        "fields are separated by commas (in .tsv files by tabs)"
                    )
            elif len(fields) != len(header):
                yield BadRow(place, f"{len(fields)} fields, the header has {len(header)}")
            else:
                yield Row(place, dict(zip(header, fields, strict=True)))


def _parquet(path: str, source: RowsConfig) -> Iterator[Row | BadRow]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(Place(path, number, "row"), values)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        yield BadRow(Place(path, number + 1, "row"), f"not Parquet that can be read: {str(error).splitlines()[0]}")


def _text(path: str, source: RowsConfig) -> Iterator[Row | BadRow]:
    with _open(path) as file:
        content = file.read()
    text = content.decode("utf-8-sig", errors="surrogateescape")
    if source.sample_by == "document":
        pieces: Iterable[tuple[int, str]] = [(1, text)]
    elif source.sample_by == "line":
        pieces = enumerate(text.split("\n"), 1)
    else:
        pieces = _paragraphs(text)
    for line, piece in pieces:
        if piece.strip():
            yield Row(Place(path, line), {"text": piece.removesuffix("\r")})


def _paragraphs(text: str) -> Iterator[tuple[int, str]]:
    start = 1
    lines: list[str] = []
    for number, line in enumerate([*text.split("\n"), ""], 1):
        if line.strip():
            start = start if lines else number
            lines.append(line)
        elif lines:
            yield start, "\n".join(lines)
            lines = []


# ---- datasets and built-in sources -----------------------------------------------------------------------------------


def _dataset(source: RowsConfig) -> Iterator[Row]:
    import datasets

    path = os.path.expanduser(source.path)
    saved = os.path.isdir(path) and _is_saved_dataset(path)
    try:
        data = (
            datasets.load_from_disk(path) if saved else datasets.load_dataset(path, source.subset, split=source.split)
        )
    except Exception as error:  # the library raises two dozen kinds; each says the same to the user
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
        raise JaxftError(
            f"{source.path}: neither a file or directory here (working directory {os.getcwd()}) nor a dataset that "
            f"could be loaded: {type(error).__name__}: {reason}. Without a network, give a local path"
        ) from error
    label = source.path
    if isinstance(data, dict):
        split = source.split or ("train" if "train" in data else next(iter(data)) if len(data) == 1 else "(none given)")
        if split not in data:
            raise JaxftError(f"{source.path}: no split {split}; {nearest(split, map(str, data))}")
        data = data[split]
        label = f"{source.path}[{split}]"
    elif saved and source.split is not None:
        raise JaxftError(f"{source.path}: saved as one split, so split={source.split!r} cannot be chosen; leave it out")
    elif source.split is not None:
        label = f"{source.path}[{source.split}]"
    for number, values in enumerate(data, 1):
        yield Row(Place(label, number, "row"), values)


def _builtin(source: RowsConfig) -> Iterator[Row]:
    # Imported by name and late: the built-in corpora are read from installed packages and cost time.
    registry = importlib.import_module("jaxft.data.builtin").BUILTIN_SOURCES
    name = source.path.removeprefix("builtin:")
    if name not in registry:
        raise JaxftError(f"{source.path}: no built-in source {name!r}; {nearest(name, registry)}")
    for number, values in enumerate(registry[name](), 1):
        yield Row(Place(source.path, number, "row"), values)


# ---- public ----------------------------------------------------------------------------------------------------------


def locate(source: RowsConfig) -> list[str] | None:
    """The files of a source in sorted order, None where it is not files (a Hugging Face dataset, a built-in source).

    Raises:
        JaxftError: no file is there; the message names what is.
    """
    return None if source.path.startswith("builtin:") else _files(source)


def _all_rows(source: RowsConfig) -> Iterator[Row | BadRow]:
    if source.path.startswith("builtin:"):
        return _builtin(source)
    files = _files(source)
    if files is None:
        return _dataset(source)
    if source.split is not None or source.subset is not None:
        raise JaxftError(f"{source.path}: split and subset are for Hugging Face datasets, and these are plain files")
    return _read_files(files, source)


def _row_hash(row: Row) -> int:
    try:
        text = json.dumps(row.values, sort_keys=True, default=str, ensure_ascii=True)
    except (RecursionError, TypeError, ValueError):  # nested too deep, or keys of several types: it has its place
        text = str(row.place)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _holdout_threshold(source: RowsConfig) -> int:
    """The hash up to which a row is held out, from a first pass over the source."""
    hashes = np.array([_row_hash(row) for row in _all_rows(source) if isinstance(row, Row)], np.uint64)
    assert source.holdout is not None
    count = source.holdout if isinstance(source.holdout, int) else round(source.holdout * len(hashes))
    if not 0 < count < len(hashes):
        raise JaxftError(
            f"{source.label}: holdout={source.holdout} of {len(hashes)} rows leaves {count} held out and "
            f"{len(hashes) - count} for training; both need at least one"
        )
    return int(np.partition(hashes, count - 1)[count - 1])


def read_rows(source: RowsConfig) -> Iterator[Row | BadRow]:
    """The rows of a source in file order, malformed ones included, after `part` and `limit`.

    Raises:
        JaxftError: nothing is at the path, the format is unknown, or the hold-out leaves a side empty.
    """
    rows = _all_rows(source)
    if source.holdout is not None:
        threshold = _holdout_threshold(source)
        wanted = source.part == "holdout"
        rows = (row for row in rows if isinstance(row, BadRow) or (_row_hash(row) <= threshold) == wanted)
    taken = 0
    for row in rows:
        yield row
        taken += isinstance(row, Row)
        if taken == source.limit:
            return
