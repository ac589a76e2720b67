"""Does the loop find the right weights? Experiments whose right answer is known.

    python benchmark.py fidelity                         # all of it, but for cells that are done
    python benchmark.py fidelity --only graded digits

A cell, (task, setting, seed), is one run of `train.py` on one thread. It does what the command line
does, with a smaller built-in model (MODEL) and fewer samples (SIZE); a setting that is no flag of
train.py replaces one of its classes. Each leaves its run under --out, a run that is cut off goes on
when the command is given again, and the tables made of all that are there are --out/tables.md and
tables.json.
"""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy

import data
import shard
import train
from bilevel import PenaltyStep, SourceWeights
from cli import report
from cli.flags import Parser
from cli.inputs import TINY
from sources import tasks

MODEL = {"hidden_size": 48, "intermediate_size": 128, "initializer_range": 48**-0.5}  # 0.16M
COUPLED = "LISA, coupled draws"
ABLATION = {
    COUPLED: "",
    "LISA, coupled, α = 30": "--alpha 30",
    "LISA, coupled, α = 100": "--alpha 100",
    "LISA, independent draws": "--lisa-coupling independent",
    "LISA, independent, α = 30": "--lisa-coupling independent --alpha 30",
    "LISA, independent, α = 100": "--lisa-coupling independent --alpha 100",
    "full training": "--lisa-layers 0",
    "full training, α = 100": "--lisa-layers 0 --alpha 100",
    "proportional batches, counts per micro-batch": "--micro-batch-size 8",
    "λ decays by 0.01 (AdamW)": "",
    "λ decays by 1 (AdamW)": "",
    "lr of λ × 1/3": "--lr-lambda 2e-2",
    "lr of λ × 3": "--lr-lambda 0.18",
}
SIZE = ("--steps 120 --batch-size 40 --val-batch-size 20 --micro-batch-size 40 --max-length 40 "
        "--lr-w 3e-3 --lr-u 3e-3 --lr-lambda 6e-2 --schedule constant")
TUNE = ("--mode finetune --samples 2800 --steps 200 --batch-size 20 --lr-w 3e-3 --max-length 40 "
        "--schedule constant")
BEST = {"denoising": "clean", "graded": "clean", "multilingual": "aru", "instruction": "good"}
LEARNED = {"learned": COUPLED, "learned, lr of λ × 3": "lr of λ × 3"}
MIXTURES = (*LEARNED, "uniform", "proportional", "best alone")
# Real data: bytes of text, a model that has read English captions.
BESIDE = Path(__file__).resolve().parents[2] / "shared" / "assets"
ASSETS = Path(os.environ.get("SCALEBIO_ASSETS", BESIDE))
CAPTIONS, N_CAPTIONS = "multilingual/multi30k/train.en", 29_000
READ = ("--mode finetune --weights captions=1 --samples 8000 --steps 200 "
        "--batch-size 40 --lr-w 3e-3 --max-length 96 --schedule constant")
REAL = ("--steps 50 --batch-size 20 --val-batch-size 10 --micro-batch-size 10 --max-length 256 "
        "--template plain --lr-w 1e-3 --lr-u 1e-3 --lr-lambda 6e-2 --lisa-layers 2 "
        "--lisa-interval 5 --schedule constant")
REAL_SETS = ("data_tiny", "math_exp")


class Decayed(SourceWeights):
    """Source weights whose λ decays, as where the models' AdamW is used for it too."""

    decay = 0.01

    def reset_optimizer(self) -> None:
        self.opt = torch.optim.AdamW([self.lam], lr=self.lr, weight_decay=self.decay)


class StronglyDecayed(Decayed):
    decay = 1.0


class Proportional(data.Batches):
    """Batches drawn from all sources as one set: each has what chance gives it."""

    def step(self, t: int):
        _, val, counts = super().step(t)
        sizes = list(map(len, self.datasets[: self.n_sources]))
        every = [(i, k) for i, size in enumerate(sizes) for k in range(size)]
        places = range(t * self.batch_size, (t + 1) * self.batch_size)
        order = np.random.default_rng(self.seed).permutation(len(every))
        drawn = [every[order[place % len(every)]] for place in places]
        here = torch.bincount(torch.tensor(drawn)[:, 0], minlength=self.n_sources)
        return self._deal(drawn), val, torch.cat([here, counts[-1:]])


class PerMicroBatch(PenaltyStep):
    """A source's loss is its mean in each micro-batch, 0 where it is absent, averaged over them."""

    def step(self, train, val, counts, stop=False):
        def losses(model, batch):
            part = val if batch.group[0] == len(counts) - 1 else train
            here = torch.bincount(batch.group)[batch.group]
            return counts[batch.group] / (len(part) * here) * model(batch.tokens, batch.labels)

        self.losses = losses
        return super().step(train, val, counts, stop)


REPLACED = {
    "proportional batches, counts per micro-batch": [
        (data, "Batches", Proportional),
        (train, "PenaltyStep", PerMicroBatch),
    ],
    "λ decays by 0.01 (AdamW)": [(train, "SourceWeights", Decayed)],
    "λ decays by 1 (AdamW)": [(train, "SourceWeights", StronglyDecayed)],
}


@dataclass(frozen=True)
class Cell:
    task: str
    setting: str
    seed: int
    flags: str

    def folder(self, out: Path) -> Path:
        words = "".join(c if c.isalnum() or c in ".=" else "-" for c in self.setting)
        return out / self.task / words / f"seed{self.seed}"


def learn(task: str, setting: str, seeds: range) -> list[Cell]:
    flags = f"--task {task} {SIZE} {ABLATION[setting]}"
    return [Cell(task, setting, seed, flags) for seed in seeds]


def mix(task: str, seed: int, out: Path) -> list[Cell]:
    """Fine-tuning from random weights on each of MIXTURES."""
    folders = [Cell(task, setting, seed, "").folder(out) for setting in LEARNED.values()]
    learned = [folder / "weights.json" for folder in folders]
    weights = (*learned, "uniform", "proportional", f"{BEST[task]}=1")
    return [
        Cell(task, f"mixture {name}", seed, f"--task {task} {TUNE} --weights {spec}")
        for name, spec in zip(MIXTURES, weights, strict=True)
    ]


def real(out: Path, seed: int) -> tuple[Cell, list[Cell]]:
    """A model that reads captions, then weights learned with it on each real set of sources."""
    captions = out / "captions.jsonl"
    reader = Cell("captions", "read", seed, f"--train captions={captions} {READ}")
    then = []
    for name in REAL_SETS:
        folder = ASSETS / "scalebio" / name
        flags = f"--model {reader.folder(out)}/model --train {folder} --val {folder}/val.json"
        then.append(Cell(name, COUPLED, seed, f"{flags} --test {folder}/test.json {REAL}"))
    return reader, then


def stages(only: list[str], out: Path) -> list[list[Cell]]:
    """The runs of the experiments named. A stage needs those before it; the first come first."""
    first, second = [], []
    if "graded" in only:
        first += learn("graded", COUPLED, range(20))
    if "ablation" in only:
        first += [cell for setting in ABLATION for cell in learn("graded", setting, range(5))]
        first += learn("instruction", COUPLED, range(5))
        first += learn("instruction", "proportional batches, counts per micro-batch", range(5))
    if "mixtures" in only:
        for task in ("denoising", "instruction", "multilingual"):
            first += [cell for s in LEARNED.values() for cell in learn(task, s, range(10))]
            second += [cell for seed in range(10) for cell in mix(task, seed, out)]
    if "tasks" in only:
        first += learn("multilingual", COUPLED, range(5)) + learn("instruction", COUPLED, range(5))
    if "real" in only and (ASSETS / CAPTIONS).exists():
        for seed in range(3):
            reader, then = real(out, seed)
            first.append(reader)
            second += then
    return [list(dict.fromkeys(first)), second]


def run_cell(cell: Cell, out: Path) -> str:
    """One run of train.py in this process. Returns what became of it."""
    folder, began = cell.folder(out), time.perf_counter()
    folder.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    argv = [*cell.flags.split(), "--seed", str(cell.seed), "--out", str(folder)]
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(open(f"{folder}.log", "w"))
        stack.enter_context(contextlib.redirect_stdout(log))
        stack.enter_context(contextlib.redirect_stderr(log))
        stack.enter_context(mock.patch.dict(TINY, MODEL))
        for where, name, other in REPLACED.get(cell.setting, ()):
            stack.enter_context(mock.patch.object(where, name, other))
        stack.enter_context(mock.patch.object(shard, "exit_now", sys.exit))
        try:
            code = train.main(argv)
        except SystemExit as leaving:
            code = leaving.code
        if dist.is_initialized():  # an error left it behind
            dist.destroy_process_group()
    ended = f"{time.perf_counter() - began:.0f} s" if code == 0 else f"failed: see {folder}.log"
    return f"{cell.task}, {cell.setting}, seed {cell.seed}: {ended}"


def run(cells: list[Cell], out: Path, workers: int) -> bool:
    """The runs that are not there yet, `workers` at a time, each in one thread. False: one failed.
    """
    left = [cell for cell in cells if not (cell.folder(out) / "model").is_dir()]
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context) as pool:
        for n, done in enumerate(pool.map(run_cell, left, [out] * len(left)), 1):
            print(f"{n} of {len(left)}: {done}", flush=True)
    return all((cell.folder(out) / "model").is_dir() for cell in cells)


# ---------------------------------------------------------------------------------------------
# Hyper-cleaning: a weight for each sample of scikit-learn's digits


class SampleWeights(SourceWeights):
    """p_j = σ(λ_j) / n: every sample is a source of its own, and is kept or not."""

    def probs(self) -> torch.Tensor:
        return self.lam.sigmoid() / len(self.lam)


def digits(seed: int, n: int = 1000, n_val: int = 200, steps: int = 400) -> dict[str, float]:
    """Half the training labels are wrong: what the learned weights make of it, on clean test data.

    Accuracies of a linear classifier on all samples, on the clean half, and on all by the learned
    weights, each trained anew; `auc` of the weights as a detector of wrong labels.
    """
    from sklearn.datasets import load_digits
    from sklearn.metrics import roc_auc_score

    g = torch.Generator().manual_seed(seed)
    x, y = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    order = torch.randperm(len(x), generator=g)
    x, y = (x[order] / 16).float(), y[order]
    wrong = torch.rand(n, generator=g).argsort() < n // 2
    y[:n] = torch.where(wrong, y[:n] + torch.randint(1, 10, (n,), generator=g), y[:n]) % 10

    def part(start: int, stop: int | None, group: torch.Tensor | None = None) -> SimpleNamespace:
        return SimpleNamespace(x=x[start:stop], y=y[start:stop], group=group)

    def losses(model: nn.Module, batch) -> torch.Tensor:
        ridge = 1e-3 * model.weight.square().sum()
        return cross_entropy(model(batch.x), batch.y, reduction="none") + ridge

    def accuracy(weights: torch.Tensor) -> float:
        model = nn.Linear(64, 10)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(steps):
            optimizer.zero_grad()
            (weights @ losses(model, part(0, n)) / weights.sum()).backward()
            optimizer.step()
        test = part(n + n_val, None)
        return (model(test.x).argmax(1) == test.y).double().mean().item()

    torch.manual_seed(seed)
    w, u = nn.Linear(64, 10), nn.Linear(64, 10)
    u.load_state_dict(w.state_dict())
    optimizers = [torch.optim.Adam(model.parameters(), lr=1e-2) for model in (w, u)]
    weights = SampleWeights(n, lr=5e-2)
    step = PenaltyStep(w, u, *optimizers, weights, alpha=10, losses=losses)
    train_part = part(0, n, torch.arange(n))
    val_part = part(n, n + n_val, torch.full((n_val,), n))
    for _ in range(steps):
        step.step([train_part], [val_part], torch.tensor([1] * n + [n_val]))
    p = weights.probs().detach()
    return {
        "all": accuracy(torch.ones(n)),
        "clean": accuracy((~wrong).float()),
        "learned": accuracy(p),
        "auc": float(roc_auc_score(~wrong, p)),
    }


# ---------------------------------------------------------------------------------------------
# Tables


def mean_se(values) -> str:
    """Mean ± its standard error."""
    x = np.array(values, float)
    spread = f" ± {x.std(ddof=1) / math.sqrt(len(x)):.3f}" if len(x) > 1 else ""
    return f"{x.mean():.3f}{spread}"


def read(out: Path, task: str, setting: str, file: str = "weights.json") -> dict[int, dict]:
    """{seed: the last record of its `file`} of the runs that are finished."""
    found = {}
    for folder in sorted(Cell(task, setting, 0, "").folder(out).parent.glob("seed*/")):
        if (folder / "model").is_dir():
            text = (folder / file).read_text()
            record = text.splitlines()[-1] if file.endswith("l") else text
            found[int(folder.name.removeprefix("seed"))] = json.loads(record)
    return dict(sorted(found.items()))


def spearman(weights: dict[str, float]) -> float:
    """Rank correlation of weight and noise rate; sources of one rate share their mean rank."""
    def ranks(values: np.ndarray) -> np.ndarray:
        return ((values[:, None] > values).sum(1) + (values[:, None] >= values).sum(1)) / 2

    p, noise = np.array([(p, tasks.NOISE[name]) for name, p in weights.items()]).T
    return float(np.corrcoef(ranks(p), ranks(noise))[0, 1])


def first(weights: dict[str, float], name: str) -> bool:
    return max(weights, key=weights.get) == name


def graded_row(runs: dict[int, dict]) -> list:
    weights = [run["weights"] for run in runs.values()]
    return [
        len(weights),
        mean_se([w["clean"] for w in weights]),
        f"{sum(first(w, 'clean') for w in weights)} of {len(weights)}",
        mean_se([spearman(w) for w in weights]),
        mean_se([sum(p for name, p in w.items() if tasks.NOISE[name] == 1) for w in weights]),
        mean_se([run["test_loss"][1] for run in runs.values()]),
    ]


def graded_tables(out: Path) -> dict[str, list[list]]:
    columns = ["seeds", "weight of clean", "clean ranks first", "Spearman, weight and noise",
               "weight of the five of pure noise", "test loss of w"]
    rows = {setting: read(out, "graded", setting) for setting in ABLATION}
    rows = {setting: runs for setting, runs in rows.items() if runs}
    few = {setting: {s: r for s, r in runs.items() if s < 5} for setting, runs in rows.items()}
    tables = {"What matters (graded, seeds 0-4)": [
        ["setting", *columns], *([setting, *graded_row(runs)] for setting, runs in few.items())]}
    if runs := rows.get(COUPLED):
        names = list(tasks.NOISE)
        tables["Graded noise"] = [
            ["source", "noise rate", "weight"],
            *([name, tasks.NOISE[name], mean_se([r["weights"][name] for r in runs.values()])]
              for name in names),
        ]
        tables["Graded noise, in short"] = [columns, graded_row(runs)]
    return tables


def task_tables(out: Path) -> dict[str, list[list]]:
    tables = {}
    if runs := read(out, "multilingual", COUPLED):
        weights = [run["weights"] for run in runs.values()]
        tables["Multilingual: validation is 70% aru, 30% eli"] = [
            ["source", "weight"],
            *([name, mean_se([w[name] for w in weights])] for name in weights[0]),
            ["aru and eli together", mean_se([w["aru"] + w["eli"] for w in weights])],
        ]
    rows = []
    for setting in (COUPLED, "proportional batches, counts per micro-batch"):
        if runs := read(out, "instruction", setting):
            weights = [run["weights"] for run in runs.values()]
            leads = f"{sum(first(w, 'good') for w in weights)} of {len(weights)}"
            rows.append([setting, len(weights), mean_se([w["good"] for w in weights]), leads])
    if rows:
        tables["Instruction: one good answer to three poor ones"] = [
            ["setting", "seeds", "weight of good", "good ranks first"], *rows]
    return tables


def mixture_tables(out: Path) -> dict[str, list[list]]:
    """Held-out losses after fine-tuning on each mixture, and differences paired by seed."""
    table = [["task", "mixture", "seeds", "test loss", "minus uniform's", "minus best alone's"]]
    for task in BEST:
        losses = {
            name: {seed: row["test_loss"]
                   for seed, row in read(out, task, f"mixture {name}", "metrics.jsonl").items()}
            for name in MIXTURES
        }  # fmt: skip
        for name in MIXTURES:
            paired = losses["uniform"].keys() & losses["best alone"].keys()
            shared = sorted(losses[name].keys() & paired)
            if not shared:
                continue
            x, uniform, best = (np.array([losses[key][seed] for seed in shared])
                                for key in (name, "uniform", "best alone"))
            differences = mean_se(x - uniform), mean_se(x - best)
            table.append([task, name, len(shared), mean_se(x), *differences])
    return {"Fine-tuning on a mixture": table}


def real_tables(out: Path) -> dict[str, list[list]]:
    tables = {}
    for name in REAL_SETS:
        if runs := read(out, name, COUPLED):
            rows = [
                [source, *(mean_se([run[key][source] for run in runs.values()])
                           for key in ("weights", "gap")),
                 f"{sum(run['settled'][source] for run in runs.values())} of {len(runs)}"]
                for source in next(iter(runs.values()))["weights"]
            ]  # fmt: skip
            tables[name] = [["source", "weight", "gap", "settled"], *rows]
    return tables


def digits_table(out: Path) -> dict[str, list[list]]:
    runs = [json.loads(file.read_text()) for file in sorted(out.glob("digits/seed*.json"))]
    title = "Digits, half the training labels wrong: test accuracy"
    said = ("all samples", "clean half alone", "learned weights", "area under the ROC curve")
    values = [mean_se([run[key] for run in runs]) for key in runs[0]] if runs else []
    return {title: [["seeds", *said], [len(runs), *values]]} if runs else {}


def write_tables(out: Path) -> None:
    """tables.json, and tables.md, which is also printed."""
    tables = {}
    for make in (graded_tables, task_tables, mixture_tables, real_tables, digits_table):
        tables |= {title: table for title, table in make(out).items() if len(table) > 1}
    report.write_json(out / "tables.json", tables)
    lines = [f"Weights: {SIZE}; LISA with 2 of 4 blocks, drawn anew every 5 steps; α = 10 unless "
             f"stated. Fine-tuning: {TUNE}. Mean ± standard error over seeds.", ""]  # fmt: skip
    for title, (header, *rows) in tables.items():
        lines += [f"### {title}", "", *(
            f"| {' | '.join(map(str, row))} |" for row in (header, ["---"] * len(header), *rows)
        ), ""]  # fmt: skip
    report.replace(out / "tables.md", "\n".join(lines))
    print("\n".join(lines))


EXPERIMENTS = ("graded", "ablation", "mixtures", "real", "tasks", "digits")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 a run failed."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=EXPERIMENTS, help="[all]")
    parser.add_argument("--out", type=Path, default=Path("runs/fidelity"), help="[runs/fidelity]")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, a thread each [2]")
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f"--workers {args.workers}: permitted is a whole number above 0")
    args.out.mkdir(parents=True, exist_ok=True)
    if "real" in args.only and (ASSETS / CAPTIONS).exists():
        lines = (ASSETS / CAPTIONS).read_text().splitlines()[:N_CAPTIONS]
        report.replace(args.out / "captions.jsonl",
                       "".join(json.dumps({"text": line}) + "\n" for line in lines))  # fmt: skip
    elif "real" in args.only:
        print(f"left out, for want of {ASSETS}: real data")
    if "digits" in args.only and find_spec("sklearn") is None:
        print("left out, for want of scikit-learn (pip install scikit-learn): digits")
    elif "digits" in args.only:
        (args.out / "digits").mkdir(exist_ok=True)
        for seed in range(5):
            report.write_json(args.out / "digits" / f"seed{seed}.json", digits(seed))
    ran = [run(cells, args.out, args.workers) for cells in stages(args.only, args.out)]
    write_tables(args.out)
    return 0 if all(ran) else 1


if __name__ == "__main__":
    sys.exit(main())
