"""train.py as a user meets it: runs on real input, the files they leave, and refusals."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import train
from cli import report
from cli.flags import parse
from cli.inputs import prepare
from hf import templates
from model import ModelConfig, build, from_pretrained, random_weights, save_pretrained
from tests.worker import FAMILIES

ROOT = Path(__file__).parents[1]
QUICK = "--steps 3 --batch-size 8 --val-batch-size 8 --micro-batch-size 4 --max-length 64".split()


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Each test in an empty folder, with a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run(*args, ranks: int = 0) -> subprocess.CompletedProcess:
    """train.py in a process of its own; under torchrun if `ranks`."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *(launcher if ranks else []), str(ROOT / "train.py")]
    return subprocess.run([*command, *map(str, args)], capture_output=True, text=True)


def checkpoint(folder: Path, family: str = "llama", **changes) -> Path:
    """A small random checkpoint with the byte tokenizer."""
    config = ModelConfig.from_hf(FAMILIES[family] | changes)
    save_pretrained(build(config, random_weights(config, 0)), folder)
    templates.save_tokenizer(data.byte_tokenizer(), folder, "alpaca")
    return folder


def write_records(path: Path, n: int = 20, word: str = "word") -> Path:
    records = [
        {"instruction": f"say {word} {i}", "input": "", "output": f"{word} {i}"} for i in range(n)
    ]
    path.write_text(json.dumps(records, indent=1))
    return path


@pytest.fixture
def sound(tmp_path):
    """Flags of a run that would start, by name, so that a test can spoil one."""
    return {
        "--model": str(checkpoint(tmp_path / "checkpoint")),
        "--train": [f"a={write_records(tmp_path / 'a.json', word='a')}",
                    f"b={write_records(tmp_path / 'b.json', word='b')}"],
        "--val": str(write_records(tmp_path / "val.json", word="val")),
        "--max-length": "64",
        "--template": "plain",
        "--out": str(tmp_path / "out"),
    }  # fmt: skip


def flags(sound: dict) -> list[str]:
    return [x for k, v in sound.items() for x in (k, *(v if isinstance(v, list) else [v]))]


def refusal(args: list[str], capsys, world: int = 1) -> list[str]:
    """The problems that train.py prints; it must leave with 2 and write no output directory."""
    os.environ["WORLD_SIZE"] = str(world)
    try:
        assert train.main(args) == 2
    finally:
        del os.environ["WORLD_SIZE"]
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    assert not Path("out").exists() and not Path("runs").exists()
    return err.splitlines()


# ---------------------------------------------------------------------------------------------
# Runs


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_denoising_orders_the_sources_under_torchrun():
    """The README's command, shortened: the clean source leads, and the test loss falls."""
    done = run("--steps", 40, "--out", "out", ranks=2)
    assert done.returncode == 0, done.stderr
    result = json.loads(Path("out/weights.json").read_text())
    weights = result["weights"]
    assert weights["clean"] > max(weights["shuffled"], weights["junk"]) + 0.1
    assert sum(weights.values()) == pytest.approx(1)
    before, after = result["test_loss"]
    assert after < 0.5 * before
    for text in ("clean", "interleave_probs", "dataset_mixer", "held-out test loss", "█"):
        assert text in done.stdout
    mixer = json.loads(done.stdout.split("dataset_mixer: ")[1].splitlines()[0])
    assert all(1 < n <= result["sources"][name]["samples"] for name, n in mixer.items())
    assert len(rows(Path("out"))) == 40
    first = rows(Path("out"))[0]
    assert first["source_loss_w"] == first["source_loss_u"]
    assert first["weights"] == {name: pytest.approx(1 / 3, abs=1e-6) for name in weights}

    again = run("--steps", 40, "--out", "out")
    assert again.returncode == 0 and "finished" in again.stdout and "clean" in again.stdout
    other = run("--steps", 41, "--alpha", 30, "--out", "out")
    assert other.returncode == 2
    assert "--steps was 40, now 41" in other.stderr
    assert "--alpha was 10.0, now 30.0" in other.stderr


@pytest.mark.parametrize("ranks", [0, 1])
def test_runs_without_torchrun_and_on_one_rank(ranks):
    done = run(*QUICK, "--out", "out", ranks=ranks)
    assert done.returncode == 0, done.stderr
    saved = from_pretrained("out/model")
    start = build(saved.config, random_weights(saved.config, 0))
    assert any(
        not torch.equal(a, b)
        for a, b in zip(saved.parameters(), start.parameters(), strict=True)
    )
    settings = json.loads(Path("out/config.json").read_text())
    assert settings["flags"]["steps"] == 3 and settings["data"]["train clean"]["sha256"]


def test_gpt2_on_two_sources_with_the_gpt2_tokenizer(asset, tmp_path):
    """scalebio/data_tiny with a random GPT-2 of two small layers."""
    folder = asset("scalebio/data_tiny")
    small = {"n_embd": 16, "n_head": 2, "n_layer": 2, "vocab_size": 50257, "n_positions": 256}
    checkpoint(tmp_path / "gpt2", "gpt2", **small)
    (tmp_path / "gpt2/tokenizer_config.json").unlink()
    shutil.copy(asset("tokenizers/gpt2/tokenizer.json"), tmp_path / "gpt2")
    for name in ("train_alpaca", "train_gpt4_alpaca"):  # 300 records of each: tokenised sooner
        records = json.loads((folder / f"{name}.json").read_text())
        Path(f"{name}.json").write_text(json.dumps(records[:300]))
    done = run("--model", tmp_path / "gpt2", "--train", tmp_path, "--val", folder / "val.json",
               *QUICK, "--out", "out")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list(rows(Path("out"))[-1]["weights"]) == ["alpaca", "gpt4_alpaca"]


def test_overlap_is_a_warning_with_counts(asset, tmp_path):
    folder = asset("scalebio/data_tiny")
    args = ["--train", f"alpaca={folder / 'train_alpaca.json'}", "--val", folder / "val.json",
            "--test", folder / "test.json", "--max-length", 512, "--out", "out"]  # fmt: skip
    args = [str(a) for a in args]
    notes = "\n".join(train.prepare(train.parse(args), 1).notes)
    assert "5 records of alpaca are val records too" in notes
    assert "8 records of alpaca are test records too" in notes
    kept = train.prepare(train.parse([*args, "--drop-overlap"]), 1).sources["alpaca"]
    all_of = train.prepare(train.parse(args), 1).sources["alpaca"]
    assert len(all_of) - len(kept) == 13


def test_sharegpt_sources(asset, tmp_path):
    folder = asset("scalebio/math_exp")
    names = ("GPT4-LLM-Cleaned", "GPTeacher-General-Instruct", "MathInstruct",
             "dart-math-uniform", "orca-math-word-problems-200k")  # fmt: skip
    for name in names:
        records = json.loads((folder / f"train_{name}.json").read_text())
        Path(f"train_{name}.json").write_text(json.dumps(records[:60]))
    done = run("--train", "train_*.json", "--val", folder / "val.json", *QUICK,
               "--max-length", 512, "--out", "out")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(rows(Path("out"))[-1]["weights"]) == sorted(names)


def test_a_real_trained_model(asset, tmp_path):
    """stories260K: its loss on a story is that of a trained model, and it trains."""
    pytest.importorskip("tokenizers")
    story = {"text": "Once upon a time, there was a little girl named Lily. She loved to play."}
    Path("a.json").write_text(json.dumps([story] * 8))
    Path("b.json").write_text(json.dumps([{"text": story["text"][::-1]}] * 8))
    Path("val.jsonl").write_text((json.dumps({"text": story["text"] + " One day."}) + "\n") * 8)
    done = run("--model", asset("model/stories260K-hf"), "--train", "a=a.json", "b=b.json",
               "--val", "val.jsonl", *QUICK, "--template", "plain", "--out", "out")  # fmt: skip
    assert done.returncode == 0, done.stderr
    losses = rows(Path("out"))[0]["source_loss_w"]
    assert losses["a"] < 2 < 4 < losses["b"]


def test_an_absent_source_is_null_and_rounds_raise_alpha():
    done = run("--steps", 4, "--outer-rounds", 2, "--tau", 3, "--batch-size", 2,
               "--val-batch-size", 4, "--out", "out")  # fmt: skip
    assert done.returncode == 0, done.stderr
    table = rows(Path("out"))
    assert all(list(row["source_loss_w"].values()).count(None) == 1 for row in table)
    assert [row["alpha"] for row in table] == [10.0] * 4 + [30.0] * 4


def test_nonfinite_loss_stops_or_is_passed_over(sound, tmp_path):
    """The embedding of Z is infinite, and only source b has a Z, in every second record."""
    weights = load_file(tmp_path / "checkpoint/model.safetensors")
    weights["model.embed_tokens.weight"][ord("Z")] = torch.inf
    save_file(weights, tmp_path / "checkpoint/model.safetensors")
    records = [{"text": "Zzz" if i == 0 else "abc"} for i in range(12)]
    Path("b.json").write_text(json.dumps(records))
    sound["--train"][1] = "b=b.json"
    args = [*flags(sound), "--steps", "6", "--batch-size", "4", "--val-batch-size", "4"]
    done = run(*args)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    message = done.stderr[done.stderr.index("step ") :]
    assert "not finite: the loss of source b under w, the loss of source b under u." in message
    stopped_at = int(message.removeprefix("step ").split(":")[0])
    assert stopped_at < 6 and len(rows(Path("out"))) == stopped_at

    done = run(*args, "--skip-nonfinite", "--out", "skipping")
    assert done.returncode == 0, done.stderr
    assert json.loads(Path("skipping/weights.json").read_text())["skipped"] == 1
    bad = rows(Path("skipping"))[stopped_at]
    assert bad["source_loss_w"]["b"] is None and bad["source_loss_w"]["a"] is not None
    before = [{"a": 0.5, "b": 0.5}] + [row["weights"] for row in rows(Path("skipping"))]
    assert bad["weights"] == before[stopped_at]


# ---------------------------------------------------------------------------------------------
# Refusals


def test_all_problems_are_printed_together(sound, capsys, tmp_path):
    Path("broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    Path("odd.json").write_text('[{"text": "fine"},\n {"colour": "red"}]')
    Path("empty.json").write_text("[]")
    sound["--train"] += ["c=broken.jsonl", "d=odd.json", "e=empty.json", "f=missing.json"]
    sound |= {"--batch-size": "63", "--lisa-layers": "4", "--max-length": "129", "--tau": "0"}
    lines = refusal(flags(sound), capsys, world=2)
    for expected in ("broken.jsonl:2: ", "odd.json: record 2: ", "empty.json: ", "missing.json: ",
                     "--batch-size 63 is not divisible by 2 ranks: take 62 or 64",
                     "--lisa-layers 4: the model has 3 blocks", "--tau 0.0: ",
                     "--max-length 129: the model has 128 positions"):  # fmt: skip
        assert sum(expected in line for line in lines) == 1, (expected, lines)


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"--train": ["a=a.json", "a=b.json"]}, "--train b.json: the name a is used twice"),
        ({"--train": ["a=a.json", "b.json"]}, "--train b.json: expected NAME=PATH"),
        ({"--train": ["a=a.json", "=b.json"]}, "--train =b.json: expected NAME=PATH"),
        ({"--train": ["a=a.json", "b,c=b.json"]}, "--train b,c=b.json: a name may have no comma"),
        ({"--train": ["a=a.json", f"b={'x' * 300}"]},
         "[Errno 36] File name too long: 'x"),
        ({"--out": "x" * 300}, "[Errno 36] File name too long: 'x"),
        ({"--out": "x" * 300, "--resume": "never"}, "[Errno 36] File name too long: 'x"),
        ({"--train": ["nowhere*.json"]}, "--train nowhere*.json: no file matches"),
        ({"--train": ["twins"]}, "--train twins/train_x.jsonl: the name x is used twice"),
        ({"--val": "a.json"}, "--val a.json is the same file as --train a"),
        ({"--train": ["a=a.json", "b=as-val.json"], "--drop-overlap": []},
         "train b: no record is left after --drop-overlap"),
        ({"--val-batch-size": "0"}, "--val-batch-size 0: "),
        ({"--alpha": "nan"}, "--alpha nan: "),
        ({"--seed": "-1"}, "--seed -1: "),
        ({"--seed": str(2**32)}, "--seed 4294967296: "),
        ({"--alpha": "1e308"}, "--alpha 1e+308: "),
        ({"--steps": "0"}, "--steps 0: "),
        ({"--tau": "1e5", "--outer-rounds": "3"}, "--tau 100000.0: "),
        ({"--template": "llama3"}, "--template llama3: "),
        ({"--model": "no/such/model"}, "no/such/model: "),
    ],
)
def test_refusals(sound, capsys, change, expected):
    write_records(Path("as-val.json"), n=5, word="val")
    Path("twins").mkdir()
    for name in ("train_x.json", "train_x.jsonl"):
        write_records(Path("twins") / name)
    lines = refusal(flags(sound | change), capsys)
    assert len(lines) == 1 and lines[0].startswith(expected), lines


def test_sources_may_be_given_one_by_one_and_what_is_odd_is_noted(sound):
    a, b = sound.pop("--train")
    same = a.replace("a=", "again=", 1)
    args = parse([*flags(sound), "--train", a, "--train", b, same])
    made = prepare(args, 1)
    assert list(made.sources) == ["a", "b", "again"]
    assert "a and again are the same records" in made.notes
    args = parse([*flags(sound), "--train", a])
    assert any("there is one source" in note for note in prepare(args, 1).notes)


def spoil_missing(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors")


def spoil_extra(folder):
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"model.surprise": torch.zeros(2)}, folder / "model.safetensors")


def spoil_shape(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.zeros(7)
    save_file(weights, folder / "model.safetensors")


def spoil_pickle(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def spoil_absent(folder):
    (folder / "model.safetensors").unlink()


def spoil_vocabulary(folder):
    weights = load_file(folder / "model.safetensors")
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[key] = weights[key][:200].clone()
    save_file(weights, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 200}))


def spoil_config(folder):
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    "spoil, expected",
    [
        (spoil_missing, "model.layers.1.mlp.up_proj.weight"),
        (spoil_extra, "model.surprise"),
        (spoil_shape, "model.norm.weight"),
        (spoil_pickle, "*.bin only"),
        (spoil_absent, "safetensors"),
        (spoil_vocabulary, "the tokenizer has 258 ids, the embedding only 200 rows"),
        (spoil_config, "config.json"),
    ],
)
def test_spoilt_checkpoints(sound, capsys, spoil, expected):
    spoil(Path(sound["--model"]))
    lines = refusal(flags(sound), capsys)
    assert len(lines) == 1 and expected in lines[0], lines


def test_an_out_that_holds_something_else_is_left_alone(sound, capsys, tmp_path):
    Path("kept").mkdir()
    Path("kept/letter.txt").write_text("dear")
    lines = refusal(flags(sound | {"--out": "kept"}), capsys)
    assert lines == ["--out kept: holds files, but no run to go on with"]
    assert [p.name for p in Path("kept").iterdir()] == ["letter.txt"]
    of_no_run = ("{", "[]", '{"model_type": "llama"}',
                 '{"flags": {"a": 1}, "data": {"train a": 3}, "mixture": null}',
                 '{"flags": {"a": 1}, "data": {}, "mixture": [1]}')  # fmt: skip
    for content in of_no_run:
        Path("kept/config.json").write_text(content)
        assert refusal(flags(sound | {"--out": "kept"}), capsys) == lines


def test_sources_added_or_removed_are_another_run(sound, capsys, tmp_path):
    Path("sources").mkdir()
    for name in "ab":
        write_records(Path(f"sources/train_{name}.json"), word=name)
    sound |= {"--train": "sources", "--out": "kept"}
    done = run(*flags(sound), *QUICK)
    assert done.returncode == 0, done.stderr
    write_records(Path("sources/train_c.json"), word="c")
    lines = refusal([*flags(sound), *QUICK], capsys)
    assert lines == ["--out kept holds another run: the records of train c were not there"]
    for name in "bc":
        Path(f"sources/train_{name}.json").unlink()
    lines = refusal([*flags(sound), *QUICK], capsys)
    assert lines == ["--out kept holds another run: the records of train b are missing now"]


def test_bad_input_under_torchrun_prints_its_lines_and_no_traceback_of_ours():
    done = run("--batch-size", 63, "--lisa-layers", 9, ranks=2)
    assert done.returncode != 0
    assert "--batch-size 63 is not divisible by 2 ranks: take 62 or 64" in done.stderr
    assert "--lisa-layers 9" in done.stderr
    assert "train.py\", line" not in done.stderr
    assert not Path("runs").exists()


# ---------------------------------------------------------------------------------------------
# The plan


def test_plan_from_a_config_alone(capsys, tmp_path):
    models = json.loads((ROOT / "tests/models.json").read_text())
    Path("config.json").write_text(json.dumps(models["Yi-34B"]))
    args = "--plan --model config.json --gpus 8 --max-length 1024 --micro-batch-size 1".split()
    assert train.main([*args, "--gpu-memory", "48"]) == 0
    text = capsys.readouterr().out
    assert "fits" in text and "AdamW moments" in text and "peak" in text
    assert train.main([*args, "--gpu-memory", "24", "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["fits"] is False and answer["peak"] > answer["persistent"] > 25e9
    assert train.main([*args, "--gpu-memory", "24"]) == 1
    text = capsys.readouterr().out
    assert "does not fit" in text and "would fit with: --gpus" in text
    assert train.main(["--plan", "--model", "nowhere.json"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_contradictory_flags_of_a_plan_are_refused_together(capsys):
    args = ["--plan", "--gpus", "0", "--gpu-memory", "2", "--lisa-layers", "0", "--lisa-ends",
            "sampled", "--lisa-coupling", "independent", "--max-length", "513"]  # fmt: skip
    assert train.main(args) == 2
    lines = capsys.readouterr().err.splitlines()
    for expected in ("--gpus 0: ", "--gpu-memory 2.0: ", "--lisa-ends sampled contradicts ",
                     "--lisa-coupling independent contradicts ", "--max-length 513: "):  # fmt: skip
        assert sum(line.startswith(expected) for line in lines) == 1, (expected, lines)
    assert len(lines) == 5
    assert refusal(["--json", "--gpu-memory", "80"], capsys) == [
        "--gpu-memory goes with --plan alone", "--json goes with --plan alone",
    ]  # fmt: skip


@pytest.mark.parametrize("flags, said", [
    (["--seed", "1e3"], "argument --seed: invalid int value: '1e3'"),
    (["--sed", "1"], "unrecognized arguments: --sed 1"),
])  # fmt: skip
def test_flags_that_cannot_be_read_are_refused_in_a_line(capsys, flags, said):
    with pytest.raises(SystemExit) as stopped:
        train.main(flags)
    assert stopped.value.code == 2 and capsys.readouterr() == ("", said + "\n")


def test_compile_without_a_compiler_is_refused_in_a_line(capsys, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert refusal(["--compile"], capsys) == [
        "--compile needs a C++ compiler: install g++, or name one in CXX"
    ]


def test_out_of_memory_names_the_plan_and_what_helps():
    """A micro-batch of 8192 samples in an address space of 2 GB beside what imports take."""
    resource = pytest.importorskip("resource")
    pages = "import train; print(open('/proc/self/statm').read().split()[0])"
    used = subprocess.run([sys.executable, "-c", pages], cwd=ROOT, capture_output=True, text=True)
    most = 2_000_000_000 + resource.getpagesize() * int(used.stdout)
    limit = (resource.RLIMIT_AS, (most, most))
    command = [sys.executable, str(ROOT / "train.py"), "--out", "out", "--steps", "1",
               "--batch-size", "8192", "--micro-batch-size", "8192"]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, preexec_fn=lambda: resource.setrlimit(*limit)
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (planned,) = (x for x in done.stdout.splitlines() if x.startswith("memory: planned peak "))
    (line,) = (x for x in done.stderr.splitlines() if "rank 0 ends: " in x)
    assert f"out of memory: {planned.removeprefix('memory: ')}, measured " in line
    assert "most likely to help: --" in line and "--activation-checkpointing" in line
    assert "traceback in out/error-rank0.log" in line
    assert "Traceback" in Path("out/error-rank0.log").read_text()


def test_activation_checkpointing_changes_nothing():
    done = run(*QUICK, "--out", "plain")
    assert done.returncode == 0, done.stderr
    done = run(*QUICK, "--out", "recomputed", "--activation-checkpointing")
    assert done.returncode == 0, done.stderr
    for a, b in zip(rows(Path("plain")), rows(Path("recomputed")), strict=True):
        assert a["source_loss_w"] == b["source_loss_w"] and a["grad_norm_w"] == b["grad_norm_w"]


# ---------------------------------------------------------------------------------------------
# Parts


def test_learning_rate_schedule():
    factors = [train.lr_factor(t, 100, 0.03, "cosine") for t in range(100)]
    assert factors[:4] == [1 / 3, 2 / 3, 1.0, 1.0]
    assert factors[-1] < 1e-3 and factors == sorted(factors[:3]) + sorted(factors[3:])[::-1]
    assert train.lr_factor(50, 100, 0, "linear") == pytest.approx(0.5)
    assert train.lr_factor(99, 100, 0.1, "constant") == 1



def test_settled_and_drifting_weights():
    def history(p_of_t):
        return [
            {"step": t, "finite": True, "alpha": 1.0, "lr_lambda": 0.005,
             "weights": {"a": p_of_t(t), "b": 1 - p_of_t(t)},
             "source_loss_w": {"a": 1.0 + 0.1 * (t % 2), "b": None},
             "source_loss_u": {"a": 1.0, "b": None}} for t in range(500)
        ]  # fmt: skip

    still = report.summarise(history(lambda t: 0.7 + 0.01 * math.sin(t * t)))
    assert still["settled"] == {"a": True, "b": True}
    near = report.summarise(history(lambda t: 0.99 + 1e-5 * t))
    assert near["settled"] == {"a": True, "b": True} and not any(near["limited"].values())
    assert still["gap"]["a"] == pytest.approx(0.05) and still["gap"]["b"] is None
    moving = report.summarise(history(lambda t: 0.3 + 0.001 * t))
    assert moving["settled"] == {"a": False, "b": False}
    short = report.summarise(history(lambda t: 0.5)[:20])
    assert short["settled"] == short["limited"] | {"a": False, "b": False}


def test_weights_limited_by_the_schedule():
    """λ at Adam's full speed to the end is told from λ that the data stopped."""

    def limited(speed, start=0.0):
        """500 steps in which the logit of a moves `speed` times as far as the rates permit."""
        logit, rows = start, []
        for t in range(500):
            lr = 0.004 * train.lr_factor(t, 500, 0, "cosine")
            logit += speed * lr
            p = 1 / (1 + math.exp(-2 * logit))
            rows.append({"step": t, "finite": True, "alpha": 1.0, "lr_lambda": lr,
                         "weights": {"a": p, "b": 1 - p}, "source_loss_w": {"a": 1.0, "b": 1.0},
                         "source_loss_u": {"a": 1.0, "b": 1.0}})  # fmt: skip
        return report.summarise(rows)["limited"]

    assert limited(0.8) == {"a": True, "b": True}
    assert limited(0.2) == {"a": False, "b": False}
    assert limited(0.8, start=2.0) == {"a": False, "b": False}  # at 0.996 it has arrived

