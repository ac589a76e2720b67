"""Records to tokens to deterministic, stratified micro-batches.

    source = load_dataset("alpaca.json", tokenizer, "alpaca", max_length=512, cache_dir="cache")
    batches = Batches([source, …], val, 64, val_batch_size=64, micro_batch_size=8, seed=0)
    train, val, counts = batches.step(t)  # a pure function of t: a resume needs only the step

A file is read once, by sources/records.py, tokenised, and kept as memory-mapped arrays in a cache.

B batch, T time (tokens of the longest sample, padded), S sources.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import math
import os
import shutil
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from hf import Problems, open_regular, read_json
from hf.templates import encode_conversations, fingerprint
from hf.tokenizer import Tokenizer, Turns, byte_tokenizer, load_tokenizer  # noqa: F401 (public)
from sources.records import ANSWERS, Source, iter_records, locate

FORMAT_VERSION = 7  # of a cache entry; raise it when the arrays or the tokenisation change
IGNORE = -100  # label of a position without loss


# Datasets

@dataclass
class Dataset:
    """Tokenised samples, in one array; a token t without loss is stored as ~t."""

    tokens: np.ndarray  # int32, of all samples one after another; a memory map if cached
    starts: np.ndarray  # int64, where each sample starts in `tokens`
    lengths: np.ndarray  # int64
    hashes: np.ndarray  # uint64, of each whole record before truncation
    prompts: np.ndarray  # uint64, of what each record asks, but for case and white space
    numbers: np.ndarray  # int64, of each record in its file, from 1: in JSON Lines, its line
    max_length: int
    path: str = ""
    sha256: str = ""  # of the file's contents
    dropped: dict[str, int] = field(default_factory=dict)  # records left out, by reason
    notes: dict[str, dict[str, int]] = field(default_factory=dict)  # {what: {thing: records}}
    duplicates: int = 0  # records that repeat an earlier one; they are kept
    of: int = 0  # records that these were drawn from, if they were

    def __len__(self) -> int:
        return len(self.starts)

    def stored(self, i: int) -> np.ndarray:
        return self.tokens[self.starts[i] : self.starts[i] + self.lengths[i]]

    def remarks(self) -> list[str]:
        """What should be known of how the records were read, a line each."""
        lines = [f"{n} records dropped: {reason}" for reason, n in self.dropped.items() if n]
        for what, counts in self.notes.items():
            parts = [f"{thing} ({n} records)" for thing, n in Counter(counts).most_common(20)]
            lines += [f"{what}: {', '.join(parts)}{', …' * (len(counts) > 20)}"] * bool(parts)
        return lines + [f"{self.duplicates} records are repetitions"] * (self.duplicates > 0)

    def select(self, which: np.ndarray) -> Dataset:
        """The samples of an index or boolean array, sharing the tokens."""
        names = ("starts", "lengths", "hashes", "prompts", "numbers")
        return replace(self, **{name: getattr(self, name)[which] for name in names})

    @classmethod
    def from_records(
        cls, records: Iterable[Turns], tokenizer: Tokenizer, template: str, max_length: int
    ) -> Dataset:
        """Tokenise records in memory."""
        counts, numbered = defaultdict(Counter), enumerate(records, start=1)
        parts = _tokenise(numbered, tokenizer, template, max_length, counts)
        dataset = cls._of_parts(parts, counts, max_length=max_length)
        return replace(dataset, sha256=hashlib.sha256(dataset.hashes.tobytes()).hexdigest())

    @classmethod
    def _of_parts(cls, parts: Iterable[Arrays], counts: Counts, **rest) -> Dataset:
        first, *more = parts
        arrays = {name: np.concatenate([first[name], *(part[name] for part in more)]) if more else
                  first[name] for name in ARRAYS}  # fmt: skip (a memory map stays one)
        starts = np.cumsum(arrays["lengths"]) - arrays["lengths"]
        rest["duplicates"] = len(starts) - len(np.unique(arrays["hashes"]))
        rest["dropped"], rest["notes"] = counts["dropped"], {**counts}
        del rest["notes"]["dropped"]
        return cls(starts=starts, **arrays, **rest)


Arrays = dict[str, np.ndarray]
Counts = dict[str, dict[str, int]]  # {what: {thing: records}}: those "dropped", and notes
ARRAYS = {"tokens": np.int32, "lengths": np.int64, "hashes": np.uint64, "prompts": np.uint64,
          "numbers": np.int64}  # fmt: skip


def _tokenise(
    records: Iterable[tuple[int, Turns]], tokenizer: Tokenizer | None, template: str,
    max_length: int, counts: Counts,
) -> Iterator[Arrays]:
    """The arrays of a Dataset, in parts; counts what is left out, and what is to be noted. Without
    a tokenizer every record is two tokens: it can be counted, compared and drawn."""
    records, dropped = iter(records), counts["dropped"]
    yield {name: np.zeros(0, dtype) for name, dtype in ARRAYS.items()}  # there may be no records
    while part := list(itertools.islice(records, 4096)):
        answered = []
        for number, turns in part:
            while turns and turns[-1][0] not in ANSWERS:  # nothing after the last answer has loss
                turns = turns[:-1]
            if turns and all(text.strip() for role, text in turns if role in ANSWERS):
                answered.append((number, turns))
        dropped["empty answer"] += len(part) - len(answered)
        samples = [([0, 0], [False, True])] * len(answered)
        if tokenizer and answered:
            numbers, conversations = zip(*answered, strict=True)
            samples = encode_conversations(tokenizer, template, conversations, numbers=numbers)
        stored, hashes, prompts, numbers = [], [], [], []
        for (number, turns), sample in zip(answered, samples, strict=True):
            (role, text), *_ = turns
            pieces = _pieces(*sample, max_length, role == "text")
            dropped["no response token left after truncation"] += not pieces
            if tokenizer and role == "text" and (spelt := tokenizer.control_pattern.findall(text)):
                counts["text that spells control tokens, taken as text"].update(set(spelt))
            if len(pieces) > 1:
                counts[f"longer than {max_length} tokens, cut to pieces"]["text"] += 1
            elif tokenizer and pieces and len(sample[0]) > max_length:
                counts[f"longer than {max_length} tokens, cut off there"]["conversation"] += 1
            stored += pieces
            hashes += [_hash(turns + [("piece", str(n))] * (n > 0)) for n in range(len(pieces))]
            prompts += [_hash(_prompt(turns))] * len(pieces)
            numbers += [number] * len(pieces)
        yield {
            "tokens": np.concatenate([np.zeros(0, np.int32), *stored]).astype(np.int32),
            "lengths": np.array([len(tokens) for tokens in stored], np.int64),
            "hashes": np.array(hashes, np.uint64),
            "prompts": np.array(prompts, np.uint64),
            "numbers": np.array(numbers, np.int64),
        }


def _pieces(
    ids: list[int], has_loss: list[bool], max_length: int, is_text: bool
) -> list[np.ndarray]:
    """A sample as it is stored, cut off at `max_length`, if loss is left; of text, the rest as more
    samples. Each opens with the last token of the one before: every token is predicted once."""
    ids = np.array(ids, np.int64)
    stored = np.where(has_loss[: len(ids)], ids, ~ids)
    starts = range(0, max(1, len(ids) - 1), max(1, max_length - 1)) if is_text else [0]
    pieces = [stored[start : start + max_length].copy() for start in starts]
    for piece in pieces[1:]:
        piece[0] = ~piece[0]
    return [piece for piece in pieces if (piece >= 0).any()]


def _prompt(turns: Turns) -> str:
    """What the user asks; of text, all of it."""
    asked = [text for role, text in turns if role in ("user", "input")]
    return " ".join(" ".join(asked or [text for _, text in turns]).split()).casefold()


def _hash(thing: object) -> int:
    digest = hashlib.blake2b(json.dumps(thing).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def overlap(one: Dataset, other: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Two boolean arrays over `one`: which of its records are, as a whole, in `other` too, and of
    which the prompt is, but for case and white space."""
    return np.isin(one.hashes, other.hashes), np.isin(one.prompts, other.prompts)


# The cache: a directory per (file contents, tokenizer, template, max_length)

def cache_dir() -> Path:
    """Where tokenised data is kept: $XDG_CACHE_HOME/scalebio, by default in ~/.cache."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "scalebio"
    except RuntimeError:
        raise ValueError("no home directory: set XDG_CACHE_HOME, for tokenised data") from None


def load_dataset(
    path: str | os.PathLike, tokenizer: Tokenizer | None, template: str, max_length: int,
    cache_dir: str | os.PathLike,
) -> Dataset:
    """Tokenise the records at `path`, see sources.records.locate, or map what an earlier call left
    in `cache_dir`; without a tokenizer, nothing is kept there (see `_tokenise`).

    Any number of processes may call this at once: one builds, the others wait for it. ValueError
    with a line for each problem; then nothing is cached.
    """
    source = locate(path)
    try:
        digest = _digest(source)
    except OSError as error:
        raise ValueError(f"{error.filename}: {error.strerror}") from None
    settings, counts = (tokenizer, template, max_length), defaultdict(Counter)
    about = {"max_length": max_length, "path": str(path), "sha256": digest}
    if not tokenizer:
        return Dataset._of_parts(_parts(source, settings, counts), counts, **about)
    of_ids = fingerprint(tokenizer, template)
    key = json.dumps([FORMAT_VERSION, digest, of_ids, template, max_length])
    entry = Path(cache_dir) / hashlib.sha256(key.encode()).hexdigest()[:32]
    map_entry = partial(_map_entry, entry, tokenizer, max_length)
    if not (found := map_entry()):
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            with open_regular(entry.with_suffix(".lock"), "ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file closes
                found = map_entry()  # another process may have built it meanwhile
                if not found:
                    found = _build_entry(entry, source, digest, settings, counts)
        except OSError as error:
            raise ValueError(f"{cache_dir}: cannot write the cache: {error.strerror} (its place is "
                             "in XDG_CACHE_HOME)") from None  # fmt: skip
    arrays, counts = found
    return Dataset._of_parts([arrays], counts, **about)


Entry = tuple[Arrays, Counts]  # arrays, memory-mapped, and counts


def _parts(source: Source, settings: tuple, counts: Counts) -> Iterator[Arrays]:
    """The arrays of a source's records, in parts. ValueError with a line for each problem."""
    problems, n_samples = Problems(), 0
    records = ((number, turns) for number, turns, _ in iter_records(source, problems, counts))
    with problems.collecting(f"{source.path}: "):
        for part in _tokenise(records, *settings, counts):
            n_samples += len(part["lengths"])
            yield part
    problems.raise_if_any()
    if not n_samples:
        dropped = ", ".join(f"{n} dropped: {why}" for why, n in counts["dropped"].items() if n)
        at = f" (at --max-length {settings[2]})" if settings[0] else ""
        raise ValueError(f"{source.path}: no records left: {dropped}{at}")


def _build_entry(
    entry: Path, source: Source, digest: str, settings: tuple, counts: Counts
) -> Entry:
    """Write the arrays under a temporary name, then rename: an entry is whole or absent."""
    temporary = entry.with_suffix(".tmp")
    for stale in (temporary, entry):  # of a build that died; damaged
        shutil.rmtree(stale, ignore_errors=True)
    temporary.mkdir()
    try:
        for part in _parts(source, settings, counts):
            for name, array in part.items():
                with open(temporary / f"{name}.bin", "ab") as file:
                    file.write(array.tobytes())
        if _digest(source) != digest:
            raise ValueError(f"{source.path}: was written to while it was read")
        arrays = _map_arrays(temporary)
        content = {"counts": counts, "checks": _checks(arrays, counts)}
        (temporary / "meta.json").write_text(json.dumps(content))
        temporary.rename(entry)  # the maps stay
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return arrays, counts


def _map_entry(entry: Path, tokenizer: Tokenizer, max_length: int) -> Entry | None:
    """An entry of the cache; None if it is absent, damaged, or holds what training would trip over:
    the folder may be shared."""
    try:
        content = read_json(entry / "meta.json")
        arrays, counts = _map_arrays(entry), content["counts"]
        tokens, lengths, *others = arrays.values()
        rows = min(tokenizer.n_vocab, tokenizer.rows or tokenizer.n_vocab)
        sound = (
            content["checks"] == _checks(arrays, counts)
            and max(tokens.max(), ~tokens.min()) < rows
            and lengths.min() > 0 and lengths.max() <= max_length and lengths.sum() == len(tokens)
            and all(len(array) == len(lengths) for array in others)
            and all(type(n) is int for of in (counts["dropped"], *counts.values())
                    for n in of.values())
        )  # fmt: skip
        return (arrays, counts) if sound else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _map_arrays(folder: Path) -> Arrays:
    arrays = {}
    for name, dtype in ARRAYS.items():
        with open_regular(folder / f"{name}.bin") as file:
            arrays[name] = np.memmap(file, dtype, "r")
    return arrays


def _checks(arrays: Arrays, counts: Counts) -> list[int]:
    """CRC-32 of all that an entry holds."""
    return [zlib.crc32(part) for part in (*arrays.values(), json.dumps(counts).encode())]


def _digest(source: Source) -> str:
    """SHA-256 of a file; of those of several files, and of a format that is stated."""
    parts = [*map(_sha256, source.files), *([str(source.form)] if source.form else [])]
    return parts[0] if len(parts) == 1 else hashlib.sha256("".join(parts).encode()).hexdigest()


def _sha256(path: str | os.PathLike) -> str:
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


# Mixtures: how many samples of each source, and which. The paper draws 10,000 by weights that it
# learned on 3,000 of each source.

def apportion(weights: dict[str, float], total: int) -> dict[str, int]:
    """`total` in whole parts proportional to the weights, by largest remainder."""
    whole = sum(weights.values())
    exact = {name: total * (p / whole) for name, p in weights.items()}
    parts = {name: math.floor(x) for name, x in exact.items()}
    by_remainder = sorted(weights, key=lambda name: parts[name] - exact[name])
    for name in by_remainder[: total - sum(parts.values())]:
        parts[name] += 1
    return parts


def count_samples(
    weights: dict[str, float], sizes: dict[str, int], samples: int, repeat: bool = False
) -> tuple[dict[str, int], list[str]]:
    """How many samples of each source, and a note on each that is short: without `repeat` what it
    lacks goes to the others, in proportion to their weights."""
    wanted = parts = apportion(weights, samples)
    if repeat:
        return parts, []
    full = {}
    while short := {name: sizes[name] for name, n in parts.items() if n > sizes[name]}:
        full |= short
        rest = {name: p for name, p in weights.items() if name not in full}
        left = samples - sum(full.values())
        parts = full | (apportion(rest, left) if sum(rest.values()) else dict.fromkeys(rest, 0))
    notes = [
        f"{name} is short: {wanted[name]} samples by its weight, but it has {full[name]}; the "
        f"mixture has {sum(parts.values())} in all (--repeat would repeat records)"
        for name in weights if wanted[name] > sizes[name]
    ]  # fmt: skip
    whole, total = sum(weights.values()), max(1, sum(parts.values()))
    shares = {name: parts[name] / total for name in weights}
    if notes and any(abs(shares[name] - p / whole) > 0.02 for name, p in weights.items()):
        most = int(min(sizes[name] * whole / p for name, p in weights.items() if p))
        said = ", ".join(f"{name} {share:.2f}" for name, share in shares.items())
        notes.append(f"so the shares are {said}, not as the weights say: --samples {most} would "
                     "keep to them")  # fmt: skip
    return {name: parts[name] for name in weights}, notes


def draw_samples(
    sources: dict[str, Dataset], weights: dict[str, float], samples: int,
    repeat: bool = False, seed: int = 0,
) -> tuple[dict[str, Dataset], list[str]]:
    """The sources cut down to a mixture, those without a sample left out; and notes for the user.

    Drawn without replacement; with `repeat`, all of a short source as often as it fits, and then
    the rest. What is drawn depends on the seed, the source's name and size, and the count alone.
    """
    sizes = {name: len(source) for name, source in sources.items()}
    parts, notes = count_samples(weights, sizes, samples, repeat)
    drawn = {name: draw(sources[name], name, n, seed) for name, n in parts.items() if n}
    return drawn, notes


def draw(source: Dataset, name: str, n: int, seed: int) -> Dataset:
    """n samples of a source, in its order."""
    rng = np.random.default_rng([seed, *name.encode()])
    picked = [rng.permutation(len(source)) for _ in range(math.ceil(n / len(source)))]
    return source.select(np.sort(np.concatenate(picked)[:n]))


# Batches

@dataclass
class MicroBatch:
    """Samples of one forward pass, right-padded: causal attention then needs no mask."""

    tokens: torch.Tensor  # (B, T) int64
    labels: torch.Tensor  # (B, T) int64; labels[:, t] is tokens[:, t], -100 where there is no loss
    group: torch.Tensor  # (B,) int64: index of the source, S for validation, -1 for a filler

    @property
    def n_tokens(self) -> int:
        """Tokens of its samples, each up to the last one with loss."""
        return int(((self.labels != IGNORE).flip(1).cumsum(1) > 0).sum())

    def to(self, device: torch.device | str) -> MicroBatch:
        """Copy without a wait. Labels stay: the model picks the positions with loss on the host."""
        if torch.device(device).type == "cpu":
            return self
        pinned = (x.pin_memory() for x in (self.tokens, self.group))
        tokens, group = (x.to(device, non_blocking=True) for x in pinned)
        return MicroBatch(tokens, self.labels, group)


Sample = tuple[int, int]  # (group, index within its dataset)


def padding() -> int:
    """What widths of micro-batches are multiples of: tensor cores are fastest on those of 8."""
    return 8 if torch.cuda.is_available() else 1


def _collate(
    datasets: list[Dataset], samples: Sequence[Sample], groups: Sequence[int],
    pad_to: int | None = None,
) -> MicroBatch:
    pad_to = pad_to or padding()
    parts = [datasets[group].stored(i) for group, i in samples]
    limit = max(datasets[group].max_length for group, _ in samples)
    width = min(-(-max(map(len, parts)) // pad_to) * pad_to, limit)
    stored = np.full((len(samples), width), ~0)  # (B, T): padding is token 0 without loss
    for row, part in zip(stored, parts, strict=True):
        row[: len(part)] = part
    tokens = torch.from_numpy(np.where(stored < 0, ~stored, stored))
    labels = torch.from_numpy(np.where(stored < 0, IGNORE, stored))
    return MicroBatch(tokens, labels, torch.tensor(groups))


class Batches:
    """Stratified global batches of S sources, and a validation batch beside each.

    With B = q S + r, every batch has q samples of each source and one more of r sources, which
    take turns: counted through all steps, extra sample n belongs to source n mod S. So the number
    of samples taken from source i before step t has the closed form

        taken(i, t) = q t + ⌈(r t − i) / S⌉

    and sample k of source i is at place k mod n_i of its permutation number k // n_i.
    """

    def __init__(
        self, sources: list[Dataset], val: Dataset | None, batch_size: int, val_batch_size: int,
        micro_batch_size: int, seed: int, rank: int = 0, world: int = 1, pad_to: int | None = None,
    ):  # fmt: skip
        assert batch_size % world == 0 and val_batch_size % world == 0
        self.datasets = [*sources, *([val] if val is not None else [])]
        self.n_sources = len(sources)
        self.batch_size, self.val_batch_size = batch_size, val_batch_size
        self.micro_batch_size, self.pad_to = micro_batch_size, pad_to
        self.seed, self.rank, self.world = seed, rank, world
        self.steps_per_epoch = -(-sum(map(len, sources)) // batch_size)
        self._orders = {}  # of each group, (epoch, permutation): the last used

    def step(self, t: int) -> tuple[list[MicroBatch], list[MicroBatch], torch.Tensor]:
        """This rank's training and validation micro-batches of step t; and counts (S + 1,): samples
        of each source in the global batch, then of validation."""
        S, n_val = self.n_sources, self.val_batch_size
        starts, stops = self._taken(t), self._taken(t + 1)
        train = [s for i in range(S) for s in self._samples(i, starts[i], stops[i])]
        val = self._samples(S, t * n_val, (t + 1) * n_val) if len(self.datasets) > S else []
        counts = torch.tensor([*(stops - starts).tolist(), len(val)])
        tokens = [0] * self.world
        return self._deal(train, tokens), self._deal(val, tokens), counts

    def _taken(self, t: int) -> np.ndarray:
        """Samples of each source in the steps before t, (S,)."""
        q, r = divmod(self.batch_size, self.n_sources)
        return q * t - (np.arange(self.n_sources) - r * t) // self.n_sources

    def _samples(self, group: int, start: int, stop: int) -> list[Sample]:
        n = len(self.datasets[group])
        return [(group, int(self._order(n, k // n, group)[k % n])) for k in range(start, stop)]

    def _order(self, n: int, epoch: int, *group: int) -> np.ndarray:
        """A permutation of range(n), drawn anew for each epoch (of a group)."""
        if self._orders.get(group, (None,))[0] != epoch:
            rng = np.random.default_rng([self.seed, *group, epoch])
            self._orders[group] = epoch, rng.permutation(n)
        return self._orders[group][1]

    def _deal(self, samples: list[Sample], tokens: list[int]) -> list[MicroBatch]:
        """This rank's share. Sorted by length, the samples make rounds of W micro-batches; in each
        round the longest goes to the rank that has the fewest tokens so far, and so on.

        tokens (W,): of each rank so far, added to. All ranks get as many samples: fillers, of group
        -1, complete what W does not divide.
        """
        samples = sorted(samples, key=lambda s: -self.datasets[s[0]].lengths[s[1]])  # stable
        places = [(s, s[0]) for s in samples]
        places += [(s, -1) for s in samples[-1:]] * (-len(samples) % self.world)
        share, parts, left = len(places) // self.world, [], iter(places)
        for start in range(0, share, self.micro_batch_size):
            size = min(self.micro_batch_size, share - start)
            for rank in sorted(range(self.world), key=tokens.__getitem__):
                part = list(itertools.islice(left, size))
                tokens[rank] += sum(int(self.datasets[g].lengths[i]) for (g, i), _ in part)
                if rank == self.rank:
                    parts.append(zip(*part, strict=True))
        return [_collate(self.datasets, *part, self.pad_to) for part in parts]


class MixtureBatches(Batches):
    """Global batches of a mixture: its sources as one set. Every sample comes once an epoch; the
    last batch of an epoch is what is left for it."""

    def __init__(
        self, sources: list[Dataset], batch_size: int, micro_batch_size: int, seed: int,
        rank: int = 0, world: int = 1,
    ):  # fmt: skip
        super().__init__(sources, None, batch_size, 0, micro_batch_size, seed, rank, world)
        self.ends = np.cumsum([len(source) for source in sources])  # in the mixture, of each source

    def step(self, t: int) -> tuple[list[MicroBatch], list[MicroBatch], torch.Tensor]:
        """As Batches.step, without validation."""
        epoch, n = divmod(t, self.steps_per_epoch)
        start = n * self.batch_size
        picked = self._order(self.ends[-1], epoch)[start : start + self.batch_size]
        groups = np.searchsorted(self.ends, picked, side="right")
        starts = self.ends - [len(source) for source in self.datasets]
        samples = list(zip(groups.tolist(), (picked - starts[groups]).tolist(), strict=True))
        counts = torch.from_numpy(np.bincount(groups, minlength=self.n_sources + 1))
        return self._deal(samples, [0] * self.world), [], counts


def prefetch(batches: Batches, steps: range) -> Iterator[tuple[int, tuple]]:
    """(t, batches.step(t)) of each step; a thread makes the next one meanwhile."""
    with ThreadPoolExecutor(1) as thread:
        coming = None
        for t in steps:
            made = coming.result() if coming else batches.step(t)
            coming = thread.submit(batches.step, t + 1) if t + 1 in steps else None
            yield t, made


def eval_batches(
    dataset: Dataset, micro_batch_size: int, rank: int = 0, world: int = 1
) -> Iterator[MicroBatch]:
    """Every sample once over all ranks, as group 0, longest first. Every rank makes the same number
    of micro-batches: fillers, of group -1, complete the last."""
    places = [((0, i), 0) for i in np.argsort(-dataset.lengths, kind="stable").tolist()]
    places += [(sample, -1) for sample, _ in places[-1:]] * (-len(places) % world)
    own = places[rank::world]
    for n in range(0, len(own), micro_batch_size):
        yield _collate([dataset], *zip(*own[n : n + micro_batch_size], strict=True))
