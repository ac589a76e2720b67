"""Pictures of runs, with matplotlib: weights and losses over the steps, and the weights as bars.

Runs that differ in nothing but --seed make one row of the picture, every other run has its own.
From left to right a row shows

    the learned weights over the steps         a fine-tuning run: training and held-out losses
    the sources' losses under w                the same
    the weights as bars, which name the        its mixture: each source's share
    colours too

A bar is the mean weight over the last fifth of a run with its standard error by batch means
(report.standard_error); of several seeds, the mean of these means with the standard error across
the seeds. Dots are the final weights, one for each run. Shares of a mixture are exact.

S sources.
"""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cli import report
from cli.flags import HARMLESS
from sources.records import Problems

NEEDS = "pictures need matplotlib: pip install matplotlib"
NAME_LENGTH, TITLE_LENGTH = 32, 150  # characters; longer ones lose their middle


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
        config = json.loads((path / "config.json").read_text())
        run = Run(path, config, report.rows_before(path, math.inf))
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
    """The picture, a row for each kind of run. ValueError without matplotlib."""
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
    """Runs of one kind."""
    others = f" and {len(runs) - 1} more of other seeds" if len(runs) > 1 else ""
    title = shorten(str(runs[0].path), TITLE_LENGTH - len(others)) + others
    figure.suptitle(title, x=0.01, ha="left", fontsize="medium", parse_math=False)
    left, middle, right = figure.subplots(1, 3, width_ratios=(4, 4, 3))
    colours = dict(zip(runs[0].names, palette(len(runs[0].names)), strict=True))
    if runs[0].learns:
        draw_weights(left, runs, colours)
        draw_source_losses(middle, runs, colours, with_validation=True)
    else:
        draw_losses(left, runs)
        draw_source_losses(middle, runs, colours, with_validation=False)
    draw_bars(right, runs, colours)
    for axes in (left, middle):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlim(-0.5, max(len(run.rows) for run in runs) - 0.5)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)


def draw_weights(axes, runs: list[Run], colours: dict) -> None:
    top = 0.0
    for run in runs:
        for name, style in colours.items():
            p = run.series("weights", name)
            top = max(top, np.nanmax(p))
            label = shorten(name, NAME_LENGTH) if run is runs[0] else None
            line(axes, p, **style, linewidth=1.5 if len(runs) == 1 else 0.8, label=label)
    axes.set(xlabel="step", ylabel="weight", ylim=(0, min(1.02, 1.1 * top)))
    if len(colours) <= 9:  # the bars' names have the colours too
        legend_above(axes)


def draw_source_losses(axes, runs: list[Run], colours: dict, with_validation: bool) -> None:
    """Of several runs the mean."""
    steps = min(len(run.rows) for run in runs)
    window = max(1, steps // 50)

    def over_runs(key: str, name: str | None = None) -> np.ndarray:
        return mean(np.stack([smooth(run.series(key, name)[:steps], window) for run in runs]))

    for name, style in colours.items():
        line(axes, over_runs("source_loss_w", name), **style, linewidth=0.9)
    if with_validation:
        line(axes, over_runs("val_loss"), color="black", label="validation")
        legend_above(axes)
    axes.set(xlabel=steps_label(window), ylabel="loss under w (nats)")
    from_zero(axes)


def draw_losses(axes, runs: list[Run]) -> None:
    """Of fine-tuning: the batches', and the held-out ones where they were evaluated."""
    window = max(1, min(len(run.rows) for run in runs) // 50)
    for n, run in enumerate(runs):
        def label(text: str, n=n) -> str | None:
            return None if n else text

        train, val, test = (run.series(f"{key}_loss") for key in ("train", "val", "test"))
        line(axes, smooth(train, window), color="C0", linewidth=1, label=label("training"))
        line(axes, val, color="black", marker=".", label=label("validation"))
        line(axes, test, color="C3", marker="x", linestyle="none", label=label("test"))
    axes.set(xlabel=steps_label(window), ylabel="loss (nats)")
    from_zero(axes)
    legend_above(axes)


def draw_bars(axes, runs: list[Run], colours: dict) -> None:
    """The sources from the greatest weight down, each with its value beside it."""
    values = {name: bar(runs, name) for name in colours}
    order = sorted(values, key=lambda name: -values[name][0])
    for y, name in enumerate(order):
        value, se, final = values[name]
        axes.barh(y, value, color=colours[name]["color"], xerr=se, ecolor="black", capsize=2)
        axes.plot(final, [y + 0.28] * len(final), "o", color="black", markersize=2.5)
        text = f"{value:.4f}" + (f" ± {se:.4f}" if se is not None else "")
        axes.text(1.02, y, text, transform=axes.get_yaxis_transform(), va="center", fontsize=8)
    axes.set_yticks(range(len(order)), [shorten(name, NAME_LENGTH) for name in order], fontsize=8)
    for name, label in zip(order, axes.get_yticklabels(), strict=True):
        label.set(color=colours[name]["color"], parse_math=False)  # a "$" in a name is a dollar
    learned = "weight: mean of the last fifth (dot: final)"
    axes.set(xlabel=learned if runs[0].learns else "share of the mixture", xlim=(0, None),
             ylim=(max(len(order), 3) - 0.4, -0.6))  # fmt: skip


def bar(runs: list[Run], name: str) -> tuple[float, float | None, list[float]]:
    """(length, standard error, dots) of a source's bar."""
    if not runs[0].learns:
        mixture = runs[0].config["mixture"]
        return mixture[name]["samples"] / sum(e["samples"] for e in mixture.values()), None, []
    series = [run.series("weights", name) for run in runs]
    final = [float(p[-1]) for p in series]
    tails = [p[-max(1, len(p) // 5) :] for p in series]
    means = [float(tail.mean()) for tail in tails]
    if len(runs) > 1:
        return float(np.mean(means)), float(np.std(means, ddof=1)) / math.sqrt(len(runs)), final
    return means[0], report.standard_error(list(tails[0])), final


def palette(n: int) -> list[dict]:
    """A colour for each source, and a line style once the twenty colours are used up."""
    from matplotlib import colormaps

    colours = colormaps["tab20"].colors
    colours = colours[::2] + colours[1::2]  # the dark ones first
    return [
        {"color": colours[i % 20], "linestyle": ("-", "--", ":")[i // 20 % 3]} for i in range(n)
    ]


def line(axes, y: np.ndarray, **style) -> None:
    """A series over the steps, leaving out what is NaN; a short one has its points marked."""
    x = np.flatnonzero(np.isfinite(y))
    if len(x):
        axes.plot(x, y[x], **{"marker": "." if len(x) < 20 else ""} | style)


def smooth(y: np.ndarray, window: int) -> np.ndarray:
    """Centred running mean of the values that are not NaN."""
    kernel, known = np.ones(window), np.isfinite(y)
    total = np.convolve(np.where(known, y, 0), kernel, "same")
    n = np.convolve(known, kernel, "same")
    return np.where(n > 0, total / np.maximum(n, 1), math.nan)


def mean(every: np.ndarray) -> np.ndarray:
    """Over the first axis, of the values that are not NaN."""
    n = np.isfinite(every).sum(0)
    return np.where(n > 0, np.nansum(every, 0) / np.maximum(n, 1), math.nan)


def from_zero(axes) -> None:
    """Start the vertical axis at 0, with a margin above what is drawn."""
    axes.update_datalim([(0, 0)])
    axes.autoscale_view()
    axes.set_ylim(bottom=0)


def steps_label(window: int) -> str:
    return f"step (losses of batches: mean over {window})" if window > 1 else "step"


def legend_above(axes) -> None:
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 3}
    for text in axes.legend(**place, frameon=False, fontsize="small").get_texts():
        text.set_parse_math(False)


def shorten(text: str, length: int) -> str:
    if len(text) <= length:
        return text
    tail = length // 3
    return f"{text[: length - tail - 1]}…{text[-tail:]}"
