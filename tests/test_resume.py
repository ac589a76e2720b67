"""Runs that are killed or stopped go on exactly where they were."""

import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch

import shard
from cli.flags import BRANCHING
from tests import forked, kill_trial
from tests.forked import at, done, rows, run, saved, send, state

pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never stopped."""
    out = str(tmp_path_factory.mktemp("whole") / "run")
    with pytest.MonkeyPatch.context() as patch:
        forked.enter(Path(out).parent, patch)
        done("--out", out, "--save-every", "2")
    return out


@pytest.mark.parametrize("ranks, dtype", [(1, "fp32"), (2, "bf16")])
def test_killed_anywhere_it_resumes_to_the_same_bits(ranks, dtype):
    """A kill in each phase, as tests/kill_trial.py makes more of. In bf16, masters and the noise of
    stochastic rounding matter too."""
    ended = kill_trial.trial(kill_trial.at_random(forked.PHASES, ranks, seed=1), ranks, dtype)
    assert len(ended) == len(forked.PHASES) and all(ended)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_in_the_midst_of_a_step_saves_and_the_same_command_goes_on(whole, number):
    told = partial(at, "backward", 20, partial(send, number), entry=7)
    code, said = run("--out", "out", fault=told)
    assert code == 128 + number
    steps = len(rows("out"))
    assert f"stopped after {steps} of 12 steps" in said and 1 <= steps < 12
    assert saved("out") == [f"step-{steps}"] and f"saved out/checkpoints/step-{steps} in " in said
    if number == signal.SIGTERM:
        with open("out/metrics.jsonl", "a") as file:
            file.write('{"step": 11, "val_l')  # torn
        said = done("--out", "out", "--save-every", "2")
        assert f"goes on from out/checkpoints/step-{steps}" in said
        forked.assert_same("out", whole)


def test_one_rank_asked_to_stop_is_enough():
    told = partial(at, "forward", 20, partial(send, signal.SIGTERM), entry=9)
    code, said = run("--out", "out", ranks=2, fault=told)
    assert code == 128 + signal.SIGTERM and "stopped after" in said
    assert len(saved("out")) == 1


def steps_done() -> int:
    """Of a run that goes on; its weights.json is whole at any time."""
    if Path("out/weights.json").exists():
        json.loads(Path("out/weights.json").read_text())
    metrics = Path("out/metrics.jsonl")
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def test_torchrun_restarts_after_a_rank_dies_and_ranks_end_when_torchrun_dies():
    argv = ["--out", "out", "--save-every", "2"]
    process = forked.launch(argv, 2, "--max-restarts=1")
    first = forked.ranks_of(process, 2)
    forked.wait_until(lambda: steps_done() >= 3, process)
    os.kill(first[-1], signal.SIGKILL)
    forked.wait_until_it_says(process, "goes on from out")
    second = forked.ranks_of(process, 2)
    forked.wait_until(lambda: steps_done() >= 5, process)
    assert json.loads(Path("out/weights.json").read_text())["step"] > 0
    process.kill()
    process.wait()
    forked.wait_for_end(second)
    said = process.log.read_text()
    assert "another rank is gone" in said and "stopped after" in said
    assert "goes on from out/checkpoints/step-" in done(*argv, ranks=2)
    done("--out", "whole", "--save-every", "2", ranks=2)
    forked.assert_same("out", "whole")


def be_large() -> None:
    """Each block is gathered, and its gradients are reduced, in each micro-batch."""
    shard.GATHER_ONCE_BYTES = 0


def test_shards_with_replicas_equal_one_process_and_resume_on_another_number_of_ranks():
    """Two by two, with clipping, slopes and copies that take turns; then, in the same place and
    others, on one rank and on two; and what one began, on two. ‖Δ‖ / ‖·‖ over w, u and λ."""
    flags = "--dtype fp64 --steps 4 --micro-batch-size 1 --clip 0.1 --gap gradient --save-every 2"
    flags = flags.split()
    done(*flags, "--out", "one")
    cut = [*flags, "--out", "four", "--shard-size", "2", "--cpu-offload"]
    code, said = forked.finish(forked.start(cut, 4, dict.fromkeys(range(4), be_large)))
    assert code == 0, said
    shutil.copytree("four", "again")
    shutil.rmtree("again/model")
    shutil.rmtree("again/checkpoints/step-4")
    done(*flags, "--out", "again")
    for out, of in ("two", "four"), ("more", "one"):
        done(*flags, "--out", out, "--resume", f"{of}/checkpoints/step-2", ranks=2)
    every = "one", "four", "again", "two", "more"
    ends = {out: state(f"{out}/checkpoints/step-4") for out in every}
    names = [name for name in ends["one"] if name[0] in "wu" and ".lisa." not in name]
    alone = rows("one")[-1]["grad_norm_w"]
    for out, end in ends.items():
        assert end.keys() == ends["one"].keys()
        for part in names, ["sources.lam"]:
            a, b = (torch.cat([x[name].flatten() for name in part]) for x in (end, ends["one"]))
            assert (a - b).norm() <= 1e-9 * b.norm(), out
        assert rows(out)[-1]["grad_norm_w"] == pytest.approx(alone, rel=1e-9)
    assert alone > 0.1  # what is clipped


def test_a_finished_run_says_so_and_resume_never_leaves_it_alone(whole):
    before = {p: p.stat().st_mtime_ns for p in Path(whole).rglob("*")}
    assert "finished run" in done("--out", whole)
    shutil.copytree(whole, "robbed")
    Path("robbed/weights.json").write_text("")
    assert "no report: a file in robbed is missing or damaged" in done("--out", "robbed")
    Path("robbed/weights.json").unlink()
    assert "damaged (robbed/weights.json: cannot be read (No such file" in done("--out", "robbed")
    done("--out", whole, "--resume", "never", "--save-every", "2")
    forked.assert_same(f"{whole}-2", whole)
    assert {p: p.stat().st_mtime_ns for p in Path(whole).rglob("*")} == before


def test_a_run_that_is_extended_is_the_longer_run(refusal):
    flags = "--schedule constant --warmup 0 --lr-lambda 0.1 --dtype bf16".split()
    done("--out", "short", *flags, "--steps", "7")
    done("--out", "long", *flags)
    done("--out", "extended", *flags, "--resume", "short")
    a, b = (state(f"{out}/checkpoints/step-12") for out in ("long", "extended"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    done("--out", "bare", "--keep", "0", "--steps", "2")
    assert not Path("bare/checkpoints").exists()
    other = [*forked.FLAGS, "--steps", "2", "--alpha", "3", "--out"]
    for out, way in ("bare", "nothing is saved there"), ("short", "with another --out and"):
        assert any(f"now 3.0; {way}" in line for line in refusal([*other, out]))


def test_a_run_that_lost_what_it_branched_off_from_says_nothing_of_it():
    done("--out", "short", "--steps", "2")
    kill = partial(at, "forward", 1, partial(send, signal.SIGKILL), entry=2)
    run("--out", "long", "--steps", "3", "--resume", "short", fault=kill)
    assert "branch" in json.loads(Path("long/config.json").read_text())
    assert "branched off" not in done("--out", "long", "--steps", "3")
    assert rows("long")[0]["step"] == 0


def test_all_ranks_take_the_fresh_out_that_rank_0_chose():
    Path("out").mkdir()
    done("--out", "out", "--resume", "never", "--steps", "2", "--save-every", "1", ranks=2)
    assert saved("out-2") == ["step-1", "step-2"] and not any(Path("out").iterdir())


def test_after_a_restart_the_fresh_out_is_the_one_that_this_run_made(monkeypatch):
    """Runs know the one before them by their launcher, which here is the server of them all."""
    fresh = ["--out", "out", "--resume", "never", "--steps", "2", "--save-every", "1"]
    Path("out").mkdir()
    Path("out/.lock").write_text("1")  # of another launcher
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run(*fresh, fault=partial(at, "model", 20, partial(send, signal.SIGKILL)))
    assert "goes on from out-2/checkpoints/step-2" in done(*fresh)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    done(*fresh)
    assert saved("out-3") == saved("out-2") == ["step-1", "step-2"]
    assert not Path("out/model").exists()


def test_a_run_branches_off_from_a_checkpoint_of_another(whole, refusal):
    newest = shard.whole_checkpoints(Path(whole) / "checkpoints")
    said = done("--out", "b", "--resume", str(newest[1]), "--save-every", "2")
    assert f"goes on from {newest[1]}" in said
    forked.assert_same("b", whole)
    Path("other.jsonl").write_text('{"text": "one more"}')
    longer = ["--steps", "16", "--alpha", "3", "--lisa-layers", "2", "--lisa-ends", "sampled"]
    said = done("--out", "longer", "--resume", whole, *longer, ranks=2)
    assert f"branched off from {newest[0]}: --steps 16, was 12; --alpha 3.0, was 10.0" in said
    assert "--template" not in said.split("branched off")[1].split("Files")[0]
    assert rows("longer")[:12] == rows(whole) and len(rows("longer")) == 16
    assert not {"max_length", "per_source", "samples", "repeat"} & BRANCHING  # the data
    for flags, problem in (
        (["--resume", whole], "12 steps are done there, and this run has 12: take more --steps"),
        (["--resume", whole, "--steps", "16", "--max-length", "32"], "--max-length was "),
        (["--resume", str(newest[1]), "--val", "other.jsonl"], "the data of val has changed"),
        (["--resume", "nowhere"], "--resume nowhere: no such directory"),
        (["--resume", "."], "--resume .: holds no checkpoint"),
        (["--out", str(Path(whole).parent), "--resume", whole], "--resume"),
        (["--out", whole, "--resume", str(newest[1])], "is in --out itself"),
    ):
        assert any(problem in line for line in refusal([*forked.FLAGS, "--out", "c", *flags]))
