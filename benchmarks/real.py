"""Is it worth the trouble on a pretrained model? Weights, what they give, and what rivals find.

    python -m benchmarks.real --model DIR --budget cpu          # all of it, but for what is done
    python -m benchmarks.real --model DIR --budget gpu --only curve --tasks languages --seeds 0
    python -m benchmarks.real --model DIR --budget gpu --only tables

    known   weights of real sources of which it is known whose help most
    curve   held-out loss after fine-tuning on these weights, and on other mixtures
    rivals  the same of weights that other methods find at equal compute (rivals.py), on the real
            tasks and on built-in ones (their own curve: the grid of `benchmarks.fidelity`)
    sizes   weights learned with a smaller built-in model, used to fine-tune a larger one

A cell is one run of train.py, as in fidelity.py: commands on other tasks, seeds or methods may run
side by side on the same --out, and what is there is not done again. The files of the tasks, of at
most so many records a source as the budget says, are made from ../shared/assets, or from
$SCALEBIO_ASSETS, and are always the same.
"""

from __future__ import annotations

import json
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
from cli.flags import Parser, parse
from sources import tasks

PARTS = "known", "curve", "rivals", "sizes", "tables"
OURS = "ScaleBiO"
SMALL = ASSETS / "model/stories260K-hf"
SHOWN = 64  # of languages, tokens of a caption; 256 of the other tasks, on CPU 128


@dataclass(frozen=True)
class Budget:
    records: int  # of a source
    held_out: tuple[int, int]  # validation and test records
    learn: str
    tune: str
    max_length: int


BUDGETS = {
    "cpu": Budget(300, (200, 48), "--steps 24 --batch-size 8 --val-batch-size 8",
                  "--steps 20 --batch-size 8 --samples 160", 128),
    "gpu": Budget(3000, (1000, 500), "--steps 200 --batch-size 32 --val-batch-size 32 "
                  "--micro-batch-size 32 --dtype bf16", "--steps 100 --batch-size 32 --samples "
                  "3200 --micro-batch-size 32 --dtype bf16", 256),
}  # fmt: skip
# Of each task the sources that are known to help: all but one, and of math those on mathematics.
BEST = {
    "languages": ["en"], "answers": ["right"], "gpt4": ["gpt4_alpaca"],
    "math": ["dart-math-uniform", "MathInstruct", "orca-math-word-problems-200k"],
} | {task: [best] for task, best in fidelity.BEST.items()}  # fmt: skip
BUILT_IN = tuple(fidelity.BEST)
REAL = tuple(task for task in BEST if task not in BUILT_IN)
# Built-in models of growing width, and the learning rate of each.
SIZES = {"0.14M": (48, 3e-3), "0.9M": (128, 1.1e-3), "3.3M": (256, 6e-4), "9.9M": (448, 3e-4)}
SIZES_TASK = "graded"


@dataclass(frozen=True)
class Trial:
    """What a command is about: where its runs are, the model, and the sizes."""

    out: Path
    model: Path
    budget: Budget

    def names(self, task: str) -> list[str]:
        files = sorted((self.out / "data" / task).glob("train_*"))
        return [file.stem.removeprefix("train_") for file in files]

    def weights(self, cell: Cell) -> dict[str, float]:
        return json.loads((cell.folder(self.out) / "weights.json").read_text())["weights"]


# The data

def parts_of(task: str, n: int) -> tuple[dict[str, list], list, list]:
    """Of a real task its sources, of at most n records, validation and test."""
    if task == "languages":  # other captions in each language
        lines = [CAPTIONS.with_suffix(s).read_text().splitlines() for s in (".en", ".de", ".fr")]
        texts = [[{"text": line} for line in part] for part in lines]
        sources = {s: texts[k][k * n : (k + 1) * n] for k, s in enumerate(("en", "de", "fr"))}
        held = CAPTIONS.with_name("val.en").read_text().splitlines()
        return sources, texts[0][3 * n :], [{"text": line} for line in held]
    if task == "answers":  # the wrong ones are those of other records
        records = json.loads((ASSETS / "alpaca/alpaca_data_cleaned_12k_en.json").read_text())
        right, wrong, rest = records[:n], records[n : 2 * n], records[2 * n :]
        order = np.random.default_rng(0).permutation(n)
        for here, there in zip(order, np.roll(order, 1), strict=True):
            wrong[here] = wrong[here] | {"output": records[n + there]["output"]}
        return {"right": right, "wrong": wrong}, rest[: len(rest) // 2], rest[len(rest) // 2 :]
    folder = ASSETS / "scalebio" / {"gpt4": "data_tiny", "math": "math_exp"}[task]
    files = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
    held = files.pop("val"), files.pop("test")
    return {name.removeprefix("train_"): part[:n] for name, part in files.items()}, *held


def write_task(task: str, trial: Trial) -> None:
    """The files of a real task, if they are not there: all at once, for who else looks for them."""
    folder, budget = trial.out / "data" / task, trial.budget
    if folder.is_dir():
        return
    sources, *held_out = parts_of(task, budget.records)
    files = {f"train_{name}": records for name, records in sources.items()}
    files |= {name: records[:n] for name, records, n in
              zip(("val", "test"), held_out, budget.held_out, strict=True)}  # fmt: skip
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=folder.parent))
    for name, records in files.items():
        (made / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    with suppress(OSError):  # another process was first
        os.rename(made, folder)
    shutil.rmtree(made, ignore_errors=True)


# The cells

def data_flags(task: str, trial: Trial, model: Path) -> str:
    folder = trial.out / "data" / task
    length = {"languages": SHOWN}.get(task, trial.budget.max_length)
    length *= 1 + (model == SMALL)  # whose tokens are short
    return (f"--model {shlex.quote(str(model))} --train {shlex.quote(str(folder))} "
            f"--test {shlex.quote(str(folder))}/test.jsonl --drop-overlap --max-length {length}")


def learning(task: str, seed: int, trial: Trial, method: str = OURS) -> Cell:
    """The run that finds weights: ours, with the small model instead of --model, or a rival's."""
    if task in BUILT_IN:
        cell = fidelity.learn(task, DEFAULTS, seed)
    else:
        model = SMALL if method == SMALL.name else trial.model
        val = f"--val {shlex.quote(str(trial.out / 'data' / task))}/val.jsonl"
        flags = f"{data_flags(task, trial, model)} {val} {trial.budget.learn}"
        cell = Cell(task, method, seed, flags)
    if method in (OURS, SMALL.name):
        return cell
    flags = parse(shlex.split(cell.flags))
    n = len(tasks.task(task, 0)[0] if task in BUILT_IN else trial.names(task))
    steps = rivals.steps_for(method, flags.steps, flags.batch_size, flags.val_batch_size, n)
    other = {"train.PenaltyStep": partial(rivals.METHODS[method], total=steps)}
    return replace(cell, setting=method, flags=f"{cell.flags} --steps {steps}", replaced=other)


def tuning(task: str, seed: int, trial: Trial, arm: str, weights: str) -> Cell:
    """Fine-tuning on a mixture."""
    flags = f"--task {task} {TUNE}"
    if task in REAL:
        flags = (f"{data_flags(task, trial, trial.model)} --mode finetune --repeat "
                 f"{trial.budget.tune}")  # fmt: skip
    return Cell(task, f"mixture {arm}", seed, f"{flags} --weights {shlex.quote(weights)}")


def spell(weights: dict[str, float]) -> str:
    return ",".join(f"{name}={p:.6f}" for name, p in weights.items())


def curve(task: str, seed: int, trial: Trial) -> Iterator[Cell]:
    """The mixtures of a real task that are fine-tuned on, but for the rivals'."""
    names, ours = trial.names(task), learning(task, seed, trial)
    even = 1 / len(names)
    arms = {"learned": trial.weights(ours), "uniform": dict.fromkeys(names, even)}
    arms["halfway"] = {name: (p + even) / 2 for name, p in arms["learned"].items()}
    if trial.model != SMALL:
        arms["learned by stories260K"] = trial.weights(learning(task, seed, trial, SMALL.name))
    arms |= {f"only {name}": {name: 1.0} for name in names}
    if len(names) > 2:
        arms |= {f"without {name}": dict.fromkeys({*names} - {name}, 1.0) for name in names}
    specs = {arm: spell(weights) for arm, weights in arms.items()}
    sizes = [len((trial.out / f"data/{task}/train_{name}.jsonl").read_text().splitlines())
             for name in names]  # fmt: skip
    if max(sizes) > 1.1 * min(sizes):  # else it is uniform
        specs["proportional"] = "proportional"
    return (tuning(task, seed, trial, arm, spec) for arm, spec in specs.items())


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
    """Each size fine-tuned on uniform weights, and on those of its own and of smaller ones."""
    specs = {"uniform": "uniform"}
    for size, cell in sizes_learn(seed).items():
        specs[size] = str(cell.folder(trial.out) / "weights.json")
        for arm, spec in specs.items():
            yield sized(size, tuning(SIZES_TASK, seed, trial, arm, spec))


def stages(args, trial: Trial) -> Iterator[list[Cell]]:
    """The cells that find weights, then, when they are through, those that use them."""
    each = [(task, seed) for task in args.tasks for seed in args.seeds]
    ours = [learning(task, seed, trial, method) for task, seed in each
            for method in (OURS, SMALL.name) if {"known", "curve"} & {*args.only}
            if method == OURS or (task in REAL and trial.model != SMALL)]  # fmt: skip
    theirs = [(learning(*at, trial, method), method, *at) for at in each for method in args.methods
              if "rivals" in args.only]  # fmt: skip
    sizes = [sizes_learn(seed) for seed in args.seeds if "sizes" in args.only]
    yield [*ours, *(cell for cell, *_ in theirs), *(c for of in sizes for c in of.values())]

    for task, seed in each if "curve" in args.only else ():
        try:
            yield [*(fidelity.mix(task, seed, trial.out) if task in BUILT_IN
                     else curve(task, seed, trial))]  # fmt: skip
        except OSError as error:
            print(f"no curve of {task}, seed {seed}: {error}")
    yield [tuning(task, seed, trial, method, str(cell.folder(trial.out) / "weights.json"))
           for cell, method, task, seed in theirs]  # fmt: skip
    yield [cell for seed in args.seeds if sizes for cell in sizes_tune(seed, trial)]


# The tables

def losses(task: str, arm: str, out: Path) -> dict[int, float]:
    """{seed: held-out loss after fine-tuning}."""
    runs = fidelity.read(out, task, f"mixture {arm}", "metrics.jsonl")
    return {seed: row["test_loss"] for seed, row in runs.items()}


def known_rows(out: Path) -> Iterator[dict]:
    for task in REAL:
        for setting in (OURS, SMALL.name):
            for run in fidelity.read(out, task, setting).values():
                for name, p in run["weights"].items():
                    yield {"task": task, "learned by": setting, "source": name, "weight": p,
                           "stated error": run["weights_se"][name],
                           "told apart": run["differs"][name]}  # fmt: skip


def curve_rows(out: Path) -> Iterator[dict]:
    """Paired by seed, the mixtures of a task from the least loss up."""
    others = {Cell("", f"mixture {method}", 0).folder(out).parent.name for method in rivals.METHODS}
    for task in REAL:
        names = {f.name for f in (out / task).glob("mixture-*") if f.is_dir()} - others
        uniform, of = losses(task, "uniform", out), {}
        for arm in (name.removeprefix("mixture-") for name in names):
            pairs = {seed: x for seed, x in losses(task, arm, out).items() if seed in uniform}
            of |= {arm: pairs} if pairs else {}
        for arm in sorted(of, key=lambda arm: np.mean([*of[arm].values()])):
            for seed, loss in of[arm].items():
                yield {"task": task, "mixture": arm, "held-out loss": loss,
                       "minus uniform's": loss - uniform[seed]}  # fmt: skip


def rival_rows(out: Path) -> Iterator[dict]:
    """Seeds in which the weights of a method, ours and uniform ones were all fine-tuned on."""
    for task, best in BEST.items():
        uniform, ours = losses(task, "uniform", out), losses(task, "learned", out)
        for method in (OURS, *rivals.METHODS):
            setting = DEFAULTS if method == OURS and task in BUILT_IN else method
            tuned = ours if method == OURS else losses(task, method, out)
            for seed, run in fidelity.read(out, task, setting).items():
                if seed in tuned.keys() & uniform.keys() & ours.keys():
                    yield {"task": task, "method": method, "steps": str(run["step"]),
                           "weight of what helps": sum(run["weights"][name] for name in best),
                           "held-out loss": tuned[seed],
                           "minus uniform's": tuned[seed] - uniform[seed],
                           "minus ScaleBiO's": tuned[seed] - ours[seed]}  # fmt: skip


def size_rows(out: Path) -> Iterator[dict]:
    """What a larger model loses by weights of a smaller one instead of its own."""
    def setting(size: str) -> str:
        return sizes_learn(0)[size].setting

    weights = {size: fidelity.read(out, SIZES_TASK, setting(size)) for size in SIZES}
    for size in SIZES:
        tuned = {arm: sized_losses(size, arm, out) for arm in ("uniform", *SIZES)}
        for arm, of in tuned.items():
            for seed in of.keys() & tuned[size].keys():
                same = arm != "uniform" and fidelity.spearman(
                    weights[arm][seed]["weights"], weights[size][seed]["weights"])
                yield {"fine-tuned": size, "on weights of": arm, "held-out loss": of[seed],
                       "minus its own": of[seed] - tuned[size][seed],
                       "Spearman with its own": same or 0.0}  # fmt: skip


def sized_losses(size: str, arm: str, out: Path) -> dict[int, float]:
    runs = fidelity.read(out, SIZES_TASK, f"{size} mixture {arm}", "metrics.jsonl")
    return {seed: row["test_loss"] for seed, row in runs.items()}


def draw(rows: list[dict], file: Path) -> None:
    """A panel for each task: what a mixture's held-out loss differs by from uniform's, of each seed
    and as their mean with its standard error."""
    from matplotlib.figure import Figure

    found = [task for task in REAL if any(row["task"] == task for row in rows)]
    figure = Figure(figsize=(4.6 * len(found), 4.2), layout="constrained")
    for axes, task in zip(np.atleast_1d(figure.subplots(1, len(found))), found, strict=True):
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
        axes.set_yticks(range(len(arms)), [*arms], fontsize=8)
        axes.locator_params(axis="x", nbins=5)
        axes.set(title=task, xlabel="held-out loss minus uniform's", ylim=(len(arms) - 0.5, -0.5))
    figure.savefig(file, dpi=92)


def write_results(trial: Trial) -> None:
    """tables.md, tables.json, and real.png."""
    out, curves = trial.out, [*curve_rows(trial.out)]
    mixtures = [row for task in BUILT_IN for row in fidelity.mixture_rows(task, out)]
    made = {
        "weights": fidelity.pivot([*known_rows(out)], "task", "learned by", "source"),
        "fine-tuning on a mixture": fidelity.pivot(curves, "task", "mixture"),
        "rivals at equal compute": fidelity.pivot([*rival_rows(out)], "task", "method", "steps"),
        "built-in tasks: the grid": fidelity.pivot(mixtures, "task"),
        f"{SIZES_TASK}: small to larger": fidelity.pivot(
            [*size_rows(out)], "fine-tuned", "on weights of"),
    }  # fmt: skip
    about = (f"{trial.model.name}. Real tasks: weights {trial.budget.learn}; fine-tuning "
             f"{trial.budget.tune}. Built-in tasks: {SIZE} {fidelity.ABLATION[DEFAULTS]}; {TUNE}.")
    fidelity.write_tables(out, {k: table for k, table in made.items() if len(table) > 1}, about)
    if curves and find_spec("matplotlib"):
        draw(curves, out / "real.png")
    elif curves:
        print("no real.png: pip install matplotlib")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 a run failed."""
    parser = Parser(description=__doc__.split("\n")[0])
    several = {"nargs": "+"}
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face directory")
    parser.add_argument("--budget", choices=BUDGETS, required=True, help="sizes of runs and data")
    parser.add_argument("--out", type=Path, default=Path("runs/real"), help="[runs/real]")
    parser.add_argument("--only", choices=PARTS, default=PARTS, help="[all]", **several)
    parser.add_argument("--tasks", choices=BEST, default=[*REAL], help="[the real ones]", **several)
    parser.add_argument("--methods", choices=rivals.METHODS, default=[*rivals.METHODS],
                        help="of rivals [all]", **several)  # fmt: skip
    parser.add_argument("--seeds", type=int, default=[0, 1, 2], help="[0 1 2]", **several)
    parser.add_argument("--workers", type=int, default=1, choices=range(1, 17),
                        help="runs at a time, a thread each [1]")  # fmt: skip
    args = parser.parse_args(argv)
    if not CAPTIONS.exists() and {*args.tasks} & {*REAL} and args.only != ["tables"]:
        parser.error(f"real tasks want the files of {ASSETS}: name another in SCALEBIO_ASSETS")
    model = args.model.resolve()
    trial = Trial(args.out / f"{model.name}-{args.budget}", model, BUDGETS[args.budget])
    for task in {*args.tasks} & {*REAL} if args.only != ["tables"] else ():
        write_task(task, trial)
    done = [fidelity.run(cells, trial.out, args.workers) for cells in stages(args, trial) if cells]
    if "tables" in args.only:
        write_results(trial)
    return 0 if all(done) else 1


if __name__ == "__main__":
    sys.exit(main())
