"""What a run is made of: model, tokenizer, records and --out, opened and checked before a model is
loaded.

    flags, inputs = open_run(flags)

Every problem is collected, so that one ValueError shows them together, a line each. On several
ranks each looks at what it will read itself, and rank 0 alone at --out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import platform
import shutil
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import numpy as np
import torch
import torch.distributed as dist

import data
import shard
from cli import plan
from cli.flags import BRANCHING, HARMLESS, WEIGHTS, Flags, as_json, check_flags, spelt
from hf import Problems, open_regular, pretrained, read_json, say, templates, tokenizer, try_lock
from model import ModelConfig, dtype_of, open_checkpoint, parameter_shapes
from sources import tasks
from sources.records import source_paths

TINY = {  # a llama of 0.9M parameters; the vocabulary is the byte tokenizer's
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 128,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
    "intermediate_size": 344, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
    "hidden_act": "silu", "tie_word_embeddings": False, "rope_theta": 10000.0,
    # 1/sqrt(128). With the usual 0.02 the residual stream starts so small that the first Adam step
    # of a block that LISA admits, ±lr on every weight, can swamp it.
    "initializer_range": 0.088,
}  # fmt: skip
LOCK = ".lock"  # in --out: locked while a run writes there
BEGUN = LOCK, ".config.json.tmp"  # all that a run leaves there that is killed at its start
HASHED = "the data of", "the tokenizer"  # in `identity`: their values say nothing to a user


@dataclass
class Inputs:
    """Everything a run is made of, checked."""

    config: ModelConfig | None  # None, like the tokenizer: records are drawn, no more
    checkpoint: Path | None  # None: random weights
    tokenizer: tokenizer.Tokenizer | None
    sources: dict[str, data.Dataset]
    val: data.Dataset | None
    test: data.Dataset | None
    notes: list[str]  # warnings that do not stop the run
    template: str | None = None  # as --template says, or as it was chosen
    weights: dict[str, float] | None = None  # of the sources, as --weights states them
    mixture: dict[str, data.Dataset] | None = None  # what is drawn from the sources by them
    lock: BinaryIO | None = None  # on rank 0: open as long as the run may write to --out

    @property
    def all(self) -> dict[str, data.Dataset]:
        named = {f"train {name}": source for name, source in self.sources.items()}
        held = {"val": self.val, "test": self.test}
        return named | {name: dataset for name, dataset in held.items() if dataset is not None}

    @property
    def used(self) -> dict[str, data.Dataset]:
        """What is trained on: the sources, or what is drawn from them."""
        return self.sources if self.mixture is None else self.mixture


def open_run(flags: Flags) -> tuple[Flags, Inputs | None]:
    """The flags, with the directory that --resume never chose, and the inputs; None for a finished
    run. Else the directory is this run's until it ends. ValueError with all problems. Collective.
    """
    world, first = int(os.environ.get("WORLD_SIZE", 1)), dist.get_rank() == 0
    if flags.resume == "never":
        out = shard.broadcast_from_rank0(lambda: first_free_name(flags.out))
        flags = dataclasses.replace(flags, out=out)
    inputs = shard.jointly(lambda: prepare(flags, world, first))
    shard.check_same(common_ground(flags, inputs))

    def finished() -> bool:
        return shard.broadcast_from_rank0(lambda: (flags.out / "model").is_dir())

    if finished():
        return flags, None
    token = shard.broadcast_from_rank0(lambda: f"{launcher()} {uuid.uuid4()}")
    inputs.lock = shard.jointly(lambda: lock_directory(flags.out, token) if first else None)
    try:
        shard.jointly(lambda: find_token(flags.out, token))
    except ValueError:
        if first:  # leave nothing behind, but a run to go on with
            (flags.out / LOCK).unlink()
            with contextlib.suppress(OSError):
                flags.out.rmdir()
        raise
    return flags, None if finished() else inputs  # by a run that was waited for


def prepare(flags: Flags, world: int, first: bool = True) -> Inputs:
    """Check flags, model and data, and --out if this is the first rank. Raises one ValueError with
    a line for each problem."""
    problems = Problems([*check_flags(flags, world), *(check_out(flags) if first else ())])
    config, checkpoint, tok, weights, notes = None, None, None, None, []
    if flags.weights and flags.mode != "bilevel":
        with contextlib.suppress(ValueError):  # which `open_data` reports
            names = source_names(flags)
            with problems.collecting():
                weights = parse_source_weights(flags.weights, names)
    with problems.collecting():
        if flags.mode != "draw":
            config, checkpoint, tok = open_model(flags)
            if flags.template == "auto":
                found, why = templates.trained_with(tok)
                found = found or ("alpaca" if checkpoint else "plain")
                flags = dataclasses.replace(flags, template=found)
                notes.append(f"--template auto: {flags.template}, {why}")
            check_fit(flags, config, tok)
    with problems.collecting():  # where something is wrong, records are only checked, not tokenised
        named = open_data(flags, None if problems.count else tok)
    problems.raise_if_any()
    sources, also = ({k.removeprefix(kind): v for k, v in named.items() if k.startswith(kind)}
                     for kind in ("train ", "also "))  # fmt: skip
    held = named.get("val"), named.get("test")
    inputs = Inputs(config, checkpoint, tok, sources, *held, notes, flags.template)
    describe(flags, inputs)
    inputs.sources |= also
    for name, dataset in inputs.all.items():
        if not len(dataset):
            after = " after --drop-overlap" if flags.drop_overlap else ""
            problems.add(f"{name}: no record is left{after}")
    if flags.per_source:
        draw_per_source(flags, inputs)
    if flags.mode != "bilevel" and not problems.count:
        draw_mixture(flags, inputs, weights)
    if flags.mode != "draw" and not problems.count:
        with problems.collecting():
            total_steps(flags, inputs)
    if first and not problems.count:
        checks = check_space(flags, config), changes(flags, record(flags, inputs))
        for problem in [*itertools.chain(*checks), *check_branch(flags, inputs)]:
            problems.add(problem)
    problems.raise_if_any()
    return inputs


def total_steps(flags: Flags, inputs: Inputs) -> int:
    """Of the run, in all its rounds. An epoch takes as many samples as there are. ValueError for
    more than a run can have."""
    epoch = -(-sum(map(len, inputs.used.values())) // flags.batch_size)
    total = (flags.outer_rounds or 1) * (flags.steps or math.ceil(flags.epochs * epoch))
    if total > 1e9:
        raise ValueError(f"--steps and --outer-rounds make {total:.3g} steps: permitted are 1e9")
    return total


def plan_inputs(flags: Flags) -> tuple[ModelConfig, int | None, int]:
    """The configuration that --plan asks about; the run's steps where flags or, for a --card,
    records tell them: as if none were dropped or cut; and how many sources there are, 2 where none
    are named. Raises one ValueError with all problems."""
    problems = Problems(check_flags(flags, max(1, flags.gpus)))
    if flags.mode == "draw":  # there is no model
        problems.raise_if_any()
    with problems.collecting():
        config = read_config(flags.model)
        check_fit(flags, config)
    with problems.collecting():
        n_sources = len(source_names(flags)) if flags.train or flags.model == "tiny" else 2
        cap, part = (None, flags.also) if flags.samples else (flags.per_source, flags.train)
        named = open_data(flags, None) if flags.card and part and not flags.steps else {}
        used = {name: range(len(named[f"train {name}"]))[:cap]
                for name in (source_paths(part) if named else ())}  # fmt: skip
    problems.raise_if_any()  # of flags out of their ranges there are no steps
    total = total_steps(flags, SimpleNamespace(used=used | {"": range(flags.samples or 0)}))
    return config, total or None, n_sources


def open_model(flags: Flags) -> tuple[ModelConfig, Path | None, tokenizer.Tokenizer]:
    """Configuration, checkpoint directory and tokenizer; reads headers, no weights."""
    if flags.model == "tiny":
        return read_config("tiny"), None, tokenizer.byte_tokenizer()
    checkpoint, config = open_checkpoint(flags.model)
    return config, checkpoint, tokenizer.load_tokenizer(checkpoint)


def read_config(name: str) -> ModelConfig:
    """Of the built-in model, a config.json, a directory that has one, or a hub id."""
    if name == "tiny":
        tok = tokenizer.byte_tokenizer()
        ids = {"bos_token_id": tok.bos_id, "eos_token_id": tok.eos_id, "vocab_size": tok.n_vocab}
        return ModelConfig.from_hf(TINY | ids)
    file = Path(name)
    if file.is_file():
        return pretrained.load_config(file.parent, file.name)
    return pretrained.load_config(pretrained.find_checkpoint(name, weights=False))


def check_fit(flags: Flags, config: ModelConfig, tok: tokenizer.Tokenizer | None = None) -> None:
    """Flags and tokenizer against the model. ValueError, a line for each that does not fit."""
    problems = Problems()
    for name, n, what in (("max_length", config.max_positions, "positions"),
                          ("lisa_layers", config.n_layers, "blocks")):  # fmt: skip
        if getattr(flags, name) > n:
            problems.add(f"{spelt(name)} {getattr(flags, name)}: the model has {n} {what}")
    if flags.micro_batch_size * flags.max_length * config.vocab > 2**44:  # the plan walks through
        problems.add("--micro-batch-size times --max-length times the vocabulary is above 2^44")
    if tok:
        try:
            templates.stop_ids(tok, flags.template)
        except ValueError as error:
            problems.add(f"--template {flags.template}: {error}")
    problems.raise_if_any()


def check_space(flags: Flags, config: ModelConfig | None) -> list[str]:
    """Whether the model that the run will leave, and its last state, find room on the disk, if they
    are not there yet."""
    if config is None:
        return []
    dtype = dtype_of(flags.dtype, "cuda" if torch.cuda.is_available() else "cpu")
    needed = dtype.itemsize * sum(map(math.prod, parameter_shapes(config).values()))
    if flags.keep:
        active = flags.lisa_layers or config.n_layers
        state = plan.state(config, 1, dtype, active, flags.lisa_ends != "frozen")
        copies = 1 if flags.mode == "finetune" else 2
        needed += copies * (sum(state.values()) - state["gradients"])
    free = shutil.disk_usage(nearest(flags.out)).free
    if free >= needed or (flags.out / "model").is_dir():
        return []
    return [f"--out {flags.out}: {free / 1e9:.3f} GB are free, and the model "
            f"{'and the last state (--keep 0: none) take' if flags.keep else 'takes'} "
            f"{needed / 1e9:.3f}"]  # fmt: skip


def nearest(path: Path) -> Path:
    """The path, or what there is of it."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def open_data(flags: Flags, tok: tokenizer.Tokenizer | None) -> dict[str, data.Dataset]:
    """{"train NAME" | "val" | "test": dataset}; with no tokenizer records are checked, no more."""
    if not flags.train:
        if tok is None:
            return {}
        sources, val, test = tasks.task(flags.task, flags.seed)
        groups = {f"train {name}": records for name, records in sources.items()}
        return {
            name: data.Dataset.from_records(records, tok, flags.template, flags.max_length)
            for name, records in (groups | {"val": val, "test": test}).items()
        }
    problems, paths, datasets, appended = Problems(), {}, {}, {}
    with problems.collecting():
        paths = {f"train {name}": path for name, path in source_paths(flags.train).items()}
        # Where nothing is trained, nothing is lost if these are validation records.
        kind = "also" if flags.mode == "draw" else "train"
        appended = source_paths(flags.also or [], "--also")
        for name, path in appended.items():
            if f"train {name}" in paths:
                problems.add(f"--also {name}={path}: --train has a source of this name")
            paths[f"{kind} {name}"] = path
    paths |= {k: Path(v) for k, v in (("val", flags.val), ("test", flags.test)) if v}
    for name, path in paths.items():
        with problems.collecting():
            settings = tok, flags.template, flags.max_length if tok else 2, data.cache_dir()
            datasets[name] = data.load_dataset(path, *settings)
    for (name, one), (held, other) in itertools.combinations(datasets.items(), 2):
        pair = held in ("val", "test") and not name.startswith("also ")
        if pair and np.array_equal(np.sort(one.hashes), np.sort(other.hashes)):
            flag = name.replace("train", "also") if name[6:] in appended else name
            problems.add(f"--{held} {other.path} has the same records as --{flag}")
    problems.raise_if_any()
    return datasets


def describe(flags: Flags, inputs: Inputs) -> None:
    """Collect the notes on the inputs, and apply --drop-overlap."""
    notes = inputs.notes
    if inputs.config and inputs.config.ignored_dropout:
        fields = ", ".join(inputs.config.ignored_dropout)
        notes.append(f"the checkpoint's dropout is ignored ({fields}): training uses none")
    for name, dataset in inputs.all.items():
        notes += [f"{name}: {remark}" for remark in dataset.remarks()]
    if flags.mode == "bilevel" and len(inputs.sources) == 1:
        notes.append("there is one source: its weight is 1, whatever is learned")
    for (a, one), (b, other) in itertools.combinations(inputs.sources.items(), 2):
        records, prompts = data.overlap(one, other)
        if flags.train and (n := int(prompts.sum())):  # built-in sources share them on purpose
            notes.append(f"{n} records of {a} have a prompt of {b}; {records.sum()} are the same "
                         "throughout")  # fmt: skip
    for pair in ("train", "val"), ("train", "test"), ("val", "test"):
        compare(flags, inputs, *pair)
    if flags.drop_overlap and not (inputs.val or inputs.test):
        notes.append("--drop-overlap drops nothing: there is neither --val nor --test")
    if flags.mode == "bilevel" and flags.batch_size < len(inputs.sources):
        notes.append(f"--batch-size {flags.batch_size} is less than the {len(inputs.sources)} "
                     "sources, which take turns")  # fmt: skip
    if flags.mode == "bilevel" and flags.val_batch_size > len(inputs.val):
        notes.append(f"--val-batch-size {flags.val_batch_size} is more than there are validation "
                     f"records, {len(inputs.val)}: a step has some more than once")  # fmt: skip


def compare(flags: Flags, inputs: Inputs, what: str, other: str) -> None:
    """Note what two of the training, validation and test records share; with --drop-overlap the
    first of them lose it."""
    every, whole, parts = inputs.all, 0, []
    for name in [name for name in every if name.split()[0] == what and other in every]:
        records, prompts = data.overlap(every[name], every[other])
        if not (n := int(prompts.sum())):
            continue
        whole += int(records.sum())
        first = ", ".join(map(str, every[name].numbers[prompts][:5])) + ", …" * (n > 5)
        parts.append(f"{n} records of {name.removeprefix('train ')} (numbers {first})")
        if flags.drop_overlap:
            left = every[name].select(~prompts)
            left.dropped = every[name].dropped | {f"with a prompt of {other}": n}
            if what == "val":
                inputs.val = left
            else:
                inputs.sources[name.removeprefix("train ")] = left
    if parts:
        gone = f": dropped from {what}" if flags.drop_overlap else " (--drop-overlap drops them)"
        inputs.notes.append(f"{', '.join(parts)} have a prompt of {other}, case and spaces aside; "
                            f"{whole} are the same throughout{gone}")  # fmt: skip


def source_names(flags: Flags) -> list[str]:
    """Of what is weighted."""
    return list(source_paths(flags.train) if flags.train else tasks.task(flags.task, 0)[0])


def draw_per_source(flags: Flags, inputs: Inputs) -> None:
    """Cut the sources that are longer down to --per-source samples."""
    for name in source_names(flags):
        source = inputs.sources[name]
        if len(source) > flags.per_source:
            drawn = data.draw(source, name, flags.per_source, flags.seed)
            inputs.sources[name] = dataclasses.replace(drawn, of=records(source))
            inputs.notes.append(f"{name}: {len(drawn)} of {len(source)} samples are drawn")
        elif len(source) < flags.per_source:
            inputs.notes.append(f"{name}: has {len(source)} samples of --per-source "
                                f"{flags.per_source}")  # fmt: skip


def draw_mixture(flags: Flags, inputs: Inputs, weights: dict | None) -> None:
    """Draw --samples by the weights, and take all of --also."""
    sources = {name: inputs.sources[name] for name in source_names(flags)}
    if weights is None:
        weights = {name: len(s) / sum(map(len, sources.values())) for name, s in sources.items()}
    with contextlib.suppress(ValueError, LookupError, TypeError):  # no weights.json
        learned = read_json(Path(flags.weights))["sources"]
        if other := [n for n, s in sources.items() if learned[n]["sha256"] != s.sha256]:
            inputs.notes.append(f"--weights {flags.weights}: learned on other records of "
                                f"{', '.join(other)}")  # fmt: skip
    how = weights, flags.samples, flags.repeat, flags.seed
    inputs.mixture, notes = data.draw_samples(sources, *how)
    also = {name: source for name, source in inputs.sources.items() if name not in sources}
    inputs.mixture |= also
    inputs.weights = weights | dict.fromkeys(also)
    inputs.notes += notes


def parse_source_weights(spec: str, names: list[str]) -> dict[str, float] | None:
    """The weights of the sources `names` that `spec` states, summing to 1; None for "proportional"
    to their sizes. A weights.json must be about these sources; in NAME=WEIGHT,... those that are
    not named get nothing. ValueError with a line per problem."""
    if spec == "proportional":
        return None
    if spec == "uniform":
        return dict.fromkeys(names, 1 / len(names))
    is_list = "=" in spec and not os.path.exists(spec)  # a long list is no path at all
    problems, stated = [], {}
    try:
        pairs = [item.strip().rpartition("=")[::2] for item in spec.split(",")]
        stated = dict(pairs if is_list else read_json(Path(spec))["weights"].items())
    except ValueError as error:
        problems.append(f"{error}; permitted is {WEIGHTS}".removeprefix(f"{spec}: "))
    except (KeyError, TypeError, AttributeError):
        problems.append("not the weights.json of a run")
    if is_list and len(stated) < len(pairs):
        problems.append("a source is named twice")
    others = set(stated) - set(names) if is_list else set(stated) ^ set(names)
    if others and not problems:
        what = f"names {sorted(others)}" if is_list else f"is about {sorted(stated)}"
        problems.append(f"it {what}, but to train on are {sorted(names)}")
    for name, p in stated.items():
        with contextlib.suppress(ValueError):
            stated[name] = p = float(p) if is_list else p
        if isinstance(p, bool) or not (isinstance(p, (int, float)) and 0 <= p < 1e9):
            problems.append(f"the weight of {name} is {p}: permitted is a number of at least 0 and "
                            "below 1e9")
    if not problems and sum(stated.values()) == 0:
        problems.append("all weights are 0")
    Problems(f"--weights {spec}: {problem}" for problem in problems).raise_if_any()
    total = sum(stated.values())
    return {name: stated.get(name, 0) / total for name in names}


# The directory of a run

def record(flags: Flags, inputs: Inputs) -> dict:
    """config.json: everything that decides what the run computes, and where it ran."""
    drawn, tok = None, inputs.tokenizer
    if inputs.mixture is not None:
        drawn = {
            name: {"weight": p, "samples": len(inputs.mixture.get(name, ()))}
            for name, p in inputs.weights.items()
        }
    return {
        "flags": as_json(flags) | {"template": inputs.template},
        "data": about(inputs.all),
        "tokenizer": tok and templates.fingerprint(tok, inputs.template),
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
        "world_size": int(os.environ.get("WORLD_SIZE", 1)),
        "mixture": drawn,
    }


def records(dataset: data.Dataset) -> int:
    """How many have a sample there: a text may be cut to several."""
    return len(np.unique(dataset.numbers))


def about(datasets: dict[str, data.Dataset]) -> dict[str, dict]:
    """What the files of a run say of data."""
    return {
        name: {"path": str(d.path), "samples": len(d), "of": d.of or records(d), "sha256": d.sha256,
               "dropped": d.dropped}
        for name, d in datasets.items()
    }


def identity(record: dict) -> dict[str, object]:
    """What of a record must stay the same in a run that goes on, by the names that a user knows."""
    shares = record.get("mixture") or {}
    decide = {name: v for name, v in record["flags"].items() if name not in HARMLESS}
    return {
        **{spelt(name): value for name, value in decide.items()},
        **{f"the weight of {name}": share["weight"] for name, share in shares.items()},
        **{f"the data of {name}": d["sha256"] for name, d in record.get("data", {}).items()},
        **({"the tokenizer": record["tokenizer"]} if "tokenizer" in record else {}),
    }


def common_ground(flags: Flags, inputs: Inputs) -> dict[str, object]:
    """What all ranks of a run must have in common, by the names that a user knows."""
    mine = record(flags, inputs)
    files = pretrained.sizes(inputs.checkpoint) if inputs.checkpoint else {}
    named = {spelt(name): value for name, value in mine["flags"].items()}
    return named | identity(mine) | files | {"torch": mine["versions"]["torch"]}


def held_run(directory: Path) -> dict | None:
    """The record of the run that a directory, or a checkpoint, holds; None if it holds none."""
    try:
        record = read_json(directory / "config.json")
        return record if identity(record) and record["data"] is not None else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def changes(flags: Flags, record: dict) -> list[str]:
    """A line for each thing that differs from a run that this one would go on with, and may not,
    or not where it branches off. Only what both records speak of is compared."""
    record, problems = json.loads(json.dumps(record)), []
    saved = shard.whole_checkpoints(flags.out / "checkpoints")
    hint = (f"; with another --out and --resume {flags.out} it may" if saved else
            "; nothing is saved there: take another --out, or --resume never")  # fmt: skip
    runs = {f"--out {flags.out}": held_run(flags.out)}
    if flags.resume not in ("auto", "never"):
        runs[f"--resume {flags.resume}"] = held_run(Path(flags.resume))
    for where, held in runs.items():
        if held is None:
            continue
        both = [key for key in record if held.get(key) is not None]
        old, new = (identity({key: r[key] for key in both}) for r in (held, record))
        for thing in sorted(old.keys() | new.keys()):
            was, now = old.get(thing), new.get(thing)
            free = where.startswith("--resume") and thing in map(spelt, BRANCHING)
            free |= (thing, now) == ("--template", "auto")  # not settled yet
            if was != now and not free:
                how = f"was {was}, now {now}"
                if where.startswith("--out") and thing in map(spelt, BRANCHING):
                    how, hint = how + hint, ""
                if thing.startswith(HASHED):
                    gone = "is gone" if now is None else "has changed"
                    how = "was not there" if was is None else gone
                problems.append(f"{where} holds another run: {thing} {how}")
        was, now = ([name.removeprefix("train ") for name in r.get("data", {})
                     if name.startswith("train ")] for r in (held, record))  # fmt: skip
        if was != now and sorted(was) == sorted(now):  # λ and batches go by the sources' places
            problems.append(f"{where} holds another run: the sources' order was {', '.join(was)}")
    return problems


def branch(record: dict, checkpoint: Path) -> dict:
    """What the run of this record branches off from, for its config.json: the checkpoint, and the
    flags that differ, with their values there and here."""
    old, new = (held_run(checkpoint) or {}).get("flags", {}), record["flags"]
    changed = {spelt(n): [old[n], new[n]] for n in new if n in old and n not in HARMLESS
               and old[n] != new[n]}  # fmt: skip
    return {"from": str(checkpoint), "changed": changed}


def checkpoints(flags: Flags) -> list[Path]:
    """What the run may go on from, in order: --out's own, or else those that --resume names."""
    own = shard.whole_checkpoints(flags.out / "checkpoints")
    if own or flags.resume in ("auto", "never"):
        return own
    named = Path(flags.resume)
    is_one = (named / shard.CHECKSUMS).exists()
    return [named] if is_one else shard.whole_checkpoints(named / "checkpoints")


def check_out(flags: Flags) -> list[str]:
    """Refuse an --out that cannot be written, or holds something else or a run of other flags."""
    parent = nearest(flags.out)
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        return [f"--out {flags.out}: {parent} is not a directory that can be written to"]
    problems = changes(flags, {"flags": as_json(flags)})
    if flags.out.exists() and held_run(flags.out) is None:
        others = [p for p in flags.out.iterdir() if p.name not in BEGUN]
        problems += [f"--out {flags.out}: holds files, but no run to go on with"] if others else []
    if flags.resume not in ("auto", "never"):
        named = Path(os.path.realpath(flags.resume))  # which no loop of links stops
        if Path(os.path.realpath(flags.out)) in (named, *named.parents):
            problems.append(f"--resume {flags.resume} is in --out itself: to branch off from an "
                            "earlier step, give another --out")
        elif not checkpoints(flags):
            held = "holds no checkpoint" if named.exists() else "no such directory"
            problems.append(f"--resume {flags.resume}: {held}")
    return problems


def first_free_name(out: Path) -> Path:
    """The first of out, out-2, ... that does not exist, or that this run made before torchrun
    started its ranks anew."""
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    paths = itertools.chain([out], (out.with_name(f"{out.name}-{n}") for n in itertools.count(2)))

    def ours(lock: Path) -> bool:
        return restarted and lock.is_file() and lock.read_text().split(" ")[0] == launcher()

    return next(path for path in paths if not os.path.exists(path) or ours(path / LOCK))


def launcher() -> str:
    """What stays the same when torchrun starts the ranks anew: its own process."""
    return f"{platform.node()}:{os.getppid()}"


def check_branch(flags: Flags, inputs: Inputs) -> list[str]:
    """Refuse to branch off from a state after which nothing is left to do."""
    first = next(iter(checkpoints(flags)), None)
    if flags.resume in ("auto", "never") or first is None or first.is_relative_to(flags.out):
        return []
    done, total = shard.steps_done(first), total_steps(flags, inputs)
    return [f"--resume {flags.resume}: {done} steps are done there, and this run has {total}: "
            "take more --steps"] if done >= total else []  # fmt: skip


def lock_directory(out: Path, token: str) -> BinaryIO:
    """Make a directory, and keep other runs out of it until the file returned is closed, or this
    process ends, however it ends; the file holds the token. ValueError if it cannot be written, or
    another run is in it. One whose launcher is gone is about to save and end: it is waited for."""
    end, waits = time.monotonic() + shard.START_TIMEOUT, False
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open_regular(out / LOCK, "a+b")
        while not try_lock(lock):
            lock.seek(0)
            holder = lock.read(1000).decode(errors="replace").split(" ")[0]
            node, _, process = holder.rpartition(":")
            alive = node != platform.node() or Path("/proc", process).exists()
            if alive or time.monotonic() > end:
                raise ValueError(f"--out {out}: another run is writing to it")
            if not waits:
                say(f"waits for the run in {out}, which lost its launcher, to end")
            waits = True
            time.sleep(0.1)
        lock.truncate(0)
        lock.write(token.encode())
        lock.flush()
    except OSError as error:
        raise ValueError(f"--out {error.filename or out}: {error.strerror}") from None
    return lock


def find_token(out: Path, token: str) -> None:
    """See that this is the directory in which rank 0 holds the lock. A network's file system may
    take some time to show it. ValueError if it is another one."""
    end = time.monotonic() + 5
    while not (out / LOCK).is_file() or (out / LOCK).read_text() != token:
        if time.monotonic() > end:
            raise ValueError(f"--out {out}: not the directory that rank 0 writes to: it must be on "
                             "a disk that all machines share")  # fmt: skip
        time.sleep(0.1)
