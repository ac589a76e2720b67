"""The reference of benchmarks.speed computes what ours does, and its tables come out."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

import shard
from benchmarks import speed
from hf import pretrained

CASE = speed.Case("", "quick", "alpaca", batch=4, micro=3, threads=1, repeats=1, dtype="fp64")


@pytest.fixture(scope="module")
def sides():
    """Ours and the reference, built from the same weights, in a process group of one."""
    device = shard.start(timeout=60)
    yield [side(CASE, device) for side in speed.SIDES.values()]
    dist.destroy_process_group()


def step(side, t: int) -> list[float]:
    return side.step(t, *side.batches.step(t))


def gradients(side, t: int) -> dict[str, torch.Tensor]:
    """Of w in a step that changes nothing, under Hugging Face's names."""
    found = {}
    holder = side.penalty if isinstance(side, speed.Ours) else side

    def keep(*_):
        named = ((name, torch.zeros(p.shape) if p.grad is None else shard.full(p.grad).clone())
                 for name, p in holder.w.named_parameters())  # fmt: skip
        named = named if holder is side else pretrained.to_hf(holder.w.config, named)
        found.update({name: grad for name, grad in named if grad.any()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(holder.opt_w, "step", keep)
        patch.setattr(holder.opt_u, "step", lambda: None)
        step(side, t)
    return found


def test_reference_computes_the_losses_and_weights_of_ours(sides):
    ours, reference = sides
    for t in range(2):
        torch.testing.assert_close(*(torch.tensor(step(side, t)) for side in sides))
    torch.testing.assert_close(ours.penalty.sources.lam, reference.lam)


def test_gradients_agree_up_to_alpha(sides):
    ours, reference = (gradients(side, 3) for side in sides)
    assert ours.keys() == reference.keys()
    assert len(ours) == 4 + 2 * 12  # the ends (tied), and two of three blocks
    for name, g in ours.items():
        torch.testing.assert_close(CASE.flags.alpha * g, reference[name])


def test_flop_count_matches_a_count_by_hand():
    """Of one sample of 8 tokens with 4 of response, in a model of which all trains: nothing is
    computed at its last token, nor before the response once the last block has attended to it."""
    case = replace(CASE, lengths="4+4", more="--lisa-layers 0")
    tokens = torch.zeros(1, 8, dtype=torch.long)
    labels = torch.tensor([[-100] * 4 + [0] * 4])
    batch = speed.data.MicroBatch(tokens, labels, torch.zeros(1, dtype=torch.long))
    D, V, L, T, P, M = 64, 512, 3, 8, 7, 4
    weights = P * (12 * L - 10) * D * D + M * 10 * D * D + M * D * V  # 10: all but k and v
    products = 2 * weights  # forward; twice as much backward
    counted = speed.flop_count(case, 0, [batch])
    attention = counted - 3 * products
    assert 0 <= attention <= 3 * 4 * T * T * D * L  # causal or not, forward and backward
    lisa = speed.flop_count(replace(case, more="--lisa-layers 2"), 0, [batch])
    assert counted - lisa == 2 * P * 12 * D * D  # no weight gradients in the block that is frozen


def test_alpaca_lengths_have_the_means_of_the_files():
    """112, 198 and 196 tokens on average in data_tiny, of which 58, 144 and 142 are the answer."""
    for name, mean, answer in (("alpaca", 112, 58), ("gpt4", 198, 144), ("val", 196, 142)):
        made = speed.random_dataset("alpaca", name, 100, seed=0, n=20_000)
        assert made.max_length <= 512
        answers = (made.tokens >= 0).sum() / len(made)
        np.testing.assert_allclose([made.lengths.mean(), answers], [mean, answer], rtol=0.05)


def test_command_prints_a_table_and_the_same_losses_of_both_sides_on_two_ranks(monkeypatch, capsys):
    """The second step's would differ if the first one's gradients were not those of all ranks."""
    more = "--lr-w 1e-3 --lr-u 1e-3"  # large enough that the second step sees the first
    case = replace(CASE, title="tried, 2 ranks", ranks=2, more=more)
    monkeypatch.setitem(speed.CASES, "cpu", [case])
    assert speed.main(["--quick", "--device", "cpu", "--only", "tried"]) == 0
    *_, header, row, last = capsys.readouterr().out.splitlines()
    assert header.split()[0] == "step" and row.startswith("tried, 2 ranks")
    (result,) = json.loads(last)["speed"]["steps"].values()
    assert [len(took) for took in result["seconds"].values()] == [2, 2]
    ours, reference = (torch.tensor(losses) for losses in result["losses"].values())
    torch.testing.assert_close(ours, reference)
    assert not ours[0].equal(ours[1])


def test_table_has_a_process_for_each_side(monkeypatch, capsys):
    """On what is there: on a CPU, too, the cases of a GPU run."""
    speed.steps([replace(speed.quick(case), lengths="1+63") for case in speed.CASES["cuda"][:2]])
    reference, ours = capsys.readouterr().out.splitlines()
    assert ours.count("GB") == 2 and reference.count("GB") == 1  # the plan is of ours
    assert "(" in ours and "(" not in reference  # the ratio, with its range

    def full(*_):
        raise RuntimeError("torch.OutOfMemoryError: CUDA out of memory")

    monkeypatch.setattr(speed, "run", full)
    assert speed.steps(speed.CASES["cuda"]) == {}
    assert capsys.readouterr().out.count("does not fit") == 12


def test_start_up_is_measured_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = speed.start_up(small=True, repeats=1)
    assert [len(took) for took in results.values()] == [1, 1]


@pytest.mark.parametrize("args", [
    ["--only", "x"], ["memory", "--only", "x"], ["memory", "--device", "cuda"],
])  # fmt: skip
def test_wrong_flags_are_a_line(args, capsys):
    with pytest.raises(SystemExit) as left:
        speed.main(args)
    assert left.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
