"""The benchmark on real sources, small; and the rivals of ScaleBiO on a problem in closed form."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from benchmarks import fidelity, real, rivals
from bilevel import PenaltyStep, SourceWeights
from data import MicroBatch
from lisa import Lisa


class Line(nn.Module):
    """x -> a x, a block that LISA trains; losses are squared errors."""

    offload = None

    def __init__(self, dim: int):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(dim, 1, bias=False)])
        nn.init.zeros_(self.blocks[0].weight)


def batch_of(generator, groups: list[int], true: torch.Tensor) -> MicroBatch:
    """Source 1 and validation (3) say what is true; sources 0 and 2 have noise of as much power."""
    group = torch.tensor(groups)
    x = torch.randn(len(groups), len(true), generator=generator)
    noise = true.norm() * torch.randn(len(groups), generator=generator)
    return MicroBatch(x, torch.where(group % 2 == 1, x @ true, noise), group)


@pytest.mark.parametrize("method", ["ScaleBiO", *rivals.METHODS])
def test_rivals_find_what_helps_at_the_stated_cost(method):
    b, v, total, spent = 24, 12, 320, 0.0

    def losses(model, batch):
        nonlocal spent
        spent += len(batch.group) * (1 if torch.is_grad_enabled() else 1 / 3)
        return (model.blocks[0](batch.tokens)[:, 0] - batch.labels).square()

    generator = torch.Generator().manual_seed(0)
    true = torch.randn(8, generator=generator)
    w, u = Line(8), Line(8)
    opts = [Lisa(model, n_active=1, interval=1000, lr=0.02) for model in (w, u)]
    make = partial(rivals.METHODS[method], total=total) if method != "ScaleBiO" else PenaltyStep
    step = make(w, u, *opts, SourceWeights(3, lr=8 / total), 10.0, losses=losses)
    counts = torch.tensor([b // 3] * 3 + [v])
    for t in range(total):
        step.set_rates(1.0)
        for opt in opts:
            opt.switch(t)
        train = [batch_of(generator, [*range(3)] * (b // 6), true) for _ in range(2)]
        stats = step.step(train, [batch_of(generator, [3] * v, true)], counts)
        assert stats.finite
    weights = step.row()["weights"]
    assert weights.sum() == pytest.approx(1, abs=1e-4)
    if method == "DoReMi":  # which balances excess losses, and has never seen validation
        assert len(step.seen) == total / 2 and (weights > 1e-4).all()
    else:
        assert weights[1] > 0.4 and weights.argmax() == 1
    passes = rivals.passes(method, b, v, 3)
    assert spent == pytest.approx(total * passes)
    assert rivals.steps_for(method, 1000, b, v, 3) * passes == pytest.approx(
        1000 * (2 * b + v), rel=1e-3)
    if method != "ScaleBiO":
        with pytest.raises(ValueError, match="does not go on"):
            step.load_state_dict({})


def test_files_of_the_tasks_are_always_the_same(asset, tmp_path):
    asset("scalebio/math_exp/val.json")
    texts = []
    for n in range(2):
        trial = real.Trial(tmp_path / str(n), None, real.BUDGETS["cpu"])
        for task in real.REAL:
            trial.write(task)
        files = sorted((trial.out / "data").glob("*/*"))
        texts.append({f"{f.parent.name}/{f.name}": f.read_text() for f in files})
    assert texts[0] == texts[1] and len(texts[0]) == 4 * 2 + 3 + 2 + 2 + 5
    records = {name: [json.loads(line) for line in text.splitlines()]
               for name, text in texts[0].items()}  # fmt: skip
    right, wrong = (records[f"answers/train_{name}.jsonl"] for name in ("right", "wrong"))
    prompts = [{(r["instruction"], r["input"]) for r in part} for part in (right, wrong)]
    assert not prompts[0] & prompts[1]
    source = json.loads(asset("alpaca/alpaca_data_cleaned_12k_en.json").read_text())
    own = {(r["instruction"], r["input"]): r["output"] for r in source}
    assert all(own[r["instruction"], r["input"]] == r["output"] for r in right)
    kept = sum(own[r["instruction"], r["input"]] == r["output"] for r in wrong)
    assert kept < 0.05 * len(wrong)  # "Yes." answers more than one


def test_one_command_goes_from_sources_to_tables(asset, tmp_path, monkeypatch, capsys):
    model = asset("model/stories260K-hf")
    small = {"records": 40, "held_out": (16, 8), "tune": "--steps 2 --batch-size 4 --samples 8",
             "learn": "--steps 8 --batch-size 4 --val-batch-size 4"}  # fmt: skip
    monkeypatch.setitem(real.BUDGETS, "cpu", replace(real.BUDGETS["cpu"], **small))
    argv = ["--model", str(model), "--budget", "cpu", "--out", str(tmp_path), "--seeds", "3",
            "--tasks", "answers", "--methods", "RegMix"]  # fmt: skip
    with pytest.raises(SystemExit, match="2"):  # there is nothing yet
        real.main([*argv, "--only", "tables"])
    assert real.main([*argv, "--only", "known", "curve", "rivals", "tables"]) == 0
    out = tmp_path / "stories260K-hf-cpu"
    tables = json.loads((out / "tables.json").read_text())
    assert [row[:3] for row in tables["weights"][1:]] == [
        ["answers", "ScaleBiO", "right"], ["answers", "ScaleBiO", "wrong"]]  # fmt: skip
    arms = {row[1]: row[2] for row in tables["fine-tuning on real mixtures"][1:]}
    assert arms == dict.fromkeys(["learned", "uniform", "halfway", "only-right", "only-wrong"], 1)
    methods = [row[1] for row in tables["rivals at equal compute"][1:]]
    assert methods == ["ScaleBiO", "RegMix"]
    assert not list(out.glob("**/*.safetensors"))
    said = capsys.readouterr().out
    assert "failed" not in said and said.count(": done") == 2 + 5 + 1
    assert real.main([*argv, "--only", "curve"]) == 0
    assert capsys.readouterr().out == ""  # all of it is there


def test_a_larger_model_is_tuned_on_weights_of_smaller_ones(tmp_path):
    trial = real.Trial(tmp_path, None, real.BUDGETS["cpu"])
    cells = [*real.sizes_tune(0, trial)]
    assert len({cell.folder(tmp_path) for cell in cells}) == len(cells) == 2 + 3 + 4 + 5
    for n, cell in enumerate([*real.sizes_learn(0).values(), *cells]):
        folder = cell.folder(tmp_path)
        (folder / "model").mkdir(parents=True)
        weights = {name: float(i + (n == 1)) for i, name in enumerate(fidelity.tasks.NOISE)}
        (folder / "weights.json").write_text(json.dumps({"weights": weights}))
        (folder / "metrics.jsonl").write_text(json.dumps({"test_loss": n}) + "\n")
    rows = list(real.size_rows(tmp_path))
    assert len(rows) == len(cells)
    by = {(row["fine-tuned"], row["on weights of"]): row["minus its own"] for row in rows}
    assert by["0.9M", "0.9M"] == 0 and by["0.9M", "0.1M"] == -1 and by["9.9M", "uniform"] == -4
