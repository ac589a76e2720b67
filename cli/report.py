"""What a run leaves to read: metrics.jsonl and weights.json while it goes on; then the printed
report and the picture, made from those files and config.json alone; or why it ended early.

Row t of metrics.jsonl holds the losses at the point from which step t starts, and the weights that
it ends with. The first row has the `test_loss` of the model as loaded, the last one that of the
model as saved. A fine-tuning run has the `train_loss` of its batches, and now and then the
`val_loss` on all validation records, the last one again of the model as saved.
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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import data
import shard
from bilevel import SourceWeights, StepStats
from cli import plan
from cli.flags import HARMLESS, as_json, parse, spelt
from hf import JSON_BYTES, Problems, open_regular, parse_json, read_json, say
from sources.records import recipes

SHORT = 50  # steps
FALSE_ALARMS = 0.01  # share of runs without differences in which one is seen
MIXTURE = 10_000  # samples in the mixture that the report proposes


# While it goes on

# Of tqdm where there is no terminal, in which a bar could move: a line now and then.
LINES = {
    "file": SimpleNamespace(write=lambda text: say(*text.split("\r")[1:], file=sys.stderr),
                            flush=lambda: None),
    "bar_format": "{n_fmt} of {total_fmt} steps, {elapsed}, {remaining} left, {rate_fmt}{postfix}",
    "mininterval": 20, "maxinterval": 20, "miniters": 1, "delay": 1e-9,
}  # fmt: skip


class Log:
    """Writes a run's files as it goes on, and draws the progress bar. Only rank 0 does either."""

    def __init__(
        self, out: Path, about: dict | None, start: int, total: int, main: bool, origin: Path,
        track: Callable | None,
    ):  # fmt: skip
        """about: what weights.json says besides the results, None for a run that learns none;
        start: steps already done, of which the rows are kept; origin: the directory of the run
        that did them; track: shows numbers by their names, and a step."""
        self.out, self.about, self.main, self.late, self.finished = out, about, main, main, False
        self.rows, file = read_rows(origin, start) if main else [], f"{origin}/metrics.jsonl"
        if main and len(self.rows) < start:
            say(f"note: {start - len(self.rows)} of the {start} steps before are missing in {file}")
        try:
            self.settle()
        except (LookupError, TypeError, AttributeError, ArithmeticError):
            raise OSError(errno.EINVAL, "holds rows that no step of this run left", file) from None
        self.track, look = track, {"mininterval": 0.5} if sys.stderr.isatty() else LINES
        self.bar = tqdm(total=total, initial=start, disable=not main, unit="step", **look)

    def write(self, row: dict) -> None:
        """Add a row to metrics.jsonl; if there is no room, later. Every tenth step, in long runs as
        often as it takes them to grow by a hundredth, weights.json, which sums up all rows."""
        if not self.main:
            return
        self.rows.append(row)
        self.show(row)
        try:
            if not self.late:
                with open(self.out / "metrics.jsonl", "a") as file:
                    file.write(json.dumps(row) + "\n")
            if row["step"] % max(10, len(self.rows) // 100) == 0:
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
            self.finished = True
            for row in self.rows[-1:]:
                row |= held_out
                self.show(held_out | {"step": row["step"]})
            self.late = True

    def settle(self) -> None:
        """Make all rows survive a power cut. OSError if there is no room for them."""
        if self.late:
            self.write_weights()
            replace(self.out / "metrics.jsonl", (json.dumps(row) + "\n" for row in self.rows))
            self.late = False
        if self.main:
            shard.sync(self.out / "metrics.jsonl")

    def show(self, row: dict) -> None:
        """Hand the numbers of a row to --report-to, until that fails."""
        dicts = ({f"{key}/{name}": x for name, x in value.items()} if isinstance(value, dict)
                 else {key: value} for key, value in row.items() if key != "step")  # fmt: skip
        numbers = {k: x for part in dicts for k, x in part.items() if type(x) in (int, float)}
        try:
            if self.track:
                self.track(numbers, step=row["step"])
        except Exception as error:  # of any kind: a service elsewhere is not worth a run
            self.say(f"--report-to is shown no more: {error!r}")
            self.track = None

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if self.main:
            with self.bar.external_write_mode():
                say(line)

    def write_weights(self) -> None:
        if self.rows and self.main and self.about is not None:
            write_json(self.out / "weights.json", self.about | summarise(self.rows, self.finished))


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


# When it cannot go on

def why(error: Exception, out: Path, timeout: float, memory: plan.Memory | None, rank: int) -> str:
    """Why a rank ends, in a line. Want of memory leaves the traceback in a file; what should not
    happen prints it."""
    said = str(error)
    # PyTorch's allocators, NCCL and cuBLAS each say it in their own way.
    if memory and (isinstance(error, MemoryError) or "out of memory" in said.lower()
            or "can't allocate memory" in said or "ALLOC_FAILED" in said):  # fmt: skip
        log = out / f"error-rank{rank}.log"
        log.write_text("".join(traceback.format_exception(error)))
        helpful = plan.most_helpful(memory.config, memory.device_type, **memory.settings)
        return (f"out of memory: {memory.planned}{memory.measured()}; most likely to help: "
                f"{' or '.join(helpful)}; traceback in {log}")  # fmt: skip
    if isinstance(error, OSError):
        return f"{error.filename or out}: {error.strerror or error}"
    if isinstance(error, Problems):  # an OSError on some rank, see shard.jointly
        return "; ".join(error.lines)
    if shard.lost_peer(error):
        saved = shard.whole_checkpoints(out / "checkpoints")
        goes_on = "goes on from the last checkpoint" if saved else "starts anew: nothing was saved"
        return (f"another rank is gone, or did not come within the --timeout of {timeout:g} s"
                f"{shard.what_it_said(error)}. The same command {goes_on}.")  # fmt: skip
    say(*"".join(traceback.format_exception(error)).splitlines(), file=sys.stderr)
    return next(iter(said.splitlines()), type(error).__name__)


def nonfinite_message(row: dict, counts: Tensor, out: Path) -> str:
    """Why a step was not finite, and how to go on from the one before it."""
    bad = [
        f"the loss of source {name} under {copy}"
        for copy in "wu"
        for (name, loss), n in zip(row.get(f"source_loss_{copy}", {}).items(), counts, strict=False)
        if n and loss is None
    ]
    bad += ["the validation loss"] * ("weights" in row and row["val_loss"] is None)
    goes_on = f", and --resume {out}, or an earlier checkpoint of it, to go on" * bool(row["step"])
    return (
        f"step {row['step']}: not finite: {', '.join(bad) or 'a gradient'}. This step changed "
        "nothing. The same command with --skip-nonfinite passes over such steps; lower learning "
        f"rates, or --clip, need another --out{goes_on}."
    )


# Results

def summarise(rows: list[dict], finished: bool = True) -> dict:
    """What weights.json says of the results.

    A source `differs` from the others if its gradient was so many standard errors from 0 that
    chance gets there in one run of a hundred (with two samples of a source in a batch in up to
    three, simulated: their errors are little known); none does in a run that is too short.
    `gap` is the mean over the last fifth of the steps, `gap_se` its standard error.
    """
    last, names = rows[-1], list(rows[-1]["weights"])
    threshold = differs_above(last["step"] + 1, len(names))
    gaps = {name: [(row["gap"][name], row["gap_se"][name]) for row in last_fifth(rows)
                   if None not in (row["gap"][name], row["gap_se"][name])]
            for name in names}  # fmt: skip
    return {key: last[key] for key in ("weights", "weights_se", "snr")} | {
        "differs": {name: last["step"] + 1 >= SHORT and last["snr"][name] > threshold
                    for name in names},
        "gap": {k: float(np.mean([gap for gap, _ in v])) if v else None for k, v in gaps.items()},
        "gap_se": {
            k: math.hypot(*(se for _, se in v)) / len(v) if v else None for k, v in gaps.items()
        },
        "step": last["step"] + 1,
        "lasting_errors": errors_last_known(rows),
        "skipped": sum(not row["finite"] for row in rows),
        "alpha": last["alpha"],
        "test_loss": before_and_after(rows, "test_loss", finished),
    }


def errors_last_known(rows: list[dict]) -> bool:
    """Whether the weights' errors count those that last from step to step: alpha was the same for
    long enough to compare blocks, see SourceWeights."""
    steps = Counter(row["alpha"] for row in rows if row["finite"])
    return max(steps.values(), default=0) >= 2 * SourceWeights.block


def before_and_after(rows: list[dict], key: str, finished: bool = True) -> list[float | None]:
    """A loss of the model as loaded and, in the last row of a `finished` run, as saved: of a run of
    one step there is only the latter."""
    first, last = ([row.get(key) for row in rows[:1] + rows[-1:]] or [None, None])
    return [first, last] if len(rows) > 1 else [None, last] if finished else [first, None]


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
        before, after = before_and_after(rows, key)
        if (shares or key == "test_loss") and rows and key in rows[-1]:
            first = "" if before is None else f"{before:.4f} before, "
            last = "not finite" if after is None else f"{after:.4f}"
            lines.append(f"{what:19} {first}{last} after")
    if skipped := sum(not row["finite"] for row in rows):
        lines.append(f"steps passed over because something was not finite: {skipped}")
    if not shares and record["flags"]["train"]:
        lines += [*[""] * bool(lines[-1]), *elsewhere(result, record["flags"], out)]
    if (out / "messages.jsonl").exists():
        lines += ["", "Elsewhere:", *recipes(out)]
    left_out = defaultdict(list)
    for name, dataset in record["data"].items():
        for reason, n in dataset["dropped"].items():
            left_out[reason] += [f"{n} of {name}"] * bool(n)
    if branch := record.get("branch"):
        changed = "; ".join(f"{flag} {now}, was {was}"
                            for flag, (was, now) in branch["changed"].items())  # fmt: skip
        lines += ["", f"branched off from {branch['from']}: {changed or 'nothing changed'}"]
    if any(left_out.values()):
        lines += ["", "records left out:"]
        lines += [f"  {reason}: {', '.join(parts)}" for reason, parts in left_out.items() if parts]
    files = ", ".join(sorted(p.name for p in out.glob("[!.]*")))
    return [*lines, "", f"Files in {out}: {files}", *what_next(record, out)]


def what_next(record: dict, out: Path) -> list[str]:
    """The command that makes use of a run; none of one that only drew records."""
    flags, ranks = record["flags"], record["world_size"]
    data = flags["test"] or flags["val"]
    if flags["mode"] == "bilevel":
        words = spelled_out(flags, "model", "train", "val", "test", "drop_overlap", "task",
                            "template", "max_length", "seed",
                            *["batch_size"] * (parse([]).batch_size % ranks > 0))  # fmt: skip
        command = ["--mode", "finetune", *words, "--weights", f"{out}/weights.json"]
        program = program_here("train.py")
    elif flags["mode"] == "finetune" and (data or not flags["train"]):
        data = data or f"{flags['task']}-seed{flags['seed']}"
        # evaluate.py cuts where models do that are not built in; a built-in task is not cut.
        cut = spelled_out(flags | {"model": "other"}, "max_length") if flags["train"] else []
        command = ["loss", "--model", f"{out}/model", "--data", data, *cut]
        program = program_here("evaluate.py")
    else:
        return []
    launch = ["torchrun", f"--nproc_per_node={ranks}"] if ranks > 1 else ["python"]
    return [f"Next: {shlex.join([*launch, program, *command])}"]


def program_here(name: str) -> str:
    """A program of this project, as it is called from the folder we are in."""
    path = Path(__file__).resolve().parents[1] / name
    return name if path.parent == Path.cwd() else str(path)


def spelled_out(flags: dict, *names: str) -> list[str]:
    """Of these flags those that are not as usual, as words of a command line."""
    usual, words = as_json(parse(["--model", flags["model"]])), []
    for name in names:
        value = flags[name]
        if value != usual[name] or name == "model" and value != "tiny":
            words += [spelt(name), *([] if value is True else map(str, np.ravel(value)))]
    return words


def table(rows: dict[str, tuple[float | None, int, str]], last: str) -> list[str]:
    """Of each source its weight, as a number and as a bar, its samples, and what is `last`; from
    the greatest weight down."""
    width, largest = max(len("source"), *map(len, rows)), max(p or 0 for p, *_ in rows.values())
    lines = [f"{'source':{width}}  weight  {'':30}  samples{last}"]
    for name, (p, samples, rest) in sorted(rows.items(), key=lambda row: -(row[1][0] or 0)):
        bar = "" if p is None else "█" * round(30 * p / largest) or "▏"
        weight = "-" if p is None else f"{p:.4f}"
        lines.append(f"{name:{width}}  {weight:6}  {bar:30}  {samples:7}{rest}")
    return lines


def weight_lines(result: dict) -> list[str]:
    """The learned weights of weights.json as a table, and what to make of them."""
    rows = {}
    for name, p in result["weights"].items():
        gap, se = result["gap"][name], result["gap_se"][name]
        gap = "-" if gap is None else f"{gap:+.1e} ± {se:.0e}"
        differs = f"{'yes' if result['differs'][name] else 'no':3} ({result['snr'][name]:.1f})"
        differs = "-" if result["step"] < SHORT else differs
        se = result["weights_se"][name]  # 0 where the weights have not moved
        error = f"{se:8.4f}" if se > 5e-5 else " <0.0001" if se else f"{'-':>8}"
        rows[name] = p, result["sources"][name]["samples"], f"  {error}  {gap:18}  {differs}"
    threshold = differs_above(result["step"], len(rows))
    return [
        *table(rows, "  ± weight  gap of w and u      differs"), "",
        "± weight: standard error, by how the gaps swung in this run" + (
            "." if result.get("lasting_errors", result["step"] >= 100) else
            f": from {2 * SourceWeights.block} steps on; here from their samples alone."
        ),
        "gap: the loss under w less that under u, at the end: low is good.",
        f"differs: from the others, above {threshold:.1f} standard errors.", "",
        *verdict(result),
    ]  # fmt: skip


def elsewhere(result: dict, flags: dict, out: Path) -> list[str]:
    """How other tools get the learned mixture, how much of it, and which source limits that."""
    sizes = {name: about.get("of", about["samples"]) for name, about in result["sources"].items()}
    counts, short = data.count_samples(result["weights"], sizes, MIXTURE)
    held = ("val", "test", "drop_overlap") if flags["drop_overlap"] else ()
    command = [*spelled_out(flags, "train", *held), "--weights", str(out / "weights.json"),
               "--out", "mix"]  # fmt: skip
    lines = [f"The mixture elsewhere, {sum(counts.values())} records:", *short,
             f"  python {shlex.quote(program_here('train.py'))} --mode draw {shlex.join(command)}",
             *recipes(Path("mix"))]  # fmt: skip
    shares = {name: p for name, p in result["weights"].items() if p >= 5e-5}
    files = {name: result["sources"][name]["path"] for name in shares}
    if not all(file.endswith((".json", ".jsonl")) for file in files.values()):
        return lines
    mixed = ", ".join(f"{{path: json, data_files: {files[name]}, fraction: {p:.4f}}}"
                      for name, p in shares.items())  # fmt: skip
    yields = {name: sizes[name] / p for name, p in shares.items()}  # until a source is used up
    first = min(yields, key=yields.get)
    return [
        *lines,
        "or mixed while loading, where the sources' own keys are alike and known to TRL:",
        f"  datasets: [{mixed}]",
        f"which yields about {yields[first]:.0f} samples: then {first} is used up",
    ]


# The records of a mixture

def mixture_jsonl(drawn: dict[str, data.Dataset]) -> Iterator[str]:
    """A line for each sample: its source, and its record's number in the source's file (from 1; in
    JSON Lines, the line)."""
    for name, source in drawn.items():
        for number in map(int, source.numbers):
            yield json.dumps({"source": name, "record": number}, ensure_ascii=False) + "\n"


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


def plot(paths: list[Path], file: Path | None = None) -> Path:
    """Draw runs into an image file: unless it is named, weights.png or losses.png, of one run in
    its directory. Returns it. ValueError, a line for each reason why it cannot be."""
    runs, problems = [], Problems()
    for path in paths:
        with problems.collecting():
            runs.append(read_run(path))
    problems.raise_if_any()
    try:
        figure = figure_of(runs)
    except (LookupError, TypeError, AttributeError, ArithmeticError):
        raise ValueError("a file of a run is damaged") from None
    if file is None:
        folder = paths[0] if len(paths) == 1 else Path()
        file = folder / ("losses.png" if runs[0].shares else "weights.png")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a font without some character: it is drawn as a box
        try:
            figure.savefig(file, dpi=92)
        except (OSError, ValueError) as error:
            raise ValueError(f"{file}: {getattr(error, 'strerror', 0) or error}") from None
    return file


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
    width = 15 if max(len(name) for run in runs for name in run.names) <= 16 else 19
    figure = Figure(figsize=(width, height * len(groups)), layout="constrained")
    parts = figure.subfigures(len(groups), 1, squeeze=False)[:, 0]
    for part, group in zip(parts, groups.values(), strict=True):
        draw_row(part, group)
    return figure


def draw_row(figure, runs: list[Run]) -> None:
    """The learned weights and the gaps that drive them, or of fine-tuning the losses; the sources'
    losses; and the final weights as bars. Of many sources the first three and the last two have a
    colour and a name, and the curves of the others are grey, or left out."""
    run, others = runs[0], f" and {len(runs) - 1} more of other seeds" if len(runs) > 1 else ""
    figure.suptitle(shorten(str(run.path), 120) + others, fontsize="medium", parse_math=False)
    bars = {name: bar(runs, name) for name in run.names}
    order = sorted(bars, key=lambda name: -bars[name][0])
    few = order if len(order) <= 6 else [*order[:3], *order[-2:]]
    colours = dict.fromkeys(order, "0.75") | {name: f"C{i}" for i, name in enumerate(few)}
    labels = dict.fromkeys(order) | {name: shorten(name, 16) for name in few}

    def curves(key: str, names: list[str]) -> list[tuple]:
        return [(key, name, colours[name], labels[name]) for name in names]

    train, val, test = (("train_loss", None, "0.5", "training"),
                        ("val_loss", None, "black", "validation"),
                        ("test_loss", None, "C9", "test"))  # fmt: skip
    between = run.shares is None and np.isfinite(run.series("test_loss")).sum() > 2
    *first, losses, last = figure.subplots(1, 4 if run.shares is None else 3)
    if run.shares is None:
        for axes, y in zip(first, (1 / len(order), 0), strict=True):
            axes.axhline(y, color="0.3", linewidth=1, linestyle=":")
        draw_curves(first[0], runs, "weight (dotted: all equal)", curves("weights", order[::-1]))
        draw_curves(first[1], runs, "gap of w and u, ± standard error", curves("gap", few))
    else:
        draw_curves(first[0], runs, "loss under w", [train, val, test])
    held_out = [val, *[test] * int(between)]
    draw_curves(losses, runs, "loss under w", [*curves("source_loss_w", few), *held_out])
    draw_bars(last, runs, {name: bars[name] for name in order}, colours)


def draw_curves(axes, runs: list[Run], what: str, curves: list[tuple]) -> None:
    """Columns of metrics.jsonl over the steps, each as (key, name, colour, label at its end). All
    but the weights are running means over a twentieth of the steps that have them."""
    ends = []
    for (key, name, colour, label), run in itertools.product(curves, runs):
        y = run.series(key, name)
        x = np.flatnonzero(np.isfinite(y))
        if not len(x):
            continue
        steps = np.array([row["step"] for row in run.rows])[x]
        window = 1 if key == "weights" else max(1, len(x) // 20)
        mean, y = partial(np.convolve, v=np.ones(window) / window, mode="valid"), y[x]
        squares = mean(run.series("gap_se", name)[x] ** 2) / window if key == "gap" else None
        x, y = mean(steps), mean(y)
        marker = "." if len(x) < 20 else ""  # a line of one point is none
        axes.plot(x, y, color=colour, marker=marker, linewidth=1, label=label)
        if key == "gap":
            axes.fill_between(x, y - squares**0.5, y + squares**0.5, color=colour, alpha=0.25)
        if label and run is runs[0]:
            ends.append((y[-1], x[-1], label, colour))
    axes.set(xlabel="step", ylabel=what)
    if not curves or curves[0][0] != "gap":
        axes.set_ylim(bottom=0)
    bottom, top = axes.get_ylim()
    ends.sort(key=lambda end: end[0])
    least = (top - bottom) * 14 / axes.bbox.height  # pixels of a line of text
    places = spread([end[0] for end in ends], least, top)
    for (y, x, label, colour), place in zip(ends, places, strict=True):
        axes.annotate(label, (x, y), (1.04, place), textcoords=("axes fraction", "data"),
                      color="0.15", fontsize=8, va="center", parse_math=False,
                      arrowprops={"arrowstyle": "-", "color": colour, "relpos": (0, 0.5),
                                  "shrinkA": 0, "shrinkB": 0})  # fmt: skip


def spread(ys: list[float], least: float, top: float) -> list[float]:
    """Places for labels of these, which rise: at least so far apart, and none above the top."""
    up = itertools.accumulate(ys, lambda below, y: max(y, below + least))
    down = itertools.accumulate([min(y, top) for y in up][::-1], lambda y, x: min(x, y - least))
    return [*down][::-1]


def draw_bars(axes, runs: list[Run], bars: dict[str, tuple], colours: dict) -> None:
    """The sources with their values, pale where the data do not tell one from the others."""
    steps = runs[0].rows[-1]["step"] + 1
    threshold = differs_above(steps, len(bars)) if steps >= SHORT else math.inf
    for y, (name, (value, se, final)) in enumerate(bars.items()):
        apart = len(runs) > 1 or runs[0].shares or runs[0].rows[-1]["snr"][name] > threshold
        axes.barh(y, value, color=colours[name], alpha=1 if apart else 0.35, xerr=se,
                  ecolor="black", capsize=2)  # fmt: skip
        axes.plot(final, [y + 0.28] * len(final), "o", color="black", markersize=2.5)
    names = [f"{shorten(name, 32)}  {value:.4f}" + (f" ± {se:.4f}" if se and se > 5e-5 else "")
             for name, (value, se, _) in bars.items()]  # fmt: skip
    axes.set_yticks(range(len(bars)), names, fontsize=8)
    for label in axes.get_yticklabels():
        label.set(color="0.15", parse_math=False)  # a "$" in a name is a dollar
    what = "final weight (pale: not told from the others)"
    axes.set_xlabel("share of the mixture" if runs[0].shares else what, loc="right")
    axes.set(xlim=(0, None), ylim=(max(len(bars), 3) - 0.4, -0.6))


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
