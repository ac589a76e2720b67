"""Sources to turns, with a line for each problem.

    for number, turns, record in iter_records(locate("a.json"), problems, notes): …
    # 1, [("user", "Name a colour."), ("assistant", "Red")], {"instruction": …}

A source is a local file or a data set of the hub: a JSON array, JSON Lines, gzipped or not, or
Parquet. The keys of its first record tell the format: a new format is a row of FORMATS. All that a
record holds is read, or counted as unread, or refused. A record goes by its line in JSON Lines, by
its number elsewhere.
"""

from __future__ import annotations

import glob
import gzip
import json
import os
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from hf import Problems, distinct, open_regular
from hf.tokenizer import Turns

# A row for each format: {role: key} of the turns in their order, of which an input may be absent;
# or the key of a list of messages. The first that fits a source's first record is that of all.
Format = dict[str, str] | str
FORMATS: tuple[Format, ...] = (
    {"user": "instruction", "input": "input", "assistant": "output"},  # Alpaca
    {"user": "instruction", "input": "context", "assistant": "response"},  # Dolly
    "conversations",  # ShareGPT
    "conversation",
    "items",
    "messages",  # chat
    "data",  # UltraChat: texts, a question and an answer in turn
    {"user": "prompt", "assistant": "completion"},
    {"user": "prompt", "assistant": "response"},
    {"user": "question", "assistant": "answer"},
    {"user": "question", "assistant": "response"},  # OpenOrca
    {"user": "query", "assistant": "response"},
    {"user": "input", "assistant": "output"},  # LMFlow
    {"text": "text"},
)
ROLES = {
    "system": "system developer",
    "user": "user human tool observation",
    "assistant": "assistant gpt chatgpt model function_call",
}
ROLE_OF = {name: role for role, names in ROLES.items() for name in names.split()}
ANSWERS = ("assistant", "text")  # the roles whose text has loss
# Keys of records and messages whose content has no place among turns of text.
REFUSED = {"tools", "functions", "tool_calls", "function_call", "images", "image", "videos",
           "audios", "chosen", "rejected", "reasoning_content", "thinking"}  # fmt: skip
WEIGHTS = {"weight", "train", "loss_weight"}  # of a message: at 0 an answer has no loss
SUFFIXES = (".parquet", ".jsonl", ".json", ".gz")  # of files; no hub id ends with one


# A record

def fits(form: Format, record: object) -> bool:
    """Whether a record has what the format says, or nothing in the place of messages."""
    if not isinstance(record, dict):
        return False
    if isinstance(form, dict):
        return record.keys() >= {key for role, key in form.items() if role != "input"}
    value = record.get(form, "absent")
    if isinstance(value, list) and value:
        return isinstance(value[0], dict) or form == "data"
    return _nothing(value) and form != "data"


def turns_of(form: Format | None, record: object) -> tuple[Turns, list[str]]:
    """The turns of a record, and the keys that hold something but were not read. ValueError if it
    has something else, or in another shape, than `form` says."""
    if not isinstance(record, dict):
        raise ValueError(f"the record is {type(record).__name__}, not an object")
    record, rated = dict(record), isinstance(form, str) or form and "completion" in form.values()
    beside = {"label"} if rated else {"role"} if form == {"text": "text"} else set()
    _refuse(record, REFUSED | beside)
    if not form:
        found = ", ".join(map(repr, record))[:100] or "none"
        raise ValueError(f"unknown record, of keys {found}: none of docs/data.md's formats; "
                         "PATH:prompt=KEY,answer=KEY may name two")  # fmt: skip
    turns = _take_turns(form, record)
    return turns, [key for key, value in record.items() if not _nothing(value)]


def _take_turns(form: Format, record: dict) -> Turns:
    """The turns, which are taken out of the record."""
    systems = [key for key in ("system", "system_prompt") if not _nothing(record.get(key))]
    texts = [_take(record, key) for key in systems if "text" not in form]
    if len(set(texts)) > 1:
        raise ValueError("'system' and 'system_prompt' are two system texts")
    turns = [("system", text) for text in texts[:1]]
    if isinstance(form, str):
        for n, message in enumerate(_take_list(record, form)):
            turn, rest = _turn(message, f"{form}[{n}]", n)
            if n == 0 and turns and turn[0] == "system" and turn != turns[0]:
                raise ValueError(f"'{systems[0]}' and '{form}[0]' are two system texts")
            turns += [turn] if n or turn not in turns else []
            record |= {f"{form}[].{key}": value for key, value in rest.items()}
        return turns
    for n, pair in enumerate(_take_list(record, "history")):
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"'history[{n}]' is not a question and its answer")
        texts = (_text(text, f"history[{n}]") for text in pair)
        turns += zip(("user", "assistant"), texts, strict=True)
    for role, key in form.items():
        if role == "input" and _nothing(record.get(key)):
            key = role  # whatever a format calls it, it may be called so
            if _nothing(record.get(key)):
                continue
        turns.append((role, _take(record, key)))
    return turns


def _turn(message: object, place: str, n: int) -> tuple[tuple[str, str], dict]:
    """The turn of message n, and what it holds beside."""
    if isinstance(message, str):
        return (("user", "assistant")[n % 2], _text(message, place)), {}
    if not isinstance(message, dict):
        raise ValueError(f"'{place}' is {type(message).__name__}, not a message")
    rest = dict(message)
    _refuse(rest, REFUSED, f"{place}.")
    names = ("from", "value") if "from" in rest else ("role", "content")
    name, text = (_take(rest, key, f"{place}.") for key in names)
    if name not in ROLE_OF:
        known = ", ".join(ROLE_OF)
        raise ValueError(f"'{place}.{names[0]}' is {name[:40]!r}, not one of {known}")
    role = ROLE_OF[name]
    for key in WEIGHTS & rest.keys():
        if ROLE_OF[name] == "assistant" or not rest[key]:  # no other turn can have loss
            weight = rest.pop(key)
            if not _nothing(weight) and weight not in (0, 1):
                raise ValueError(f"'{place}.{key}' is {weight!r}: permitted are 0 and 1")
            role = "given" if weight == 0 and role == "assistant" else role
    return (role, text), rest


def _nothing(value: object) -> bool:
    """Whether there is nothing in a value: null, NaN, or empty."""
    return value is None or value != value or value in ("", [], {})


def _refuse(record: dict, keys: set[str], place: str = "") -> None:
    for key in keys & record.keys():
        if not _nothing(record[key]):
            raise ValueError(f"'{place}{key}' would be lost: put what it holds into the text of a "
                             "turn, or take out the key or the record")  # fmt: skip


def _take_list(record: dict, key: str) -> list:
    value = record.pop(key, None)
    if not isinstance(value, list) and not _nothing(value):
        raise ValueError(f"'{key}' is {type(value).__name__}, not a list")
    return [] if _nothing(value) else value


def _take(record: dict, key: str, place: str = "") -> str:
    if key not in record:
        raise ValueError(f"lacks '{place}{key}'")
    return _text(record.pop(key), place + key)


def _text(value: object, name: str) -> str:
    """A text, or a list of parts of it as one; nothing is the empty text."""
    text = ""
    for part in value if isinstance(value, list) else [value]:
        kind, held = type(part).__name__, {}
        if isinstance(part, dict):
            kind, held = part.get("type", "text"), part
            part = part.get("text") if kind == "text" else part
        lost = kind == "text" and "text" not in held and held.keys() - {"type"}
        if lost and not all(_nothing(held[key]) for key in lost):
            raise ValueError(f"'{name}' is an object of {', '.join(map(repr, held))}, not a text")
        if not isinstance(part, str) and not _nothing(part):
            raise ValueError(f"'{name}' is {str(kind)[:40]}, not a string")
        text += part if isinstance(part, str) else ""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"'{name}' holds a lone surrogate or broken UTF-8") from None
    return text


# A source

def source_paths(items: list[str], flag: str = "--train") -> dict[str, Path]:
    """{name: path} of [NAME=]PATH ...; a directory stands for its train_* files, a glob for all."""
    problems, paths = Problems(), {}
    for item in items:
        name, path = re.fullmatch("(?:([^=/:]*)=)?(.*)", item, re.S).groups()
        folder, found = Path(path).is_dir(), [path]
        if name is None and (folder or re.search(r"[*?]", path)):
            pattern = f"{glob.escape(path)}/train_*" if folder else path
            found = sorted(p for p in glob.glob(pattern) if p.endswith(SUFFIXES) or not folder)
            if not found:
                problems.add(f"{flag} {item}: no file matches {pattern}")
        for p in found:
            bare = re.sub(r"(\.jsonl?|\.parquet|\.gz)+$", "", Path(p).name)
            label = bare.removeprefix("train_" * (p != path)) if name is None else name
            if name is not None and p and folder:
                problems.add(f"{flag} {item}: a folder, whose train_* files are sources by their "
                             f"own names: give {flag} {p}")
            elif not (label and p):
                problems.add(f"{flag} {item}: expected NAME=PATH")
            elif not label.isprintable() or set(label) & set("/,") or len(label) > 100:
                problems.add(f"{flag} {label}={p}: a name may have no comma, as in --weights, and "
                             "what a file name may have: at most 100 characters, all printable")
            elif label in paths:
                problems.add(f"{flag} {p}: the name {label} is used twice: give NAME=PATH")
            paths[label] = Path(p)
    problems.raise_if_any()
    return paths


class Source(NamedTuple):
    """Where records are, as it was said; files, read one after another; a format, if stated."""

    path: str
    files: list[Path]
    form: Format | None = None


def locate(path: str | os.PathLike) -> Source:
    """The files of PATH, or of a data set OWNER/NAME[:SPLIT][[CONFIG]] of the hub, downloaded if
    they are not cached; either may end with :prompt=KEY,answer=KEY. Raises ValueError."""
    stated = re.fullmatch(r"(.*?)(?::prompt=([^,]+),answer=([^,]+))?", str(path), re.S)
    place, user, assistant = stated.groups()
    form = {"user": user, "assistant": assistant} if user else None
    on_hub = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?(?:\[([^]]+)\])?", place)
    if not on_hub or os.path.isdir(place.split("/")[0]) or place.endswith(SUFFIXES):
        return Source(str(path), [Path(place)], form)
    from hf.pretrained import find_dataset

    return Source(str(path), find_dataset(*on_hub.groups(), SUFFIXES), form)


def iter_records(
    source: Source, problems: Problems, notes: dict[str, Counter]
) -> Iterator[tuple[int, Turns, dict]]:
    """(number or line, turns, record) of each record; files are numbered on from one to the next.
    Counts in `notes` the keys that are not read, and what is read from files with names unsaid."""
    form, last, faults = source.form, 0, Counter()  # the first record with a format tells it
    for file in source.files:
        before = last
        for number, where, record in located_values(file, problems):
            last = before + number
            try:
                form = form or next((form for form in FORMATS if fits(form, record)), None)
                turns, unread = turns_of(form, record)
            except ValueError as error:
                faults[str(error)] += 1
                if faults[str(error)] <= 5:
                    problems.add(f"{where}: {error}")
                continue
            if unread:
                notes["keys that are not read"].update(unread)
            if str(file) not in source.path:
                notes["read from"]["/".join(file.parts[-3:])] += 1
            yield last, turns, record
    for what, n in faults.items():
        if n > 5:
            problems.add(f"{source.path}: {n - 5} more: {what}")
    if not form and not problems.count:
        problems.add(f"{source.path}: no records")


# What a file is that opens so, and what to make of it.
FOREIGN = {
    rb"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it with zstd -d",
    rb"PK\x03\x04|BZh|\xfd7zXZ": "a zip archive, or compressed by bzip2 or xz: unpack it",
    rb"\xff\xfe|\xfe\xff|[\[{]\0|\0[\[{]": "in UTF-16: iconv -f UTF-16 -t UTF-8 makes it UTF-8",
    rb"ARROW1|\xff{4}": "in Arrow's format: to_parquet() of datasets makes Parquet of it",
}


def located_values(
    path: str | os.PathLike, problems: Problems
) -> Iterator[tuple[int, str, object]]:
    """(n, "path: record n", value) of each record of a JSON array, which is read whole, or of
    Parquet, which is streamed; (line, "path:line", value) of JSON Lines, streamed too."""
    try:
        with open_regular(path) as file:
            start = file.read(8)
        for opening, what in FOREIGN.items():
            if re.match(opening, start):
                raise OSError(f"is {what}")
        if start.startswith(b"PAR1"):
            for n, value in enumerate(_parquet(path), start=1):
                yield n, f"{path}: record {n}", value
            return
        opener = gzip.open if start.startswith(b"\x1f\x8b") else open
        # Bytes that are not UTF-8 become lone surrogates, which `_text` refuses.
        with opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape") as file:
            first = next((text.strip() for text in file if text.strip()), "")
            file.seek(0)
            line = [] if first.startswith("[") else _parsed(first, path, 1, Problems())
            if first.startswith("[") or first.endswith(("{", "[", ",")) or any(map(_wrapped, line)):
                for value in _parsed(file.read(), path, 1, problems):
                    records = value if isinstance(value, list) else _wrapped(value) or [value]
                    for n, record in enumerate(records, start=1):
                        yield n, f"{path}: record {n}", record
            elif not line and not first.startswith("{") and re.search("[,;\t]", first):
                raise OSError("is neither JSON nor Parquet: if it is CSV, to_json(…, "
                              "orient='records', lines=True) of pandas makes JSON Lines of it")
            else:
                for n, text in enumerate(file, start=1):
                    for value in _parsed(text, path, n, problems) if text.strip() else ():
                        yield n, f"{path}:{n}", value
    except (OSError, EOFError, zlib.error) as error:
        problems.add(f"{path}: {getattr(error, 'strerror', None) or error}")


def _wrapped(value: object) -> list | None:
    """The records that an object has as a list, as LMFlow's {"type": …, "instances": […]} does."""
    for key in ("instances", "data"):
        records = value.get(key) if isinstance(value, dict) else None
        if isinstance(records, list) and records and isinstance(records[0], dict):
            return records if not records[0].keys() & {"from", "role"} else None
    return None


def _parquet(path: str | os.PathLike) -> Iterator[dict]:
    """The rows of a Parquet file, of which a piece at a time is in memory. Raises OSError."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise OSError("Parquet needs pyarrow: pip install pyarrow") from None
    try:
        with parquet.ParquetFile(path) as file:
            for piece in file.iter_batches(1024):
                yield from piece.to_pylist()
    except (ArrowException, ValueError) as error:
        raise OSError(f"damaged Parquet: {error}") from None


def _parsed(text: str, path: str | os.PathLike, line: int, problems: Problems) -> list:
    """[value] of JSON that starts at a line of the file; [], and a problem, if it is broken."""
    try:
        return [json.loads(text.rstrip(), object_pairs_hook=distinct)]
    except RecursionError:
        what = "nested too deep"
    except ValueError as error:  # of a number with too many digits no line is known: the first
        line += getattr(error, "lineno", 1) - 1
        what = f"broken JSON: {getattr(error, 'msg', error)}"
    problems.add(f"{path}:{line}: {what}")
    return []


# What is drawn from sources, for other trainers

# How LLaMA-Factory is told of messages.jsonl.
DATASET_INFO = {"mixture": {
    "file_name": "messages.jsonl", "formatting": "sharegpt", "columns": {"messages": "messages"},
    "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user",
             "assistant_tag": "assistant", "system_tag": "system"},
}}  # fmt: skip


def write_records(out: Path, drawn: dict) -> list[str]:
    """Write the records of a mixture, in the order of mixture.jsonl, as they are in their files,
    and the conversations as messages. Returns notes. ValueError if a file cannot be read any more.
    """
    records, chats, problems = [], [], Problems()
    for source in drawn.values():
        found = dict.fromkeys(source.numbers.tolist())
        for n, *record in iter_records(locate(source.path), problems, defaultdict(Counter)):
            if n in found:
                found[n] = record
        problems.raise_if_any()
        if None in found.values():
            raise ValueError(f"{source.path}: was written to while it was read")
        for turns, record in (found[n] for n in source.numbers.tolist()):
            records.append(record)
            if messages := as_messages(turns):
                chats.append({"messages": messages})
    for name, rows in ("records.jsonl", records), ("messages.jsonl", chats):
        lines = (json.dumps(strict(row), ensure_ascii=False) + "\n" for row in rows)
        (out / name).write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
    (out / "dataset_info.json").write_text(json.dumps(DATASET_INFO, indent=1))
    texts = len(records) - len(chats)
    given = sum(any("weight" in message for message in chat["messages"]) for chat in chats)
    return [f"note: {what}" for n, what in (
        (texts, f"{texts} records are text: messages.jsonl lacks them"),
        (given, f"{given} conversations have answers of weight 0, which other trainers may learn"),
    ) if n]  # fmt: skip


def strict(row: object) -> object:
    """What JSON can say of a record: NaN and infinities are null, dates are texts."""
    return json.loads(json.dumps(row, default=str), parse_constant=lambda _: None)


def as_messages(turns: Turns) -> list[dict]:
    """A conversation in OpenAI's format; [] for text. An input joins the question."""
    messages = []
    for role, text in turns:
        if role == "input":
            messages[-1]["content"] += f"\n{text}"
        elif role != "text":
            weight = {"weight": 0} if role == "given" else {}
            role = "assistant" if weight else role
            messages.append({"role": role, "content": text} | weight)
    return messages


def recipes(folder: Path) -> list[str]:
    """How other tools are told of what --mode draw wrote into a folder."""
    file = folder / "messages.jsonl"
    return [
        f"  open-instruct   --mixer_list {file} 1.0   (finetune.py: --dataset_mixer_list)",
        f"  LLaMA-Factory   dataset_dir: {folder}, dataset: mixture",
        f"  axolotl         datasets: [{{path: {file}, type: chat_template}}]",
        f"  TRL             datasets: [{{path: json, data_files: {file}}}]",
    ]
