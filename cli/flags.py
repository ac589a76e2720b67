"""The flags, and what a run is made of, checked before a model is loaded: model, tokenizer, data,
--out.

Every problem is collected, so that one ValueError shows them together, a line each.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import filecmp
import itertools
import json
import math
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

import data
import shard
from cli import plan
from data import cache_dir
from hf import pretrained, templates, tokenizer
from lisa import ENDS
from model import DTYPES, ModelConfig, dtype_of, open_checkpoint, parameter_shapes
from sources import mixture, tasks
from sources.records import Problems, read_records, source_paths

TINY = {  # a llama of 0.9M parameters; the vocabulary is the byte tokenizer's
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 344,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    # 1/sqrt(128). With the usual 0.02 the residual stream starts so small that the first Adam step
    # of a block that LISA admits, ±lr on every weight, can swamp it.
    "initializer_range": 0.088,
    "rope_theta": 10000.0,
}
# flag: (default with a checkpoint, default with the built-in tiny model)
DEFAULTS = {
    "epochs": (1.0, 1.0),
    "steps": (None, 200),
    "micro_batch_size": (8, 32),
    "max_length": (512, 64),
    "lr_w": (1e-5, 1e-3),
    "lr_u": (1e-5, 1e-3),
    "lr_lambda": (1e-2, 0.2),
    "lisa_interval": (20, 5),
    "template": ("alpaca", "plain"),
    "samples": (10_000, 6400),
}
# Flags of one mode alone.
ONLY = {
    "bilevel": ("val_batch_size", "alpha", "tau", "outer_rounds", "lr_u", "lr_lambda",
                "lisa_coupling", "cpu_offload"),
    "finetune": ("weights", "samples", "repeat"),
}  # fmt: skip
# Flags that do not change what a run computes.
HARMLESS = {"out", "timeout", "save_every", "keep", "resume", "activation_checkpointing"}
HARMLESS |= {"plan", "gpus", "gpu_memory", "json", "skip_nonfinite", "cpu_offload"}
HARMLESS |= {"weights"}  # the numbers themselves are compared
HARMLESS |= {"train", "val", "test"}  # paths: the records themselves are compared
LOCK = ".lock"  # in --out


@dataclass
class Inputs:
    """Everything a run is made of, checked."""

    config: ModelConfig
    checkpoint: Path | None  # None: random weights
    tokenizer: tokenizer.Tokenizer
    sources: dict[str, data.Dataset]
    val: data.Dataset | None
    test: data.Dataset | None
    notes: list[str]  # warnings that do not stop the run
    weights: dict[str, float] | None = None  # of the sources, as --weights states them
    mixture: dict[str, data.Dataset] | None = None  # what is drawn from the sources by them

    @property
    def all(self) -> dict[str, data.Dataset]:
        named = {f"train {name}": source for name, source in self.sources.items()}
        held = {"val": self.val, "test": self.test}
        return named | {name: dataset for name, dataset in held.items() if dataset}

    @property
    def longest(self) -> int:
        """Tokens of the longest sample that is trained or validated on."""
        used = [*(self.mixture or self.sources).values(), *([self.val] if self.val else [])]
        return max(int(d.lengths.max()) for d in used)


class Parser(argparse.ArgumentParser):
    """Refuses a flag in one line; the usage is for --help."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{message}\n")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line, with the defaults of the chosen model filled in."""
    parser = Parser(
        description="Learn source weights by first-order bilevel optimisation (ScaleBiO), and "
        "fine-tune on the mixture that they make.",
        epilog="'A (tiny: B)' is the default A, and B for the built-in model.",
    )

    def add(group, flag, text, **kwargs):
        a, b = DEFAULTS.get(flag.replace("-", "_"), (kwargs.get("default"), None))
        if flag.replace("-", "_") in DEFAULTS:
            a = "as --epochs says" if a is None else a
            text += f" [{a}]" if a == b else f" [{a} (tiny: {b})]"
        elif a not in (None, False):
            text += f" [{a}]"
        group.add_argument(f"--{flag}", help=text.replace("%", "%%"), **kwargs)

    add(parser, "mode", "'bilevel' learns source weights; 'finetune' trains on samples drawn by "
        "--weights", default="bilevel", choices=tuple(ONLY))

    g = parser.add_argument_group("model and data")
    add(g, "model", "'tiny', a local Hugging Face directory, or a hub id", default="tiny")
    add(g, "train", "sources, as NAME=PATH ..., or one directory or quoted glob of train_*.json(l)",
        nargs="+", action="extend", metavar="NAME=PATH")
    add(g, "val", "validation records, JSON or JSONL: the weights minimise their loss; finetune "
        "watches it")
    add(g, "test", "held-out records, for the report")
    add(g, "task", "built-in data, used without --train", default="denoising", choices=tasks.TASKS)
    add(g, "template", "how a conversation becomes text", choices=templates.TEMPLATES)
    add(g, "max-length", "tokens at which a sample is cut", type=int)
    add(g, "drop-overlap", "remove training records that are validation or test records",
        action="store_true")
    add(g, "out", "directory of the run [runs/<task or model>-seed<seed>; finetune: "
        "runs/<task or model>-finetune-seed<seed>]")

    g = parser.add_argument_group("optimisation")
    add(g, "epochs", "passes over as many samples as all sources hold, or over the mixture",
        type=float)
    add(g, "steps", "steps of an outer round, instead of --epochs", type=int)
    add(g, "batch-size", "training samples of a step, over all ranks", type=int, default=64)
    add(g, "val-batch-size", "validation samples of a step, over all ranks", type=int, default=64)
    add(g, "micro-batch-size", "samples of one forward on one rank", type=int)
    add(g, "alpha", "penalty multiplier", type=float, default=10.0)
    add(g, "tau", "factor on alpha from one outer round to the next", type=float, default=1.0)
    add(g, "outer-rounds", "rounds of --epochs or --steps", type=int, default=1)
    add(g, "lr-w", "learning rate of w", type=float)
    add(g, "lr-u", "learning rate of u", type=float)
    add(g, "lr-lambda", "learning rate of the source weights' logits", type=float)
    add(g, "warmup", "share of all steps in which learning rates rise", type=float, default=0.03)
    add(g, "schedule", "what follows the warm-up", choices=("cosine", "linear", "constant"),
        default="cosine")
    add(g, "weight-decay", "AdamW's, for w and u", type=float, default=5e-4)
    add(g, "clip", "largest gradient norm of w and of u (gradients are divided by alpha); 0 = off",
        type=float, default=0.0)
    add(g, "seed", "of the data order, LISA's draws, and the built-in task and model", type=int,
        default=0)
    add(g, "skip-nonfinite", "pass over a step whose loss or gradient is not finite, and count it",
        action="store_true")

    g = parser.add_argument_group("--mode finetune")
    add(g, "weights", "what to draw samples by: " + mixture.PERMITTED)
    add(g, "samples", "size of the mixture, drawn without replacement", type=int)
    add(g, "repeat", "repeat the records of a source that is short, instead of taking more of the "
        "others", action="store_true")

    g = parser.add_argument_group("memory and devices")
    add(g, "lisa-layers", "blocks that train at a time; 0 = train everything", type=int, default=2)
    add(g, "lisa-interval", "steps between two draws of the blocks", type=int)
    add(g, "lisa-ends", "embedding, final norm and head: trained always, drawn like a block, never",
        default="always", choices=ENDS)
    add(g, "lisa-coupling", "w and u train the same blocks, or draw their own", default="shared",
        choices=("shared", "independent"))
    add(g, "dtype", "storage of parameters; auto is bf16 on CUDA and fp32 on CPU", default="auto",
        choices=("auto", *DTYPES))
    add(g, "activation-checkpointing", "keep only the inputs of blocks for backward, and compute "
        "the rest again", action="store_true")
    add(g, "cpu-offload", "the copy that is not at work, u while w is and w while u is, waits in "
        "host memory", action="store_true")
    add(g, "compile", "fuse what each block does, with torch.compile; needs a C++ compiler",
        action="store_true")
    add(g, "save-every", "steps between two checkpoints; 0 = only when asked to stop by a signal",
        type=int, default=0)
    add(g, "keep", "checkpoints to keep, the newest", type=int, default=2)
    add(g, "resume", "'auto' goes on from the newest checkpoint in --out; 'never' starts anew, in "
        "another directory if --out exists; a run's directory, or one of its checkpoints, starts "
        "from there where --out has no checkpoint yet", default="auto", metavar="auto|never|DIR")
    add(g, "timeout", "seconds after which a rank that is waited for in a step ends the run "
        "(loading and saving have their own limit of 4 hours)", type=float, default=1800.0)

    g = parser.add_argument_group("plan")
    add(g, "plan", "print the bytes that each GPU needs, and end: needs no GPU and no weights, "
        "--model may be a config.json; exit 1 if they do not fit", action="store_true")
    add(g, "gpus", "GPUs of the plan [8]", type=int)
    add(g, "gpu-memory", "of each, in 10^9 bytes; 2 are kept back", type=float)
    add(g, "json", "the plan as JSON", action="store_true")

    defaults = vars(parser.parse_args([]))
    args = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults)))
    given_epochs = args.epochs is not None and args.steps is None
    args.mode, args.model = args.mode or defaults["mode"], args.model or defaults["model"]
    defaults |= {flag: pair[args.model == "tiny"] for flag, pair in DEFAULTS.items()}
    for flag in other_modes(args.mode):  # they stay None, unless they are given by mistake
        del defaults[flag]
    for flag, default in defaults.items():
        if getattr(args, flag) is None:
            setattr(args, flag, default)
    if given_epochs:
        args.steps = None
    source = args.task if args.model == "tiny" and not args.train else Path(args.model).name
    source += "-finetune" * (args.mode == "finetune")
    args.out = Path(args.out or f"runs/{source}-seed{args.seed}")
    if args.resume == "never":
        restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        args.out = first_free_name(args.out, restarted)
    return args


def other_modes(mode: str) -> list[str]:
    """Flags that make no sense in a mode."""
    return [flag for other, flags in ONLY.items() if other != mode for flag in flags]


def first_free_name(out: Path, restarted: bool) -> Path:
    """The first of out, out-2, ... that does not exist, or after a restart that this run made."""

    def ours(path: Path) -> bool:
        lock = path / LOCK
        return restarted and lock.exists() and lock.read_text() == launcher()

    others = (out.with_name(f"{out.name}-{n}") for n in itertools.count(2))
    paths = itertools.chain([out], others)
    return next(path for path in paths if not os.path.exists(path) or ours(path))


def launcher() -> str:
    """What stays the same when torchrun starts the ranks anew: its own process."""
    return str(os.getppid())


def prepare(args: argparse.Namespace, world: int) -> Inputs:
    """Check flags, model and data. Raises one ValueError with a line for each problem."""
    problems = Problems(check_flags(args, world) + check_out(args))
    for flag in ("gpus", "gpu_memory", "json"):
        if getattr(args, flag):
            problems.add(f"{spelt(flag)} goes with --plan alone")
    config, checkpoint, tok, weights = None, None, None, None
    with problems.collecting():
        weights = source_weights(args)
    with problems.collecting():
        config, checkpoint, tok = open_model(args)
        for problem in check_fit(args, config, tok):
            problems.add(problem)
    with problems.collecting():  # where something is wrong, records are only checked, not tokenised
        named = open_data(args, None if problems.count else tok)
    problems.raise_if_any()
    sources = {k.removeprefix("train "): v for k, v in named.items() if k.startswith("train ")}
    inputs = Inputs(config, checkpoint, tok, sources, named.get("val"), named.get("test"), [])
    describe(args, inputs)
    for name, dataset in inputs.all.items():
        if not len(dataset):
            after = " after --drop-overlap" if args.drop_overlap else ""
            problems.add(f"{name}: no record is left{after}")
    if args.mode == "finetune" and not problems.count:
        draw_mixture(args, inputs, weights)
    for problem in check_space(args, config):
        problems.add(problem)
    for problem in changed_data(args, inputs):
        problems.add(problem)
    problems.raise_if_any()
    return inputs


def source_weights(args: argparse.Namespace) -> dict[str, float] | None:
    """The weights that --weights states; None for "proportional", and in the other mode."""
    if args.mode != "finetune":
        return None
    if not args.weights:
        raise ValueError(f"--weights is missing: --mode finetune needs {mixture.PERMITTED}")
    try:
        names = list(source_paths(args.train) if args.train else tasks.task(args.task, 0)[0])
    except ValueError:  # which `open_data` reports
        return None
    return mixture.parse_source_weights(args.weights, names)


def draw_mixture(args: argparse.Namespace, inputs: Inputs, weights: dict | None) -> None:
    """Draw --samples by the weights."""
    if weights is None:
        total = sum(map(len, inputs.sources.values()))
        weights = {name: len(source) / total for name, source in inputs.sources.items()}
    inputs.weights = weights
    inputs.mixture, notes = mixture.draw(
        inputs.sources, weights, args.samples, args.repeat, args.seed
    )
    inputs.notes += notes


COUNT = lambda x: 0 < x < 1e9, "a whole number above 0 and below 1e9"
SCALE = lambda x: 0 < x < 1e9, "a number above 0 and below 1e9"
RATE = lambda x: 0 <= x < math.inf, "a number of at least 0"
RANGES = {  # flag: (test, what is permitted)
    **dict.fromkeys(("batch_size", "val_batch_size", "micro_batch_size", "max_length", "steps",
                     "outer_rounds", "samples", "lisa_interval", "keep"), COUNT),
    **dict.fromkeys(("epochs", "alpha", "tau", "timeout"), SCALE),
    **dict.fromkeys(("lr_w", "lr_u", "lr_lambda", "weight_decay", "clip"), RATE),
    "warmup": (lambda x: 0 <= x < 1, "a share from 0 to below 1"),
    "seed": (lambda x: 0 <= x < 2**32, "a whole number from 0 to below 2^32"),
    "lisa_layers": (lambda x: x >= 0, "0 (all) or a number of blocks"),
    "save_every": (lambda x: x >= 0, "a number of steps, or 0"),
}  # fmt: skip


def check_flags(args: argparse.Namespace, world: int) -> list[str]:
    """A line for each flag that is out of range, contradicts another or does not suit the machine.
    """
    others = other_modes(args.mode)
    given = {flag: value for flag, value in vars(args).items() if value is not None}
    problems = [f"{spelt(flag)} makes no sense with --mode {args.mode}"
                for flag in others if flag in given]  # fmt: skip
    given = {flag: value for flag, value in given.items() if flag not in others}
    problems += [
        f"{spelt(flag)} {given[flag]}: permitted is {permitted}"
        for flag, (within, permitted) in RANGES.items()
        if flag in given and not within(given[flag])
    ]
    for flag in ("batch_size", "val_batch_size"):
        value = given.get(flag, 0)
        if value > 0 and value % world:
            below, above = value // world * world, -(-value // world) * world
            near = " or ".join(str(v) for v in (below, above) if v)
            problems.append(f"{spelt(flag)} {value} is not divisible by {world} ranks: take {near}")
    if "tau" in given and 0 < args.alpha < 1e9 and args.tau > 0:
        last = math.log(args.alpha) + (args.outer_rounds - 1) * math.log(args.tau)  # ln alpha
        if not last < math.log(1e9):
            problems.append(f"--tau {args.tau}: permitted is what leaves alpha below 1e9 in the "
                            "last outer round")
    for flag, value in ("lisa_ends", "sampled"), ("lisa_coupling", "independent"):
        if args.lisa_layers == 0 and given.get(flag) == value:
            problems.append(f"{spelt(flag)} {value} contradicts --lisa-layers 0: nothing is drawn "
                            "where everything trains")
    if args.compile and not args.plan and not shutil.which(os.environ.get("CXX", "g++")):
        problems.append("--compile needs a C++ compiler: install g++, or name one in CXX")
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if torch.cuda.is_available() and local > torch.cuda.device_count():
        problems.append(f"{local} ranks on a machine of {torch.cuda.device_count()} GPUs: take as "
                        "many as there are GPUs, or hide them with CUDA_VISIBLE_DEVICES=")
    if args.mode == "bilevel" and args.train and not args.val:
        problems.append("--val is missing: --train needs validation records beside it")
    if not args.train and (args.val or args.test):
        problems.append("--train is missing: --val and --test do not go with a built-in task")
    return problems


def spelt(flag: str) -> str:
    """A flag as it is typed."""
    return f"--{flag.replace('_', '-')}"


def open_model(args: argparse.Namespace) -> tuple[ModelConfig, Path | None, tokenizer.Tokenizer]:
    """Configuration, checkpoint directory and tokenizer; reads headers, no weights."""
    if args.model == "tiny":
        tok = tokenizer.byte_tokenizer()
        ends = {"bos_token_id": tok.bos_id, "eos_token_id": tok.eos_id}
        return ModelConfig.from_hf(TINY | ends | {"vocab_size": tok.n_vocab}), None, tok
    checkpoint, config = open_checkpoint(args.model)
    return config, checkpoint, tokenizer.load_tokenizer(checkpoint)


def read_config(name: str) -> ModelConfig:
    """Of the built-in model, a config.json, a directory that has one, or a hub id."""
    if name == "tiny":
        return ModelConfig.from_hf(TINY | {"vocab_size": tokenizer.byte_tokenizer().n_vocab})
    file = Path(name)
    if file.is_file():
        return pretrained.load_config(file.parent, file.name)
    return pretrained.load_config(pretrained.find_checkpoint(name, weights=False))


def plan_inputs(args: argparse.Namespace) -> ModelConfig:
    """The configuration that --plan asks about. Raises one ValueError with all problems."""
    args.gpus = 8 if args.gpus is None else args.gpus
    problems = Problems(check_flags(args, max(1, args.gpus)))
    if args.gpus < 1:
        problems.add(f"--gpus {args.gpus}: permitted is a whole number above 0")
    if args.gpu_memory is not None and not plan.room(args.gpu_memory) > 0:
        problems.add(f"--gpu-memory {args.gpu_memory}: permitted is more than the "
                     f"{plan.RESERVED / plan.GB:g} that are kept back")  # fmt: skip
    with problems.collecting():
        config = read_config(args.model)
        for problem in check_sizes(args, config):
            problems.add(problem)
    problems.raise_if_any()
    return config


def check_space(args: argparse.Namespace, config: ModelConfig) -> list[str]:
    """Whether the model that the run will leave finds room on the disk, if it is not there yet."""
    dtype = dtype_of(args.dtype, "cuda" if torch.cuda.is_available() else "cpu")
    needed = dtype.itemsize * sum(map(math.prod, parameter_shapes(config).values()))
    parent = next(p for p in (args.out, *args.out.absolute().parents) if p.exists())
    free = shutil.disk_usage(parent).free
    if free >= needed or (args.out / "model").is_dir():
        return []
    return [f"--out {args.out}: {free / 1e9:.3f} GB are free, and the model takes "
            f"{needed / 1e9:.3f}"]  # fmt: skip


def check_sizes(args: argparse.Namespace, config: ModelConfig) -> list[str]:
    """Flags against the model."""
    problems = []
    if args.max_length > config.max_positions:
        problems.append(
            f"--max-length {args.max_length}: the model has {config.max_positions} positions"
        )
    if args.lisa_layers > config.n_layers:
        problems.append(f"--lisa-layers {args.lisa_layers}: the model has {config.n_layers} blocks")
    return problems


def check_fit(args: argparse.Namespace, config: ModelConfig, tok) -> list[str]:
    """Flags and tokenizer against the model."""
    problems = check_sizes(args, config)
    if tok.n_vocab > config.vocab:
        problems.append(
            f"--model {args.model}: the tokenizer has {tok.n_vocab} ids, "
            f"the embedding only {config.vocab} rows"
        )
    try:
        templates.stop_ids(tok, args.template)
    except ValueError as error:
        problems.append(f"--template {args.template}: {error}")
    return problems


def open_data(
    args: argparse.Namespace, tok: tokenizer.Tokenizer | None
) -> dict[str, data.Dataset]:
    """{"train NAME" | "val" | "test": dataset}; with no tokenizer records are checked, no more."""
    if not args.train:
        if tok is None:
            return {}
        sources, val, test = tasks.task(args.task, args.seed)
        groups = {f"train {name}": records for name, records in sources.items()}
        return {
            name: data.Dataset.from_records(records, tok, args.template, args.max_length)
            for name, records in (groups | {"val": val, "test": test}).items()
        }
    problems, paths, datasets = Problems(), {}, {}
    with problems.collecting():
        paths = {f"train {name}": path for name, path in source_paths(args.train).items()}
    paths |= {k: Path(v) for k, v in (("val", args.val), ("test", args.test)) if v}
    for held in {"val", "test"} & paths.keys():
        for name, path in paths.items():
            source = name.removeprefix("train ")
            if name != source and same_contents(path, paths[held]):
                problems.add(f"--{held} {paths[held]} is the same file as --train {source}")
    for name, path in paths.items():
        with problems.collecting():
            if tok is None:
                read_records(path)
            else:
                datasets[name] = data.load_dataset(
                    path, tok, args.template, args.max_length, cache_dir()
                )
    problems.raise_if_any()
    return datasets


def same_contents(a: Path, b: Path) -> bool:
    return a.is_file() and b.is_file() and filecmp.cmp(a, b, shallow=False)


def describe(args: argparse.Namespace, inputs: Inputs) -> None:
    """Collect the notes on the inputs, and apply --drop-overlap."""
    notes = inputs.notes
    if inputs.config.ignored_dropout:
        fields = ", ".join(inputs.config.ignored_dropout)
        notes.append(f"the checkpoint's dropout is ignored ({fields}): training uses none")
    for name, dataset in inputs.all.items():
        for reason, count in dataset.dropped.items():
            if count:
                notes.append(f"{name}: {count} records dropped: {reason}")
        if dataset.duplicates:
            notes.append(f"{name}: {dataset.duplicates} records are repetitions")
    if args.mode == "bilevel" and len(inputs.sources) == 1:
        notes.append("there is one source: its weight is 1, whatever is learned")
    for (a, one), (b, other) in itertools.combinations(inputs.sources.items(), 2):
        if one.sha256 == other.sha256:
            notes.append(f"{a} and {b} are the same records")
    for held in [name for name in ("val", "test") if name in inputs.all]:
        for name, source in inputs.sources.items():
            shared = data.overlap(source, inputs.all[held])
            if not shared.any():
                continue
            few = ", ".join(map(str, source.numbers[shared][:5]))
            few += ", …" if shared.sum() > 5 else ""
            notes.append(f"{shared.sum()} records of {name} are {held} records too (numbers {few})")
            if args.drop_overlap:
                left = inputs.sources[name] = source.select(~shared)
                left.dropped = source.dropped | {f"a {held} record too": int(shared.sum())}
                notes[-1] += ": dropped from training"


def plain(args: argparse.Namespace) -> dict:
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}


def record(args: argparse.Namespace, inputs: Inputs) -> dict:
    """config.json: everything that decides what the run computes, and where it ran."""
    files = {
        name: {"path": str(d.path), "samples": len(d), "sha256": d.sha256, "dropped": d.dropped}
        for name, d in inputs.all.items()
    }
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    world = int(os.environ.get("WORLD_SIZE", 1))
    return {
        "flags": plain(args), "data": files, "tokenizer": inputs.tokenizer.fingerprint,
        "versions": versions, "world_size": world, "mixture": shares(inputs),
    }  # fmt: skip


def shares(inputs: Inputs) -> dict | None:
    """What the mixture of a fine-tuning run is made of, for config.json."""
    if inputs.mixture is None:
        return None
    drawn = {name: len(inputs.mixture.get(name, ())) for name in inputs.weights}
    return {name: {"weight": p, "samples": drawn[name]} for name, p in inputs.weights.items()}


def held_run(directory: Path) -> dict | None:
    """The record of the run that a directory, or a checkpoint, holds; None if it holds none."""
    try:
        record = json.loads((directory / "config.json").read_text())
        looked_at = {  # below, and by the report
            **record["flags"],
            **{name: entry["sha256"] for name, entry in record["data"].items()},
            **{name: (s["weight"], s["samples"]) for name, s in (record["mixture"] or {}).items()},
        }
        return record if looked_at else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def runs_to_continue(args: argparse.Namespace) -> dict[str, dict]:
    """The records of the runs that this one would go on with, by the flag that names them."""
    named = {f"--out {args.out}": held_run(args.out)}
    if args.resume not in ("auto", "never"):
        named[f"--resume {args.resume}"] = held_run(Path(args.resume))
    return {flag: record for flag, record in named.items() if record is not None}


def checkpoints(args: argparse.Namespace) -> list[Path]:
    """What the run may go on from, in order: --out's own, or else those that --resume names."""
    own = shard.whole_checkpoints(args.out / "checkpoints")
    if own or args.resume in ("auto", "never"):
        return own
    named = Path(args.resume)
    is_one = (named / shard.CHECKSUMS).exists()
    return [named] if is_one else shard.whole_checkpoints(named / "checkpoints")


def check_out(args: argparse.Namespace) -> list[str]:
    """Refuse an --out that cannot be written, or holds something else or a run of other flags."""
    parent = next(p for p in (args.out, *args.out.absolute().parents) if p.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        return [f"--out {args.out}: {parent} is not a directory that can be written to"]
    problems, runs = [], runs_to_continue(args)
    if f"--out {args.out}" not in runs and args.out.exists():
        others = [p for p in args.out.iterdir() if p.name != LOCK]
        problems += [f"--out {args.out}: holds files, but no run to go on with"] if others else []
    if args.resume not in ("auto", "never"):
        if args.out.resolve() in (named := Path(args.resume).resolve(), *named.parents):
            problems.append(f"--resume {args.resume} is in --out itself: to branch off from an "
                            "earlier step, give another --out")
        elif not checkpoints(args):
            problems.append(f"--resume {args.resume}: holds no checkpoint")
    new = json.loads(json.dumps(plain(args)))
    for where, record in runs.items():
        old = record["flags"]
        problems += [
            f"{where} holds another run: {spelt(flag)} was {old.get(flag)}, "
            f"now {new.get(flag)}"
            for flag in sorted((old.keys() | new.keys()) - HARMLESS)
            if old.get(flag) != new.get(flag)
        ]
    return problems


def changed_data(args: argparse.Namespace, inputs: Inputs) -> list[str]:
    """What of records, weights and tokenizer differs from the runs that this would go on with."""
    new = {name: dataset.sha256 for name, dataset in inputs.all.items()}
    now, problems = shares(inputs) or {}, []
    for where, record in runs_to_continue(args).items():
        was = record.get("mixture") or {}
        problems += [
            f"{where} holds another run: the weight of {name} was "
            f"{was.get(name, {}).get('weight')}, now {now[name]['weight']}"
            for name in now
            if was.get(name, {}).get("weight") != now[name]["weight"]
        ]
        old = {name: entry["sha256"] for name, entry in record["data"].items()}
        problems += [
            f"{where} holds another run: the records of {name} "
            + ("are not the same" if name in old and name in new else
               "were not there" if name in new else "are missing now")
            for name in sorted(old.keys() | new.keys())
            if old.get(name) != new.get(name)
        ]
        if record.get("tokenizer") not in (None, inputs.tokenizer.fingerprint):
            problems.append(f"{where} holds another run: the tokenizer of {args.model} has changed")
    return problems


def lock_directory(out: Path) -> None:
    """Make a directory and keep other runs out of it until this process ends, however it ends.
    ValueError if another run is in it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(out / LOCK, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise ValueError(f"--out {out}: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"--out {out}: another run is writing to it") from None
    except OSError:
        pass  # a file system without locks
    with contextlib.suppress(OSError):  # a full disk is noticed by what matters more
        os.truncate(lock, 0)
        os.write(lock, launcher().encode())
