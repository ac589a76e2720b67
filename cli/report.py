"""The record of a run: metrics.jsonl and weights.json while it goes on, and the printed report,
which is made from those files and config.json alone.

Row t of metrics.jsonl holds the losses at the point from which step t starts, and the weights that
it ends with. The first row has the `test_loss` of the model as loaded, the last one that of the
model as saved. A fine-tuning run has the `train_loss` of its batches, and now and then the
`val_loss` on all validation records, the last one again of the model as saved.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import sys
import traceback
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bilevel import StepStats
from cli import plan
from sources import mixture

BATCHES = 10  # batch means, for standard errors of series that are autocorrelated
SETTLED = 0.1  # largest drift of a logit over the last fifth of a run that has settled
NEAR = 0.02  # a weight as close as this to 0 or 1 has arrived, however far its logit goes on
MIXTURE = 10_000  # samples in the mixture that the report proposes


class Log:
    """Writes a run's files as it goes on and draws the progress bar. Only rank 0 does either."""

    def __init__(
        self,
        out: Path,
        about: dict | None,
        start: int,
        total: int,
        main: bool,
        origin: Path | None = None,
    ):
        """about: what weights.json says besides the results, None for a run that learns none;
        start: steps already done, of which the rows are kept; origin: the directory of the run
        that did them, if it is another one."""
        self.out, self.about, self.total, self.main = out, about, total, main
        self.rows: list[dict] = []
        if main:
            self.rows = rows_before(origin or out, start)
            if len(self.rows) < start:
                print(f"note: {start - len(self.rows)} of the {start} steps before are missing in "
                      f"{origin or out}/metrics.jsonl")  # fmt: skip
            replace(out / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows))
        interval = 0.5 if sys.stderr.isatty() else 20
        self.bar = tqdm(
            total=total, initial=start, disable=not main, mininterval=interval, maxinterval=interval
        )

    def write(self, row: dict) -> None:
        """Add one row of metrics.jsonl; bring weights.json up to date every tenth step."""
        if not self.main:
            return
        self.rows.append(row)
        with open(self.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        last = row["step"] == self.total - 1
        if last or row["step"] % 10 == 0:
            self.write_weights()
        self.bar.set_postfix_str(progress_text(row), refresh=False)
        self.bar.update()
        if last:
            self.bar.close()

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if self.main:
            self.bar.write(line)

    def write_weights(self) -> None:
        if self.rows and self.main and self.about is not None:
            write_json(self.out / "weights.json", self.about | summarise(self.rows))


def progress_text(row: dict) -> str:
    """What the progress bar says of a step."""
    def number(x: float | None) -> str:
        return f"{math.nan if x is None else x:.3f}"

    if "weights" not in row:
        return f"train {number(row['train_loss'])}"
    leading = sorted(row["weights"].items(), key=lambda item: -item[1])[:3]
    weights = " ".join(f"{name} {p:.2f}" for name, p in leading)
    return f"val {number(row['val_loss'])} | {weights}"


def row(step: int, stats: StepStats, counts: Tensor, names: list[str]) -> dict:
    """A row of metrics.jsonl; null where a source is absent from the batch, or not finite."""
    losses = by_name(names, stats.source_loss_w)
    common = {
        "step": step,
        "source_loss_w": losses,
        "grad_norm_w": finite(stats.grad_norm_w),
        "finite": stats.finite,
        "peak_memory": peak_memory(),
    }
    if stats.source_loss_u is None:
        n = counts[:-1].to(stats.source_loss_w)
        total = torch.where(n > 0, n * stats.source_loss_w, 0).sum() / n.sum()
        return common | {"train_loss": finite(total.item())}
    return common | {
        "val_loss": finite(stats.val_loss),
        "source_loss_u": by_name(names, stats.source_loss_u),
        "grad_norm_u": finite(stats.grad_norm_u),
        "weights": by_name(names, stats.weights),
    }


def by_name(names: list[str], values: Tensor) -> dict:
    return dict(zip(names, map(finite, values.tolist()), strict=True))


def finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


def peak_memory() -> int:
    """Bytes: allocated on this rank's GPU, or else resident in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Memory:
    """The planned peak of a run and beside it, on this rank, the measured one."""

    def __init__(self, config, device_type: str, settings: dict):
        """settings: what plan.plan takes. Make it before the model is loaded."""
        self.config, self.device_type, self.settings = config, device_type, settings
        self.planned = f"planned peak {plan.plan(config, **settings).peak / plan.GB:.2f} GB a rank"
        self.before = peak_memory()  # on a CPU: Python, its libraries and the data

    def measured(self) -> str:
        peak = peak_memory() / plan.GB
        if self.device_type == "cuda":
            reserved = torch.cuda.max_memory_reserved() / plan.GB
            return f"{peak:.2f} GB ({reserved:.2f} GB with what the allocator kept back)"
        before = self.before / plan.GB
        return f"{peak - before:.2f} GB above the {before:.2f} GB before loading"

    def advice(self, log: Path) -> str:
        """A line on an error for want of memory, whose traceback goes to `log`."""
        log.write_text(traceback.format_exc())
        helpful = plan.most_helpful(self.config, self.device_type, **self.settings)
        return (f"out of memory: {self.planned}, measured {self.measured()}; most likely to help: "
                f"{' or '.join(helpful)}; traceback in {log}")  # fmt: skip


def out_of_memory(error: BaseException) -> bool:
    """Also where PyTorch's CPU allocator, NCCL or cuBLAS says so."""
    said = "out of memory" in str(error).lower() or "can't allocate memory" in str(error)
    return said or isinstance(error, MemoryError)


def nonfinite_message(row: dict, counts: Tensor, out: Path) -> str:
    """Why a step was not finite, and what is left of the run."""
    learns = "weights" in row
    present = dict(zip(row["source_loss_w"], counts.tolist(), strict=False))
    bad = [
        f"the loss of source {name} under {copy}"
        for copy in ("wu" if learns else "w")
        for name, loss in row[f"source_loss_{copy}"].items()
        if present[name] and loss is None
    ]
    bad += ["the validation loss"] * (learns and row["val_loss"] is None)
    return (
        f"step {row['step']}: not finite: {', '.join(bad) or 'a gradient'}. This step changed "
        f"nothing; the {row['step']} steps before it are in {out}. "
        "The same command with --skip-nonfinite passes over such steps; "
        f"{'lower --lr-w and --lr-u' if learns else 'a lower --lr-w'}, or --clip, need another "
        "--out."
    )


def write_json(path: Path, content: dict) -> None:
    replace(path, json.dumps(content, indent=1) + "\n")


def replace(path: Path, text: str) -> None:
    """Write a file in one step: a reader sees the old one or the new one, each whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def summarise(rows: list[dict]) -> dict:
    """What weights.json says of the results: `of_source` of each, and of the run as a whole."""
    tail = rows[-max(1, len(rows) // 5) :]
    names = list(rows[-1]["weights"])
    p = np.array([[row["weights"][name] for name in names] for row in tail])
    logits = np.log(np.maximum(p, 1e-300))
    logits -= logits.mean(1, keepdims=True)
    results = {
        name: of_source(name, tail, p[:, i], logits[:, i]) for i, name in enumerate(names)
    }
    by_key = {key: {name: results[name][key] for name in names} for key in results[names[0]]}
    return by_key | {
        "step": rows[-1]["step"] + 1,
        "skipped": sum(not row["finite"] for row in rows),
        "alpha": rows[-1]["alpha"],
        "test_loss": before_and_after(rows, "test_loss"),
    }


def of_source(name: str, tail: list[dict], p: np.ndarray, logits: np.ndarray) -> dict:
    """A source's final weight, and over the last fifth of the steps, `tail`, its mean, the mean gap
    ℓ_i(w) − ℓ_i(u) with its standard error, and whether the weight settled.

    p, logits (n,): weight and centred logit after each step of `tail`. The weight has settled if it
    was near 0 or 1 all the time, or if the logit drifts by less than SETTLED and by less than two
    standard errors of the drift. The schedule has `limited` it, where it was not near, if the logit
    drifts at more than half the speed that the learning rates of λ permit: Adam moves it by about
    the rate in each step. Where the rates fall to 0 it is then both.
    """
    losses = [(row["source_loss_w"][name], row["source_loss_u"][name]) for row in tail]
    gaps = [w - u for w, u in losses if None not in (w, u)]
    drift, se = slope(logits)
    near = bool(((p < NEAR) | (p > 1 - NEAR)).all())
    still = abs(drift) < SETTLED and abs(drift) < 2 * se
    permitted = sum(row["lr_lambda"] for row in tail)
    return {
        "weights": float(p[-1]),
        "mean_last_20pct": float(p.mean()),
        "gap": float(np.mean(gaps)) if gaps else None,
        "gap_se": standard_error(gaps),
        "settled": math.isfinite(drift) and (near or still),
        "limited": not near and max(permitted / 2, 2 * se) < abs(drift) < math.inf,
    }


def before_and_after(rows: list[dict], key: str) -> list[float | None]:
    """A held-out loss of the model as loaded and as saved; None where it was not evaluated."""
    return [rows[0].get(key) if len(rows) > 1 else None, rows[-1].get(key)]


def standard_error(series: list[float]) -> float | None:
    """Of the mean, by batch means; None for a series too short to tell."""
    if len(series) < 2 * BATCHES:
        return None
    means = [part.mean() for part in np.array_split(np.array(series), BATCHES)]
    return float(np.std(means, ddof=1) / math.sqrt(BATCHES))


def slope(series: np.ndarray) -> tuple[float, float]:
    """Drift of a series over its length by least squares on batch means, and its standard error.

    A series too short to tell has an infinite drift.
    """
    if len(series) < 2 * BATCHES:
        return math.inf, 0.0
    means = np.array([part.mean() for part in np.array_split(series, BATCHES)])
    t = np.linspace(-0.5, 0.5, BATCHES)
    drift = float(t @ means / (t @ t))
    residual = means - means.mean() - drift * t
    return drift, math.sqrt(residual @ residual / (BATCHES - 2) / (t @ t))


def render(out: Path) -> str:
    """The report of a finished run, from its files."""
    record = json.loads((out / "config.json").read_text())
    shares = record.get("mixture")
    lines = render_mixture(out, shares) if shares else render_weights(out)
    left_out = [
        f"{n} of {name}: {reason}"
        for name, dataset in record["data"].items()
        for reason, n in dataset.get("dropped", {}).items()
        if n
    ]
    if left_out:
        lines += ["", f"records left out: {'; '.join(left_out)}"]
    files = ", ".join(sorted(p.name for p in out.glob("[!.]*")))
    return "\n".join([*lines, "", f"Files in {out}: {files}"])


def render_mixture(out: Path, shares: dict[str, dict]) -> list[str]:
    """The report of a fine-tuning run."""
    rows = read_rows(out)
    width = max(len("source"), *map(len, shares))
    lines = [f"{'source':{width}}  weight  {'':30}  samples"]
    for name, share in shares.items():
        lines.append(f"{name:{width}}  {share['weight']:6.4f}  {bar(share['weight']):30}  "
                     f"{share['samples']:7}")  # fmt: skip
    losses = [row["train_loss"] for row in rows if row["train_loss"] is not None]
    if losses:
        tail = losses[-max(1, len(losses) // 5) :]
        lines += ["", f"training loss:      {losses[0]:.4f} at first, {np.mean(tail):.4f} over the "
                  "last fifth of the steps"]  # fmt: skip
    for what, key in ("validation loss", "val_loss"), ("held-out test loss", "test_loss"):
        lines += loss_lines(f"{what + ':':19}", before_and_after(rows, key))
    return lines + skipped_lines(sum(not row["finite"] for row in rows))


def loss_lines(what: str, before_after: list[float | None]) -> list[str]:
    before, after = before_after
    if before is None or after is None:
        return []
    return [f"{what} {before:.4f} before, {after:.4f} after"]


def skipped_lines(skipped: int) -> list[str]:
    if not skipped:
        return []
    return ["", f"steps passed over because something was not finite: {skipped}"]


def bar(p: float) -> str:
    return "█" * round(30 * p) or "▏"


def read_rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def rows_before(out: Path, step: float) -> list[dict]:
    """Those of a run that was killed; lines that the crash has cut are left out."""
    rows = []
    with contextlib.suppress(OSError):
        for line in (out / "metrics.jsonl").read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and row.get("step", step) < step]


def render_weights(out: Path) -> list[str]:
    """The report of a run that learned weights."""
    result = json.loads((out / "weights.json").read_text())
    weights = result["weights"]
    width = max(len("source"), *map(len, weights))
    lines = [f"{'source':{width}}  weight  {'':30}  samples  gap l(w) - l(u)     settled"]
    for name, p in weights.items():
        gap, se = result["gap"][name], result["gap_se"][name]
        gap = f"{gap:+.4f}" if gap is not None else "-"
        se = f" ± {se:.4f}" if se is not None else ""
        lines.append(
            f"{name:{width}}  {p:6.4f}  {bar(p):30}  {result['sources'][name]['samples']:7}  "
            f"{gap + se:18}  {'yes' if result['settled'][name] else 'drifts'}"
        )
    if limited := [name for name, flag in result["limited"].items() if flag]:
        lines += ["", f"warning: the schedule, not the data, limited the weight of "
                  f"{', '.join(limited)}: to the end its logit",
                  "moved at more than half the speed that --lr-lambda permits. More steps, or a "
                  "larger --lr-lambda, take it further."]  # fmt: skip
    test = loss_lines("held-out test loss:", result["test_loss"])
    lines += ["", *test] if test else []
    lines += skipped_lines(result["skipped"])
    parts = mixture.apportion(weights, MIXTURE)  # so that the printed probabilities sum to one
    probs = ",".join(f"{n / MIXTURE:.4f}" for n in parts.values())
    # Of a source with weight p, n p samples are asked: as large an n as the sources permit. A count
    # of 1 would be read as all of a source.
    sizes = [result["sources"][name]["samples"] / p for name, p in weights.items() if p > 0]
    counts = mixture.apportion(weights, int(min(MIXTURE, *sizes)))
    mixer = json.dumps({name: n for name, n in counts.items() if n > 1})
    lines += [
        "",
        "The same mixture elsewhere:",
        f"  LLaMA-Factory   dataset: {','.join(weights)}",
        "                  mix_strategy: interleave_under",
        f"                  interleave_probs: {probs}",
        f"  open-instruct   dataset_mixer: {mixer}",
    ]
    return lines
