"""What models say: checkpoints opened and loaded, conversations answered in batches on all ranks,
and the files in which the replies are kept as they come.

    asked = [Asked({"id": 1}, ["Hi!", "Why?"])]
    rows = answer(file, open_model("runs/x/model"), asked, None,
                  lambda said: {"last": said[-1].output}, device, "auto", 512, 16)
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from tqdm import tqdm

import shard
from hf import Problems, open_regular, parse_json, pretrained, say, templates, tokenizer, try_lock
from hf.tokenizer import Turns
from model import ModelConfig, Transformer, dtype_of, generate, open_checkpoint, read_tensors
from sources.records import located_values


class Checkpoint(NamedTuple):
    """A model's directory, checked but not loaded."""

    name: str
    directory: Path
    config: ModelConfig
    tokenizer: tokenizer.Tokenizer
    template: str | None
    stops: list[int]  # ids that end an answer
    notes: list[str]


def open_model(name: str, template: str | None = None, talks: bool = True) -> Checkpoint:
    """ValueError with a line for each problem of the model, its tokenizer or the template, which
    may be unknown if the model is not to talk."""
    directory, config = open_checkpoint(name)
    tok, notes = tokenizer.load_tokenizer(directory), []
    if not template:
        template, why = templates.trained_with(tok)
        notes = [f"template {template}, {why}"] * bool(template)
    stops = templates.stop_ids(tok, template) if template or talks else list(tok.eos_ids)
    told = tokenizer.read_settings(directory, "config.json", "generation_config.json")
    told = told.get("eos_token_id", [])
    if template and stops[0] not in (told if isinstance(told, list) else [told]):
        notes.append(f"{tok.name(stops[0])} ends an answer, but neither config.json nor "
                     "generation_config.json says so: other software goes on past it")  # fmt: skip
    return Checkpoint(name, directory, config, tok, template, [*stops, *config.eos_ids], notes)


def load(c: Checkpoint, dtype: str, device: torch.device) -> Transformer:
    """The model, sharded where there are several ranks; says what is to be known of it. ValueError
    if they have different ones. Collective: every rank calls it."""
    tokens = templates.fingerprint(c.tokenizer, c.template)
    about = pretrained.sizes(c.directory) | {"its tokenizer": tokens}
    shard.check_same({f"--model {c.name}: {name}": of for name, of in about.items()})
    if dist.get_rank() == 0:
        say(*(f"note: {c.name}: {note}" for note in c.notes))
    model = shard.build(c.config, dtype_of(dtype, device.type), device)
    shard.fill(model, read_tensors(c.directory, c.config))
    return model


class Reply(NamedTuple):
    output: str
    tokens: int
    end: str  # "stop"; "length": it was cut; "no room": the prompt alone is too long


class Asked(NamedTuple):
    """A question, of one turn or several."""

    about: dict  # what is kept with the replies; its first entry identifies the question
    turns: Sequence[str]  # what the user says, turn by turn; all questions have as many
    temperature: float = 0.0


def answer(
    file: Path, c: Checkpoint, asked: list[Asked], limit: int | None,
    as_row: Callable[[list[Reply]], dict], device: torch.device, dtype: str, max_new_tokens: int,
    batch_size: int, before: Turns = (), seed: int = 0,
) -> list[dict]:  # fmt: skip
    """On rank 0 the rows of a file, once it has one for each of the first `limit` questions: what
    it lacks is answered, and appended as `as_row` of the replies to the turns, beside what is kept
    with them.

    before: turns of the conversation that come first
    ValueError if the file is of other settings. Collective: every rank calls it.
    """
    weights = [(f.name, f.stat().st_size, f.stat().st_mtime_ns)  # stand for what they hold
               for f in sorted(c.directory.glob("*.safetensors"))]  # fmt: skip
    settings = {
        "model": c.name, "weights": fingerprint(weights), "template": c.template, "dtype": dtype,
        "max_new_tokens": max_new_tokens, "exemplars": fingerprint(before),
        "questions": fingerprint([q.turns for q in asked]),
    } | ({"seed": seed} if any(q.temperature for q in asked) else {})  # fmt: skip
    shard.check_same({name: of for name, of in settings.items() if name != "weights"})
    settings, rows = shard.broadcast_from_rank0(lambda: (settings, read(file)))
    old = rows[-1].get("settings", {}) if rows else settings
    if other := [key for key in settings if old.get(key) != settings[key]]:
        raise ValueError(f"{file} holds replies of other settings ({', '.join(other)}): take "
                         "another --out")  # fmt: skip
    name = next(iter(asked[0].about))
    done = {row[name] for row in rows}
    todo = [q for q in asked[:limit] if q.about[name] not in done]
    with shard.jointly(lambda: Journal(file)) as journal:
        model = load(c, dtype, device) if todo else None
        answered = respond(model, c, todo, before, max_new_tokens, batch_size, seed)
        quiet = not todo or dist.get_rank() > 0
        for q, said in tqdm(answered, total=len(todo), disable=quiet, mininterval=5):
            journal.append({**q.about, **as_row(said), "settings": settings})
    wanted = {q.about[name] for q in asked[:limit]}
    return [row for row in journal.rows if row[name] in wanted]


def respond(
    model: Transformer, c: Checkpoint, asked: list[Asked], before: Turns, max_new_tokens: int,
    batch_size: int, seed: int,
) -> Iterator[tuple[Asked, list[Reply]]]:  # fmt: skip
    """Each question and a reply to each turn as they are done, `batch_size` on each rank at a time,
    the longest first, those of a temperature together. Collective: every rank calls it, takes all
    of it, and gets all replies."""

    def prompt(q: Asked, said: list[Reply]) -> list[int]:
        turns = list(before)
        for text, reply in zip(q.turns, [*said, None], strict=False):
            turns += [("user", text)] + ([("assistant", reply.output)] if reply else [])
        return templates.render_prompt(c.tokenizer, c.template, turns)

    size = batch_size * dist.get_world_size()
    for temperature in dict.fromkeys(q.temperature for q in asked):
        group = [q for q in asked if q.temperature == temperature]
        group.sort(key=lambda q: -len(prompt(q, [])))
        for n in range(0, len(group), size):
            batch = [(q, []) for q in group[n : n + size]]
            for _ in group[0].turns:
                prompts = [prompt(q, said) for q, said in batch]
                seeds = [seed_of(seed, q.turns, len(said)) for q, said in batch]
                new = answer_batch(model, c, prompts, max_new_tokens, temperature, seeds)
                for (_, said), reply in zip(batch, new, strict=True):
                    said.append(reply)
            yield from batch


def answer_batch(
    model: Transformer, c: Checkpoint, prompts: list[list[int]], max_new_tokens: int,
    temperature: float, seeds: list[int],
) -> list[Reply]:  # fmt: skip
    """The reply to each prompt, which depends on that and its seed alone; each rank generates its
    share. Collective."""
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
        seeds=[seeds[i] for i in own], stop_when=all_finished,
    )  # fmt: skip
    for i, ids in shard.gathered(dict(zip(own, new, strict=True))).items():
        text = c.tokenizer.decode(ids)
        if c.template == "alpaca":  # no control token opens a user's turn: it may go on with one
            text = text.split("### Instruction:")[0]
        limit = min(max_new_tokens, room - len(prompts[i]))
        replies[i] = Reply(text.strip(), len(ids), "stop" if len(ids) < limit else "length")
    return replies


def all_finished(finished: bool) -> bool:
    """Whether all ranks are. Collective: every rank calls it."""
    flag = torch.tensor(int(finished))  # on the CPU, where gloo carries it
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag)


def convert_rows(path: str | os.PathLike, convert: Callable[[dict], object], lacks: str) -> list:
    """`convert` of each row of a JSON array or JSON Lines. Where it raises because of what the row
    is, one ValueError has a line "path:line: lacks …" for each."""
    problems, found = Problems(), []
    for _, where, row in located_values(path, problems):
        try:
            found.append(convert(row))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            problems.add(f"{where}: lacks {lacks}")
    if not found and not problems.count:
        problems.add(f"{path}: no rows")
    problems.raise_if_any()
    return found


def is_graded(row: dict) -> bool:
    """Whether a row is one of `answer` to a problem, which can be scored."""
    settings = row.get("settings") if isinstance(row.get("settings"), dict) else {}
    texts = row.get("answer"), row.get("output"), settings.get("model")
    return all(isinstance(text, str) for text in texts)


def read(path: Path) -> list[dict]:
    """The rows of a journal, [] if there is none; a last line without its end is left out.
    ValueError with path:line for any other line that is not a JSON object."""
    if not path.exists():
        return []
    with open_regular(path) as file:
        lines = file.read().split(b"\n")[:-1]
    rows = []
    for n, line in enumerate(lines, start=1):
        try:
            rows.append({**parse_json(line)})
        except (ValueError, TypeError):
            raise ValueError(f"{path}:{n}: not a JSON object") from None
    return rows


class Journal:
    """JSON Lines that grow row by row and survive being cut off: the rows so far, and the only
    writer of more. Threads may append at once. Other ranks than the first write nothing."""

    def __init__(self, path: Path):
        """Raises ValueError if another process writes to the file, and what `read` does."""
        first, self.rows = not dist.is_initialized() or dist.get_rank() == 0, []
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path if first else os.devnull, "ab")  # noqa: SIM115 (see __exit__)
        if first:
            if not try_lock(self.file):  # until the file is closed
                raise ValueError(f"{path}: another process is writing to it")
            self.rows = read(path)
            self.file.truncate(path.read_bytes().rfind(b"\n") + 1)

    def append(self, row: dict) -> None:
        """Add a row; once this returns, killing the process does not lose it."""
        self.file.write(json.dumps(row).encode() + b"\n")  # a row at a time: Python's own lock
        self.file.flush()
        self.rows.append(row)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_) -> None:
        self.file.close()


def seed_of(*things: object) -> int:
    """A seed that is as good as random, and different where anything is."""
    return int(fingerprint(things), 16)


def fingerprint(thing: object) -> str:
    return hashlib.sha256(json.dumps(thing).encode()).hexdigest()[:16]
