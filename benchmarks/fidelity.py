"""Does the loop find the right weights? Experiments whose right answer is known.

    python -m benchmarks.fidelity                        # all of it, but for cells that are done
    python -m benchmarks.fidelity --only graded digits

A cell, (task, setting, seed), is one run of `train.py` on one thread. It does what the command line
does, with a smaller built-in model (MODEL) and fewer samples (SIZE); a setting that is no flag of
train.py replaces one of its classes. Each leaves its run under --out, without the model that it
trained; a run that is cut off goes on when the command is given again, and the tables made of all
that are there are --out/tables.md and tables.json.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import math
import multiprocessing
import os
import shlex
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
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
import train
from bilevel import PenaltyStep, SourceWeights
from cli import report
from cli.flags import Parser
from cli.inputs import TINY
from lisa import Lisa
from model import from_pretrained
from sources import tasks

MODEL = {"hidden_size": 48, "intermediate_size": 128, "initializer_range": 48**-0.5}  # 0.14M
COUPLED = "LISA, coupled draws"
PROPORTIONAL = "proportional batches, counts per micro-batch"
DEFAULTS = "λ's rate and z by default, 240 steps"
ABLATION = {
    COUPLED: "",
    "LISA, coupled, α = 30": "--alpha 30",
    "LISA, coupled, α = 100": "--alpha 100",
    "LISA, independent draws": "--lisa-coupling independent",
    "LISA, independent, α = 30": "--lisa-coupling independent --alpha 30",
    "LISA, independent, α = 100": "--lisa-coupling independent --alpha 100",
    "full training": "--lisa-layers 0",
    "full training, α = 100": "--lisa-layers 0 --alpha 100",
    PROPORTIONAL: "--micro-batch-size 8",
    "λ decays by 0.01 (AdamW)": "",
    "λ decays by 1 (AdamW)": "",
    "lr of λ × 1/3": "--lr-lambda 2e-2",
    "lr of λ × 3": "--lr-lambda 0.18",
    DEFAULTS: "--lr-lambda auto --lambda-z 3 --steps 240",
}
SIZE = ("--steps 120 --batch-size 40 --val-batch-size 20 --micro-batch-size 40 --max-length 40 "
        "--lr-w 3e-3 --lr-u 3e-3 --lr-lambda 6e-2 --lambda-z 0 --schedule constant --dtype fp32")
TUNE = ("--mode finetune --samples 2800 --steps 200 --batch-size 20 --lr-w 3e-3 --max-length 40 "
        "--schedule constant --dtype fp32")
BEST = {"denoising": "clean", "graded": "clean", "multilingual": "aru", "instruction": "good"}
# Mixtures to fine-tune on, beside the learned one (twice, which tells how far chance alone takes
# two runs apart) and the uniform one: a grid of shares of the best source. The others have equal
# parts of the rest; of multilingual only eli, the other language of its validation.
SHARES = 0.5, 0.6, 0.7, 0.8, 0.9, 1.0
MIXTURES = "learned", "learned, again", "uniform", *(f"best {share}" for share in SHARES)
BESIDE = Path(__file__).resolve().parents[2] / "shared" / "assets"
ASSETS = Path(os.environ.get("SCALEBIO_ASSETS", BESIDE))
CAPTIONS = ASSETS / "multilingual/multi30k/train.en"
# What λ learns from, on a small trained model: captions in three languages with English validation;
# and a placebo, three thirds of one file, between which there is nothing to learn.
STORIES = (f"--model {ASSETS}/model/stories260K-hf --steps 141 --batch-size 32 --val-batch-size 32 "
           "--micro-batch-size 32 --max-length 48 --template plain --lr-w 1e-5 --lr-u 1e-5")
LEARN = {  # experiment: tasks, their settings and the number of seeds
    "graded": [("graded", [COUPLED], 20)],
    "ablation": [("graded", ABLATION, 5), ("instruction", [COUPLED, PROPORTIONAL], 5)],
    "mixtures": [(task, [DEFAULTS], 10) for task in BEST],
    "coverage": [("multilingual", [DEFAULTS], 40)],
}
EXPERIMENTS = *LEARN, "signal", "errors", "digits"


class Decayed(SourceWeights):
    """Source weights whose λ decays, as where the models' AdamW is used for it too."""

    decay = 0.01

    def reset_optimizer(self) -> None:
        self.opt = torch.optim.AdamW([self.lam], lr=self.lr, weight_decay=self.decay)


class Hundredfold(Decayed):
    decay = 1.0


class Proportional(data.Batches):
    """Batches drawn from all sources as one set: each has what chance gives it."""

    def step(self, t: int):
        _, val, counts = super().step(t)
        every = [(i, k) for i in range(self.n_sources) for k in range(len(self.datasets[i]))]
        places = range(t * self.batch_size, (t + 1) * self.batch_size)
        order = np.random.default_rng(self.seed).permutation(len(every))
        drawn = [every[order[place % len(every)]] for place in places]
        here = torch.bincount(torch.tensor(drawn)[:, 0], minlength=self.n_sources)
        return self._deal(drawn, [0] * self.world), val, torch.cat([here, counts[-1:]])


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
    PROPORTIONAL: {"data.Batches": Proportional, "train.PenaltyStep": PerMicroBatch},
    "λ decays by 0.01 (AdamW)": {"train.SourceWeights": Decayed},
    "λ decays by 1 (AdamW)": {"train.SourceWeights": Hundredfold},
}


@dataclass(frozen=True)
class Cell:
    """A run: its flags, what it replaces of the program, and the built-in model's sizes."""

    task: str
    setting: str
    seed: int
    flags: str = ""
    replaced: dict = field(default_factory=dict, compare=False)
    model: dict = field(default_factory=MODEL.copy, compare=False)

    def folder(self, out: Path) -> Path:
        words = "".join(c if c.isalnum() or c in ".=" else "-" for c in self.setting)
        return out / self.task / words / f"seed{self.seed}"


def learn(task: str, setting: str, seed: int = 0) -> Cell:
    flags = f"--task {task} {SIZE} {ABLATION[setting]}"
    return Cell(task, setting, seed, flags, REPLACED.get(setting, {}))


def mix(task: str, seed: int, out: Path) -> list[Cell]:
    """Fine-tuning from random weights on each mixture."""
    best, weights = BEST[task], Cell(task, DEFAULTS, seed).folder(out) / "weights.json"
    others = [name for name in tasks.task(task, seed)[0] if name != best]
    others = ["eli"] if task == "multilingual" else others
    specs = [weights, f"{weights} --samples 2801", "uniform"]
    for share in SHARES:
        rest = [f"{name}={(1 - share) / len(others):.6f}" for name in others if share < 1]
        specs.append(",".join([f"{best}={share}", *rest]))
    return [Cell(task, f"mixture {name}", seed, f"--task {task} {TUNE} --weights {spec}")
            for name, spec in zip(MIXTURES, specs, strict=True)]  # fmt: skip


def signal(out: Path) -> list[Cell]:
    """Weights of three languages in both dtypes, at two alphas; and of placebos in both dtypes."""
    def flags(name: str, dtype: str) -> str:
        return f"--train {out}/{name} --val {out}/val.jsonl {STORIES} --dtype {dtype}"

    return [
        *(Cell("languages", f"{dtype}, α = {alpha}", seed, f"{flags('languages', dtype)} "
               f"--alpha {alpha}")
          for dtype in ("fp32", "bf16") for alpha in (10, 100) for seed in range(5)),
        *(Cell("placebo", dtype, seed, flags(f"placebo{seed}", dtype))
          for dtype in ("fp32", "bf16") for seed in range(20)),
    ]  # fmt: skip


def gap_of(w: nn.Module, u: nn.Module, batch: tuple, dtype: torch.dtype, gap: str) -> torch.Tensor:
    """The sources' gaps, (S,), of fp32 models of which copies in this dtype compute."""
    low = [copy.deepcopy(model).to(dtype) for model in (w, u)]
    d = {p: (a - b).detach().to(dtype) for p, a, b in zip(low[0].parameters(), w.parameters(),
                                                         u.parameters(), strict=True)}  # fmt: skip
    train_part, val_part, counts = batch
    nothing = [torch.optim.SGD(model.parameters(), lr=0.0) for model in low]
    step = PenaltyStep(*low, *nothing, SourceWeights(len(counts) - 1), alpha=10, gap=gap,
                       direction=lambda p_w, _: d[p_w])  # fmt: skip
    return step.step(train_part, val_part, counts).gap.double()


def errors(directory: Path, out: Path, n: int = 16) -> Iterator[dict]:
    """After some steps of AdamW at 1e-5 on validation records, of two blocks and the ends: how far
    the two sources of data_tiny differ in their gaps over n samples each, and how far these are off
    in bf16. Root mean squares over two batches."""
    tokenizer, files = data.load_tokenizer(directory), ASSETS / "scalebio/data_tiny"
    *sources, val = (
        data.load_dataset(files / name, tokenizer, "alpaca", 128, out / "cache")
        for name in ("train_alpaca.json", "train_gpt4_alpaca.json", "val.json")
    )
    batches = data.Batches(sources, val, 2 * n, 4, 8, seed=0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def step(t: int) -> tuple:
        *parts, counts = batches.step(t)
        return *([batch.to(device) for batch in part] for part in parts), counts

    w, u = (from_pretrained(directory).to(device) for _ in "wu")
    opt, done = Lisa(w, 2, interval=1000, lr=1e-5), 0
    for p_w, p_u in zip(w.parameters(), u.parameters(), strict=True):
        p_u.requires_grad_(p_w.requires_grad)
    for steps in (1, 10, 100):
        for t in range(done, steps):
            for batch in step(t)[1]:
                w(batch.tokens, batch.labels).mean().backward()
            opt.step()
            opt.zero_grad()
        done, found = steps, {"differ by": [], "losses": [], "gradients": []}
        for t in range(2):
            batch = step(t)
            true = gap_of(w, u, batch, torch.float32, "difference")
            found["differ by"].append(true[:1] - true[1:])
            for how, gap in ("losses", "difference"), ("gradients", "gradient"):
                found[how].append(gap_of(w, u, batch, torch.bfloat16, gap) - true)
        rms = {name: torch.cat(x).square().mean().sqrt().item() for name, x in found.items()}
        yield {"steps": steps, "gap": f"{true.mean():.1e}"} | {
            name: f"{x:.1e}" for name, x in rms.items()
        } | {"gradients / differ by": f"{rms['gradients'] / rms['differ by']:.2f}"}


def write_captions(out: Path) -> None:
    """The records of `signal`: 3,000 captions of each language, other ones; of a placebo 1,000
    English ones a source; 1,014 for validation."""
    def write(name: str, texts: list[str]) -> None:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        report.replace(out / name, "".join(json.dumps({"text": x}) + "\n" for x in texts))

    for n, language in enumerate(("en", "de", "fr")):
        texts = CAPTIONS.with_suffix(f".{language}").read_text().splitlines()
        write(f"languages/train_{language}.jsonl", texts[3000 * n : 3000 * (n + 1)])
    write("val.jsonl", CAPTIONS.with_name("val.en").read_text().splitlines())
    english = CAPTIONS.read_text().splitlines()[:3000]
    for seed in range(20):
        order = np.random.default_rng(seed).permutation(3000)
        for n, name in enumerate("abc"):
            write(f"placebo{seed}/train_{name}.jsonl", [english[i] for i in order[n::3]])


def stages(only: list[str], out: Path) -> list[list[Cell]]:
    """The runs of the experiments named. A stage needs those before it."""
    first = [learn(task, setting, seed) for name in only
             for task, settings, n in LEARN.get(name, ())
             for setting in settings for seed in range(n)]  # fmt: skip
    first += signal(out) if "signal" in only else []
    second = [cell for task in BEST for seed in range(10) for cell in mix(task, seed, out)
              if "mixtures" in only]  # fmt: skip
    return [list(dict.fromkeys(first)), second]


def run_cell(cell: Cell, out: Path) -> str:
    """One run of train.py in this process. Returns what became of it. SystemExit if it was stopped
    by a signal."""
    folder = cell.folder(out)
    folder.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    argv = shlex.split(f"{cell.flags} --keep 0 --seed {cell.seed} --out {shlex.quote(str(folder))}")
    replaced = {
        "shard.exit_now": sys.exit,
        "shard.save": lambda model, target, finish: target.mkdir(),  # nobody needs the model
        "train.draw_picture": lambda flags: [],
    } | cell.replaced
    with (open(f"{folder}.log", "w") as log, contextlib.redirect_stdout(log),
          contextlib.redirect_stderr(log), mock.patch.dict(TINY, cell.model),
          contextlib.ExitStack() as stack):  # fmt: skip
        for name, other in replaced.items():
            stack.enter_context(mock.patch(name, other))
        try:
            code = train.main(argv)
        except SystemExit as leaving:
            code = leaving.code
        if dist.is_initialized():  # an error left it behind
            dist.destroy_process_group()
    gc.collect()  # the models, which are in circles of references
    if code and code > 128:
        sys.exit(code)
    ended = "done" if code == 0 else f"failed: see {folder}.log"
    return f"{cell.task}, {cell.setting}, seed {cell.seed}: {ended}"


def run(cells: list[Cell], out: Path, workers: int) -> bool:
    """The runs that are not there yet, `workers` at a time, each in one thread. False: one failed.
    """
    left = [cell for cell in cells if not (cell.folder(out) / "model").is_dir()]
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        several = workers > 1 and len(left) > 1
        ends = (pool.map if several else map)(run_cell, left, [out] * len(left))
        for n, done in enumerate(ends, 1):
            print(f"{n} of {len(left)}: {done}", flush=True)
    return all((cell.folder(out) / "model").is_dir() for cell in cells)


# Hyper-cleaning: a weight for each sample of scikit-learn's digits

class SampleWeights(SourceWeights):
    """p_j = σ(λ_j) / n: every sample is a source of its own, and is kept or not."""

    def probs(self) -> torch.Tensor:
        return self.lam.sigmoid() / len(self.lam)


def digits(seed: int) -> dict[str, float]:
    """Half the training labels are wrong: the accuracy on clean test data of a linear classifier,
    trained anew with each weighting of the samples, and the area under the ROC curve of the learned
    weights as a detector of wrong labels."""
    from sklearn.datasets import load_digits
    from sklearn.metrics import roc_auc_score

    n, n_val, steps = 1000, 200, 400
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    order = torch.randperm(len(x), generator=g)
    x, y = (x[order] / 16).float(), y[order]
    wrong = torch.rand(n, generator=g).argsort() < n // 2
    y[:n] = torch.where(wrong, y[:n] + torch.randint(1, 10, (n,), generator=g), y[:n]) % 10
    fit, val = (SimpleNamespace(x=x[p], y=y[p], group=torch.arange(p.start, p.stop).clamp(max=n))
                for p in (slice(0, n), slice(n, n + n_val)))  # fmt: skip

    def losses(model: nn.Module, batch) -> torch.Tensor:
        ridge = 1e-3 * model.weight.square().sum()
        return cross_entropy(model(batch.x), batch.y, reduction="none") + ridge

    def accuracy(weights: torch.Tensor) -> float:
        model = nn.Linear(64, 10)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(steps):
            optimizer.zero_grad()
            (weights @ losses(model, fit) / weights.sum()).backward()
            optimizer.step()
        return (model(x[n + n_val :]).argmax(1) == y[n + n_val :]).double().mean().item()

    torch.manual_seed(seed)
    w, u = nn.Linear(64, 10), nn.Linear(64, 10)
    u.load_state_dict(w.state_dict())
    optimizers = [torch.optim.Adam(model.parameters(), lr=1e-2) for model in (w, u)]
    weights = SampleWeights(n, lr=5e-2)
    step = PenaltyStep(w, u, *optimizers, weights, alpha=10, losses=losses)
    for _ in range(steps):
        step.step([fit], [val], torch.tensor([1] * n + [n_val]))
    p = weights.probs().detach()
    return {
        "all samples": accuracy(torch.ones(n)),
        "clean half alone": accuracy((~wrong).float()),
        "learned weights": accuracy(p),
        "area under the ROC curve": float(roc_auc_score(~wrong, p)),
    }


# Tables

def read(out: Path, task: str, setting: str, file: str = "weights.json") -> dict[int, dict]:
    """{seed: the last record of its `file`} of the runs that are finished."""
    found = {}
    for folder in Cell(task, setting, 0).folder(out).parent.glob("seed*/"):
        if (folder / "model").is_dir():
            text = (folder / file).read_text()
            record = text.splitlines()[-1] if file.endswith("l") else text
            found[int(folder.name.removeprefix("seed"))] = json.loads(record)
    return dict(sorted(found.items()))


def spearman(one: dict[str, float], other: dict[str, float]) -> float:
    """Rank correlation of two figures of the sources; those of one value share their mean rank."""
    def ranks(values: np.ndarray) -> np.ndarray:
        return ((values[:, None] > values).sum(1) + (values[:, None] >= values).sum(1)) / 2

    pairs = np.array([(x, other[name]) for name, x in one.items()]).T
    return float(np.corrcoef(*map(ranks, pairs))[0, 1])


def of_run(task: str, run: dict) -> dict:
    """What the weights that a run has learned are like, as a whole."""
    w, best = run["weights"], BEST[task]
    found = {f"weight of {best}": w[best], f"{best} ranks first": max(w, key=w.get) == best}
    if task == "graded":
        pure = sum(w[name] for name, rate in tasks.NOISE.items() if rate == 1)
        found |= {"Spearman, weight and noise": spearman(w, tasks.NOISE),
                  "weight of pure noise": pure}  # fmt: skip
    if task == "multilingual":
        found["weight of aru and eli (validation is 70% and 30% of them)"] = w["aru"] + w["eli"]
    return found


def mixture_rows(task: str, out: Path) -> Iterator[dict]:
    """Held-out losses after fine-tuning on the learned weights against the others, by seed."""
    runs = {name: read(out, task, f"mixture {name}", "metrics.jsonl") for name in MIXTURES}
    for seed in sorted(set.intersection(*map(set, runs.values()))):
        loss = {name: of_seed[seed]["test_loss"] for name, of_seed in runs.items()}
        grid = {share: loss[f"best {share}"] for share in SHARES}
        best = min(grid, key=grid.get)
        yield {
            "task": task, "learned": loss["learned"], "uniform": loss["uniform"],
            "best of the grid": grid[best], "its share": best,
            "learned / best": loss["learned"] / grid[best],
            "at most 1.05": loss["learned"] <= 1.05 * grid[best],
            "below uniform's": loss["learned"] < loss["uniform"],
            "|ln| of two runs' ratio": abs(math.log(loss["learned, again"] / loss["learned"])),
        }  # fmt: skip


def interval_rows(task: str, out: Path) -> Iterator[dict]:
    """Of each learned weight its stated error, and whether two of them reach the seeds' mean."""
    runs = read(out, task, DEFAULTS).values()
    for name in next(iter(runs), {"weights": ()})["weights"]:
        mean = np.mean([run["weights"][name] for run in runs])
        for run in runs:
            weight, error = run["weights"][name], run["weights_se"][name]
            yield {"source": name, "weight": weight, "stated error": error,
                   "held by 95% interval": bool(abs(weight - mean) <= 1.96 * error)}  # fmt: skip


def pivot(rows: list[dict], *by: str) -> list[list]:
    """A table of tidy rows, whose first line are the headings: for each combination of the columns
    `by`, how many seeds there are, and over them each of the other columns."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in by), []).append(row)
    figures = [name for name in rows[0] if name not in by] if rows else []
    return [[*by, "seeds", *figures]] + [
        [*at, len(group), *(over_seeds([row[name] for row in group]) for name in figures)]
        for at, group in groups.items()
    ]


def over_seeds(values: list) -> str:
    """Mean ± its standard error; of booleans, how many are true."""
    if isinstance(values[0], bool):
        return f"{sum(values)} of {len(values)}"
    x = np.array(values, float)
    spread = f" ± {x.std(ddof=1) / math.sqrt(len(x)):.4f}" if len(x) > 1 else ""
    return f"{x.mean():.4f}{spread}"


def tables(out: Path) -> dict[str, list[list]]:
    """{title: table} of what is measured in the finished runs under `out`."""
    found = {}
    for task in BEST:
        runs = {setting: read(out, task, setting) for setting in ABLATION}
        for title, n in (("settings", 20), ("settings, seeds 0-4", 5)):
            found[f"{task}: {title}"] = pivot(
                [{"setting": setting} | of_run(task, run) for setting, of_seed in runs.items()
                 for seed, run in of_seed.items() if seed < n], "setting",
            )  # fmt: skip
        found[f"{task}: sources ({COUPLED})"] = pivot(
            [{"source": name, "weight": run["weights"][name], "gap": run["gap"][name],
              "differs": run["differs"][name]}
             for run in runs[COUPLED].values() for name in run["weights"]], "source",
        )  # fmt: skip
        found[f"{task}: intervals ({DEFAULTS})"] = pivot([*interval_rows(task, out)], "source")
    for task in ("languages", "placebo"):
        every = {f.parent.name for f in (out / task).glob("*/seed*") if f.is_dir()}
        found[task] = pivot(
            [{"setting": setting} | run["weights"] | {"any differs": any(run["differs"].values())}
             for setting in sorted(every) for run in read(out, task, setting).values()], "setting",
        )  # fmt: skip
    found["fine-tuning on a mixture"] = pivot(
        [row for task in BEST for row in mixture_rows(task, out)], "task"
    )
    if (file := out / "errors.json").exists():
        rows = json.loads(file.read_text())
        found["bf16's error of a source's gap"] = [
            [*rows[0]], *([*row.values()] for row in rows)
        ]
    found["digits, half the training labels wrong: test accuracy"] = pivot(
        [json.loads(file.read_text()) for file in sorted(out.glob("digits/seed*.json"))]
    )
    return {title: table for title, table in found.items() if len(table) > 1}


def write_tables(out: Path, made: dict[str, list[list]], about: str) -> None:
    """tables.json, and tables.md, which is also printed."""
    report.write_json(out / "tables.json", made)
    lines = [f"{about} Mean ± standard error over seeds.", ""]
    for title, (header, *rows) in made.items():
        table = [header, ["---"] * len(header), *rows]
        lines += [f"### {title}", "", *(f"| {' | '.join(map(str, row))} |" for row in table), ""]
    report.replace(out / "tables.md", "\n".join(lines))
    print("\n".join(lines))


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 a run failed."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=EXPERIMENTS, help="[all]")
    parser.add_argument("--out", type=Path, default=Path("runs/fidelity"), help="[runs/fidelity]")
    parser.add_argument("--model", type=Path, help="of `errors`: a pretrained model, "
                        "as a Hugging Face directory")  # fmt: skip
    parser.add_argument("--workers", type=int, default=2, choices=range(1, 17),
                        help="runs at a time, a thread each [2]")  # fmt: skip
    args = parser.parse_args(argv)
    wanting = {"signal": not CAPTIONS.exists() and ASSETS,
               "errors": not args.model and "--model",
              "digits": not find_spec("sklearn") and "scikit-learn"}  # fmt: skip
    only = [name for name in args.only if not wanting.get(name)]
    for name in {*args.only} - {*only}:
        print(f"left out, for want of {wanting[name]}: {name}")
    (args.out / "digits").mkdir(parents=True, exist_ok=True)
    if "signal" in only:
        write_captions(args.out)
    if "errors" in only:
        report.write_json(args.out / "errors.json", [*errors(args.model, args.out)])
    for seed in range(5 if "digits" in only else 0):
        report.write_json(args.out / "digits" / f"seed{seed}.json", digits(seed))
    ran = [run(cells, args.out, args.workers) for cells in stages(only, args.out)]
    write_tables(args.out, tables(args.out), f"Weights: {SIZE}. Fine-tuning: {TUNE}.")
    return 0 if all(ran) else 1


if __name__ == "__main__":
    sys.exit(main())
