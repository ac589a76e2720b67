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
import errno
import itertools
import json
import math
import os
import shlex
import sys
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import data
import shard
from bilevel import StepStats
from cli import plan
from cli.flags import HARMLESS
from hf import JSON_BYTES, Problems, open_regular, parse_json, read_json, say, shown
from hf.tokenizer import Turns
from sources.records import iter_records, locate

SHORT = 50  # steps
FALSE_ALARMS = 0.01  # share of runs without differences in which one is seen
MIXTURE = 10_000  # samples in the mixture that the report proposes


# --------------------------------------------------------------------------------------------------
# While it goes on


class Log:
    """Writes a run's files as it goes on and draws the progress bar. Only rank 0 does either."""

    def __init__(
        self, out: Path, about: dict | None, start: int, total: int, main: bool, origin: Path
    ):
        """about: what weights.json says besides the results, None for a run that learns none;
        start: steps already done, of which the rows are kept; origin: the directory of the run
        that did them."""
        self.out, self.about, self.main, self.late = out, about, main, main
        self.rows, file = read_rows(origin, start) if main else [], f"{origin}/metrics.jsonl"
        if main and len(self.rows) < start:
            say(f"note: {start - len(self.rows)} of the {start} steps before are missing in {file}")
        try:
            self.settle()
        except (LookupError, TypeError, AttributeError, ArithmeticError):
            raise OSError(errno.EINVAL, "holds rows that no step of this run left", file) from None
        often = dict.fromkeys(["mininterval", "maxinterval"], 0.5 if sys.stderr.isatty() else 20)
        self.bar = tqdm(total=total, initial=start, disable=not main, **often)

    def write(self, row: dict) -> None:
        """Add a row to metrics.jsonl, every tenth to weights.json; if there is no room, later."""
        if not self.main:
            return
        self.rows.append(row)
        try:
            if not self.late:
                with open(self.out / "metrics.jsonl", "a") as file:
                    file.write(json.dumps(row) + "\n")
            if row["step"] % 10 == 0:
                self.write_weights()
        except OSError as error:
            if not shard.no_room(error):
                raise
            if not self.late:
                self.say(f"{self.out}: {error.strerror}: metrics are kept until there is room")
            self.late = True
        self.bar.set_postfix_str(progress_text(row), refresh=False)
        self.bar.update()

    def finish(self, held_out: dict) -> None:
        """Add to the last row what the finished model gives; `settle` writes it."""
        if self.main:
            self.bar.close()
            for row in self.rows[-1:]:
                row |= held_out
            self.late = True

    def settle(self) -> None:
        """Make all rows survive a power cut. OSError if there is no room for them."""
        if self.late:
            self.write_weights()
            replace(self.out / "metrics.jsonl", (json.dumps(row) + "\n" for row in self.rows))
            self.late = False
        if self.main:
            shard.sync(self.out / "metrics.jsonl")

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if self.main:
            self.bar.write(shown(line))

    def write_weights(self) -> None:
        if self.rows and self.main and self.about is not None:
            write_json(self.out / "weights.json", self.about | summarise(self.rows))


def progress_text(row: dict) -> str:
    """What the progress bar says of a step: a loss, and the leading weights."""
    weights, loss = row.get("weights", {}), row.get("val_loss", row.get("train_loss"))
    leading = sorted(weights.items(), key=lambda item: -item[1])[:3]
    loss = f"loss {math.nan if loss is None else loss:.3f}"
    return " ".join([loss, *(f"{name} {p:.2f}" for name, p in leading)])


def row(step: int, stats: StepStats, counts: Tensor, names: list[str]) -> dict:
    """A row of metrics.jsonl; null where a source is absent from the batch, or not finite."""
    common = {
        "step": step,
        "source_loss_w": by_name(names, stats.source_loss_w),
        "grad_norm_w": finite(stats.grad_norm_w),
        "finite": stats.finite,
        "peak_memory": plan.peak_memory(),
    }
    if stats.source_loss_u is None:
        n = counts[:-1].to(stats.source_loss_w)
        total = torch.where(n > 0, n * stats.source_loss_w, 0).sum() / n.sum()
        return common | {"train_loss": finite(total.item())}
    return common | {
        "val_loss": finite(stats.val_loss),
        "source_loss_u": by_name(names, stats.source_loss_u),
        "grad_norm_u": finite(stats.grad_norm_u),
        "gap": by_name(names, stats.gap),
        "gap_se": by_name(names, stats.gap_variance.sqrt()),
    }


def by_name(names: list[str], values: Tensor) -> dict:
    return dict(zip(names, map(finite, values.tolist()), strict=True))


def finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


def write_json(path: Path, content: dict) -> None:
    replace(path, json.dumps(content, indent=1) + "\n")


def replace(path: Path, lines: str | Iterable[str]) -> None:
    """Write a file in one step: a reader sees the old one or the new one, each whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.writelines([lines] if isinstance(lines, str) else lines)
    os.replace(temporary, path)


def read_rows(out: Path, before: float = math.inf) -> list[dict]:
    """The rows of metrics.jsonl of the steps `before`. There may be none yet, and a run that was
    killed may have left the last line cut: lines that cannot be read are left out."""
    rows = []
    with contextlib.suppress(OSError), open_regular(out / "metrics.jsonl") as file:
        while line := file.readline(JSON_BYTES):
            with contextlib.suppress(ValueError):
                rows.append(parse_json(line))
    return [row for row in rows if isinstance(row, dict) and type(row.get("step")) is int
            and row["step"] < before]  # fmt: skip


# --------------------------------------------------------------------------------------------------
# When it cannot go on


def why(error: Exception, out: Path, timeout: float, memory: plan.Memory | None, rank: int) -> str:
    """Why a rank ends, in a line. Want of memory leaves the traceback in a file; what should not
    happen prints it."""
    said = str(error)
    # PyTorch's allocators, NCCL and cuBLAS each say it in their own way.
    if memory and (isinstance(error, MemoryError) or "out of memory" in said.lower()
            or "can't allocate memory" in said):  # fmt: skip
        log = out / f"error-rank{rank}.log"
        log.write_text("".join(traceback.format_exception(error)))
        helpful = plan.most_helpful(memory.config, memory.device_type, **memory.settings)
        return (f"out of memory: {memory.planned}, measured {memory.measured()}; most likely to "
                f"help: {' or '.join(helpful)}; traceback in {log}")  # fmt: skip
    if isinstance(error, OSError):
        return f"{error.filename or out}: {error.strerror or error}"
    if shard.lost_peer(error):
        saved = shard.whole_checkpoints(out / "checkpoints")
        goes_on = "goes on from the last checkpoint" if saved else "starts anew: nothing was saved"
        return (f"another rank is gone, or did not come within the --timeout of {timeout:g} s. "
                f"The same command {goes_on}.")  # fmt: skip
    say(*"".join(traceback.format_exception(error)).splitlines(), file=sys.stderr)
    return next(iter(said.splitlines()), type(error).__name__)


def nonfinite_message(row: dict, counts: Tensor, out: Path) -> str:
    """Why a step was not finite, and what is left of the run."""
    bad = [
        f"the loss of source {name} under {copy}"
        for copy in "wu"
        for (name, loss), n in zip(row.get(f"source_loss_{copy}", {}).items(), counts, strict=False)
        if n and loss is None
    ]
    bad += ["the validation loss"] * ("weights" in row and row["val_loss"] is None)
    return (
        f"step {row['step']}: not finite: {', '.join(bad) or 'a gradient'}. This step changed "
        f"nothing; the {row['step']} steps before it are in {out}. The same command with "
        "--skip-nonfinite passes over such steps; lower learning rates, or --clip, need another "
        "--out."
    )


# --------------------------------------------------------------------------------------------------
# Results


def summarise(rows: list[dict]) -> dict:
    """What weights.json says of the results.

    A source `differs` from the others if its gradient was so many standard errors from 0 that
    chance gets there in one run of a hundred.
    `gap` is the mean over the last fifth of the steps, `gap_se` its standard error.
    """
    last, names = rows[-1], list(rows[-1]["weights"])
    threshold = differs_above(last["step"] + 1, len(names))
    gaps = {name: [(row["gap"][name], row["gap_se"][name]) for row in last_fifth(rows)
                   if row["gap"][name] is not None] for name in names}  # fmt: skip
    return {key: last[key] for key in ("weights", "weights_se", "snr")} | {
        "differs": {name: last["snr"][name] > threshold for name in names},
        "gap": {k: float(np.mean([gap for gap, _ in v])) if v else None for k, v in gaps.items()},
        "gap_se": {
            k: math.hypot(*(se for _, se in v)) / len(v) if v else None for k, v in gaps.items()
        },
        "step": last["step"] + 1,
        "skipped": sum(not row["finite"] for row in rows),
        "alpha": last["alpha"],
        "test_loss": [row.get("test_loss") for row in (rows[0], last)],
    }


def last_fifth(series):
    return series[-max(1, len(series) // 5) :]


def differs_above(steps: int, n_sources: int) -> float:
    """The largest number of standard errors from 0 that sources which do not differ get to.

    A maximum over steps is that of some 20 + steps / 10 independent looks (simulated: a sum of
    memory 0.99, up to 5,000 steps), at each source; Bonferroni's correction for all of them.
    """
    looks = n_sources * (20 + steps / 10)
    return NormalDist().inv_cdf(1 - FALSE_ALARMS / 2 / looks)


def verdict(result: dict) -> list[str]:
    """What a user can do with the weights of a weights.json, in sentences."""
    snr, lines = result["snr"], []
    apart = [name for name, flag in result["differs"].items() if flag]
    nearly = differs_above(result["step"], len(snr)) - 0.5
    unsure = [name for name in snr if name not in apart and snr[name] > nearly]
    if result["step"] < SHORT:
        return [f"The run was too short to tell anything: {SHORT} steps are the least."]
    if apart:
        lines.append(f"The data tell {', '.join(apart)} from the others.")
    if unsure:
        lines.append(f"The run was too short, or its batches too small, to be sure of "
                     f"{', '.join(unsure)}.")  # fmt: skip
    return lines or ["These sources do not differ, as far as this run can tell: take any weights."]


def retold(out: Path) -> list[str]:
    """The report of a run that was finished earlier."""
    try:
        return render(out)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        return [f"no report: a file in {out} is missing or damaged ({error})"]


def render(out: Path) -> list[str]:
    """The report of a finished run, from its files."""
    record, rows = read_json(out / "config.json"), read_rows(out)
    shares = record["mixture"]
    if shares:
        lines = table({name: (e["weight"], e["samples"], "") for name, e in shares.items()}, "")
        losses = [row["train_loss"] for row in rows if row["train_loss"] is not None]
        if losses:
            lines += ["", f"training loss:      {losses[0]:.4f} at first, "
                      f"{np.mean(last_fifth(losses)):.4f} over the last fifth of the steps"]
    else:
        result = read_json(out / "weights.json")
        lines = [*weight_lines(result), ""]
    for what, key in ("validation loss:", "val_loss"), ("held-out test loss:", "test_loss"):
        before, after = (row.get(key) for row in (rows[:1] + rows[-1:] or [{}, {}]))
        if (shares or key == "test_loss") and None not in (before, after):
            lines.append(f"{what:19} {before:.4f} before, {after:.4f} after")
    if skipped := sum(not row["finite"] for row in rows):
        lines.append(f"steps passed over because something was not finite: {skipped}")
    if not shares and (train := record["flags"]["train"]):
        lines += [*[""] * bool(lines[-1]), *elsewhere(result, train, out)]
    if (out / "messages.jsonl").exists():
        lines += ["", "Elsewhere:", *recipes(out)]
    left_out = [f"{n} of {name}: {reason}" for name, dataset in record["data"].items()
                for reason, n in dataset["dropped"].items() if n]  # fmt: skip
    if branch := record.get("branch"):
        changed = "; ".join(f"{flag} {now}, was {was}"
                            for flag, (was, now) in branch["changed"].items())  # fmt: skip
        lines += ["", f"branched off from {branch['from']}: {changed or 'nothing changed'}"]
    if left_out:
        lines += ["", f"records left out: {'; '.join(left_out)}"]
    files = ", ".join(sorted(p.name for p in out.glob("[!.]*")))
    return [*lines, "", f"Files in {out}: {files}"]


def table(rows: dict[str, tuple[float | None, int, str]], last: str) -> list[str]:
    """Of each source its weight, as a number and a bar, its samples, and what is `last`."""
    width = max(len("source"), *map(len, rows))
    lines = [f"{'source':{width}}  weight  {'':30}  samples{last}"]
    for name, (p, samples, rest) in rows.items():
        bar = "" if p is None else "█" * round(30 * min(p, 1)) or "▏"
        weight = "-" if p is None else f"{p:.4f}"
        lines.append(f"{name:{width}}  {weight:6}  {bar:30}  {samples:7}{rest}")
    return lines


def weight_lines(result: dict) -> list[str]:
    """The learned weights of weights.json as a table, and what to make of them."""
    rows = {}
    for name, p in result["weights"].items():
        gap, se = result["gap"][name], result["gap_se"][name]
        gap = "-" if gap is None else f"{gap:+.1e} ± {se:.0e}"
        error, differs = result["weights_se"][name], "yes" if result["differs"][name] else "no"
        rest = f"  {error:8.4f}  {gap:18}  {differs:3} ({result['snr'][name]:.1f})"
        rows[name] = p, result["sources"][name]["samples"], rest
    lines = table(rows, "  ± weight  gap of w and u      differs")
    return [*lines, "", *verdict(result)]


def elsewhere(result: dict, train: list[str], out: Path) -> list[str]:
    """How other tools get the learned mixture, how much of it, and which source limits that."""
    weights = result["weights"]
    sizes = {name: about.get("of", about["samples"]) for name, about in result["sources"].items()}
    counts, short = data.count_samples(weights, sizes, MIXTURE)
    command = ["--train", *train, "--weights", str(out / "weights.json"), "--out", "mix"]
    parts = data.apportion(weights, MIXTURE)  # so that the printed probabilities sum to one
    parts = {name: n / MIXTURE for name, n in parts.items() if n}
    drawn = {name: sizes[name] / p for name, p in parts.items()}  # until a source is used up
    first, last = (choose(drawn, key=drawn.get) for choose in (min, max))
    way = "under" if 2 * drawn[first] >= sum(counts.values()) else "over"
    return [
        f"The same mixture elsewhere, {sum(counts.values())} records:", *short,
        f"  python train.py --mode draw {shlex.join(command)}",
        *recipes(Path("mix")),
        "or mixed at random while loading, in LLaMA-Factory:",
        f"  dataset: {','.join(parts)}",
        f"  mix_strategy: interleave_{way}",
        f"  interleave_probs: {','.join(f'{p:.4f}' for p in parts.values())}",
        f"interleave_under yields about {drawn[first]:.0f} samples, until {first} is used up; "
        f"interleave_over about {drawn[last]:.0f}, until {last} is",
        "(stopping_strategy first_exhausted and all_exhausted of datasets.interleave_datasets).",
    ]  # fmt: skip


# --------------------------------------------------------------------------------------------------
# The records of a mixture


def mixture_jsonl(drawn: dict[str, data.Dataset]) -> Iterator[str]:
    """A line for each sample: its source, and its record's number in the source's file (from 1; in
    JSON Lines, the line)."""
    for name, source in drawn.items():
        for number in map(int, source.numbers):
            yield json.dumps({"source": name, "record": number}, ensure_ascii=False) + "\n"


# How LLaMA-Factory is told of messages.jsonl.
DATASET_INFO = {"mixture": {
    "file_name": "messages.jsonl", "formatting": "sharegpt", "columns": {"messages": "messages"},
    "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user",
             "assistant_tag": "assistant", "system_tag": "system"},
}}  # fmt: skip


def write_records(out: Path, drawn: dict[str, data.Dataset]) -> list[str]:
    """Write the records of a mixture, in the order of mixture.jsonl, as they are in their files,
    and the conversations as messages. Returns notes. ValueError if a file cannot be read any more.
    """
    records, chats, problems = [], [], Problems()
    for source in drawn.values():
        found = dict.fromkeys(source.numbers.tolist())
        for n, *record in iter_records(locate(source.path), problems, defaultdict(Counter)):
            if n in found:
                found[n] = record
        problems.raise_if_any()
        for turns, record in (found[n] for n in source.numbers.tolist()):
            records.append(record)
            if messages := as_messages(turns):
                chats.append({"messages": messages})
    for name, rows in ("records.jsonl", records), ("messages.jsonl", chats):
        lines = (json.dumps(strict(row), ensure_ascii=False) + "\n" for row in rows)
        (out / name).write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
    (out / "dataset_info.json").write_text(json.dumps(DATASET_INFO, indent=1))
    texts = len(records) - len(chats)
    given = sum(any("weight" in message for message in chat["messages"]) for chat in chats)
    return [f"note: {what}" for n, what in (
        (texts, f"{texts} records are text: messages.jsonl lacks them"),
        (given, f"{given} conversations have answers of weight 0, which other trainers may learn"),
    ) if n]  # fmt: skip


def strict(row: object) -> object:
    """What JSON can say of a record: NaN and infinities are null, dates are texts."""
    return json.loads(json.dumps(row, default=str), parse_constant=lambda _: None)


def as_messages(turns: Turns) -> list[dict]:
    """A conversation in OpenAI's format; [] for text. An input joins the question."""
    messages = []
    for role, text in turns:
        if role == "input":
            messages[-1]["content"] += f"\n{text}"
        elif role != "text":
            weight = {"weight": 0} if role == "given" else {}
            role = "assistant" if weight else role
            messages.append({"role": role, "content": text} | weight)
    return messages


def recipes(folder: Path) -> list[str]:
    """How other tools are told of what --mode draw wrote into a folder."""
    file = folder / "messages.jsonl"
    return [
        f"  open-instruct   --dataset_mixer_list {file} 1.0",
        f"  LLaMA-Factory   dataset_dir: {folder}, dataset: mixture",
        f"  axolotl         datasets: [{{path: {file}, type: chat_template}}]",
        f"  TRL             datasets: [{{path: json, data_files: {file}}}]",
    ]


# --------------------------------------------------------------------------------------------------
# Pictures


@dataclass
class Run:
    path: Path
    rows: list[dict]  # of metrics.jsonl
    names: list[str]  # of the sources
    shares: dict | None  # of a fine-tuning run: of the mixture, by source
    kind: str  # equal for runs that differ in their seed alone

    def series(self, key: str, name: str | None = None) -> np.ndarray:
        """A column of metrics.jsonl, NaN where it has no value, (steps,)."""
        cells = [row.get(key) for row in self.rows]
        if name is not None:
            cells = [cell and cell.get(name) for cell in cells]
        return np.array([math.nan if x is None else x for x in cells], float)


def read_run(path: Path) -> Run:
    """ValueError if the directory holds no run, or one without a step. It may still go on, or have
    been killed in the midst of a line."""
    rows = read_rows(path)
    try:
        config = read_json(path / "config.json")
        flags = {k: v for k, v in config["flags"].items() if k not in HARMLESS | {"seed"}}
        paths = {name: entry["path"] for name, entry in config["data"].items()}
        shares = config["mixture"]
    except (OSError, LookupError, TypeError, ValueError, AttributeError):
        raise ValueError(f"{path}: not the directory of a run") from None
    if not rows:
        raise ValueError(f"{path}: the run has not done a step yet")
    kind = json.dumps([flags, paths, shares], sort_keys=True)
    return Run(path, rows, [*(shares or rows[0].get("weights") or ())], shares, kind)


def plot(paths: list[Path], file: Path) -> None:
    """Draw runs into an image file. ValueError, a line per problem: no matplotlib, directories that
    hold no run, a file that cannot be written."""
    runs, problems = [], Problems()
    for path in paths:
        with problems.collecting():
            runs.append(read_run(path))
    problems.raise_if_any()
    try:
        figure = figure_of(runs)
    except (LookupError, TypeError, AttributeError, ArithmeticError):
        raise ValueError("a file of a run is damaged") from None
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
        raise ValueError("pictures need matplotlib: pip install matplotlib") from None

    groups = {}
    for run in runs:
        groups.setdefault(run.kind, []).append(run)
    height = max(3.2, 1.2 + 0.22 * max(len(run.names) for run in runs))
    figure = Figure(figsize=(15, height * len(groups)), layout="constrained")
    parts = figure.subfigures(len(groups), 1, squeeze=False)[:, 0]
    for part, group in zip(parts, groups.values(), strict=True):
        draw_row(part, group)
    return figure


def draw_row(figure, runs: list[Run]) -> None:
    """The learned weights, or of fine-tuning the losses; the sources' losses under w; and the
    weights as bars, which name the colours."""
    from matplotlib import colormaps

    run, others = runs[0], f" and {len(runs) - 1} more of other seeds" if len(runs) > 1 else ""
    figure.suptitle(shorten(str(run.path), 120) + others, fontsize="medium", parse_math=False)
    left, middle, right = figure.subplots(1, 3)
    tab20 = colormaps["tab20"].colors  # every second one is light
    colours = dict(zip(run.names, itertools.cycle(tab20[::2] + tab20[1::2]), strict=False))

    weights, losses = (
        [(key, name, colour, None) for name, colour in colours.items()]
        for key in ("weights", "source_loss_w")
    )
    train = "train_loss", None, "C0", "training"
    val = "val_loss", None, "black", "validation"
    test = "test_loss", None, "C3", "test"
    what = "loss under w, running mean"
    if run.shares is None:
        draw_curves(left, runs, "weight", weights)
    else:
        draw_curves(left, runs, what, [train, val, test])
    between = run.shares is None and np.isfinite(run.series("test_loss")).sum() > 2
    draw_curves(middle, runs, what, [*losses, val, *[test] * int(between)])
    draw_bars(right, runs, colours)


def draw_curves(axes, runs: list[Run], what: str, curves: list[tuple]) -> None:
    """Columns of metrics.jsonl over the steps, each as (key, name, colour, label). Losses that most
    steps have are drawn as running means."""
    for (key, name, colour, label), run in itertools.product(curves, runs):
        y = run.series(key, name)
        x = np.flatnonzero(np.isfinite(y))
        if not len(x):
            continue
        window = 1 if key == "weights" else max(1, len(x) // 50)
        x, y = (np.convolve(z, np.ones(window) / window, "valid") for z in (x, y[x]))
        marker = "." if len(x) < 20 else ""  # a line of one point is none
        axes.plot(x, y, color=colour, marker=marker, linewidth=1,
                  label=label if run is runs[0] else None)  # fmt: skip
    axes.set(xlabel="step", ylabel=what)
    axes.set_ylim(bottom=0)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False)


def draw_bars(axes, runs: list[Run], colours: dict) -> None:
    """The sources from the greatest weight down, each named with its value."""
    values = {name: bar(runs, name) for name in colours}
    order = sorted(values, key=lambda name: -values[name][0])
    names = []
    for y, name in enumerate(order):
        value, se, final = values[name]
        axes.barh(y, value, color=colours[name], xerr=se, ecolor="black", capsize=2)
        axes.plot(final, [y + 0.28] * len(final), "o", color="black", markersize=2.5)
        label = f"{shorten(name, 32)}  {value:.4f}" + (f" ± {se:.4f}" if se else "")
        threshold = differs_above(len(runs[0].rows), len(colours))
        apart = len(runs) > 1 or runs[0].shares or runs[0].rows[-1]["snr"][name] > threshold
        names.append(label if apart else f"{label}, not told from others")
    axes.set_yticks(range(len(order)), names, fontsize=8)
    for name, label in zip(order, axes.get_yticklabels(), strict=True):
        label.set(color=colours[name], parse_math=False)  # a "$" in a name is a dollar
    axes.set(xlabel="share of the mixture" if runs[0].shares else "final weight", xlim=(0, None),
             ylim=(max(len(order), 3) - 0.4, -0.6))  # fmt: skip


def bar(runs: list[Run], name: str) -> tuple[float, float | None, list[float]]:
    """(length, standard error, dots) of a source's bar: the final weight and the error that the run
    states; of several seeds their mean, its error over the seeds, and each of them. Shares of a
    mixture are exact."""
    if shares := runs[0].shares:
        return shares[name]["samples"] / sum(e["samples"] for e in shares.values()), None, []
    final = [float(run.series("weights", name)[-1]) for run in runs]
    if len(runs) > 1:
        return float(np.mean(final)), float(np.std(final, ddof=1)) / math.sqrt(len(runs)), final
    return final[0], float(runs[0].series("weights_se", name)[-1]), []


def shorten(text: str, length: int) -> str:
    half = length // 2
    return text if len(text) <= length else f"{text[:half]}…{text[1 - half :]}"
