"""Files of records to turns, with a line for each problem.

    read_records("a.json")           # [(2, [("user", "Name a colour."), ("assistant", "Red")]), …]

A file is a JSON array or JSON Lines, gzipped or not, of Alpaca, ShareGPT, chat or text records: the
keys of its first record tell which. It is streamed, and each problem is named with its line.
"""

from __future__ import annotations

import contextlib
import glob
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from hf.tokenizer import Turns

CHUNK = 1 << 20  # characters read at a time


class Problems(ValueError):
    """What is wrong with the user's input, a line each: the first 60 are kept, all are counted."""

    shown = 60

    def __init__(self, lines: Iterable[str] = ()):
        self.lines, self.count = [], 0
        for line in lines:
            self.add(line)

    def add(self, problem: str) -> None:
        self.count += 1
        if self.count <= self.shown:
            self.lines.append(problem)

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Take over what a ValueError in the block says."""
        try:
            yield
        except ValueError as error:
            new = error if isinstance(error, Problems) else Problems(str(error).splitlines())
            self.lines = (self.lines + new.lines)[: self.shown]
            self.count += new.count

    def raise_if_any(self) -> None:
        if self.count:
            raise self

    def __str__(self) -> str:
        more = self.count - len(self.lines)
        return "\n".join([*self.lines, *([f"… and {more} more"] if more else [])])


def source_paths(train: list[str]) -> dict[str, Path]:
    """{name: path} from NAME=PATH ..., or from one directory or glob of train_*.json(l)."""
    problems, pairs = [], [item.partition("=")[::2] for item in train]
    if len(train) == 1 and "=" not in train[0]:
        folder = Path(train[0]).is_dir()
        pattern = f"{glob.escape(train[0])}/train_*.json*" if folder else train[0]
        found = sorted(glob.glob(pattern))
        pairs = [(Path(p).name.split(".json")[0].removeprefix("train_"), p) for p in found]
        problems += [] if pairs else [f"--train {train[0]}: no file matches {pattern}"]
    paths = {}
    for name, path in pairs:
        if not (name and path):
            problems.append(f"--train {name}{'=' * bool(path)}{path}: expected NAME=PATH")
        elif "," in name:
            problems.append(f"--train {name}={path}: a name may have no comma, as in --weights")
        elif name in paths:
            problems.append(f"--train {path}: the name {name} is used twice")
        paths[name] = Path(path)
    if problems:
        raise ValueError("\n".join(problems))
    return paths


def read_records(path: str | os.PathLike) -> list[tuple[int, Turns]]:
    """(line number, turns) of each record; ValueError with a line "path:line: …" per problem."""
    problems = Problems()
    records = list(iter_records(path, problems))
    if not records and not problems.count:
        problems.add(f"{path}: no records")
    problems.raise_if_any()
    return records


def iter_records(path: str | os.PathLike, problems: Problems) -> Iterator[tuple[int, Turns]]:
    """Stream the records of a JSON array or JSON Lines file, gzipped or not."""
    kind = None
    try:
        for line, where, record in located_values(path, problems):
            try:
                if not isinstance(record, dict):
                    raise ValueError(f"the record is {type(record).__name__}, not an object")
                kind = kind or _format_of(record)
                yield line, FORMATS[kind](record)
            except ValueError as error:
                problems.add(f"{where}: {error}")
    except (OSError, EOFError, zlib.error) as error:
        problems.add(f"{path}: {getattr(error, 'strerror', None) or error}")


def _format_of(record: dict) -> str:
    """The format whose keys the record has; it then holds for the whole file."""
    for kind, keys in KEYS.items():
        if all(key in record for key in keys):
            return kind
    found = ", ".join(map(repr, record))[:100] or "none"
    known = "; ".join(", ".join(keys) for keys in KEYS.values())
    raise ValueError(f"unknown record, of keys {found}; expected {known}")


KEYS = {
    "alpaca": ("instruction", "output"),
    "sharegpt": ("conversations",),
    "sharegpt items": ("items",),
    "chat": ("messages",),
    "text": ("text",),
}

ANSWERS = ("assistant", "text")  # the roles whose text has loss
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant",
         "gpt": "assistant", "model": "assistant"}


def _alpaca(record: dict) -> Turns:
    context = _string(record, "input") if record.get("input") is not None else ""
    turns = [("user", _string(record, "instruction")), ("input", context)]
    return [turn for turn in turns if turn[0] == "user" or turn[1]] + [
        ("assistant", _string(record, "output"))
    ]


def _conversation(key: str, role_key: str, text_key: str, record: dict) -> Turns:
    if key not in record:
        raise ValueError(f"lacks '{key}'")
    messages = record[key]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"'{key}' is not a list of messages")
    turns = []
    for n, message in enumerate(messages):
        where = f"{key}[{n}]."
        if not isinstance(message, dict):
            raise ValueError(f"'{key}[{n}]' is {type(message).__name__}, not an object")
        role = _string(message, role_key, where)
        if role not in ROLES:
            known = ", ".join(ROLES)
            raise ValueError(f"'{where}{role_key}' is {role[:40]!r}, not one of {known}")
        turns.append((ROLES[role], _string(message, text_key, where)))
    return turns


def _string(record: dict, key: str, where: str = "") -> str:
    if key not in record:
        raise ValueError(f"lacks '{where}{key}'")
    value = record[key]
    if not isinstance(value, str):
        raise ValueError(f"'{where}{key}' is {type(value).__name__}, not a string")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f"'{where}{key}' holds a lone surrogate or broken UTF-8") from None
    return value


FORMATS = {
    "alpaca": _alpaca,
    "sharegpt": lambda record: _conversation("conversations", "from", "value", record),
    "sharegpt items": lambda record: _conversation("items", "from", "value", record),
    "chat": lambda record: _conversation("messages", "role", "content", record),
    "text": lambda record: [("text", _string(record, "text"))],
}


def json_values(path: str | os.PathLike, problems: Problems) -> Iterator[tuple[int, object]]:
    """(line, value) of each record of a JSON array or JSON Lines; broken JSON is a problem."""
    with open(path, "rb") as file:
        opener = gzip.open if file.read(2) == b"\x1f\x8b" else open
    # Bytes that are not UTF-8 become lone surrogates, which `_string` refuses with the line.
    with opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape") as file:
        start = next((text for text in iter(lambda: file.read(4096), "") if text.strip()), "")
        file.seek(0)
        if start.lstrip().startswith("["):
            array = JsonArray(file)
            try:
                yield from array.items()
            except (ValueError, RecursionError) as error:
                problems.add(f"{path}:{array.line}: {_json_error(error)}")
            return
        for line, text in enumerate(file, start=1):
            if line == 1 and text.strip() == "{":
                problems.add(f"{path}:1: an object over several lines: expected a JSON array of "
                             "records, or a record on each line")  # fmt: skip
                return
            if text.strip():
                try:
                    value = json.loads(text)
                except (ValueError, RecursionError) as error:
                    problems.add(f"{path}:{line}: {_json_error(error)}")
                else:
                    yield line, value


def located_values(
    path: str | os.PathLike, problems: Problems
) -> Iterator[tuple[int, str, object]]:
    """(line, "path:line", value) of each record, with its number in a line that has several."""
    last, n = 0, 0
    for line, value in json_values(path, problems):
        last, n = line, n + 1 if line == last else 1
        yield line, f"{path}:{line}" + f" (record {n} of the line)" * (n > 1), value


def _json_error(error: ValueError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "nested too deep"
    return f"broken JSON: {getattr(error, 'msg', error)}"


class JsonArray:
    """The items of one array, decoded in pieces: memory holds a piece, not the file.

    Reading ends at the first broken item, for there is no telling where the next one starts.
    """

    decoder = json.JSONDecoder()
    space = re.compile(r"\s*")

    def __init__(self, file):
        self.file, self.line = file, 1  # the line of text[at]
        self.text, self.at = "", 0

    def items(self) -> Iterator[tuple[int, object]]:
        """(line, item); ValueError or RecursionError at `self.line`."""
        self._expect("[")
        if self._peek() != "]":
            while True:
                self._peek()
                line = self.line
                yield line, self._item()
                if self._peek() != ",":
                    break
                self._expect(",")
        self._expect("]")
        if self._peek():
            raise ValueError("text after the end of the array")

    def _grow(self) -> bool:
        """Read on, dropping what is done; False at the end of the file."""
        rest = self.text[self.at:]
        more = self.file.read(max(CHUNK, len(rest)))  # doubling keeps a huge item linear
        self.text, self.at = rest + more, 0
        return bool(more)

    def _move(self, end: int) -> None:
        self.line += self.text.count("\n", self.at, end)
        self.at = end

    def _peek(self) -> str:
        """The next character that is not space; "" at the end of the file."""
        while True:
            self._move(self.space.match(self.text, self.at).end())
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._grow():
                return ""

    def _expect(self, char: str) -> None:
        found = self._peek()
        if found != char:
            wanted = "',' or ']'" if char == "]" else f"{char!r}"
            raise ValueError(f"expected {wanted}, found {found or 'the end of the file'!r}")
        self._move(self.at + 1)

    def _item(self) -> object:
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                # Either broken or cut off by the end of the piece: then the error is there.
                cut = error.msg.startswith("Unterminated") or error.pos > len(self.text) - 16
                if cut and self._grow():
                    continue
                self._move(error.pos)
                raise
            self._move(end)
            return value
