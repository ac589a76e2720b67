"""The reference of benchmarks.speed computes what ours does, and its tables come out."""

import json
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

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
    made = {name: side(CASE, device) for name, side in speed.SIDES.items()}
    for side in made.values():
        side.feed(CASE.batch)
    yield made
    dist.destroy_process_group()


def gradients(side, t: int) -> dict[str, torch.Tensor]:
    """Of w in a step that changes nothing, under Hugging Face's names."""
    found = {}
    holder = side.penalty if isinstance(side, speed.Ours) else side

    def keep(*_):
        named = {name: p.grad for name, p in holder.w.named_parameters()}
        if holder is not side:
            full = ((n, torch.zeros(p.shape) if p.grad is None else shard.full(p.grad))
                    for n, p in holder.w.named_parameters())  # fmt: skip
            named = dict(pretrained.to_hf(holder.w.config, full))
        found.update({n: g.clone() for n, g in named.items() if g is not None and g.any()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(holder.opt_w, "step", keep)
        patch.setattr(holder.opt_u, "step", lambda: None)
        side.step(t, side.arrived(t))
    return found


def test_reference_computes_the_losses_and_weights_of_ours(sides):
    for t in range(2):
        losses = [side.step(t, side.arrived(t)) for side in sides.values()]
        torch.testing.assert_close(*map(torch.tensor, losses))
    torch.testing.assert_close(sides["ours"].penalty.sources.lam, sides["reference"].lam)


def test_gradients_agree_up_to_alpha(sides):
    ours, reference = (gradients(side, 3) for side in sides.values())
    alpha = sides["ours"].args.alpha
    assert ours.keys() == reference.keys()
    frozen = len(sides["reference"].blocks(sides["reference"].w)) - 2
    assert len(ours) == 4 + 2 * 12 and frozen == 1  # the ends (tied), and two blocks
    for name, g in ours.items():
        torch.testing.assert_close(alpha * g, reference[name])


def test_both_sides_see_the_same_samples(sides):
    train, val, counts = sides["ours"].batches.step(5)
    pairs = (pair for b in (*train, *val) for pair in zip(b.group, b.tokens, strict=True))
    seen = [(int(group), row[row != 0].tolist()) for group, row in pairs]
    train, val, same = sides["reference"].arrived(5)
    arrived = [(int(b.group), b.tokens[b.tokens != 0].tolist()) for b in (*train, *val)]
    assert sorted(seen) == sorted(arrived) and counts.tolist() == same.tolist()


def test_flop_count_matches_a_count_by_hand():
    """Of one sample of 8 tokens with 4 of response, in a model of which all trains: nothing is
    computed at its last token, nor before the response once the last block has attended to it."""
    case = replace(CASE, lengths="4+4", flags="--lisa-layers 0")
    tokens = torch.zeros(1, 8, dtype=torch.long)
    labels = torch.tensor([[-100] * 4 + [0] * 4])
    batch = speed.data.MicroBatch(tokens, labels, torch.zeros(1, dtype=torch.long))
    D, V, L, T, P, M = 64, 512, 3, 8, 7, 4
    weights = P * (12 * L - 10) * D * D + M * 10 * D * D + M * D * V  # 10: all but k and v
    products = 2 * weights  # forward; twice as much backward
    counted = speed.flop_count(case, 0, [batch])
    attention = counted - 3 * products
    assert 0 <= attention <= 3 * 4 * T * T * D * L  # causal or not, forward and backward
    lisa = speed.flop_count(replace(case, flags="--lisa-layers 2"), 0, [batch])
    assert counted - lisa == 2 * P * 12 * D * D  # no weight gradients in the block that is frozen


def test_alpaca_lengths_have_the_means_of_the_files():
    """112, 198 and 196 tokens on average in data_tiny, of which 58, 144 and 142 are the answer."""
    for name, mean, answer in (("alpaca", 112, 58), ("gpt4", 198, 144), ("val", 196, 142)):
        p, a = speed.random_lengths("alpaca", name, 20_000)
        assert (p + a).max() <= 512
        np.testing.assert_allclose([(p + a).mean(), a.mean()], [mean, answer], rtol=0.05)


def test_tokenize_makes_texts_of_its_own_and_prints_a_table_and_json(capsys):
    assert speed.main(["tokenize", "--quick"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    speeds = json.loads(last)["tokenize"]["speed"]
    assert "of its speed" in table[-1] and len(speeds["records"]) == 5


def test_tokenize_reads_records(asset, capsys):
    texts, directory = asset("scalebio/data_tiny/val.json"), asset("tokenizers/gpt2")
    result = speed.tokenize(SimpleNamespace(texts=texts, tokenizer=directory, quick=False))
    assert "1000 texts" in capsys.readouterr().out and len(result["speed"]["records"]) == 5


ON_TWO_RANKS = """
import json, sys
import torch.distributed as dist
import shard
from benchmarks import speed
device = shard.start(timeout=60)
case = speed.Case(**json.loads(sys.argv[1]))
losses = []
for side in (speed.Ours(case, device), speed.Reference(case, device)):
    side.feed(case.batch)
    losses.append([side.step(t, side.arrived(t)) for t in range(2)])
if dist.get_rank() == 0:
    print(json.dumps(losses))
dist.destroy_process_group()
"""


def test_reference_computes_the_losses_of_ours_on_two_ranks(tmp_path):
    """The second step's would differ if the first one's gradients were not those of all ranks."""
    script = tmp_path / "losses.py"
    script.write_text(ON_TWO_RANKS)
    flags = "--lr-w 1e-3 --lr-u 1e-3"  # large enough that the second step sees the first
    case = replace(CASE, micro=1, ranks=2, flags=flags)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    first, second = speed.start([*launch, str(script), json.dumps(asdict(case))])
    torch.testing.assert_close(torch.tensor(first), torch.tensor(second))
    assert first[0] != first[1]


def test_workers_measure_on_two_ranks():
    r = speed.run(replace(CASE, ranks=2, dtype="fp32"))
    assert [len(took) for took in r["seconds"].values()] == [1, 1] and r["floor"] > 0


def test_table_has_a_process_for_each_side(monkeypatch, capsys):
    """On what is there: on a CPU, too, the cases of a GPU run."""
    results = speed.table(speed.gpu_cases(quick=True)[:2])
    assert all(r["attention"] for r in results.values())
    reference, ours = capsys.readouterr().out.splitlines()[-2:]
    assert ours.count("GB") == 2 and reference.count("GB") == 1  # the plan is of ours
    assert len(results["quick, ours "]["ratio"]) == 2

    def full(*_):
        raise RuntimeError("torch.OutOfMemoryError: CUDA out of memory")

    monkeypatch.setattr(speed, "run", full)
    assert speed.table(speed.gpu_cases(quick=False)) == {}
    assert capsys.readouterr().out.count("does not fit") == 10


def test_start_up_is_measured_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = speed.start_up(quick=True, repeats=1)
    assert [len(pairs) for pairs in results.values()] == [1, 1]


@pytest.mark.parametrize("args, said", [
    (["memory", "--only", "x"], "--only goes with speed"),
    (["speed", "--only", "x"], "no case has this in its title"),
    (["memory", "--device", "cuda"], "--device cuda goes with speed, where there is a GPU"),
    (["tokenize", "--texts", "none.json", "--tokenizer", "."], "none.json"),
])  # fmt: skip
def test_wrong_flags_are_a_line(args, said, capsys):
    with pytest.raises(SystemExit) as left:
        speed.main(args)
    assert left.value.code == 2 and said in capsys.readouterr().err
