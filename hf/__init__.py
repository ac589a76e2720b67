"""What Hugging Face's files say: configurations, weights, tokenizers, chat templates. What a new
family of models needs is said at the top of families.py.

Here stands what all that others wrote goes through: how a file is opened, how its JSON is read, how
its Jinja is run, and how lines are printed.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import fcntl
import functools
import json
import math
import os
import re
import resource
import stat
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from pathlib import Path
from typing import BinaryIO, TextIO

JSON_BYTES = 100_000_000  # of a file; the tokenizer.json of 262,144 tokens has 33 MB
DEPTH = 100  # of arrays and objects in one another
SOUND = "sound"  # what a child process says
TODAY = date(2025, 1, 1)  # what a chat template is told: a run is to be the same on every day
TRIAL_SECONDS, TRIAL_BYTES = 10, 4_000_000_000  # of computing, and of memory, in `tried`
DIGITS = 40  # of a whole number: transformers writes 10^30 where there is no limit


def open_regular(path: str | os.PathLike, mode: str = "rb") -> BinaryIO:
    """Open a regular file. OSError for a pipe, which may block for ever, a device, which may never
    end, and a directory."""

    def opener(name: str, flags: int) -> int:
        descriptor = os.open(name, flags | os.O_NONBLOCK, 0o666)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))

    return open(path, mode, opener=opener)


def try_lock(file: BinaryIO) -> bool:
    """Lock a file until it is closed, unless another process has done so."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        say(f"note: nothing keeps another run out: {file.name} cannot be locked ({error.strerror})")
    return True


def read_json(file: Path, most: int = JSON_BYTES) -> dict:
    """The object in a JSON file of at most so many bytes. Raises ValueError, in one line, where
    there is none to read."""
    try:
        with open_regular(file) as opened:
            text = opened.read(most + 1)
        if len(text) > most:
            raise ValueError(f"it has more than {most:,} bytes")
        content = parse_json(text)
        if re.search(rb"\\u[dD][89a-fA-F]", text):  # halves of characters: is the other one there?
            json.dumps(content, ensure_ascii=False).encode()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"{file}: cannot be read ({why})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: not a JSON object")
    return content


def parse_json(text: str | bytes) -> object:
    """What JSON says, in which every number is finite and no key comes twice. Raises ValueError, in
    one line."""
    text = text if isinstance(text, str) else text.decode()
    try:
        content = json.loads(text, object_pairs_hook=distinct, parse_int=_whole,
                             parse_float=_finite, parse_constant=_finite)  # fmt: skip
        level = [content]
        for _ in range(DEPTH + 1):
            level = [x.values() if isinstance(x, dict) else x
                     for x in level if isinstance(x, (dict, list))]  # fmt: skip
            level = [y for x in level for y in x]
    except RecursionError:
        level = [...]
    if level:
        raise ValueError(f"nested deeper than {DEPTH}")
    return content


def distinct(pairs: list[tuple[str, object]]) -> dict:
    """An object of JSON. ValueError if a key comes twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:40]!r} comes twice in an object")
    return found


def _whole(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _finite(number: str) -> float:
    if not math.isfinite(float(number)):
        raise ValueError(f"{number[:DIGITS]} is not a finite number")
    return float(number)


@functools.cache
def compiled(source: str, trusted: bool = False) -> Callable[..., str]:
    """What renders a chat template, which knows what transformers lets it know. It runs in a
    sandbox, and raises what it likes."""
    import jinja2.ext  # comes with torch
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    version = [int(n) for n in re.findall(r"\d+", jinja2.__version__)[:3]]
    if version < [3, 1, 6] and not trusted:
        raise ValueError("the sandbox of jinja2 before 3.1.6 leaks: pip install -U jinja2")
    source.encode()  # bytes that are not UTF-8 would be rendered as anything
    def refuse(why: str) -> None:
        raise jinja2.TemplateError(why)

    loop_controls = [jinja2.ext.loopcontrols]
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                        extensions=loop_controls)  # fmt: skip
    env.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    env.globals |= {"raise_exception": refuse, "strftime_now": TODAY.strftime}
    # A block that marks an answer, for those who ask for that, is rendered as any text.
    marks = {"generation": "if true", "endgeneration": "endif"}
    tags = re.compile(r"({%-?\s*)((?:end)?generation)(?=\s*-?%})")
    return env.from_string(tags.sub(lambda tag: tag[1] + marks[tag[2]], source)).render


def tried(work: Callable[[], object], file: Path) -> None:
    """Do in a child process, within limits, what a file can make crash, fill the memory or run for
    ever. ValueError that names it if it does, or if `work` raises one."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the other threads, which a child does not have
        child = os.fork()
    if child == 0:
        said = "?"
        try:
            said = _limited(work)
        except ValueError as error:
            said = str(error)
        except BaseException as error:
            said = f"not understood: {error!r}"
        finally:
            os.write(write, said.encode(errors="replace")[:2000])
            os._exit(0)
    os.close(write)
    with open(read, encoding="utf-8", errors="replace") as pipe:
        said = pipe.read()
    with contextlib.suppress(ChildProcessError):  # of a parent that lets its children go
        os.waitpid(child, 0)
    if said != SOUND:
        said = said or (f"crashes, or takes more than {TRIAL_SECONDS} s of computing or "
                        f"{TRIAL_BYTES / 1e9:g} GB")  # fmt: skip
        raise ValueError(f"{file}: {said}")


def _limited(work: Callable[[], object]) -> str:
    """Silence this process, limit it, and do the work."""
    faulthandler.disable()
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    limits = {resource.RLIMIT_CPU: TRIAL_SECONDS}
    if held := re.search(r"VmData:\s*(\d+)", Path("/proc/self/status").read_text()):
        limits[resource.RLIMIT_DATA] = 1024 * int(held[1]) + TRIAL_BYTES
    for what, most in limits.items():
        hard = resource.getrlimit(what)[1]
        resource.setrlimit(what, (most if hard < 0 else min(most, hard), hard))
    work()
    return SOUND


def shown(line: object) -> str:
    """A line as it may be printed. Characters that move a terminal's cursor, colour it, begin other
    lines or turn the text round are spelled out."""
    text = str(line)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\t" else ascii(c)[1:-1] for c in text)


def say(*lines: object, file: TextIO | None = None) -> None:
    """Print lines: whatever is printed goes through here."""
    for line in lines:
        print(shown(line), file=file, flush=True)


def say_why(*lines: object) -> None:
    """Print on stderr why this process ends; and tell torchrun, whose own traceback would otherwise
    stand below, by the file and in the form that its `record` writes: it then says so last."""
    say(*lines, file=sys.stderr)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        text = "\n".join(map(shown, lines))
        extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}))


def refuse(*lines: object) -> int:
    """Say what is wrong with the input, on the first rank of a node. Returns the exit code."""
    if os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) != "0":
        time.sleep(3)  # torchrun ends the other ranks when the first one leaves
    say_why(*lines)
    return 2


class Problems(ValueError):
    """What is wrong with the user's input, a line each: the first 60 are kept, all are counted."""

    shown = 60

    def __init__(self, lines: Iterable[str] = ()):
        self.lines, self.count = [], 0
        for line in lines:
            self.add(line)

    @classmethod
    def of(cls, error: Exception) -> Problems:
        """What an error says: of any other it is one line."""
        return error if isinstance(error, Problems) else cls([str(error)])

    def add(self, problem: str) -> None:
        self.count += 1
        if self.count <= self.shown:
            self.lines.append(problem if len(problem) <= 2000 else f"{problem[:2000]}…")

    @contextlib.contextmanager
    def collecting(self, prefix: str = "") -> Iterator[None]:
        """Take over what a ValueError in the block says, each line with a prefix."""
        try:
            yield
        except ValueError as error:
            new = Problems.of(error)
            self.lines = (self.lines + [prefix + line for line in new.lines])[: self.shown]
            self.count += new.count

    def raise_if_any(self) -> None:
        if self.count:
            raise self

    def __iter__(self) -> Iterator[str]:
        more = self.count - len(self.lines)
        return iter([*self.lines, *([f"… and {more} more"] if more else [])])

    def __str__(self) -> str:
        return "\n".join(self)
