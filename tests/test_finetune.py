"""train.py --mode finetune: the pipeline from learned weights to a model, and its refusals."""

import json
import shutil
import signal
from collections import Counter
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import data
import evaluate
import train
from cli import report
from cli.flags import parse
from cli.inputs import prepare
from model import from_pretrained, generate
from tests import forked
from tests.forked import at, done, rows, run, send, write_model


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A folder in which weights were learned with one model, and another was tuned with them."""
    folder = tmp_path_factory.mktemp("pipeline")
    with pytest.MonkeyPatch.context() as patch:
        forked.enter(folder, patch)
        write_model(folder / "small")
        write_model(folder / "other", "gpt2")
        held_out = Path("val.jsonl").read_text().splitlines()
        Path("val.jsonl").write_text("\n".join(held_out[:6]))
        sources = "--train a=train_a.jsonl b=train_b.jsonl --template plain --max-length 64"
        learn = f"{sources} --model small --val val.jsonl --steps 3 --val-batch-size 8"
        done("--batch-size", "8", "--out", "learned", flags=learn.split())
        tune = (f"{sources} --mode finetune --model other --lr-w 1e-2 "
                "--weights learned/weights.json").split()  # fmt: skip
        usual = [*tune, *("--samples 40 --batch-size 8 --micro-batch-size 3 --epochs 2 "
                          "--lisa-interval 2 --val val.jsonl --test test.jsonl").split()]
        said = done("--out", "tuned", flags=usual, fault=forked.draw)
        yield SimpleNamespace(tune=tune, usual=usual, said=said)


def test_the_pipeline_and_the_files_it_leaves(pipeline, capsys):
    weights = json.loads(Path("learned/weights.json").read_text())["weights"]
    parts = data.apportion(weights, 40)
    assert json.loads(Path("tuned/config.json").read_text())["mixture"] == {
        name: {"weight": pytest.approx(weights[name]), "samples": parts[name]} for name in "ab"
    }
    drawn = [json.loads(line) for line in Path("tuned/mixture.jsonl").read_text().splitlines()]
    assert Counter(entry["source"] for entry in drawn) == parts
    assert len({(entry["source"], entry["record"]) for entry in drawn}) == 40
    assert not Path("tuned/weights.json").exists()

    table = rows("tuned")
    assert len(table) == 10  # two epochs of five batches
    assert table[-1]["train_loss"] < table[0]["train_loss"]
    assert [row["step"] for row in table if "test_loss" in row] == [0, 9]
    # As many samples as a tenth of the training is worth: 3 * 10 * 8 / 10 = 24, 4 times the 6.
    assert [row["step"] for row in table if "val_loss" in row] == [0, 3, 6, 9]
    before, after = table[0]["val_loss"], table[-1]["val_loss"]
    for text in (f"{before:.4f} before, {after:.4f} after", "held-out test loss: ",
                 "training loss: ", "mixture.jsonl", "█"):  # fmt: skip
        assert text in pipeline.said
    if find_spec("matplotlib"):
        assert "losses.png" in pipeline.said.split("Files in tuned: ")[1]
    assert train.main([*pipeline.usual, "--out", "tuned"]) == 0
    assert "tuned is a finished run" in capsys.readouterr().out
    judged = "loss --model tuned/model --data test.jsonl --max-length 64".split()
    assert evaluate.main(judged) == 0
    assert f"{table[-1]['test_loss']:.4f}" in capsys.readouterr().out


def test_without_validation_records_the_loss_that_is_shown_is_of_training(pipeline):
    said = done("--samples", "16", "--batch-size", "8", "--out", "unheld", flags=pipeline.tune)
    assert "loss " in said and "nan" not in said
    assert not any("val_loss" in row for row in rows("unheld"))


def test_it_matches_a_loop_with_adamw_on_one_process(pipeline):
    """Two ranks, an odd last batch with a filler, several micro-batches; everything trains."""
    flags = ("--lisa-layers 0 --dtype fp64 --clip 0.5 --samples 21 --batch-size 8 "
             "--micro-batch-size 3 --seed 4 --out exact").split()  # fmt: skip
    exact = [*pipeline.tune, *flags]
    done(ranks=2, flags=exact)

    drawn = prepare(parse(exact), 1).mixture
    assert Path("exact/mixture.jsonl").read_text() == "".join(report.mixture_jsonl(drawn))
    model = from_pretrained("other", torch.float64)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=5e-4)
    batches = data.MixtureBatches(list(drawn.values()), 8, 8, seed=4)
    losses = []
    for step in range(3):
        opt.param_groups[0]["lr"] = 1e-2 * train.lr_factor(step, 3, 0.03, "cosine")
        ((batch,), _, _) = batches.step(step)
        loss = model(batch.tokens, batch.labels).mean()
        opt.zero_grad()
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        for p in model.parameters():
            p.grad *= min(1, 0.5 / norm)
        opt.step()
        losses.append(loss.item())
    assert [row["train_loss"] for row in rows("exact")] == pytest.approx(losses, rel=1e-9)
    saved = from_pretrained("exact/model", torch.float64)
    for ours, theirs in zip(saved.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


def test_killed_it_resumes_to_the_same_bits(pipeline):
    killed = ["--out", "killed", "--save-every", "2"]
    run(*killed, flags=pipeline.usual,
        fault=partial(at, "save", 20, partial(send, signal.SIGKILL), entry=3))
    assert "goes on from killed/checkpoints/step-4" in done(*killed, flags=pipeline.usual)
    assert rows("killed") == rows("tuned")
    for file in ("mixture.jsonl", "model/model.safetensors"):
        assert Path("killed", file).read_bytes() == Path("tuned", file).read_bytes()


def test_the_tuned_model_opens_in_transformers(pipeline):
    """And says the same, greedily."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained("tuned/model").eval()
    tok, ours = data.load_tokenizer("tuned/model"), from_pretrained("tuned/model")
    prompts = [tok.encode(text) for text in ("a", "b and on", "b")]
    for prompt, new in zip(prompts, generate(ours, prompts, 24), strict=True):
        out = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=24)
        assert out[0, len(prompt) :].tolist()[: len(new)] == new


def test_other_weights_or_another_tokenizer_are_another_run(pipeline, refusal):
    """A run that did not record its tokenizer is gone on with."""
    other = ["a=1,b=3" if arg == "learned/weights.json" else arg for arg in pipeline.usual]
    lines = refusal([*other, "--out", "tuned"])
    assert [line.split(" was ")[0] for line in lines] == [
        f"--out tuned holds another run: the weight of {name}" for name in "ab"
    ]
    shutil.copytree("tuned", "kept")
    tokenizer = Path("other/tokenizer.json")
    tokenizer.write_text(tokenizer.read_text() + "\n")
    (line,) = refusal([*pipeline.usual, "--out", "kept"])
    tokenizer.write_text(tokenizer.read_text()[:-1])
    assert "the tokenizer has changed" in line
    config = json.loads(Path("tuned/config.json").read_text())
    Path("kept/config.json").write_text(json.dumps(config | {"tokenizer": None}))
    assert train.main([*pipeline.usual, "--out", "kept"]) == 0


def test_weights_learned_on_other_records_are_noted(pipeline):
    argv = [*pipeline.usual, "--samples", "8", "--out", "new"]
    other = ["b=train_c.jsonl" if arg == "b=train_b.jsonl" else arg for arg in argv]
    uniform = ["a=1,b=1" if arg == "learned/weights.json" else arg for arg in other]
    said = [[note for note in prepare(parse(words), 1).notes if "learned on" in note]
            for words in (argv, other, uniform)]  # fmt: skip
    assert said == [[], ["--weights learned/weights.json: learned on other records of b"], []]


def test_all_problems_are_printed_together(pipeline, refusal):
    spoilt = "--samples 0 --batch-size 0 --alpha 10 --val-batch-size 8 --weights c=0.5,b=-1"
    lines = refusal([*pipeline.tune, *spoilt.split(), "--out", "new"])
    for expected in ("--val-batch-size goes with --mode bilevel alone",
                     "--alpha goes with --mode bilevel alone", "--batch-size 0: permitted",
                     "--samples 0: permitted", "it names ['c'], but", "weight of b is -1.0"):
        assert sum(expected in line for line in lines) == 1, (expected, lines)
    assert len(lines) == 6
    (line,) = refusal(["--mode", "finetune", "--out", "new"])
    assert line.startswith("--weights is missing: ")
    lines = refusal(["--weights", "uniform", "--repeat", "--out", "new"])
    assert len(lines) == 2 and all("goes with --mode finetune or draw" in line for line in lines)
