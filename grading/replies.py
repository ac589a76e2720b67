"""What models say: checkpoints opened and loaded, conversations answered in batches on all ranks,
and the files in which the replies are kept as they come.

    c = open_model("runs/x/model")
    model = load(c, "auto", device)
    with Journal(path, total=1) as journal:
        for i, (first, second) in respond(model, c, [("Hi!", "Why?")], [], 512, batch_size=16):
            journal.append({"id": i, "outputs": [first.text, second.text]})
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from tqdm import tqdm

import shard
from hf import templates, tokenizer
from hf.tokenizer import Turns
from model import ModelConfig, Transformer, dtype_of, generate, open_checkpoint, read_tensors
from sources.records import Problems, located_values


class Checkpoint(NamedTuple):
    """A model's directory, checked but not loaded."""

    name: str
    directory: Path
    config: ModelConfig
    tokenizer: tokenizer.Tokenizer
    template: str
    stops: list[int]  # ids that end an answer


def open_model(name: str, template: str | None = None) -> Checkpoint:
    """ValueError with a line for each problem of the model, its tokenizer or the template."""
    directory, config = open_checkpoint(name)
    tok = tokenizer.load_tokenizer(directory)
    template = template or templates.trained_with(directory)
    try:
        stops = templates.stop_ids(tok, template)
    except ValueError as error:
        raise ValueError(f"--template {template}: {error}") from None
    return Checkpoint(name, directory, config, tok, template, [*stops, *config.eos_ids])


def load(c: Checkpoint, dtype: str, device: torch.device) -> Transformer:
    """The model, sharded where there are several ranks. Collective: every rank calls it."""
    model = shard.build(c.config, dtype_of(dtype, device.type), device)
    shard.fill(model, read_tensors(c.directory, c.config))
    return model


class Reply(NamedTuple):
    text: str
    tokens: int
    # "stop"; "length": cut by --max-new-tokens or the last position; "no room": the prompt alone
    # is too long
    end: str


def respond(
    model: Transformer, c: Checkpoint, asked: list[tuple[str, ...]], before: Turns,
    max_new_tokens: int, batch_size: int, temperature: float = 0.0, seed: int = 0,
) -> Iterator[tuple[int, list[Reply]]]:  # fmt: skip
    """(index, a reply to each turn) of each user as they are done, `batch_size` on each rank at a
    time, the longest first. asked: what each user says turn by turn, after the turns `before`.
    Collective: every rank calls it, takes all of it, and gets all replies."""

    def prompt(i: int, said: list[Reply]) -> list[int]:
        turns = list(before)
        for text, reply in zip(asked[i], [*said, None], strict=False):
            turns += [("user", text)] + ([("assistant", reply.text)] if reply else [])
        return templates.render_prompt(c.tokenizer, c.template, turns)

    order = sorted(range(len(asked)), key=lambda i: -len(prompt(i, [])))
    size = batch_size * dist.get_world_size()
    for n in range(0, len(order), size):
        said = {i: [] for i in order[n : n + size]}
        for _ in asked[0]:
            prompts = [prompt(i, replies) for i, replies in said.items()]
            new = answer_batch(model, c, prompts, max_new_tokens, temperature, seed + n)
            for replies, reply in zip(said.values(), new, strict=True):
                replies.append(reply)
        yield from said.items()


def answer_batch(
    model: Transformer, c: Checkpoint, prompts: list[list[int]], max_new_tokens: int,
    temperature: float, seed: int,
) -> list[Reply]:  # fmt: skip
    """The reply to each prompt, of which each rank generates its share. Collective."""
    rank, world = dist.get_rank(), dist.get_world_size()
    room = c.config.max_positions
    replies = [Reply("", 0, "no room")] * len(prompts)
    fit = [i for i, prompt in enumerate(prompts) if len(prompt) < room]
    if not fit:
        return replies
    # Every rank has the same number of rows: the last prompt fills up.
    own = [fit[min(k, len(fit) - 1)] for k in range(rank, -(-len(fit) // world) * world, world)]
    new = generate(
        model, [prompts[i] for i in own], max_new_tokens, temperature, eos_id=c.stops,
        seed=seed + own[0], stop_when=all_finished if world > 1 else bool,
    )  # fmt: skip
    every = [None] * world
    dist.all_gather_object(every, dict(zip(own, new, strict=True)))
    before = templates.TEMPLATES[c.template].before["user"]
    mark = "" if templates.CONTROL.search(before) else before.strip()
    for i, ids in {i: ids for part in every for i, ids in part.items()}.items():
        text = c.tokenizer.decode(ids)
        if mark:  # no control token opens a user's turn: a model may go on with one of its own
            text = text.split(mark)[0]
        limit = min(max_new_tokens, room - len(prompts[i]))
        replies[i] = Reply(text.strip(), len(ids), "stop" if len(ids) < limit else "length")
    return replies


def all_finished(finished: bool) -> bool:
    """Whether all ranks are. Collective: every rank calls it."""
    flag = torch.tensor(int(finished))  # on the CPU, where gloo carries it
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag)


# --------------------------------------------------------------------------------------------------
# Files of rows


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
    """The rows of a journal, [] if there is none; a last line without its end is left out.
    ValueError with path:line for any other line that is not a JSON object."""
    rows = []
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for n, line in enumerate(lines, start=1):
        try:
            rows.append({**json.loads(line)})
        except (ValueError, TypeError):
            raise ValueError(f"{path}:{n}: not a JSON object") from None
    return rows


class Journal:
    """JSON Lines that grow row by row and survive being cut off: the rows so far, and the only
    writer of more. Threads may append at once. On other ranks than the first it does nothing."""

    def __init__(self, path: Path, total: int = 0):
        """total: of rows to come, for a progress bar. Raises ValueError if the file cannot be
        written to, or another process does; see `read` for what else."""
        self.lock, self.file, self.rows = threading.Lock(), None, []
        first = not dist.is_initialized() or dist.get_rank() == 0
        interval = 0.5 if sys.stderr.isatty() else 20  # seconds
        self.bar = tqdm(total=total, disable=not (first and total), mininterval=interval,
                        maxinterval=interval)  # fmt: skip
        if not first:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(path, "ab")  # noqa: SIM115 (see __exit__)
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the file closes
        except BlockingIOError:
            raise ValueError(f"{path}: another process is writing to it") from None
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}") from None
        self.rows = read(path)
        self.file.truncate(path.read_bytes().rfind(b"\n") + 1)

    def append(self, row: dict) -> None:
        """Add a row; once this returns, killing the process does not lose it."""
        with self.lock:
            if self.file:
                self.file.write(json.dumps(row).encode() + b"\n")
                self.file.flush()
            self.rows.append(row)
            self.bar.update()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()
        if self.file:
            self.file.close()


def settings_of(c: Checkpoint, max_new_tokens: int, dtype: str) -> dict:
    """What decides the generations, beside the questions. Weights count by size and time."""
    files = sorted(c.directory.glob("*.safetensors"))
    weights = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return {"model": c.name, "weights": fingerprint(weights), "template": c.template,
            "max_new_tokens": max_new_tokens, "dtype": dtype}  # fmt: skip


def fingerprint(thing: object) -> str:
    return hashlib.sha256(json.dumps(thing).encode()).hexdigest()[:16]


def rows_so_far(path: Path, settings: dict) -> list[dict]:
    """The generations in a file. ValueError with a line for each setting that was another."""
    rows = read(path)
    if any("settings" not in row for row in rows):
        raise ValueError(f"{path}: not a file of generations: take another --out")
    old = rows[-1]["settings"] if rows else settings
    Problems(
        f"{path} holds generations of other settings: {key} was {old.get(key)!r}, now "
        f"{settings.get(key)!r}: take another --out"
        for key in sorted(old.keys() | settings.keys()) if old.get(key) != settings.get(key)
    ).raise_if_any()  # fmt: skip
    return rows
