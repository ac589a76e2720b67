"""What models say: checkpoints opened and loaded, conversations answered in batches on all ranks,
and the files in which the replies are kept as they come.

    c = open_model("runs/x/model")
    for i, reply in respond(load(c, "auto", device), c, chats, max_new_tokens=512, batch_size=16):
        …
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from tqdm import tqdm

import shard
from grading.journal import Journal, read
from hf import templates, tokenizer
from hf.tokenizer import Turns
from model import ModelConfig, Transformer, dtype_of, generate, open_checkpoint, read_tensors


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
    model: Transformer,
    c: Checkpoint,
    chats: list[Turns],
    max_new_tokens: int,
    batch_size: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[tuple[int, Reply]]:
    """(index, reply) of each chat as it is done, `batch_size` on each rank at a time, the longest
    first. Collective: every rank calls it, takes all of it, and gets all replies."""
    if not chats:
        return
    rank, world = dist.get_rank(), dist.get_world_size()
    device = next(model.parameters()).device
    prompts = [templates.render_prompt(c.tokenizer, c.template, chat) for chat in chats]
    order = sorted(range(len(chats)), key=lambda i: -len(prompts[i]))
    room = c.config.max_positions
    fit = [i for i in order if len(prompts[i]) < room]
    yield from ((i, Reply("", 0, "no room")) for i in order if len(prompts[i]) >= room)
    for n in range(0, len(fit), batch_size * world):
        part = fit[n : n + batch_size * world]
        # Every rank has the same number of rows: the last chat fills up.
        rows = -(-len(part) // world)
        own = [part[min(k, len(part) - 1)] for k in range(rank, rows * world, world)]
        new = generate(
            model, [prompts[i] for i in own], max_new_tokens, temperature, eos_id=c.stops,
            seed=seed + own[0], stop_when=all_finished if world > 1 else bool, device=device,
        )  # fmt: skip
        every = [None] * world
        dist.all_gather_object(every, dict(zip(own, new, strict=True)))
        for i, ids in {i: ids for replies in every for i, ids in replies.items()}.items():
            text = c.tokenizer.decode(ids)
            if mark := turn_mark(c.template):  # a model may go on with a question of its own
                text = text.split(mark)[0]
            limit = min(max_new_tokens, room - len(prompts[i]))
            yield i, Reply(text.strip(), len(ids), "stop" if len(ids) < limit else "length")


def all_finished(finished: bool) -> bool:
    """Whether all ranks are. Collective: every rank calls it."""
    flag = torch.tensor(int(finished))  # on the CPU, where gloo carries it
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag)


def turn_mark(template: str) -> str:
    """The text that opens a user's turn, where no control token does."""
    before = templates.TEMPLATES[template].before["user"]
    return "" if templates.CONTROL.search(before) else before.strip()


# --------------------------------------------------------------------------------------------------
# Files of replies


class Writer:
    """Rank 0's journal and progress bar; nothing on the others."""

    def __init__(self, path: Path, total: int):
        first = dist.get_rank() == 0
        self.journal = Journal(path) if first else None
        self.bar = progress_bar(total, disable=not first or not total)

    def append(self, row: dict) -> None:
        if self.journal:
            self.journal.append(row)
        self.bar.update()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()
        if self.journal:
            self.journal.__exit__()


def progress_bar(total: int, disable: bool = False) -> tqdm:
    interval = 0.5 if sys.stderr.isatty() else 20
    return tqdm(total=total, disable=disable, mininterval=interval, maxinterval=interval)


def settings_of(c: Checkpoint, max_new_tokens: int, dtype: str) -> dict:
    """What decides the generations, beside the questions. Weights count by size and time."""
    files = sorted(c.directory.glob("*.safetensors"))
    weights = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return {"model": c.name, "weights": fingerprint(weights), "template": c.template,
            "max_new_tokens": max_new_tokens, "dtype": dtype}  # fmt: skip


def fingerprint(thing: object) -> str:
    return hashlib.sha256(json.dumps(thing).encode()).hexdigest()[:16]


def other_settings(path: Path, settings: dict) -> list[str]:
    """A line for each setting by which the generations in a file differ from what is asked for."""
    rows = read(path)
    if any("settings" not in row for row in rows):
        return [f"{path}: not a file of generations: take another --out"]
    old = rows[-1]["settings"] if rows else settings
    return [
        f"{path} holds generations of other settings: {key} was {old.get(key)!r}, now "
        f"{settings.get(key)!r}: take another --out"
        for key in sorted(old.keys() | settings.keys())
        if old.get(key) != settings.get(key)
    ]
