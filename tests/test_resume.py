"""Runs that are killed, stopped or damaged go on exactly where they were."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
FLAGS = ("--steps 12 --lisa-interval 2 --lisa-layers 1 --batch-size 8 --val-batch-size 8 "
         "--micro-batch-size 4").split()  # fmt: skip


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def start(out: str, *flags, ranks: int = 0, restarts: int = 0) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}",
                f"--max-restarts={restarts}"]  # fmt: skip
    command = [sys.executable, *(launcher if ranks else []), str(ROOT / "train.py"), *FLAGS]
    return subprocess.Popen(
        [*command, "--out", out, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(out: str, *flags, **kwargs) -> str:
    process = start(out, *flags, **kwargs)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stdout + stderr
    return stdout + stderr


def rows(out: str) -> list[dict]:
    """metrics.jsonl but for times and memory."""
    lines = (Path(out) / "metrics.jsonl").read_text().splitlines()
    drop = {"seconds", "tokens_per_s", "peak_memory"}
    return [{k: v for k, v in json.loads(line).items() if k not in drop} for line in lines]


def wait_for(condition, process: subprocess.Popen) -> None:
    end = time.time() + 120
    while not condition() and process.poll() is None:
        assert time.time() < end
        time.sleep(0.005)


def reached(out: str, n: int):
    """Whether a run has done n steps."""
    file = Path(out) / "metrics.jsonl"
    return lambda: file.exists() and len(file.read_text().splitlines()) >= n


def same_result(a: str, b: str) -> None:
    """Equal to the last bit: the steps, the learned weights, and w."""
    assert rows(a) == rows(b)
    for name in ("weights", "gap", "test_loss", "step"):
        old, new = (json.loads((Path(out) / "weights.json").read_text()) for out in (a, b))
        assert old[name] == new[name]
    old, new = (load_file(Path(out) / "model/model.safetensors") for out in (a, b))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in old)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never stopped."""
    out = str(tmp_path_factory.mktemp("whole") / "run")
    finish(out)
    return out


def test_killed_at_random_points_it_resumes_to_the_same_bits(whole):
    moment = random.Random(0)
    for n in (2, 5, 9):
        process = start("out", "--save-every", "2")
        wait_for(reached("out", n), process)
        time.sleep(moment.uniform(0, 0.2))
        process.kill()
        process.communicate()
    finish("out", "--save-every", "2")
    same_result("out", whole)
    kept = sorted(p.name for p in Path("out/checkpoints").iterdir())
    assert kept == ["step-10", "step-8"]
    assert "finished run" in finish("out", "--save-every", "2")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_goes_on(whole, number):
    process = start("out")
    wait_for(reached("out", 3), process)
    process.send_signal(number)
    stdout, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    done = len(rows("out"))
    assert f"stopped after {done} of 12 steps" in stdout and 3 <= done < 12
    assert [p.name for p in Path("out/checkpoints").iterdir()] == [f"step-{done}"]
    assert f"goes on from out/checkpoints/step-{done}" in finish("out")
    same_result("out", whole)


def test_bf16_resumes_to_the_same_bits():
    """Masters, moments and the noise of stochastic rounding are those of a run never stopped."""
    flags = ("--dtype", "bf16", "--lisa-ends", "sampled")
    finish("whole", *flags)
    process = start("out", *flags)
    wait_for(reached("out", 4), process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert "goes on from out/checkpoints/step-" in finish("out", *flags)
    same_result("out", "whole")


def test_torchrun_restarts_after_a_rank_dies():
    finish("whole", ranks=2)
    process = start("out", "--save-every", "2", ranks=2, restarts=2)
    wait_for(reached("out", 5), process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stdout + stderr
    assert "goes on from out/checkpoints/step-" in stdout
    same_result("out", "whole")


def test_a_damaged_checkpoint_is_passed_over(whole):
    process = start("out", "--save-every", "3")
    wait_for(reached("out", 8), process)
    process.kill()
    process.communicate()
    newest = Path("out/checkpoints/step-6")
    file = next(newest.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    said = finish("out", "--save-every", "3")
    assert f"{newest} is damaged ({file.name}): trying the one before" in said
    assert "goes on from out/checkpoints/step-3" in said
    same_result("out", whole)


def test_it_resumes_on_another_number_of_ranks():
    """In fp64 the trajectory is the same within rounding: ‖Δ‖ / ‖·‖ over all of w, and over p."""
    finish("whole", "--dtype", "fp64")
    process = start("out", "--dtype", "fp64", "--save-every", "4", ranks=2)
    wait_for(reached("out", 6), process)
    process.terminate()
    process.communicate(timeout=120)
    assert "goes on from" in finish("out", "--dtype", "fp64")
    old, new = (load_file(f"{out}/model/model.safetensors") for out in ("whole", "out"))
    a, b = (torch.cat([t.flatten() for t in x.values()]) for x in (old, new))
    assert (a - b).norm() / b.norm() <= 1e-9
    a, b = (torch.tensor(list(rows(out)[-1]["weights"].values())) for out in ("whole", "out"))
    assert (a - b).norm() / b.norm() <= 1e-9


def test_resume_never_leaves_the_old_run_alone(whole):
    finish("out")
    before = (Path("out") / "metrics.jsonl").stat()
    finish("out", "--resume", "never")
    same_result("out-2", whole)
    assert (Path("out") / "metrics.jsonl").stat() == before
