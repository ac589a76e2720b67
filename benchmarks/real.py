"""Is it worth the trouble on a pretrained model? Weights, what they give, and what rivals find.

    python -m benchmarks.real --model DIR --budget cpu          # all of it, but for what is done
    python -m benchmarks.real --model DIR --budget gpu --only curve --tasks languages --seeds 0
    python -m benchmarks.real --model DIR --budget gpu --only tables

    known   weights of real sources of which it is known whose help most
    curve   held-out loss after fine-tuning on these weights, and on other mixtures
    rivals  on weights that other methods find at equal compute (rivals.py)
    sizes   a larger built-in model on weights of smaller ones

A cell is one run of train.py, as in fidelity.py, whose tasks it also takes: commands on other
tasks, seeds or methods may run side by side on one --out, and what is there is not done again. The
files of the real tasks are made from ../shared/assets, or $SCALEBIO_ASSETS, and always the same.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from benchmarks import fidelity, rivals
from benchmarks.fidelity import ASSETS, CAPTIONS, DEFAULTS, SIZE, TUNE, Cell
from cli.flags import Parser, from_to, parse
from sources import tasks

PARTS = "known", "curve", "rivals", "sizes", "tables"
SMALL = (ASSETS / "model/stories260K-hf").resolve()
OURS, THEIRS = "ScaleBiO", tuple(rivals.METHODS)


@dataclass(frozen=True)
class Budget:
    records: int  # of a source
    held_out: tuple[int, int]  # validation and test records
    max_length: int
    learn: str
    tune: str


ON_GPU = "--batch-size 32 --micro-batch-size 32 --dtype bf16"
BUDGETS = {
    "cpu": Budget(300, (200, 48), 128, "--steps 24 --batch-size 8 --val-batch-size 8",
                  "--steps 20 --batch-size 8 --samples 160 --lr-w 5e-5"),
    "gpu": Budget(3000, (1000, 500), 256, f"--steps 200 --val-batch-size 32 {ON_GPU}",
                  f"--steps 100 --samples 3200 --lr-w 5e-5 {ON_GPU}"),
}  # fmt: skip
BEST = {  # of each task the sources that should help
    "languages": ["en"], "answers": ["right"], "gpt4": ["gpt4_alpaca"],
    "math": ["dart-math-uniform", "MathInstruct", "orca-math-word-problems-200k"],
} | {task: [best] for task, best in fidelity.BEST.items()}  # fmt: skip
BEST["multilingual"].append("eli")  # 30% of its validation
REAL = tuple(task for task in BEST if task not in fidelity.BEST)
# Built-in models by their parameters: width, and learning rate.
SIZES = {"0.1M": (48, 3e-3), "0.9M": (128, 1.1e-3), "3.3M": (256, 6e-4), "9.9M": (448, 3e-4)}
SIZES_TASK = "graded"


# The data of the real tasks

def parts_of(task: str, n: int) -> tuple[dict[str, list], list, list]:
    """Its sources, of at most n records, validation and test."""
    if task == "languages":  # of each language other captions
        files = [CAPTIONS, *map(CAPTIONS.with_suffix, (".de", ".fr")), CAPTIONS.with_name("val.en")]
        en, de, fr, test = ([{"text": line} for line in file.read_text().splitlines()]
                            for file in files)  # fmt: skip
        return {"en": en[:n], "de": de[n : 2 * n], "fr": fr[2 * n : 3 * n]}, en[3 * n :], test
    if task == "answers":  # the wrong ones are those of other wrong records
        records = json.loads((ASSETS / "alpaca/alpaca_data_cleaned_12k_en.json").read_text())
        part, *rest = records[n : 2 * n], records[2 * n : 10_000], records[10_000:]
        order = np.random.default_rng(0).permutation(n)
        wrong = [part[i] | {"output": part[j]["output"]}
                 for i, j in zip(order, np.roll(order, 1), strict=True)]  # fmt: skip
        return {"right": records[:n], "wrong": wrong}, *rest
    folder = ASSETS / "scalebio" / {"gpt4": "data_tiny", "math": "math_exp"}[task]
    files = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
    held = files.pop("val"), files.pop("test")
    return {name.removeprefix("train_"): part[:n] for name, part in files.items()}, *held


@dataclass(frozen=True)
class Trial:
    """What a command is about: where its runs are, the model, and the sizes."""

    out: Path
    model: Path
    budget: Budget

    def folder(self, task: str) -> Path:
        return self.out / "data" / task

    def write(self, task: str) -> None:
        """The files of a real task, if they are not there: all at once, whoever else does so."""
        if self.folder(task).is_dir():
            return
        sources, *held = parts_of(task, self.budget.records)
        held = [part[:n] for part, n in zip(held, self.budget.held_out, strict=True)]
        files = {f"train_{name}": records for name, records in sources.items()}
        self.folder(task).parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=self.folder(task).parent))
        for name, records in (files | dict(zip(("val", "test"), held, strict=True))).items():
            (made / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        with suppress(OSError):  # another was first
            os.rename(made, self.folder(task))
        shutil.rmtree(made, ignore_errors=True)

    def sizes(self, task: str) -> dict[str, int]:
        files = sorted(self.folder(task).glob("train_*"))
        return {f.stem.removeprefix("train_"): f.read_text().count("\n") for f in files}

    def result(self, cell: Cell) -> Path:
        return cell.folder(self.out) / "weights.json"

    def flags(self, task: str, model: Path) -> str:
        length = 64 if task == "languages" else self.budget.max_length
        length *= 1 + (model == SMALL)  # whose tokens are short
        model, folder = (shlex.quote(str(path)) for path in (model, self.folder(task)))
        return (f"--model {model} --train {folder} --test {folder}/test.jsonl --drop-overlap "
                f"--max-length {length}")  # fmt: skip


# The cells

def learning(task: str, seed: int, trial: Trial, method: str = OURS) -> Cell:
    """The run that finds weights: ours, with the small model instead of --model, or a rival's."""
    if task in REAL:
        model = SMALL if method == SMALL.name else trial.model
        val = f"--val {shlex.quote(str(trial.folder(task)))}/val.jsonl"
        flags = f"{trial.flags(task, model)} {val} {trial.budget.learn}"
        cell = Cell(task, method, seed, flags)
    else:
        cell = fidelity.learn(task, DEFAULTS, seed)
    if method not in THEIRS:
        return cell
    given = parse(shlex.split(cell.flags))
    n_sources = len(trial.sizes(task) if task in REAL else tasks.task(task, 0)[0])
    sizes = given.steps, given.batch_size, given.val_batch_size, n_sources
    steps = rivals.steps_for(method, *sizes)
    other = {"train.PenaltyStep": partial(rivals.METHODS[method], total=steps)}
    return replace(cell, setting=method, flags=f"{cell.flags} --steps {steps}", replaced=other)


def tuning(task: str, seed: int, trial: Trial, arm: str, weights: str | Path) -> Cell:
    """Fine-tuning on a mixture."""
    flags = f"--task {task} {TUNE}"
    if task in REAL:
        flags = f"{trial.flags(task, trial.model)} --mode finetune --repeat {trial.budget.tune}"
    return Cell(task, f"mixture {arm}", seed, f"{flags} --weights {shlex.quote(str(weights))}")


def curve(task: str, seed: int, trial: Trial) -> list[Cell]:
    """The mixtures of a real task that are fine-tuned on, but for the rivals'. KeyError if their
    weights are not found yet."""
    sizes = trial.sizes(task)
    learned = fidelity.read(trial.out, task, OURS)[seed]["weights"]
    even = 1 / len(sizes)
    arms = {"learned": learned, "uniform": dict.fromkeys(sizes, even),
            "halfway": {name: (p + even) / 2 for name, p in learned.items()}}  # fmt: skip
    arms |= {f"only {name}": {name: 1.0} for name in sizes}
    if len(sizes) > 2:  # else the same
        arms |= {f"without {name}": dict.fromkeys(sizes.keys() - {name}, 1.0) for name in sizes}
    specs = {arm: ",".join(f"{name}={p:.6f}" for name, p in weights.items())
             for arm, weights in arms.items()}  # fmt: skip
    if seed in fidelity.read(trial.out, task, SMALL.name):
        specs["learned by stories260K"] = trial.result(learning(task, seed, trial, SMALL.name))
    if max(sizes.values()) > 1.1 * min(sizes.values()):  # else it is uniform
        specs["proportional"] = "proportional"
    return [tuning(task, seed, trial, arm, spec) for arm, spec in specs.items()]


def sized(size: str, cell: Cell) -> Cell:
    """The cell with a built-in model of this size."""
    width, lr = SIZES[size]
    model = {"hidden_size": width, "intermediate_size": 8 * round(width / 3),
             "initializer_range": width**-0.5}  # fmt: skip
    flags = f"{cell.flags} --lr-w {lr}" + f" --lr-u {lr}" * ("finetune" not in cell.flags)
    return replace(cell, setting=f"{size} {cell.setting}", flags=flags, model=model)


def sizes_learn(seed: int) -> dict[str, Cell]:
    return {size: sized(size, fidelity.learn(SIZES_TASK, DEFAULTS, seed)) for size in SIZES}


def sizes_tune(seed: int, trial: Trial) -> Iterator[Cell]:
    """Each size fine-tuned on uniform weights, on those of smaller ones and on its own."""
    specs = {"uniform": "uniform"}
    for size, cell in sizes_learn(seed).items():
        specs[size] = trial.result(cell)
        for arm, spec in specs.items():
            yield sized(size, tuning(SIZES_TASK, seed, trial, arm, spec))


def stages(args, trial: Trial) -> Iterator[list[Cell]]:
    """The cells that find weights; when they are through, those that use them."""
    each = [(task, seed, trial) for task in args.tasks for seed in args.seeds]
    theirs = [(at, method) for at in each for method in args.methods if "rivals" in args.only]
    sizes = args.seeds if "sizes" in args.only else ()
    if {"known", "curve"} & {*args.only}:
        yield [learning(*at, method) for at in each for method in (OURS, SMALL.name)
               if method == OURS or (at[0] in REAL and trial.model != SMALL)]  # fmt: skip
    yield [learning(*at, method) for at, method in theirs]
    yield [cell for seed in sizes for cell in sizes_learn(seed).values()]

    for task, seed, _ in each if "curve" in args.only else ():
        with suppress(KeyError):  # that its weights are not there `run` has said
            yield curve(task, seed, trial) if task in REAL else fidelity.mix(task, seed, trial.out)
    yield [tuning(*at, method, trial.result(learning(*at, method))) for at, method in theirs
           if at[1] in fidelity.read(trial.out, at[0], method)]  # fmt: skip
    yield [cell for seed in sizes for cell in sizes_tune(seed, trial)]


# The tables

def losses(out: Path, task: str, arm: str, size: str = "") -> dict[int, float]:
    """{seed: held-out loss after fine-tuning}."""
    runs = fidelity.read(out, task, f"{size} mixture {arm}".strip(), "metrics.jsonl")
    return {seed: row["test_loss"] for seed, row in runs.items()}


def known_rows(out: Path) -> Iterator[dict]:
    for task, setting in ((task, setting) for task in REAL for setting in (OURS, SMALL.name)):
        for run in fidelity.read(out, task, setting).values():
            for name, p in run["weights"].items():
                yield {"task": task, "learned by": setting, "source": name, "weight": p,
                       "stated error": run["weights_se"][name],
                       "told apart": run["differs"][name]}  # fmt: skip


def curve_rows(out: Path) -> Iterator[dict]:
    """Paired by seed, the mixtures of a task from the best up."""
    others = {Cell("", f"mixture {method}", 0).folder(out).parent.name for method in THEIRS}
    for task in REAL:
        names = {f.name for f in (out / task).glob("mixture-*") if f.is_dir()} - others
        uniform, arms = losses(out, task, "uniform"), {}
        for arm in (name.removeprefix("mixture-") for name in names):
            pairs = [
                {"task": task, "mixture": arm, "held-out loss": x, "minus uniform's": x - base}
                for k, x in losses(out, task, arm).items() if (base := uniform.get(k))
            ]  # fmt: skip
            arms |= {arm: pairs} if pairs else {}
        order = {arm: np.mean([row["minus uniform's"] for row in arms[arm]]) for arm in arms}
        for arm in sorted(arms, key=order.get):
            yield from arms[arm]


def rival_rows(out: Path) -> Iterator[dict]:
    """Seeds in which a method's weights, ours and uniform ones were all fine-tuned on."""
    for task, best in BEST.items():
        uniform, ours = losses(out, task, "uniform"), losses(out, task, "learned")
        for method in (OURS, *THEIRS):
            setting = DEFAULTS if method == OURS and task not in REAL else method
            tuned = ours if method == OURS else losses(out, task, method)
            for seed, run in fidelity.read(out, task, setting).items():
                if seed in tuned.keys() & uniform.keys() & ours.keys():
                    yield {"task": task, "method": method, "steps": run["step"],
                           "weight of what should help": sum(run["weights"][name] for name in best),
                           "held-out loss": tuned[seed],
                           "minus uniform's": tuned[seed] - uniform[seed],
                           "minus ScaleBiO's": tuned[seed] - ours[seed]}  # fmt: skip


def size_rows(out: Path) -> Iterator[dict]:
    """What a model loses by weights of a smaller one instead of its own."""
    learned = {size: fidelity.read(out, SIZES_TASK, cell.setting)
               for size, cell in sizes_learn(0).items()}  # fmt: skip
    for size in SIZES:
        own = losses(out, SIZES_TASK, size, size)
        for arm in (*SIZES, "uniform"):
            for seed, loss in losses(out, SIZES_TASK, arm, size).items():
                if seed in own:
                    yield {"fine-tuned": size, "on weights of": arm, "held-out loss": loss,
                           "minus its own": loss - own[seed],
                           "rank correlation with its own": math.nan if arm == "uniform" else
                           fidelity.spearman(*(learned[s][seed]["weights"] for s in (arm, size)))
                           }  # fmt: skip


def draw(rows: list[dict], file: Path) -> None:
    """A panel for each task: what a mixture's held-out loss differs by from uniform's, of each seed
    and as their mean with its standard error."""
    from matplotlib.figure import Figure

    found = list(dict.fromkeys(row["task"] for row in rows))
    n = math.ceil(len(found) / 2)
    figure = Figure(figsize=(11, 3.6 * n), layout="constrained")
    panels = figure.subplots(n, 2, squeeze=False).flat
    for axes in panels[len(found) :]:
        axes.remove()
    for axes, task in zip(panels, found, strict=False):
        arms = {}
        for row in rows:
            if row["task"] == task:
                arms.setdefault(row["mixture"], []).append(row["minus uniform's"])
        for y, (arm, values) in enumerate(arms.items()):
            se = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else None
            colour = "C3" if arm == "learned" else "C0"
            axes.errorbar(np.mean(values), y, xerr=se, fmt="o", color=colour, capsize=3)
            axes.plot(values, [y] * len(values), ".", color="0.4", markersize=3)
        axes.axvline(0, color="0.3", linewidth=1, linestyle=":")
        axes.set_yticks(range(len(arms)), [*arms], fontsize=9)
        axes.locator_params(axis="x", nbins=5)
        axes.set(title=task, xlabel="held-out loss minus uniform's", ylim=(len(arms) - 0.5, -0.5))
    figure.savefig(file, dpi=92)


def write_results(trial: Trial) -> None:
    """tables.md, tables.json and real.png."""
    out, curves = trial.out, [*curve_rows(trial.out)]
    grids = [row for task in fidelity.BEST for row in fidelity.mixture_rows(task, out)]
    made = {
        "weights": fidelity.pivot([*known_rows(out)], "task", "learned by", "source"),
        "fine-tuning on real mixtures": fidelity.pivot(curves, "task", "mixture"),
        "fine-tuning on built-in mixtures": fidelity.pivot(grids, "task"),
        "rivals at equal compute": fidelity.pivot([*rival_rows(out)], "task", "method", "steps"),
        f"{SIZES_TASK}, small to larger": fidelity.pivot(
            [*size_rows(out)], "fine-tuned", "on weights of"),
    }  # fmt: skip
    about = (f"{trial.model.name}. Real tasks: weights {trial.budget.learn}; fine-tuning "
             f"{trial.budget.tune}. Built-in: {SIZE} {fidelity.ABLATION[DEFAULTS]}; {TUNE}.")
    fidelity.write_tables(out, {k: table for k, table in made.items() if len(table) > 1}, about)
    if curves and find_spec("matplotlib"):
        draw(curves, out / "real.png")
    elif curves:
        print("no real.png: pip install matplotlib")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 a run failed."""
    parser = Parser(description=__doc__.split("\n")[0])
    for name, choices, default in (("--only", PARTS, PARTS), ("--tasks", [*BEST], REAL),
                                   ("--methods", THEIRS, THEIRS)):  # fmt: skip
        parser.add_argument(name, nargs="+", choices=choices, default=default,
                            help=f"[{', '.join(default)}]")  # fmt: skip
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face directory")
    parser.add_argument("--budget", choices=BUDGETS, required=True, help="sizes of runs and data")
    parser.add_argument("--seeds", type=from_to(0), nargs="+", default=[0, 1, 2], help="[0 1 2]")
    parser.add_argument("--out", type=Path, default=Path("runs/real"), help="[runs/real]")
    parser.add_argument("--workers", type=int, default=1, choices=range(1, 17),
                        help="runs at a time, a thread each [1]")  # fmt: skip
    args = parser.parse_args(argv)
    model = args.model.resolve()
    out = args.out.resolve() / f"{model.name}-{args.budget}"
    trial = Trial(out, model, BUDGETS[args.budget])
    runs = {*args.only} - {"sizes", "tables"}
    for task in (task for task in args.tasks if runs and task in REAL):
        for file, what in (model / "config.json", "--model"), (ASSETS, "SCALEBIO_ASSETS"):
            if not file.exists():
                parser.error(f"{what}: there is no {file}, and {task} needs it")
        try:
            trial.write(task)
        except OSError as error:
            parser.error(f"--out {args.out}, or SCALEBIO_ASSETS: {error}")
    if {*args.only} == {"tables"} and not out.is_dir():
        parser.error(f"--out: there is no run yet in {out}")
    done = [fidelity.run(cells, trial.out, args.workers) for cells in stages(args, trial) if cells]
    if "tables" in args.only:
        write_results(trial)
    return 0 if all(done) else 1


if __name__ == "__main__":
    sys.exit(main())
