"""Files of records to turns, with a line for each problem.

    read_records("a.json")           # [(1, [("user", "Name a colour."), ("assistant", "Red")]), …]

A file is a JSON array or JSON Lines, gzipped or not; the keys of its first record tell the format.
A record goes by its number in an array, and by its line in JSON Lines. A new record format is a row
of FORMATS.
"""

from __future__ import annotations

import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from hf import Problems, open_regular
from hf.tokenizer import Turns

ROLE_OF = {"system": "system", "user": "user", "human": "user", "assistant": "assistant",
         "gpt": "assistant", "model": "assistant"}
ANSWERS = ("assistant", "text")  # the roles whose text has loss


class Keys(NamedTuple):
    """A format of records that have a key for each turn."""

    keys: dict[str, str]  # {role: key}, in the order of the turns
    optional: str = ""  # the key that may be absent, null or empty: then there is no such turn

    def fits(self, record: dict) -> bool:
        return record.keys() >= {*self.keys.values()} - {self.optional}

    def turns(self, record: dict) -> Turns:
        absent = self.optional if record.get(self.optional) in (None, "") else None
        return [(role, _string(record, k)) for role, k in self.keys.items() if k != absent]


class Messages(NamedTuple):
    """A format of records that have a list of messages, each with a role of ROLE_OF and a text."""

    key: str  # of the list
    role: str  # key of a message's role
    text: str  # key of its text

    def fits(self, record: dict) -> bool:
        """Whether the first message has the role's key: formats may share the list's."""
        messages = record.get(self.key)
        first = messages[0] if isinstance(messages, list) and messages else None
        return self.key in record and (not isinstance(first, dict) or self.role in first)

    def turns(self, record: dict) -> Turns:
        messages = record.get(self.key)
        if not isinstance(messages, list) or not messages:
            raise ValueError(f"'{self.key}' is not a list of messages")
        turns = []
        for n, message in enumerate(messages):
            place = f"{self.key}[{n}]"
            role = _string(message, self.role, f"{place}.")
            if role not in ROLE_OF:
                known = ", ".join(ROLE_OF)
                raise ValueError(f"'{place}.{self.role}' is {role[:40]!r}, not one of {known}")
            turns.append((ROLE_OF[role], _string(message, self.text, f"{place}.")))
        return turns


# A row for each record format; the first that fits a file's first record is that of the file.
FORMATS = (
    Keys({"user": "instruction", "input": "input", "assistant": "output"}, optional="input"),
    Messages("conversations", role="from", text="value"),  # ShareGPT
    Messages("items", role="from", text="value"),
    Messages("messages", role="role", text="content"),  # chat
    Keys({"text": "text"}),
)


def _string(record: object, key: str, place: str = "") -> str:
    if not isinstance(record, dict) or key not in record:
        raise ValueError(f"lacks '{place}{key}'")
    value = record[key]
    if not isinstance(value, str):
        raise ValueError(f"'{place}{key}' is {type(value).__name__}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"'{place}{key}' holds a lone surrogate or broken UTF-8") from None
    return value


def read_records(path: str | os.PathLike) -> list[tuple[int, Turns]]:
    """(number or line, turns) of each record; a ValueError has a line for each problem."""
    problems = Problems()
    records = list(iter_records(path, problems))
    problems.raise_if_any()
    return records


def iter_records(path: str | os.PathLike, problems: Problems) -> Iterator[tuple[int, Turns]]:
    """(number or line, turns) of each record of a file."""
    form = None  # the format of the first record that has a known one: it holds for the file
    for number, where, record in located_values(path, problems):
        try:
            if not isinstance(record, dict):
                raise ValueError(f"the record is {type(record).__name__}, not an object")
            form = form or next((form for form in FORMATS if form.fits(record)), None)
            if not form:
                found = ", ".join(map(repr, record))[:100] or "none"
                raise ValueError(f"unknown record, of keys {found}: neither Alpaca, ShareGPT, chat "
                                 "nor text, as in README.md")
            yield number, form.turns(record)
        except ValueError as error:
            problems.add(f"{where}: {error}")
    if not form and not problems.count:
        problems.add(f"{path}: no records")


def located_values(
    path: str | os.PathLike, problems: Problems
) -> Iterator[tuple[int, str, object]]:
    """(n, "path: record n", value) of each record of a JSON array, which is read whole, or
    (line, "path:line", value) of JSON Lines, which are streamed."""
    try:
        with open_regular(path) as file:
            opener = gzip.open if file.read(2) == b"\x1f\x8b" else open
        # Bytes that are not UTF-8 become lone surrogates, which `_string` refuses.
        with opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape") as file:
            first = next((text.strip()[:2] for text in file if text.strip()), "")
            file.seek(0)
            if first == "{":
                problems.add(f"{path}:1: an object over several lines: expected a JSON array of "
                             "records, or a record on each line")  # fmt: skip
            elif first.startswith("["):
                for array in _parsed(file.read(), path, 1, problems):
                    for n, value in enumerate(array, start=1):
                        yield n, f"{path}: record {n}", value
            else:
                for line, text in enumerate(file, start=1):
                    for value in _parsed(text, path, line, problems) if text.strip() else ():
                        yield line, f"{path}:{line}", value
    except (OSError, EOFError, zlib.error) as error:
        problems.add(f"{path}: {getattr(error, 'strerror', None) or error}")


def _parsed(text: str, path: str | os.PathLike, line: int, problems: Problems) -> list:
    """[value] of JSON that starts at a line of the file; [], and a problem, if it is broken."""
    try:
        return [json.loads(text.rstrip())]
    except RecursionError:
        what = "nested too deep"
    except ValueError as error:  # of a number with too many digits no line is known: the first
        line += getattr(error, "lineno", 1) - 1
        what = f"broken JSON: {getattr(error, 'msg', error)}"
    problems.add(f"{path}:{line}: {what}")
    return []


def source_paths(train: list[str]) -> dict[str, Path]:
    """{name: path} from NAME=PATH ..., or from one directory or glob of train_*.json(l)."""
    pairs = [item.partition("=")[::2] for item in train]
    if len(train) == 1 and "=" not in train[0]:
        folder = Path(train[0]).is_dir()
        pattern = f"{glob.escape(train[0])}/train_*.json*" if folder else train[0]
        found = sorted(glob.glob(pattern))
        pairs = [(Path(p).name.split(".json")[0].removeprefix("train_"), p) for p in found]
        if not pairs:
            raise ValueError(f"--train {train[0]}: no file matches {pattern}")
    problems, paths = Problems(), {}
    for name, path in pairs:
        if not (name and path):
            problems.add(f"--train {name}{'=' * bool(path)}{path}: expected NAME=PATH")
        elif not name.isprintable() or set(name) & set("/,") or len(name) > 100:
            problems.add(f"--train {name}={path}: a name may have no comma, as in --weights, and "
                         "what a file name may have: at most 100 characters, all printable, no /")
        elif name in paths:
            problems.add(f"--train {path}: the name {name} is used twice")
        paths[name] = Path(path)
    problems.raise_if_any()
    return paths
