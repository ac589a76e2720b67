"""The flags of train.py and, at the end, of evaluate.py. Nothing here waits for torch.

    flags = parse(["--train", "alpaca=a.json", "math=b.jsonl", "--val", "val.json"])
    problems = check_flags(flags, world=8)

A flag of train.py is a field of `Flags`: its type, its defaults, its help, what is permitted and
the mode it belongs to stand there and nowhere else. The parser, the check of ranges, the comparison
with the run that --out holds, and config.json are made from the fields.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import re
import shlex
import shutil
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn, get_args, get_type_hints

from hf import refuse, templates
from sources import tasks

if TYPE_CHECKING:
    import torch

GB = 1_000_000_000
RESERVED = 2 * GB  # of a GPU's memory, see cli/plan.py
DTYPES = "auto", "bf16", "fp32", "fp64"


class Card(NamedTuple):
    """A GPU as its maker publishes it; rates in 10⁹ a second."""

    products: float  # FLOPs in bf16 without sparsity
    memory: float  # GB
    moves: float  # bytes from and to memory
    link: float  # bytes from the other cards: NVLink, or PCIe where there is none or in pairs alone
    host: float  # bytes from the host: PCIe


CARDS = {
    "A40": Card(149_700, 48, 696, 32, 32),
    "A100-40": Card(312_000, 40, 1555, 300, 32),
    "A100-80": Card(312_000, 80, 2039, 300, 32),
    "H100": Card(989_000, 80, 3350, 450, 64),
    "H200": Card(989_000, 141, 4800, 450, 64),
    "L40S": Card(362_000, 48, 864, 32, 32),
    "4090": Card(165_200, 24, 1008, 32, 32),
}

WEIGHTS = "a weights.json, uniform, proportional, or NAME=WEIGHT,..."  # what --weights may be
# How far λ_k can go in a run, at Adam's full speed: weights that start equal can end at a ratio of
# exp(2 REACH).
REACH = 8.0
MODES = "bilevel", "finetune", "draw", "plan"
TRAINS, DRAWS, LEARNS = MODES[:2], MODES[1:3], MODES[:1]


class Range(NamedTuple):
    """What a flag's value may be."""

    within: Callable[[float], bool]
    words: str


COUNT = Range(lambda x: 0 < x < 1e9, "a whole number above 0 and below 1e9")
LOT = Range(lambda x: 0 < x <= 10**6, "a whole number from 1 to a million")
MANY = Range(lambda x: 0 < x <= 10**7, "a whole number from 1 to ten millions")
SCALE = Range(lambda x: 0 < x < 1e9, "a number above 0 and below 1e9")
RATE = Range(lambda x: 0 <= x < 1e9, "a number of at least 0 and below 1e9")
SHARE = Range(lambda x: 0 <= x < 1, "a share from 0 to below 1")
SEED = Range(lambda x: 0 <= x < 2**32, "a whole number from 0 to below 2^32")
BLOCKS = Range(lambda x: x >= 0, "0 (all) or a number of blocks")
CUT = Range(lambda x: x == 0 or x > 1, "0 (all) or at least 2 ranks")
STEPS = Range(lambda x: x >= 0, "a number of steps, or 0")
MEMORY = Range(lambda x: x * GB > RESERVED, f"more than the {RESERVED / GB:g} kept back")


def flag(group, default, text, *, tiny=None, permitted=None, choices=None, only=MODES,
         same_run=True, metavar=None):  # fmt: skip
    """A field of Flags.

    group      its heading in --help
    tiny       its default for the built-in model, if that is another
    permitted  Range of its values, or `choices`
    only       the modes that it belongs to: the others refuse it, and it is None there
    same_run   whether a run that goes on must have the value it began with
    """
    about = {"group": group, "text": text, "tiny": default if tiny is None else tiny, "only": only,
             "permitted": permitted, "choices": choices, "same_run": same_run, "metavar": metavar}
    return dataclasses.field(default=default, metadata=about)


MOST = partial(flag, "what most runs need")
DATA = partial(flag, "model and data")
STEP = partial(flag, "optimisation", only=TRAINS)
LISA = partial(flag, "LISA, memory and devices", only=TRAINS)
TUNE = partial(flag, "--mode finetune and draw", only=DRAWS)
KEEP = partial(flag, "saving and going on", same_run=False)
PLAN = partial(flag, "--plan", only=("plan",), same_run=False)


@dataclass(frozen=True)
class Flags:
    """Every flag, by its name with underscores. One that belongs to another mode is None."""

    mode: str = MOST("bilevel", "'bilevel' learns source weights; 'finetune' trains on samples "
                     "drawn by --weights; 'draw' writes these samples to files, and trains nothing",
                     choices=MODES[:3])
    model: str = MOST("tiny", "'tiny', a local Hugging Face directory, or a hub id", only=TRAINS)
    train: list | None = MOST(None, "sources, as NAME=PATH ... (a.json is a=a.json), or one "
                              "directory or quoted glob of train_* files; or of the hub, "
                              "NAME=OWNER/NAME[:SPLIT[CONFIG]]. "
                              ":prompt=KEY,answer=KEY after either names the keys to read",
                              metavar="NAME=PATH", same_run=False)
    val: str | None = MOST(None, "validation records: the weights minimise their loss; finetune "
                           "watches it", same_run=False)
    test: str | None = MOST(None, "held-out records, for the report", same_run=False)
    weights: str | None = MOST(None, "what finetune and draw draw samples by: " + WEIGHTS,
                               only=DRAWS, same_run=False)  # the numbers are compared
    out: Path = MOST(None, "directory of the run [runs/<model>-<sources>-seed<seed>, of the "
                     "built-in model and data runs/<task>-seed<seed>; with another --mode "
                     "…-<mode>-seed<seed>]", same_run=False)
    steps: int | None = MOST(None, "steps of an outer round, instead of --epochs", tiny=200,
                             permitted=COUNT, only=TRAINS)
    batch_size: int = MOST(64, "training samples of a step, over all ranks", permitted=LOT,
                           only=TRAINS)
    plan: bool = MOST(False, "print the bytes that each GPU needs, and end: needs no GPU and no "
                      "weights, --model may be a config.json; exit 1 if they do not fit",
                      same_run=False, only=TRAINS)

    task: str = DATA("denoising", "built-in data, without --train", only=TRAINS,
                     choices=tuple(tasks.TASKS))
    template: str = DATA("auto", "how a conversation becomes text; own is the model's chat "
                         "template; auto is own where it has one, else alpaca", tiny="plain",
                         choices=("auto", *templates.NAMES), only=TRAINS)
    max_length: int = DATA(512, "tokens at which a sample is cut; the rest of a text makes more",
                           tiny=64, permitted=COUNT, only=TRAINS)
    eval_every: int = DATA(0, "steps between two losses on the test records; 0 = before and after "
                           "the run alone", permitted=STEPS, same_run=False, only=TRAINS)
    per_source: int | None = DATA(None, "samples to draw of each source, after --drop-overlap",
                                  permitted=COUNT)
    drop_overlap: bool = DATA(False, "remove training records whose prompt is one of validation or "
                              "test, case and spaces aside, and validation records likewise")

    epochs: float = STEP(1.0, "passes over as many samples as all sources hold, or over the "
                         "mixture", permitted=SCALE)
    val_batch_size: int = STEP(64, "validation samples of a step, over all ranks", permitted=LOT,
                               only=LEARNS)
    micro_batch_size: int = STEP(8, "samples of one forward on one rank", tiny=32, permitted=LOT)
    alpha: float = STEP(10.0, "penalty multiplier", permitted=SCALE, only=LEARNS)
    tau: float = STEP(1.0, "factor on alpha from one outer round to the next", permitted=SCALE,
                      only=LEARNS)
    outer_rounds: int = STEP(1, "rounds of --epochs or --steps", permitted=COUNT, only=LEARNS)
    lr_w: float = STEP(1e-5, "learning rate of w; and of u, unless that is given", tiny=1e-3,
                       permitted=RATE)
    lr_u: float = STEP(1e-5, "learning rate of u", tiny=1e-3, permitted=RATE, only=LEARNS)
    lr_lambda: float | None = STEP(None, "learning rate of the source weights' logits; auto: such "
                                   "that each can move by 8 in a whole run [auto]",
                                   permitted=RATE, only=LEARNS, metavar="auto|RATE")
    gap: str = STEP("auto", "how the gap of a sample between w and u is computed: from gradients, "
                    "which bf16 does not drown, or as the difference of two losses; auto is "
                    "gradient where parameters are bf16",
                    choices=("auto", "gradient", "difference"), only=LEARNS)
    lambda_z: float = STEP(3.0, "standard errors that a source's gradient must be from 0 for its "
                           "weight to move; 0: Adam steps whatever the error, as in the paper",
                           permitted=RATE, only=LEARNS)
    warmup: float = STEP(0.03, "share of all steps in which learning rates rise", permitted=SHARE)
    schedule: str = STEP("cosine", "what follows the warm-up",
                         choices=("cosine", "linear", "constant"))
    weight_decay: float = STEP(5e-4, "AdamW's, for w and u", permitted=RATE)
    clip: float = STEP(0.0, "largest gradient norm of w and of u (gradients are divided by alpha); "
                       "0 = off", permitted=RATE)
    seed: int = STEP(0, "of the data order, LISA's draws, and the built-in task and model",
                     permitted=SEED, only=MODES)
    skip_nonfinite: bool = STEP(False, "pass over a step whose loss or gradient is not finite, and "
                                "count it", same_run=False)

    samples: int = TUNE(10_000, "size of the mixture, drawn without replacement", tiny=6400,
                        permitted=MANY)
    repeat: bool = TUNE(False, "repeat the records of a source that is short, instead of taking "
                        "more of the others")
    also: list | None = TUNE(None, "sources of which all records join the mixture, beside --samples"
                             " (validation records too; finetune then without --val)",
                             metavar="NAME=PATH", same_run=False)

    lisa_layers: int = LISA(2, "blocks that train at a time; 0 = train everything",
                            permitted=BLOCKS)
    lisa_interval: int = LISA(20, "steps between two draws of the blocks", tiny=5, permitted=COUNT)
    lisa_ends: str = LISA("always", "embedding, final norm and head: trained always, drawn like a "
                          "block, never", choices=("always", "sampled", "frozen"))
    lisa_coupling: str = LISA("shared", "w and u train the same blocks, or draw their own",
                              choices=("shared", "independent"), only=LEARNS)
    dtype: str = LISA("auto", "storage of parameters; auto is bf16 on CUDA and fp32 on CPU. Cards "
                      "before Ampere (V100, T4) compute bf16 slowly: give fp32",
                      choices=DTYPES)
    activation_checkpointing: bool = LISA(False, "keep only the inputs of blocks for backward, and "
                                          "compute the rest again", same_run=False)
    cpu_offload: bool = LISA(False, "the copy that is not at work, u while w is and w while u is, "
                             "waits in host memory", only=LEARNS, same_run=False)
    shard_size: int = LISA(0, "ranks that a copy of the model is cut over, such as the GPUs of a "
                           "machine; every so many hold a replica; 0 = all",
                           permitted=CUT, same_run=False)
    compile: bool = LISA(False, "fuse what each block does, with torch.compile; needs a C++ "
                         "compiler")

    save_every: int = KEEP(0, "steps between two checkpoints; 0 = only at the end, and where a "
                           "signal, or a step that is not finite, stops the run", permitted=STEPS)
    keep: int = KEEP(2, "checkpoints to keep, the newest; a finished run keeps its last state, or "
                        "with 0 none", permitted=STEPS)
    resume: str = KEEP("auto", "'auto' goes on from the newest checkpoint in --out; 'never' starts "
                       "anew, in another directory if --out exists; a run's directory, or one of "
                       "its checkpoints, starts from there where --out has no checkpoint yet, "
                       "and may change every flag but --mode, --dtype, and those of "
                       "model, data and mixture",
                       metavar="auto|never|DIR")
    report_to: str | None = KEEP(None, "show the metrics there, too", only=TRAINS,
                                 choices=("wandb", "tensorboard", "trackio"))
    timeout: float = KEEP(1800.0, "seconds after which a rank that is waited for in a step ends "
                          "the run (loading and saving have their own limit of 4 hours)",
                          permitted=SCALE)

    gpus: int = PLAN(8, "GPUs of the plan", permitted=COUNT)
    gpu_memory: float | None = PLAN(None, "of each, in GB (10^9 bytes), of which 2 are kept back",
                                    permitted=MEMORY)
    card: str | None = PLAN(None, "a GPU of these, for the time of a step; gives --gpu-memory",
                            choices=tuple(CARDS))
    price: float | None = PLAN(None, "dollars of one GPU and hour; adds what the run costs",
                               permitted=SCALE)
    json: bool = PLAN(False, "the plan as JSON")

    def lambda_rate(self, total: int) -> float:
        """--lr-lambda; where that is auto, the rate at which a logit can move by REACH in a run of
        `total` steps."""
        return REACH / (total * (1 - self.warmup / 2)) if self.lr_lambda is None else self.lr_lambda

    def reach(self, total: int | None, n_sources: int) -> str:
        """How far weights can move, in words; without a number of steps in a run of any, or where
        the rate is given in 100."""
        steps = total or 100
        far = self.lambda_rate(steps) * steps * (1 - self.warmup / 2)
        most = 1 / (1 + (n_sources - 1) * math.exp(-2 * min(far, 300)))
        span = f"{steps} steps" if total or self.lr_lambda is not None else "the run"
        return (f"in {span} one of {n_sources} sources can go from {1 / n_sources:.3f} to "
                f"{most:.5f} (its logit by {far:.1f}, at Adam's full speed)")

    def cost_in_words(self, cost: dict) -> list[str]:
        """Lines of what a plan says of time and money."""
        *parts, step = (f"{what} {s:.4g} s" for what, s in cost["seconds"].items())
        where = f"{self.gpus} {self.card}{' (as if in one machine)' * (self.gpus > 8)}"
        lines = [f"a {step.replace(' ', ': ', 1)} on {where}, bound by {cost['bound']}; "
                 f"all samples {self.max_length} tokens long",
                 f"of which {', '.join(parts)}"]  # fmt: skip
        if cost["exchanged"]:
            lines += [f"of what is sent, {cost['exchanged'] / GB:.3g} GB a GPU and step go between "
                      f"replicas, the rest among every {self.shard_size} GPUs"]  # fmt: skip
        if n := cost.get("hidden_from"):
            beyond = "" if cost["hidden_fits"] else ", which does not fit"
            lines += [f"computing takes longer than gathering from --micro-batch-size {n}{beyond}"]
        if not cost["hours"]:
            return [*lines, "for how many hours: --steps, or --train"]
        price = f", {cost['dollars']:,.2f} dollars" if self.price else ""
        return [*lines, f"{cost['steps']} steps: {cost['hours']:,.4g} hours{price}"]

    def slopes(self, dtype: torch.dtype) -> bool:
        """Whether the gap is had from gradients, for parameters of this dtype."""
        return self.mode == "bilevel" and self.gap != "difference" and (
            self.gap == "gradient" or dtype.itemsize < 4)

    @property
    def modes(self) -> set[str]:
        """What a flag's `only` must have one of."""
        return {self.mode, "plan"} if self.plan else {self.mode}


# Flags that a run may change when it goes on: they do not decide what it computes.
HARMLESS = {f.name for f in dataclasses.fields(Flags) if not f.metadata["same_run"]}
# Flags that a run may change when it branches off: not those of the state's shapes and of the data.
BRANCHING = {f.name for f in dataclasses.fields(Flags) if f.metadata["only"] != DRAWS
             and f.metadata["group"] != "model and data"}  # fmt: skip
BRANCHING -= {"mode", "model", "dtype"}


EXAMPLES = """\
'A (tiny: B)' is the default A, and B for the built-in model. @FILE stands for the flags in a file,
on as many lines as you like, with or without a \\ at their ends; what follows a # is a comment.

examples:
  torchrun --standalone --nproc_per_node=2 train.py
  torchrun --nproc_per_node=8 train.py --model meta-llama/Meta-Llama-3-8B \\
      --train alpaca=a.json math=b.jsonl --val val.json --test test.json --out runs/x
  torchrun --nproc_per_node=8 train.py --mode finetune --model meta-llama/Meta-Llama-3-70B \\
      --train alpaca=a.json math=b.jsonl --weights runs/x/weights.json --out runs/y
"""


# Beside the words of a line of @FILE, which the group holds if they are quoted or escaped: a
# comment, and a backslash that goes on with the next line.
BESIDE = re.compile(r"""('[^']*'|"(?:\\.|[^"\\])*"|\\.)|(?<!\S)(?:#.*|\\$)""")


class Parser(argparse.ArgumentParser):
    """Refuses a flag in one line; the usage is for --help."""

    def parse_args(self, args: list[str] | None = None) -> argparse.Namespace:
        given = sys.argv[1:] if args is None else args
        for text in given:
            self.check(text)
        try:
            return super().parse_args(given)
        except UnicodeDecodeError as error:  # of Python before 3.12
            self.error(f"a file of flags is not in UTF-8: {error}")
        except RecursionError:
            self.error("a file of flags names itself")

    def check(self, text: str) -> None:
        if text.encode(errors="ignore").decode() != text:
            self.error(f"{text}: not in UTF-8")  # the files of a run could not say it

    def error(self, message: str) -> NoReturn:
        self.exit(refuse(message))

    def print_help(self, file=None) -> None:
        if os.environ.get("RANK", "0") == "0":  # once, however many processes torchrun starts
            super().print_help(file)

    def convert_arg_line_to_args(self, line: str) -> list[str]:
        self.check(line)
        line = line.removeprefix("\ufeff").rstrip()
        try:
            return shlex.split(BESIDE.sub(r"\1", line))
        except ValueError as error:
            self.error(f"{line}: {error}")


def parse(argv: list[str] | None) -> Flags:
    """The command line, with the defaults of the chosen mode and model filled in."""
    parser = Parser(
        description="Learn source weights by first-order bilevel optimisation (ScaleBiO), and\n"
        "fine-tune on the mixture that they make.",
        usage="[torchrun --nproc_per_node=N] train.py [@FILE] [flags]",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
        fromfile_prefix_chars="@",
        argument_default=argparse.SUPPRESS,  # so that what was given is told from what was not
    )
    groups, hints, fields = {}, get_type_hints(Flags), dataclasses.fields(Flags)
    for f in fields:
        title = f.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        groups[title].add_argument(spelt(f.name), help=help_of(f), **reading(hints[f.name], f))
    given = vars(parser.parse_args(argv))
    stub = Flags(**{name: given[name] for name in ("mode", "plan", "model") if name in given})
    tiny = stub.model == "tiny" and stub.mode != "draw"
    values = {
        f.name: (f.metadata["tiny"] if tiny else f.default)
        if stub.modes & {*f.metadata["only"]} else None
        for f in fields
    } | given  # fmt: skip
    if {"epochs", "steps"} <= given.keys():
        parser.error("--epochs and --steps both say how long it takes: give one")
    if "epochs" in given:
        values["steps"] = None
    if "lr_w" in given and "lr_u" not in given and values["lr_u"] is not None:
        values["lr_u"] = values["lr_w"]
    names = []
    for item in values["train"] or []:
        name, equals, _ = item.partition("=")
        if not equals or set(name) & set("/:"):  # no NAME=PATH
            name = re.split("[.:]", Path(item).name)[0]
        names.append(re.sub("[^A-Za-z0-9_]+", "", name)[:20] or "data")
    model = Path(values["model"] or "").name if names or not tiny else values["task"]
    about = [model, *names[:3], f"and-{len(names) - 3}-more" * (len(names) > 3),
             stub.mode * (stub.mode != "bilevel"), f"seed{values['seed']}"]  # fmt: skip
    return Flags(**values | {"out": values["out"] or Path("runs", "-".join(filter(None, about)))})


def reading(hint: type, f: dataclasses.Field) -> dict:
    """How argparse reads a flag of this type."""
    kind = next(t for t in get_args(hint) or (hint,) if t is not types.NoneType)
    if kind is bool:
        return {"action": "store_true"}
    how = {"nargs": "+", "action": "extend"} if kind is list else {"type": kind}
    if f.metadata["metavar"] == "auto|RATE":
        how = {"type": auto_or_number}
    return how | {key: f.metadata[key] for key in ("metavar", "choices")}


def auto_or_number(text: str) -> float | None:
    try:
        return None if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: permitted is auto or a number") from None


def help_of(f: dataclasses.Field) -> str:
    """The text of --help, with the defaults."""
    a, b = f.default, f.metadata["tiny"]
    text = f.metadata["text"].replace("%", "%%")
    if b is None or a is False:
        return text
    a = "as --epochs says" if a is None else a
    return f"{text} [{a}]" if a == b else f"{text} [{a} (tiny: {b})]"


def spelt(name: str) -> str:
    """A flag as it is typed."""
    return f"--{name.replace('_', '-')}"


def as_flags(change: dict, ranks: str) -> str:
    """The command line's form of a change, in which `ranks` is the flag for their number."""
    typed = ((f"--{ranks}" if k == "ranks" else spelt(k), value) for k, value in change.items())
    return " ".join(flag if value is True else f"{flag} {value}" for flag, value in typed)


def as_json(flags: Flags) -> dict:
    """The flags, as config.json keeps them."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(flags).items()}


def check_flags(flags: Flags, world: int) -> list[str]:
    """A line for each flag that is out of range, contradicts another or does not suit the ranks."""
    problems, learns = [], flags.mode == "bilevel"
    for f in dataclasses.fields(Flags):
        value, only, permitted = getattr(flags, f.name), f.metadata["only"], f.metadata["permitted"]
        if value is not None and not flags.modes & {*only}:
            of = "--plan" if only == ("plan",) else f"--mode {' or '.join(only)}"
            problems.append(f"{spelt(f.name)} goes with {of} alone")
        elif value is not None and permitted and not permitted.within(value):
            problems.append(f"{spelt(f.name)} {value}: permitted is {permitted.words}")
    for name in ("batch_size", "val_batch_size"):
        value = getattr(flags, name) or 0
        if value > 0 and value % world:
            below, above = value // world * world, -(-value // world) * world
            near = " or ".join(str(v) for v in (below, above) if v)
            problems.append(f"{spelt(name)} {value} is not divisible by {world} ranks: take {near}")
    if (flags.shard_size or 0) > 1 and world % flags.shard_size:
        problems.append(f"--shard-size {flags.shard_size} does not divide the {world} rank(s)")
    if learns and 0 < flags.alpha < 1e9 and flags.tau > 0:
        last = math.log(flags.alpha) + (flags.outer_rounds - 1) * math.log(flags.tau)  # ln alpha
        if not abs(last) < math.log(1e9):
            problems.append(f"--tau {flags.tau}: permitted is what leaves alpha between 1e-9 and "
                            "1e9 in the last outer round")
    if flags.card and flags.dtype in ("fp32", "fp64"):
        problems.append(f"--dtype {flags.dtype}: the rates of a --card are those of bf16")
    if flags.price and not flags.card:
        problems.append("--price needs --card: without, no time is known")
    if flags.save_every and flags.keep == 0:
        problems.append("--keep 0 contradicts --save-every: none would be kept")
    for name, value in ("lisa_ends", "sampled"), ("lisa_coupling", "independent"):
        if flags.lisa_layers == 0 and getattr(flags, name) == value:
            problems.append(f"{spelt(name)} {value} contradicts --lisa-layers 0: nothing is drawn "
                            "where everything trains")
    if learns and flags.train and not flags.val:
        problems.append("--val is missing: --train needs validation records beside it")
    if flags.eval_every and flags.train and not flags.test:
        problems.append(f"--eval-every {flags.eval_every}: needs --test")
    if not flags.train and (flags.val or flags.test or flags.also or flags.mode == "draw"):
        problems.append("--train is missing: a built-in task goes without --val, --test, --also "
                        "and --mode draw")
    if flags.train and flags.task not in (None, Flags.task):
        problems.append(f"--task {flags.task} contradicts --train: built-in data go without")
    if learns and 0 < flags.tau != 1 == flags.outer_rounds:
        problems.append(f"--tau {flags.tau}: needs --outer-rounds, between which alpha changes")
    if not learns and not flags.weights and not flags.plan:
        problems.append(f"--weights is missing: --mode {flags.mode} needs {WEIGHTS}")
    if flags.report_to and not find_spec(flags.report_to):
        problems.append(f"--report-to {flags.report_to}: pip install {flags.report_to}")
    if flags.compile and not flags.plan and not shutil.which(os.environ.get("CXX", "g++")):
        problems.append("--compile needs a C++ compiler: install g++, or name one in CXX")
    return problems


# The flags of evaluate.py

# What ScaleBiO's evaluation puts after a question of GSM8K or MATH.
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."


def from_to(least: float, most: float = 10**6) -> Callable[[str], float]:
    """A type for argparse: a number in a range, whole where `least` is."""

    def number(text: str) -> float:
        if not least <= (value := type(least)(text)) <= most:
            raise argparse.ArgumentTypeError(f"{text}: permitted is from {least} to {most}")
        return value

    return number


AT_LEAST_1, AT_LEAST_0 = {"type": from_to(1)}, {"type": from_to(0, 2**32 - 1)}
SEVERAL = {"nargs": "+", "required": True}
FILE = {"type": Path, "metavar": "FILE"}
ASKING, RUNNING = "gsm8k math mt-bench", "loss gsm8k math mt-bench generate"
EVALUATIONS = {
    "loss": "mean sample loss and perplexity",
    "gsm8k": "accuracy on GSM8K",
    "math": "accuracy on MATH",
    "mt-bench": "two-turn questions, and a judge",
    "generate": "continue prompts",
    "plot": "weights and losses of runs, as a picture",
}
EVALUATION = [  # commands, flag, default, help, and what argparse takes beside
    ("loss", "--model", None, "directories or hub ids", SEVERAL),
    ("loss", "--data", None, "records, as [NAME=]PATH; a directory or quoted glob stands for its "
     "train_* files, TASK or TASK-seedN for the test records of a built-in task", SEVERAL),
    ("loss", "--max-length", 512, "tokens of a sample, at most the model's positions", AT_LEAST_1),
    ("loss", "--micro-batch-size", 8, "samples of a forward", AT_LEAST_1),
    (ASKING, "--model", None, "a directory or hub id", {}),
    ("generate", "--model", None, "a directory or hub id", {"required": True}),
    ("generate", "--prompt", None, "users' turns with --template, else text to continue", SEVERAL),
    ("gsm8k math", "--data", None, "JSON or JSONL of {question, answer} or {problem, solution}, or "
     "owner/dataset/file of the hub", {}),
    ("gsm8k math", "--shots", 0, "worked examples before each question", AT_LEAST_0),
    ("gsm8k math", "--exemplars", None, "a file to take them from, like --data [4 of our own]", {}),
    ("gsm8k math", "--instruction", INSTRUCTION, "what follows a question", {}),
    ("gsm8k math", "--rescore", None, "score these replies again; needs no other flag", FILE),
    ("mt-bench", "--questions", None, "FastChat's question.jsonl; may be owner/dataset/file", {}),
    ("mt-bench", "--reference", None, "FastChat's gpt-4.jsonl or its like [from --questions]", {}),
    ("mt-bench", "--answers", None, "grade these, in FastChat's format, not a --model's", {}),
    ("mt-bench", "--judge-url", None, "OpenAI-compatible, as http://host:8000/v1 (/v1 is added "
     "where there is no path); its key, if any, in $JUDGE_API_KEY", {}),
    ("mt-bench", "--judge-model", None, "the endpoint's name of the judge", {}),
    ("mt-bench", "--judge-prompts", None, "FastChat's judge_prompts.jsonl [our own]", FILE),
    ("mt-bench", "--judge-max-tokens", 2048, "of a judgement", AT_LEAST_1),
    ("mt-bench", "--judge-temperature", 0.0, "of judgements", {"type": from_to(0.0)}),
    ("mt-bench", "--judge-concurrency", 4, "requests at a time", AT_LEAST_1),
    ("mt-bench", "--judge-timeout", 120, "seconds without a byte", {"type": from_to(1e-3)}),
    ("mt-bench", "--judge-tries", 8, "of a request, before giving up", AT_LEAST_1),
    (ASKING, "--limit", None, "take the first so many questions [all]", AT_LEAST_1),
    (ASKING, "--max-new-tokens", 1024, "of a reply", AT_LEAST_1),
    ("generate", "--max-new-tokens", 128, "of a reply", AT_LEAST_1),
    (ASKING, "--batch-size", 16, "replies at a time, on each rank", AT_LEAST_1),
    ("generate", "--temperature", 0.0, "0 is the likeliest token", {"type": from_to(0.0)}),
    ("generate", "--top-p", 1.0, "nucleus of the distribution", {"type": from_to(1e-6, 1)}),
    ("mt-bench generate", "--seed", 0, "of the draws at temperature > 0", AT_LEAST_0),
    (RUNNING, "--dtype", "auto", "bf16 on GPUs, fp32 on CPUs", {"choices": DTYPES}),
    (RUNNING, "--template", None, "[the model's]", {"choices": templates.NAMES}),
    (ASKING, "--out", None, "directory of the replies [runs/eval-<model>]", {}),
    ("plot", "run", None, "directories of train.py; runs that differ in their seed alone are drawn "
     "together", {"nargs": "+", "type": Path}),
    ("plot", "--out", None, "png, pdf or svg [weights.png or, of fine-tuning, losses.png; of one "
     "run in its directory]", FILE),
]  # fmt: skip


def parse_evaluation(argv: list[str] | None) -> argparse.Namespace:
    """The command line of evaluate.py."""
    parser = Parser(description="Judge a model on held-out data, or let it talk.")
    commands = parser.add_subparsers(dest="command", required=True)
    for command, summary in EVALUATIONS.items():
        p = commands.add_parser(command, help=summary)
        for of, flag, default, text, options in EVALUATION:
            if command in of.split():
                text += f" [{default}]" if default is not None else ""
                p.add_argument(flag, default=default, help=text, **options)
    return parser.parse_args(argv)
