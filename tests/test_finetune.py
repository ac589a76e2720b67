"""train.py --mode finetune: the pipeline from learned weights to a model, and its refusals."""

import contextlib
import json
import signal
from collections import Counter
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import data
import train
from cli.flags import parse
from cli.inputs import prepare
from model import from_pretrained, generate
from sources import mixture
from tests import forked
from tests.forked import at, done, rows, run, send, write_model


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A folder in which weights were learned with one model, and another was tuned with them."""
    folder = tmp_path_factory.mktemp("pipeline")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        write_model(folder / "small")
        write_model(folder / "other", "gpt2")
        for name, n in (("a", 30), ("b", 30), ("val", 6), ("test", 30)):
            records = [{"text": f"{name} {'and on ' * (i % 5)}{i}"} for i in range(n)]
            Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
        sources = "--train a=a.jsonl b=b.jsonl --template plain --max-length 64"
        done(flags=(f"{sources} --model small --val val.jsonl --out learned --steps 3 "
                    "--batch-size 8 --val-batch-size 8").split())  # fmt: skip
        tune = (f"{sources} --mode finetune --model other --lr-w 1e-2 "
                "--weights learned/weights.json").split()  # fmt: skip
        usual = [*tune, *("--samples 40 --batch-size 8 --micro-batch-size 3 --epochs 2 "
                          "--lisa-interval 2 --val val.jsonl --test test.jsonl").split()]
        said = done("--out", "tuned", flags=usual, fault=forked.draw)
        yield tune, usual, said


def test_the_pipeline_and_the_files_it_leaves(pipeline, capsys):
    tune, usual, said = pipeline
    weights = json.loads(Path("learned/weights.json").read_text())["weights"]
    parts = mixture.apportion(weights, 40)
    config = json.loads(Path("tuned/config.json").read_text())
    assert config["mixture"] == {
        name: {"weight": pytest.approx(weights[name]), "samples": parts[name]} for name in "ab"
    }
    drawn = [json.loads(line) for line in Path("tuned/mixture.jsonl").read_text().splitlines()]
    assert Counter(entry["source"] for entry in drawn) == parts
    assert len({(entry["source"], entry["record"]) for entry in drawn}) == 40
    assert all(entry.keys() == {"source", "record"} for entry in drawn)
    assert not Path("tuned/weights.json").exists()

    table = rows("tuned")
    assert len(table) == 10  # two epochs of five batches
    assert table[-1]["train_loss"] < table[0]["train_loss"]
    assert [row["step"] for row in table if "test_loss" in row] == [0, 9]
    # As many samples as a tenth of the training is worth: 3 * 10 * 8 / 10 = 24, 4 times the 6.
    assert [row["step"] for row in table if "val_loss" in row] == [0, 3, 6, 9]
    before, after = table[0]["val_loss"], table[-1]["val_loss"]
    assert f"validation loss:    {before:.4f} before, {after:.4f} after" in said
    for text in ("held-out test loss: ", "training loss: ", "mixture.jsonl", "█"):
        assert text in said
    if find_spec("matplotlib"):
        assert "losses.png" in said.split("Files in tuned: ")[1]
    assert train.main([*usual, "--out", "tuned"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "tuned is a finished run."


def test_it_matches_a_loop_with_adamw_on_one_process(pipeline):
    """Two ranks, an odd last batch with a filler, several micro-batches; everything trains."""
    tune, _, _ = pipeline
    exact = [*tune, *("--lisa-layers 0 --dtype fp64 --clip 0.5 --samples 21 --batch-size 8 "
                      "--micro-batch-size 3 --seed 4 --out exact").split()]  # fmt: skip
    done(ranks=2, flags=exact)

    args = parse(exact)
    found = prepare(args, 1)
    lines = Path("exact/mixture.jsonl").read_text()
    assert lines == mixture.as_jsonl(found.mixture)  # whatever the number of ranks
    model = from_pretrained("other", torch.float64)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=5e-4)
    batches = data.MixtureBatches(list(found.mixture.values()), 8, 8, seed=4)
    losses = []
    for step in range(3):
        opt.param_groups[0]["lr"] = 1e-2 * train.lr_factor(step, 3, 0.03, "cosine")
        ((batch,), _, _) = batches.step(step)
        loss = model(batch.tokens, batch.labels).mean()
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        opt.step()
        losses.append(loss.item())
    assert [row["train_loss"] for row in rows("exact")] == pytest.approx(losses, rel=1e-9)
    saved = from_pretrained("exact/model", torch.float64)
    for ours, theirs in zip(saved.parameters(), model.parameters(), strict=True):
        # Clipping by torch divides by the norm + 1e-6.
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_killed_it_resumes_to_the_same_bits(pipeline):
    _, usual, _ = pipeline
    killed = ["--out", "killed", "--save-every", "2"]
    run(*killed, flags=usual, fault=partial(at, "save", 20, partial(send, signal.SIGKILL), entry=3))
    assert "goes on from killed/checkpoints/step-4" in done(*killed, flags=usual)
    assert rows("killed") == rows("tuned")
    assert Path("killed/mixture.jsonl").read_text() == Path("tuned/mixture.jsonl").read_text()
    old, new = (Path(out, "model/model.safetensors").read_bytes() for out in ("tuned", "killed"))
    assert old == new


def test_the_tuned_model_opens_in_transformers(pipeline):
    """And says the same, greedily."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained("tuned/model").eval()
    ours = from_pretrained("tuned/model")
    tok = data.load_tokenizer("tuned/model")
    prompts = [tok.encode(text) for text in ("a", "b and on", "b")]
    said = generate(ours, prompts, 24)
    for prompt, new in zip(prompts, said, strict=True):
        out = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=24)
        assert out[0, len(prompt):].tolist()[: len(new)] == new


@contextlib.contextmanager
def changed(file: str, change):
    """A file of the pipeline's is as change(its text) says, for a while."""
    before = Path(file).read_text()
    Path(file).write_text(change(before))
    try:
        yield
    finally:
        Path(file).write_text(before)


def test_other_weights_or_another_tokenizer_are_another_run(pipeline, refusal):
    _, usual, _ = pipeline
    other = ["a=1,b=3" if arg == "learned/weights.json" else arg for arg in usual]
    lines = refusal([*other, "--out", "tuned"])
    assert [line.split(" was ")[0] for line in lines] == [
        f"--out tuned holds another run: the weight of {name}" for name in "ab"
    ]
    with changed("other/tokenizer.json", lambda text: text + "\n"):
        lines = refusal([*usual, "--out", "tuned"])
    assert lines == ["--out tuned holds another run: the tokenizer has changed"]


def test_a_run_that_did_not_record_its_tokenizer_is_gone_on_with(pipeline):
    _, usual, _ = pipeline
    with changed("tuned/config.json", lambda t: json.dumps({**json.loads(t), "tokenizer": None})):
        assert train.main([*usual, "--out", "tuned"]) == 0


def test_all_problems_are_printed_together(pipeline, refusal):
    tune, _, _ = pipeline
    spoilt = "--samples 0 --batch-size 0 --alpha 10 --val-batch-size 8 --weights c=0.5,b=-1"
    lines = refusal([*tune, *spoilt.split(), "--out", "new"])
    for expected in ("--val-batch-size goes with --mode bilevel alone",
                     "--alpha goes with --mode bilevel alone", "--batch-size 0: permitted",
                     "--samples 0: permitted", "about the sources b, c", "weight of b is -1.0"):
        assert sum(expected in line for line in lines) == 1, (expected, lines)
    assert len(lines) == 6
    assert refusal(["--mode", "finetune", "--out", "new"]) == [
        f"--weights is missing: --mode finetune needs {mixture.PERMITTED}"
    ]
    assert refusal(["--weights", "uniform", "--repeat", "--out", "new"]) == [
        "--weights goes with --mode finetune alone",
        "--repeat goes with --mode finetune alone",
    ]
    lines = refusal("--mode finetune --weights learned/weights.json --out new "
                    "--train a=a.jsonl c=b.jsonl".split())  # fmt: skip
    assert lines == ["--weights learned/weights.json: it is about the sources a, b, but those to "
                     "train on are a, c"]  # fmt: skip


def test_the_name_of_out_and_the_note_on_a_short_source(pipeline):
    tune, _, _ = pipeline
    assert parse(["--mode", "finetune"]).out == Path("runs/denoising-finetune-seed0")
    found = prepare(parse([*tune, "--weights", "a=1,b=0", "--samples", "90000"]), 1)
    assert {name: len(part) for name, part in found.mixture.items()} == {"a": 30}
    assert len(found.notes) == 1
    assert "a is short: 90000 samples by its weight, but it has 30" in found.notes[0]


def test_the_plan_counts_one_copy(capsys):
    one, two = {}, {}
    for sizes, mode in (one, "finetune"), (two, "bilevel"):
        assert train.main(["--plan", "--json", "--mode", mode]) == 0
        sizes |= json.loads(capsys.readouterr().out)["components"]
    for name in ("parameters", "masters", "AdamW moments"):
        assert 2 * one[name] == two[name]
    assert one["activations"] == two["activations"] and one["gradients"] < two["gradients"]
