"""Rows of JSON files: those of a user, checked, and a file of our own that grows row by row,
survives being cut off, and says what is in it already.

    with Journal(path) as journal:
        done = {row["id"] for row in journal.rows}
        journal.append({"id": 7, …})
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

from sources.records import Problems, located_values


def convert_rows(path: str | os.PathLike, convert: Callable[[dict], object], lacks: str) -> list:
    """`convert` of each row of a JSON array or JSON Lines. Where it raises because of what the row
    is, one ValueError has a line "path:line: lacks …" for each."""
    problems, found = Problems(), []
    try:
        for _, where, row in located_values(path, problems):
            try:
                found.append(convert(row))
            except (KeyError, TypeError, ValueError, IndexError, AttributeError):
                problems.add(f"{where}: lacks {lacks}")
    except (OSError, EOFError, zlib.error) as error:
        problems.add(f"{path}: {getattr(error, 'strerror', None) or error}")
    if not found and not problems.count:
        problems.add(f"{path}: no rows")
    problems.raise_if_any()
    return found


def read(path: Path) -> list[dict]:
    """The rows of a file, [] if there is none; a last line without its end is left out.

    Raises ValueError with path:line for any other line that is not a JSON object, and for a file
    that cannot be read.
    """
    rows = []
    try:
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    for n, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{n}: not a JSON object")
        rows.append(row)
    return rows


class Journal:
    """The rows so far, and the only writer of more. Threads may append at once."""

    def __init__(self, path: Path):
        """Raises ValueError if the file cannot be written to, or another process does; see `read`
        for what else."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.lock, self.file = threading.Lock(), open(path, "ab")  # noqa: SIM115 (see __exit__)
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}") from None
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the file closes
        except OSError:
            raise ValueError(f"{path}: another process is writing to it") from None
        self.rows = read(path)
        self.file.truncate(path.read_bytes().rfind(b"\n") + 1)

    def append(self, row: dict) -> None:
        """Add a row; once this returns, killing the process does not lose it."""
        with self.lock:
            self.file.write(json.dumps(row).encode() + b"\n")
            self.file.flush()
            self.rows.append(row)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_) -> None:
        self.file.close()
