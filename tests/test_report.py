"""The pictures of runs: what the bars say, that nothing written overlaps, and refusals; and how a
run that ends early says why."""

import itertools
import json
import math
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
import evaluate
import train
from cli import report, tracker
from cli.flags import as_json, parse
from hf import Problems
from tests import forked

LONG = [
    "GPTeacher-General-Instruct", "orca-math-word-problems-200k", "code_contests_$python$_filtered",
    "a-very-long-name-of-a-source-which-nobody-would-type-twice-in-a-row",
    *(f"Magicoder-Evol-Instruct-{i}K-filtered" for i in range(14)),
]  # fmt: skip


def write_run(path, names, steps=60, seed=0, learns=True, absent=0.0):
    """The files of a run, as train.py leaves them."""
    rng = np.random.default_rng(seed)
    rows = []
    for t in range(steps):
        p = rng.dirichlet(np.arange(1, len(names) + 1))
        losses = [None if rng.random() < absent else 3 / (1 + t) for _ in names]
        row = {"step": t, "source_loss_w": dict(zip(names, losses, strict=True)), "finite": True}
        if learns:
            row |= {"weights": dict(zip(names, p.tolist(), strict=True)), "val_loss": 1.0}
            row |= {"weights_se": dict.fromkeys(names, 0.01), "snr": dict.fromkeys(names, 3.0)}
            row |= {"gap": dict(zip(names, p - 0.5, strict=True))}
            row |= {"gap_se": dict.fromkeys(names, 0.1)}
        else:
            row |= {"train_loss": 1 + 1 / (1 + t)} | ({"val_loss": 1.5} if t % 9 == 0 else {})
        rows.append(row)
    path.mkdir(parents=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {"seed": seed, "mode": "bilevel" if learns else "finetune", "out": str(path)}
    mixture = {name: {"weight": 0.1, "samples": 10 * i + 10} for i, name in enumerate(names)}
    config = {"flags": flags, "data": {f"train {name}": {"path": name} for name in names},
              "mixture": None if learns else mixture}  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    return path


def written(figure, monkeypatch) -> list:
    """(text, box in pixels) of all that is written in a picture; all of it must be inside."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    canvas = FigureCanvasAgg(figure)
    figure.get_layout_engine().execute(figure)
    figure.set_layout_engine("none")  # it draws to measure
    drawn, draw = [], Text.draw
    monkeypatch.setattr(Text, "draw", lambda text, *rest: drawn.append(text) or draw(text, *rest))
    canvas.draw()
    drawn = [text for text in drawn if text.get_text() and text.get_visible()]
    boxes = [(text.get_text(), Text.get_window_extent(text, canvas.get_renderer()))
             for text in drawn]  # without the lines that lead to labels
    width, height = canvas.get_width_height()
    for text, box in boxes:
        assert min(box.x0, box.y0) >= 0 and box.x1 <= width and box.y1 <= height, text
    return boxes


@pytest.mark.parametrize("case", ["eighteen", "several", "one source, one step"])
def test_no_two_texts_overlap(tmp_path, monkeypatch, case):
    if case == "eighteen":
        paths = [write_run(tmp_path / "/".join(["directory"] * 30), LONG, absent=0.5)]
    elif case == "several":
        paths = [write_run(tmp_path / str(seed), LONG[:3], seed=seed) for seed in range(3)]
        paths.append(write_run(tmp_path / "tuned", LONG[:5], learns=False))
    else:
        paths = [write_run(tmp_path / "one", ["only"], steps=1)]
    boxes = written(report.figure_of([report.read_run(path) for path in paths]), monkeypatch)
    assert len(boxes) > 8 * (1 + (case == "several"))
    for (a, box_a), (b, box_b) in itertools.combinations(boxes, 2):
        assert not box_a.shrunk(0.98, 0.8).overlaps(box_b), (a, b)


def test_what_a_bar_says(tmp_path):
    runs = [report.read_run(write_run(tmp_path / str(s), ["a", "b"], 100, s)) for s in range(3)]
    final = np.array([run.rows[-1]["weights"]["a"] for run in runs])
    assert report.bar(runs[:1], "a") == (final[0], 0.01, [])
    value, se, dots = report.bar(runs, "a")
    assert value == pytest.approx(final.mean()) and dots == final.tolist()
    assert se == pytest.approx(final.std(ddof=1) / math.sqrt(3))
    tuned = report.read_run(write_run(tmp_path / "tuned", ["a", "b", "c"], learns=False))
    assert report.bar([tuned], "c") == (0.5, None, [])


@pytest.mark.parametrize("ys, places", [
    ([0, 5, 9], [0, 5, 9]), ([1, 1, 1], [1, 3, 5]), ([9, 9, 9.5], [6, 8, 10]), ([], []),
])  # fmt: skip
def test_labels_stand_apart_and_below_the_top(ys, places):
    assert report.spread(ys, 2, 10) == places


def test_a_gap_is_drawn_with_the_error_of_its_mean(tmp_path):
    (part,) = report.figure_of([report.read_run(write_run(tmp_path / "x", ["a", "b"]))]).subfigs
    weights, gap, *_ = part.axes
    assert list(weights.get_lines()[0].get_ydata()) == [0.5, 0.5]  # 1/S
    (zero, a, _), (band, _) = gap.get_lines(), gap.collections
    assert list(zero.get_ydata()) == [0, 0] and len(a.get_ydata()) == 58
    half = 0.1 / 3**0.5  # of three steps, a twentieth of them
    highest = band.get_paths()[0].get_extents().y1
    assert highest - a.get_ydata().max() == pytest.approx(half)


def test_steps_that_are_missing_leave_the_others_in_their_places(tmp_path):
    run = report.read_run(write_run(tmp_path / "x", ["a", "b"], steps=80))
    run.rows[:40] = []
    for row in run.rows:
        row["snr"] = {"a": 99.0, "b": 0.0}
    (part,) = report.figure_of([run]).subfigs
    weights, *_, bars = part.axes
    assert {line.get_xdata()[-1] for line in weights.get_lines()[1:]} == {79}
    assert [bar.get_alpha() for bar in bars.patches] in ([1, 0.35], [0.35, 1])


@pytest.mark.parametrize("alphas, known", [
    ([10] * 99, False), ([10] * 100, True), ([10] * 60 + [20] * 60, False),
    ([10] * 100 + [20] * 50, True),
])  # fmt: skip
def test_errors_that_last_are_known_once_blocks_of_one_alpha_were_compared(alphas, known):
    rows = [{"alpha": alpha, "finite": True} for alpha in alphas]
    assert report.errors_last_known(rows) == known


def test_a_table_is_sorted_and_scaled_to_the_largest_weight():
    rows = {"a": (0.1, 5, ""), "none": (0.0, 5, ""), "b": (0.2, 5, ""), "all": (None, 5, "")}
    _, *lines = report.table(rows, "")
    assert [line.split()[0] for line in lines] == ["b", "a", "none", "all"]
    assert [line.count("█") for line in lines] == [30, 15, 0, 0] and "▏" in lines[2]


@pytest.mark.parametrize("changed, said", [
    ({}, "python train.py --mode finetune --weights x/weights.json"),
    ({"model": "o/M", "train": ["a=a b.json", "c.json"], "template": "own", "max_length": 512,
      "world_size": 8},
     "torchrun --nproc_per_node=8 train.py --mode finetune --model o/M --train 'a=a b.json' c.json "
     "--template own --weights x/weights.json"),
    ({"world_size": 3, "batch_size": 48}, "torchrun --nproc_per_node=3 train.py --mode finetune "
                                          "--batch-size 48 --weights x/weights.json"),
    ({"mode": "finetune", "seed": 3}, "python evaluate.py loss --model x/model --data "
                                      "denoising-seed3"),
    ({"mode": "finetune", "train": ["a.json"], "val": "v.json", "max_length": 512},
     "python evaluate.py loss --model x/model --data v.json"),
    ({"mode": "finetune", "model": "o/M", "train": ["a"], "test": "t.json", "max_length": 2048},
     "python evaluate.py loss --model x/model --data t.json --max-length 2048"),
    ({"mode": "finetune", "train": ["a.json"], "test": "t.json"},
     "python evaluate.py loss --model x/model --data t.json --max-length 64"),
    ({"train": ["a.json"], "val": "v.json", "drop_overlap": True},
     "python train.py --mode finetune --train a.json --val v.json --drop-overlap "
     "--weights x/weights.json"),
    ({"mode": "draw"}, None),
])  # fmt: skip
def test_a_report_ends_with_the_next_command(changed, said):
    flags = as_json(parse([])) | {"template": "plain", "world_size": 1} | changed
    next_one = report.what_next({"flags": flags, "world_size": flags["world_size"]}, Path("x"))
    assert next_one == [f"Next: {said}"] * bool(said)


def test_no_source_differs_in_a_run_that_is_too_short(tmp_path):
    for steps in (report.SHORT - 1, report.SHORT):
        rows = report.read_rows(write_run(tmp_path / str(steps), ["a", "b"], steps))
        for row in rows:
            row |= {"snr": {"a": 99.0, "b": 0.0}, "gap_se": {"a": 1.0, "b": 1.0}, "alpha": 10.0}
        rows[-1]["gap_se"]["b"] = None  # something in that step was not finite
        told, last = report.summarise(rows), [row["gap"]["b"] for row in report.last_fifth(rows)]
        assert told["differs"] == {"a": steps == report.SHORT, "b": False}
        assert told["gap"]["b"] == pytest.approx(np.mean(last[:-1]))


def test_a_run_of_one_step_has_no_loss_of_before():
    rows = [{"test_loss": 2.0}, {}, {"test_loss": 1.0}]
    assert report.before_and_after(rows, "test_loss") == [2, 1]
    assert report.before_and_after(rows[-1:], "test_loss") == [None, 1]
    assert report.before_and_after(rows[:1], "test_loss", finished=False) == [2, None]
    assert report.before_and_after([], "test_loss") == [None, None]


def test_a_tracker_is_shown_every_number(tmp_path, monkeypatch, capsys):
    shown = []
    fake = SimpleNamespace(init=lambda **about: shown.append(about), finish=shown.append,
                           log=lambda row, step: shown.append((step, row)))  # fmt: skip
    monkeypatch.setitem(sys.modules, "wandb", fake)
    track, end = tracker("wandb", tmp_path, {"seed": 1}, "ab12", goes_on=False)
    log = report.Log(tmp_path, {}, 0, 1, True, tmp_path, track)
    log.show({"step": 3, "weights": {"a": 0.5, "b": None}, "finite": True, "val_loss": 2.0})
    end(0)
    log.track = fake.init = lambda *_, **__: 1 / 0
    log.show({"step": 4, "val_loss": 1.0})  # a line, and the run goes on
    assert log.track is None and "no more: ZeroDivisionError" in capsys.readouterr().out
    with pytest.raises(OSError, match="division by zero: '--report-to wandb'"):
        tracker("wandb", tmp_path, {}, "ab12", True)
    train.end(lambda code: code / 0, 1, parse(["--report-to", "wandb"]))  # the run is over
    assert capsys.readouterr().out == "--report-to wandb: division by zero\n"
    about = {"project": "scalebio", "name": tmp_path.name, "config": {"seed": 1}}
    assert shown == [about | {"id": "ab12", "resume": "never"},
                     (3, {"weights/a": 0.5, "val_loss": 2.0}), 0]  # fmt: skip


def test_a_run_that_goes_on_does_so_in_its_tracker(own_folder, monkeypatch):
    """And one that branches off is a run of its own."""
    monkeypatch.setattr(train, "draw_picture", lambda flags: [])
    asked = []

    def log(row, step):
        if len(asked) < 3 and step == 3 * len(asked):  # in the first run, later in the second
            os.kill(os.getpid(), signal.SIGTERM)

    fake = SimpleNamespace(init=lambda **about: asked.append(about), log=log, __spec__=True,
                           finish=lambda *code: None)  # fmt: skip
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, fake)
    for to, more, code in (("wandb", [], 143), ("wandb", [], 143), ("trackio", [], 0),
                           ("wandb", ["--resume", "a/checkpoints/step-12"], 0)):  # fmt: skip
        argv = [*forked.FLAGS, "--report-to", to, "--out", "b" if more else "a", *more]
        assert train.main(argv + ["--steps", "14"] * bool(more)) == code
    one, two, three, other = asked
    assert [about["resume"] for about in asked] == ["never", "allow", "allow", "never"]
    assert one["id"] == two["id"] != other["id"] and three["name"] == "a" and "id" not in three


@pytest.mark.parametrize("every", [0, 5])
def test_the_curve_of_the_test_loss_is_drawn_where_there_is_one(tmp_path, every):
    path = write_run(tmp_path / "x", ["a", "b"])
    table = report.read_rows(path)
    for row in (table[0], table[-1], *(table[5::every] if every else ())):
        row["test_loss"] = 7.0
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    (part,) = report.figure_of([report.read_run(path)]).subfigs
    curves = {line.get_label(): line.get_ydata() for line in part.axes[2].get_lines()}
    assert ("test" in curves) == bool(every)
    if every:
        assert curves["test"].tolist() == [7.0] * 13


def test_plot_writes_a_picture(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "x", ["a", "b"])
    write_run(tmp_path / "y", ["a", "b"], learns=False)
    assert evaluate.main(["plot", "x"]) == 0
    assert evaluate.main(["plot", "y"]) == 0
    assert evaluate.main(["plot", "x", "y", "--out", "both.png"]) == 0
    drawn = ["x/weights.png", "y/losses.png", "both.png"]
    assert all((tmp_path / file).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for file in drawn)
    assert capsys.readouterr().out.splitlines() == drawn


def test_what_cannot_be_drawn_is_one_line_each(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "x", ["a", "b"])
    write_run(tmp_path / "new", ["a"], steps=0)
    write_run(tmp_path / "broken", ["a"])
    (tmp_path / "broken/config.json").write_text('{"flags": {"se')
    with open(tmp_path / "x/metrics.jsonl", "a") as file:
        file.write('{"step": 60, "wei')  # killed at this point: the rest is drawn
    assert len(report.read_run(tmp_path / "x").rows) == 60

    def refused(*args: str) -> list[str]:
        assert evaluate.main(["plot", *args]) == 2
        return capsys.readouterr().err.splitlines()

    several = refused("nowhere", "new", "broken")
    assert [line.split(":")[0] for line in several] == ["nowhere", "new", "broken"]
    assert len(refused("x", "--out", "no/such/p.png")) == len(refused("x", "--out", "p.xyz")) == 1
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install matplotlib" in refused("x")[0]


@pytest.mark.parametrize("error, said", [
    (MemoryError(), "out of memory: planned, and peak; most likely to help: --flag"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory: planned"),
    (OSError(28, "No space left on device", "out/x"), "out/x: No space left on device"),
    (Problems(["[Errno 5] x", "rank 1 on n: y"]), "[Errno 5] x; rank 1 on n: y"),
    (torch.distributed.DistNetworkError("closed"), "goes on from the last checkpoint"),
    (torch.distributed.DistBackendError("NCCL error in: x.cpp:1\nLast error:\nDuplicate GPU\n"),
     "30 s (Duplicate GPU). The same"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling x"), "out of memory: plan"),
    (RuntimeError("a bug\nof two lines"), "a bug"),
])  # fmt: skip
def test_why_a_rank_ends_is_one_line(tmp_path, monkeypatch, capsys, error, said):
    monkeypatch.setattr(report.shard, "whole_checkpoints", lambda _: ["step-2"])
    monkeypatch.setattr(report.plan, "most_helpful", lambda *_, **__: ["--flag"])
    memory = SimpleNamespace(planned="planned", measured=lambda: ", and peak", config=None,
                             device_type="cpu", settings={})  # fmt: skip
    line = report.why(error, tmp_path, 30.0, memory, 1)
    assert said in line and "\n" not in line
    assert ("a bug" in capsys.readouterr().err) == (said == "a bug")
    assert (tmp_path / "error-rank1.log").exists() == ("out of memory" in line)


def told(snr, steps=100):
    """weights.json of a run whose sources differed from 0 by so many standard errors."""
    same = dict.fromkeys(snr, 0.5)
    row = {"finite": True, "alpha": 1.0, "weights": same, "weights_se": same, "snr": snr,
           "gap": {"a": 0.1, "b": None}, "gap_se": {"a": 0.02, "b": None}}  # fmt: skip
    return report.summarise([row | {"step": t} for t in range(steps)])


def test_gaps_are_means_of_the_last_fifth_with_their_errors():
    result = told({"a": 1.0, "b": 1.0})
    assert result["gap"] == {"a": pytest.approx(0.1), "b": None}
    assert result["gap_se"] == {"a": pytest.approx(0.02 / 20**0.5), "b": None}


@pytest.mark.parametrize("snr, differs, said", [
    ({"a": 1.0, "b": 2.9}, [], ["take any weights"]),
    ({"a": 9.0, "b": 4.1}, ["a", "b"], ["tell a, b from the others"]),
    ({"a": 9.0, "b": 1.0}, ["a"], ["tell a from the others"]),
    ({"a": 9.0, "b": 3.5}, ["a"], ["tell a from", "too short", "sure of b"]),
])  # fmt: skip
def test_verdict_says_what_differs_and_what_to_do(snr, differs, said):
    result = told(snr)
    assert [name for name, flag in result["differs"].items() if flag] == differs
    lines = "\n".join(report.verdict(result))
    assert all(words in lines for words in said)
    assert told(snr, report.SHORT)["differs"] == result["differs"]
    short = told(snr, report.SHORT - 1)
    assert not any(short["differs"].values())
    assert "too short to tell anything" in report.verdict(short)[0]


def test_chance_gets_above_the_threshold_in_one_run_of_a_hundred():
    """On sums of noise with λ's memory: the largest over 200 steps and three sources."""
    rng, sums, squares = np.random.default_rng(0), np.zeros((4000, 3)), 0.0
    largest = np.zeros(4000)
    for t in range(200):
        sums, squares = 0.99 * sums + rng.normal(size=sums.shape), 0.99**2 * squares + 1
        if t >= 10:
            largest = np.maximum(largest, np.abs(sums).max(1) / math.sqrt(squares))
    assert 0.003 < (largest > report.differs_above(200, 3)).mean() < 0.015
