"""What a run leaves to read: metrics.jsonl and weights.json while it goes on; then the printed
report and the picture, made from those files and config.json alone; or why it ended early.

Row t of metrics.jsonl holds the losses at the point from which step t starts, and the weights that
it ends with. The first row has the `test_loss` of the model as loaded, the last one that of the
model as saved. A fine-tuning run has the `train_loss` of its batches, and now and then the
`val_loss` on all validation records, the last one again of the model as saved.

S sources.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import resource
import sys
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from tqdm import tqdm

import shard
from bilevel import StepStats
from cli import plan
from cli.flags import HARMLESS
from sources import mixture
from sources.records import Problems

BATCHES = 10  # batch means, for standard errors of series that are autocorrelated
SETTLED = 0.1  # largest drift of a logit over the last fifth of a run that has settled
NEAR = 0.02  # a weight as close as this to 0 or 1 has arrived, however far its logit goes on
MIXTURE = 10_000  # samples in the mixture that the report proposes
NEEDS = "pictures need matplotlib: pip install matplotlib"
NAME_LENGTH, TITLE_LENGTH = 32, 150  # characters in a picture; longer ones lose their middle


# --------------------------------------------------------------------------------------------------
# While it goes on


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
            self.rows = read_rows(origin or out, start)
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
        "gap": by_name(names, stats.gap),
        "gap_se": by_name(names, stats.gap_variance.sqrt()),
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


def write_json(path: Path, content: dict) -> None:
    replace(path, json.dumps(content, indent=1) + "\n")


def replace(path: Path, text: str) -> None:
    """Write a file in one step: a reader sees the old one or the new one, each whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def read_rows(out: Path, before: float = math.inf) -> list[dict]:
    """The rows of metrics.jsonl of the steps `before`. There may be none yet, and a run that was
    killed may have left the last line cut: lines that cannot be read are left out."""
    rows = []
    with contextlib.suppress(OSError):
        for line in (out / "metrics.jsonl").read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and row.get("step", before) < before]


# --------------------------------------------------------------------------------------------------
# When it cannot go on


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


def why(error: BaseException, out: Path, timeout: float, memory: Memory, rank: int) -> str:
    """Why a rank ends, in a line. Want of memory leaves the traceback in a file; what should not
    happen prints it."""
    if isinstance(error, dcp.CheckpointException):  # of the ranks that failed, one's
        error = next(iter(error.failures.values()))[0]
    said = str(error)
    # PyTorch's allocators, NCCL and cuBLAS each say it in their own way.
    if (isinstance(error, MemoryError) or "out of memory" in said.lower()
            or "can't allocate memory" in said):  # fmt: skip
        log = out / f"error-rank{rank}.log"
        log.write_text("".join(traceback.format_exception(error)))
        helpful = plan.most_helpful(memory.config, memory.device_type, **memory.settings)
        return (f"out of memory: {memory.planned}, measured {memory.measured()}; most likely to "
                f"help: {' or '.join(helpful)}; traceback in {log}")  # fmt: skip
    if isinstance(error, OSError):
        return f"{error.filename or out}: {error.strerror or error}"
    if "inline_container" in said:  # torch.save forgets what the system said
        return f"a checkpoint in {out} could not be written: is the disk full?"
    if type(error).__name__ == "SafetensorError":
        return f"{out}/model could not be written: {error}"
    if shard.lost_peer(error):
        saved = shard.whole_checkpoints(out / "checkpoints")
        goes_on = "goes on from the last checkpoint" if saved else "starts anew: nothing was saved"
        return ("another rank is gone, or did not come within the --timeout of "
                f"{timeout:g} s. The same command {goes_on}.")  # fmt: skip
    traceback.print_exception(error)
    return next(iter(said.splitlines()), type(error).__name__)


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


# --------------------------------------------------------------------------------------------------
# Results


def summarise(rows: list[dict]) -> dict:
    """What weights.json says of the results: `of_source` of each, and of the run as a whole."""
    tail = last_fifth(rows)
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


def last_fifth(series):
    return series[-max(1, len(series) // 5) :]


def batch_means(series: list[float] | np.ndarray) -> np.ndarray | None:
    """(BATCHES,); None for a series too short to tell an error from."""
    if len(series) < 2 * BATCHES:
        return None
    return np.array([part.mean() for part in np.array_split(np.array(series), BATCHES)])


def standard_error(series: list[float] | np.ndarray) -> float | None:
    """Of the mean, by batch means; None for a series too short to tell."""
    means = batch_means(series)
    return None if means is None else float(np.std(means, ddof=1) / math.sqrt(BATCHES))


def slope(series: np.ndarray) -> tuple[float, float]:
    """Drift of a series over its length by least squares on batch means, and its standard error.

    A series too short to tell has an infinite drift.
    """
    means = batch_means(series)
    if means is None:
        return math.inf, 0.0
    t = np.linspace(-0.5, 0.5, BATCHES)
    drift = float(t @ means / (t @ t))
    residual = means - means.mean() - drift * t
    return drift, math.sqrt(residual @ residual / (BATCHES - 2) / (t @ t))


def retold(out: Path) -> str:
    """The report of a run that was finished earlier."""
    try:
        return render(out)
    except OSError as error:  # somebody took a file away
        return f"no report: {error.filename}: {error.strerror}"
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        return f"no report: a file in {out} is damaged ({error})"


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


def table(rows: dict[str, tuple[float, int, str]], last: str = "") -> list[str]:
    """Of each source its weight, as a number and as a bar, its samples, and what is `last`."""
    width = max(len("source"), *map(len, rows))
    lines = [f"{'source':{width}}  weight  {'':30}  samples{last}"]
    for name, (p, samples, rest) in rows.items():
        bar = "█" * round(30 * p) or "▏"
        lines.append(f"{name:{width}}  {p:6.4f}  {bar:30}  {samples:7}{rest}")
    return lines


def loss_lines(what: str, before_after: list[float | None]) -> list[str]:
    before, after = before_after
    if before is None or after is None:
        return []
    return [f"{what:19} {before:.4f} before, {after:.4f} after"]


def skipped_lines(skipped: int) -> list[str]:
    if not skipped:
        return []
    return ["", f"steps passed over because something was not finite: {skipped}"]


def render_mixture(out: Path, shares: dict[str, dict]) -> list[str]:
    """The report of a fine-tuning run."""
    rows = read_rows(out)
    lines = table({name: (e["weight"], e["samples"], "") for name, e in shares.items()})
    losses = [row["train_loss"] for row in rows if row["train_loss"] is not None]
    if losses:
        lines += ["", f"training loss:      {losses[0]:.4f} at first, "
                  f"{np.mean(last_fifth(losses)):.4f} over the last fifth of the steps"]
    lines += loss_lines("validation loss:", before_and_after(rows, "val_loss"))
    lines += loss_lines("held-out test loss:", before_and_after(rows, "test_loss"))
    return lines + skipped_lines(sum(not row["finite"] for row in rows))


def render_weights(out: Path) -> list[str]:
    """The report of a run that learned weights."""
    result = json.loads((out / "weights.json").read_text())
    weights = result["weights"]
    samples = {name: source["samples"] for name, source in result["sources"].items()}
    rows = {}
    for name, p in weights.items():
        gap, se = result["gap"][name], result["gap_se"][name]
        gap = f"{gap:+.4f}" if gap is not None else "-"
        se = f" ± {se:.4f}" if se is not None else ""
        settled = "yes" if result["settled"][name] else "drifts"
        rows[name] = p, samples[name], f"  {gap + se:18}  {settled}"
    lines = table(rows, "  gap l(w) - l(u)     settled")
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
    most = [samples[name] / p for name, p in weights.items() if p > 0]
    counts = mixture.apportion(weights, int(min(MIXTURE, *most)))
    mixer = json.dumps({name: n for name, n in counts.items() if n > 1})
    return lines + [
        "",
        "The same mixture elsewhere:",
        f"  LLaMA-Factory   dataset: {','.join(weights)}",
        "                  mix_strategy: interleave_under",
        f"                  interleave_probs: {probs}",
        f"  open-instruct   dataset_mixer: {mixer}",
    ]


# --------------------------------------------------------------------------------------------------
# Pictures


@dataclass
class Run:
    path: Path
    config: dict
    rows: list[dict]  # of metrics.jsonl

    @property
    def learns(self) -> bool:
        return "weights" in self.rows[0]

    @property
    def names(self) -> list[str]:
        return list(self.rows[0]["weights"] if self.learns else self.config["mixture"])

    @property
    def kind(self) -> str:
        """Equal for runs that differ in their seed alone."""
        flags = {k: v for k, v in self.config["flags"].items() if k not in HARMLESS | {"seed"}}
        paths = {name: entry["path"] for name, entry in self.config["data"].items()}
        return json.dumps([flags, paths, self.config.get("mixture")], sort_keys=True)

    def series(self, key: str, name: str | None = None) -> np.ndarray:
        """A column of metrics.jsonl, NaN where it has no value, (steps,)."""
        cells = [row.get(key) for row in self.rows]
        if name is not None:
            cells = [cell and cell.get(name) for cell in cells]
        return np.array([math.nan if x is None else x for x in cells], float)


def read_run(path: Path) -> Run:
    """ValueError if the directory holds no run, or one without a step. It may still go on, or have
    been killed in the midst of a line."""
    try:
        run = Run(path, json.loads((path / "config.json").read_text()), read_rows(path))
        if not run.rows:
            raise ValueError(f"{path}: the run has not done a step yet")
        if not (run.names and run.kind):
            raise KeyError
    except (OSError, KeyError, TypeError, json.JSONDecodeError):
        raise ValueError(f"{path}: not the directory of a run") from None
    return run


def plot(paths: list[Path], file: Path) -> None:
    """Draw runs into an image file. ValueError, a line per problem: no matplotlib, directories that
    hold no run, a file that cannot be written."""
    runs, problems = [], Problems()
    for path in paths:
        with problems.collecting():
            runs.append(read_run(path))
    problems.raise_if_any()
    figure = figure_of(runs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a font without some character: it is drawn as a box
        try:
            figure.savefig(file, dpi=110)
        except (OSError, ValueError) as error:
            raise ValueError(f"{file}: {getattr(error, 'strerror', 0) or error}") from None


def figure_of(runs: list[Run]):
    """The picture: runs that differ in nothing but --seed make one row, every other run its own.
    ValueError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(NEEDS) from None

    groups = {}
    for run in runs:
        groups.setdefault(run.kind, []).append(run)
    heights = [max(3.2, 1.2 + 0.22 * len(group[0].names)) for group in groups.values()]
    figure = Figure(figsize=(15, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(groups), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, group in zip(parts, groups.values(), strict=True):
        draw_row(part, group)
    return figure


def draw_row(figure, runs: list[Run]) -> None:
    """Over the steps the learned weights, or of fine-tuning the training and held-out losses; the
    sources' losses under w; and the weights as bars, which name the colours."""
    from matplotlib import colormaps

    others = f" and {len(runs) - 1} more of other seeds" if len(runs) > 1 else ""
    title = shorten(str(runs[0].path), TITLE_LENGTH - len(others)) + others
    figure.suptitle(title, x=0.01, ha="left", fontsize="medium", parse_math=False)
    left, middle, right = figure.subplots(1, 3, width_ratios=(4, 4, 3))
    colours = colormaps["tab20"].colors
    colours = colours[::2] + colours[1::2]  # the dark ones first
    looks = [{"color": c, "linestyle": dash} for dash in ("-", "--", ":") for c in colours]
    styles = dict(zip(runs[0].names, itertools.cycle(looks), strict=False))
    steps = [len(run.rows) for run in runs]
    window = max(1, min(steps) // 50)
    if runs[0].learns:
        draw_weights(left, runs, styles)
    else:
        draw_losses(left, runs, window)
    draw_source_losses(middle, runs, styles, window)
    draw_bars(right, runs, styles)
    for axes in (left, middle):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlim(-0.5, max(steps) - 0.5)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)


def draw_weights(axes, runs: list[Run], styles: dict) -> None:
    for name, style in styles.items():
        curves = [run.series("weights", name) for run in runs]
        width = 1.5 if len(runs) == 1 else 0.8
        lines(axes, curves, **style, linewidth=width, label=shorten(name, NAME_LENGTH))
    axes.set(xlabel="step", ylabel="weight", ylim=(0, min(1.02, 1.1 * axes.dataLim.ymax)))
    if len(styles) <= 9:  # the bars' names have the colours too
        legend_above(axes)


def draw_losses(axes, runs: list[Run], window: int) -> None:
    """Of fine-tuning: the batches', and the held-out ones where they were evaluated."""
    train, val, test = ([run.series(f"{k}_loss") for run in runs] for k in ("train", "val", "test"))
    train = [smooth(y, window) for y in train]
    lines(axes, train, color="C0", linewidth=1, label="training")
    lines(axes, val, color="black", marker=".", label="validation")
    lines(axes, test, color="C3", marker="x", linestyle="none", label="test")
    finish_losses(axes, window, "loss (nats)")


def draw_source_losses(axes, runs: list[Run], styles: dict, window: int) -> None:
    """Of several runs the mean."""
    steps = min(len(run.rows) for run in runs)

    def mean(key: str, name: str | None = None) -> list[np.ndarray]:
        every = [smooth(run.series(key, name)[:steps], window) for run in runs]
        return [np.ma.masked_invalid(every).mean(0).filled(math.nan)]

    for name, style in styles.items():
        lines(axes, mean("source_loss_w", name), **style, linewidth=0.9)
    lines(axes, mean("val_loss") if runs[0].learns else [], color="black", label="validation")
    finish_losses(axes, window, "loss under w (nats)")


def finish_losses(axes, window: int, what: str) -> None:
    """The vertical axis starts at 0, with a margin above what is drawn."""
    over = f" (losses of batches: mean over {window})" if window > 1 else ""
    axes.set(xlabel=f"step{over}", ylabel=what)
    axes.update_datalim([(0, 0)])
    axes.autoscale_view()
    axes.set_ylim(bottom=0)
    legend_above(axes)


def draw_bars(axes, runs: list[Run], styles: dict) -> None:
    """The sources from the greatest weight down, each with its value beside it."""
    values = {name: bar(runs, name) for name in styles}
    order = sorted(values, key=lambda name: -values[name][0])
    for y, name in enumerate(order):
        value, se, final = values[name]
        axes.barh(y, value, color=styles[name]["color"], xerr=se, ecolor="black", capsize=2)
        axes.plot(final, [y + 0.28] * len(final), "o", color="black", markersize=2.5)
        text = f"{value:.4f}" + (f" ± {se:.4f}" if se is not None else "")
        axes.text(1.02, y, text, transform=axes.get_yaxis_transform(), va="center", fontsize=8)
    axes.set_yticks(range(len(order)), [shorten(name, NAME_LENGTH) for name in order], fontsize=8)
    for name, label in zip(order, axes.get_yticklabels(), strict=True):
        label.set(color=styles[name]["color"], parse_math=False)  # a "$" in a name is a dollar
    learned = "weight: mean of the last fifth (dot: final)"
    axes.set(xlabel=learned if runs[0].learns else "share of the mixture", xlim=(0, None),
             ylim=(max(len(order), 3) - 0.4, -0.6))  # fmt: skip


def bar(runs: list[Run], name: str) -> tuple[float, float | None, list[float]]:
    """(length, standard error, dots) of a source's bar: the mean weight over the last fifth of a
    run, its error by batch means, and the final weight; of several seeds the mean of these means,
    its error over the seeds, and all final weights. Shares of a mixture are exact."""
    if not runs[0].learns:
        mixture = runs[0].config["mixture"]
        return mixture[name]["samples"] / sum(e["samples"] for e in mixture.values()), None, []
    series = [run.series("weights", name) for run in runs]
    final = [float(p[-1]) for p in series]
    means = [float(last_fifth(p).mean()) for p in series]
    if len(runs) > 1:
        return float(np.mean(means)), float(np.std(means, ddof=1)) / math.sqrt(len(runs)), final
    return means[0], standard_error(last_fifth(series[0])), final


def lines(axes, curves: list[np.ndarray], label: str | None = None, **style) -> None:
    """Series over the steps, leaving out what is NaN; the points of short ones are marked. They
    share a style and a label."""
    for y in curves:
        x = np.flatnonzero(np.isfinite(y))
        if len(x):
            marker = "." if len(x) < 20 else ""
            axes.plot(x, y[x], **{"marker": marker, "label": label} | style)
            label = None


def smooth(y: np.ndarray, window: int) -> np.ndarray:
    """Centred running mean of the values that are not NaN."""
    kernel, known = np.ones(window), np.isfinite(y)
    total = np.convolve(np.where(known, y, 0), kernel, "same")
    n = np.convolve(known, kernel, "same")
    return np.where(n > 0, total / np.maximum(n, 1), math.nan)


def legend_above(axes) -> None:
    """If anything has a label."""
    if axes.get_legend_handles_labels()[0]:
        place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 3}
        for text in axes.legend(**place, frameon=False, fontsize="small").get_texts():
            text.set_parse_math(False)


def shorten(text: str, length: int) -> str:
    if len(text) <= length:
        return text
    tail = length // 3
    return f"{text[: length - tail - 1]}…{text[-tail:]}"
