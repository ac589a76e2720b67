"""evaluate.py: losses with their standard errors, and generation, as a user starts them."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import evaluate
import model as hf
import templates
from tests.worker import FAMILIES

ROOT = Path(__file__).parents[1]


@pytest.fixture
def checkpoint(tmp_path):
    config = hf.ModelConfig.from_hf(FAMILIES["llama"])
    hf.save_pretrained(hf.build(config, hf.random_weights(config, 0)), tmp_path / "model")
    templates.save_tokenizer(data.byte_tokenizer(), tmp_path / "model", "plain")
    return tmp_path / "model"


@pytest.fixture
def records(tmp_path):
    words = ["a", "some", "longer words here", "four", "and five", "x" * 50, "seven"]
    (tmp_path / "val.jsonl").write_text("".join(json.dumps({"text": w}) + "\n" for w in words))
    return tmp_path / "val.jsonl"


def run(*args, ranks: int = 0) -> subprocess.CompletedProcess:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *(launcher if ranks else []), str(ROOT / "evaluate.py")]
    return subprocess.run([*command, *map(str, args)], capture_output=True, text=True)


def test_loss_matches_a_loop_over_samples(checkpoint, records, tmp_path):
    model = hf.from_pretrained(checkpoint)
    dataset = data.load_dataset(records, data.byte_tokenizer(), "plain", 64, tmp_path / "cache")
    losses, counts = [], []
    for i in range(len(dataset)):
        tokens, labels = (torch.from_numpy(x)[None] for x in dataset.example(i))
        losses.append(model(tokens, labels).item())
        counts.append((labels[:, 1:] != -100).sum().item())
    losses, counts = torch.tensor(losses).double(), torch.tensor(counts).double()
    result = evaluate.loss(model, dataset, micro_batch_size=3)
    assert result.n == 7
    assert result.mean == pytest.approx(losses.mean().item(), 1e-6)
    assert result.mean_se == pytest.approx(losses.std().item() / math.sqrt(7), 1e-5)
    token_mean = (losses @ counts / counts.sum()).item()
    assert result.token_mean == pytest.approx(token_mean, 1e-6)
    # The jackknife, an estimate of the same standard error by another road.
    left_out = [
        ((losses @ counts - losses[i] * counts[i]) / (counts.sum() - counts[i])).item()
        for i in range(7)
    ]
    jackknife = math.sqrt(6 / 7 * sum((x - sum(left_out) / 7) ** 2 for x in left_out))
    assert result.token_mean_se == pytest.approx(jackknife, rel=1)


def test_loss_table_is_the_same_on_one_process_and_two(checkpoint, records, tmp_path):
    args = ("loss", "--model", checkpoint, "--data", records, f"again={records}",
            "--template", "plain", "--micro-batch-size", 2)  # fmt: skip
    one, two = run(*args), run(*args, ranks=2)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    assert one.stdout == two.stdout
    assert "again" in one.stdout and one.stdout.count("±") == 4


def test_generation_is_the_same_on_one_process_and_two(checkpoint):
    args = ("generate", "--model", checkpoint, "--prompt", "Hi", "Tell me more",
            "--max-new-tokens", 8)  # fmt: skip
    one, two = run(*args), run(*args, ranks=2)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    assert one.stdout == two.stdout and one.stdout.startswith("Hi")


def test_a_story_by_a_real_model(asset):
    pytest.importorskip("tokenizers")
    done = run("generate", "--model", asset("model/stories260K-hf"), "--prompt",
               "Once upon a time", "--max-new-tokens", 30)  # fmt: skip
    assert "there was a little girl named Lily" in done.stdout


def test_bad_input_is_one_line(checkpoint, records):
    for args in (
        ("loss", "--model", "no/such/model", "--data", records),
        ("loss", "--model", checkpoint, "--data", "missing.json"),
        ("generate", "--model", checkpoint, "--prompt", "Hi", "--template", "llama3"),
        ("generate", "--model", checkpoint, "--prompt", "Hi", "--max-new-tokens", 9999),
    ):
        done = run(*args)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr


