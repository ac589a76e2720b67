"""train.py as a user meets it: runs on real input, the files they leave, and refusals."""

import dataclasses
import json
import math
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from cli import flags as flags_of_train
from cli.flags import Flags, parse
from cli.inputs import prepare, source_paths
from lisa import ENDS
from model import DTYPES, build, from_pretrained, random_weights
from tests.cases import example
from tests.forked import FLAGS, assert_same, done, rows, run, saved, write_model

ROOT = Path(__file__).parents[1]
QUICK = "--steps 3 --batch-size 8 --val-batch-size 8 --micro-batch-size 4 --max-length 64".split()
pytestmark = pytest.mark.usefixtures("own_folder")


def launch(*args: str, launcher: str = "") -> subprocess.CompletedProcess:
    """train.py as it is started from a shell."""
    command = [sys.executable, *launcher.split(), str(ROOT / "train.py"), *args]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def sound():
    """Flags of a run that would start, by name, so that a test can spoil one."""
    return {
        "--model": str(write_model(Path("checkpoint"))),
        "--train": ["a=train_a.jsonl", "b=train_b.jsonl"],
        "--val": "val.jsonl",
        "--max-length": "64",
        "--template": "plain",
        "--out": "out",
    }


def flags(sound: dict) -> list[str]:
    return [x for k, v in sound.items() for x in (k, *(v if isinstance(v, list) else [v]))]


def write_json(path: Path, records: list) -> None:
    path.write_text(json.dumps(records))


def test_denoising_orders_the_sources(refusal):
    """The README's command, shortened: the clean source leads, and the test loss falls."""
    argv = "--batch-size 48 --val-batch-size 32 --steps 20 --out out".split()
    said = done(*argv, ranks=2, flags=[])
    result = json.loads(Path("out/weights.json").read_text())
    weights, (before, after) = result["weights"], result["test_loss"]
    assert weights["clean"] > max(weights["shuffled"], weights["junk"]) + 0.1
    assert sum(weights.values()) == pytest.approx(1) and after < 0.5 * before
    assert result.keys() >= {"weights_se", "gap", "gap_se", "snr"}
    assert result["differs"].keys() == weights.keys()
    assert all(text in said for text in ("held-out test loss", "█")) and "elsewhere" not in said
    ahead = "20 steps of 48 training and 32 validation samples: about "
    assert said.index(ahead) < said.index("evaluating 384 test records\n") < said.index(" steps, ")
    assert "20 of 20 steps, " in said and "\r" not in said  # off a terminal a bar is lines
    assert said.count("planned peak") == 1 and "measured" not in said
    table = rows("out")
    assert len(table) == 20 and table[0]["source_loss_w"] == table[0]["source_loss_u"]
    assert table[0]["weights"] == {name: pytest.approx(1 / 3, abs=1e-6) for name in weights}
    shown = done(*argv, flags=[])  # on one rank now
    assert "finished" in shown and "clean" in shown
    lines = refusal([*argv, "--steps", "41", "--alpha", "30"])
    assert [line.split(" another run: ")[1] for line in lines] == [
        "--alpha was 10.0, now 30.0; with another --out and --resume out it may",
        "--steps was 20, now 41",
    ]  # fmt: skip


def test_runs_from_a_shell_and_as_the_one_rank_of_a_launcher(monkeypatch):
    ended = launch(*FLAGS, *QUICK, "--out", "shell")
    assert ended.returncode == 0, ended.stderr
    launched = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    done(*QUICK, "--out", "launched")
    assert rows("launched") == rows("shell")
    launched, shell = (Path(out, "model/model.safetensors") for out in ("launched", "shell"))
    assert launched.read_bytes() == shell.read_bytes()
    trained = from_pretrained("shell/model")
    first = build(trained.config, random_weights(trained.config, 0))
    assert not torch.equal(trained.embed.weight, first.embed.weight)


def test_overlap_is_a_warning_with_counts():
    records = [{"instruction": f"say {n}", "output": "yes"} for n in range(30)]
    other = [{"instruction": f"  SAY {n}", "output": "no"} for n in (7, 18, 21)]
    with_input = records[2] | {"input": "loudly"}  # another prompt
    parts = {"a": [*records[:20], with_input], "v": records[18:22],
             "t": [*records[2:5], *records[25:], *other]}  # fmt: skip
    for name, some in parts.items():
        write_json(Path(f"{name}.json"), some)
    args = "--train a=a.json --val v.json --test t.json --val-batch-size 2".split()
    all_of, kept = (prepare(parse([*args, *more]), 1) for more in ([], ["--drop-overlap"]))
    notes = [note.removesuffix(" (--drop-overlap drops them)") for note in all_of.notes[-3:]]
    assert [note.replace(", case and spaces aside", "") for note in notes] == [
        "2 records of a (numbers 19, 20) have a prompt of val; 2 are the same throughout",
        "5 records of a (numbers 3, 4, 5, 8, 19) have a prompt of test; 3 are the same throughout",
        "2 records of val (numbers 1, 4) have a prompt of test; 0 are the same throughout",
    ]
    assert [note.rpartition(": ")[2] for note in kept.notes[-3:]] == [
        "dropped from train", "dropped from train", "dropped from val",
    ]  # fmt: skip
    assert [len(found.sources["a"]) for found in (all_of, kept)] == [21, 15]
    (left,) = (i for i, n in enumerate(kept.sources["a"].numbers) if n == 21)
    assert b"say 2\nloudly\nyes" in bytes(example(kept.sources["a"], left)[0][1:-1].tolist())
    assert [len(found.val) for found in (all_of, kept)] == [4, 2]


def test_batches_of_less_than_the_sources_or_more_than_there_is_are_noted():
    argv = [*FLAGS, "--batch-size", "2", "--val-batch-size", "41"]
    assert prepare(parse(argv), 1).notes[-2:] == [
        "--batch-size 2 is less than the 3 sources, which take turns",
        "--val-batch-size 41 is more than there are validation records, 40: a step has some more "
        "than once",
    ]  # fmt: skip


def test_the_test_loss_between_both_ends_changes_nothing_else():
    done("--steps", "5", "--out", "ends")
    done("--steps", "5", "--out", "often", "--eval-every", "2")
    ends, often = rows("ends"), rows("often")
    found = [row.pop("test_loss", None) for row in often]
    first, *_, last = (row.pop("test_loss", None) for row in ends)
    assert found[0] == first and found[-1] == last and often == ends
    assert [loss is not None for loss in found] == [True, False, True, False, True]
    assert found[2] not in (first, last)


def test_an_absent_source_is_null_and_rounds_raise_alpha():
    done("--steps", "4", "--outer-rounds", "2", "--tau", "3", "--batch-size", "2", "--out", "out")
    table = rows("out")
    assert all(list(row["source_loss_w"].values()).count(None) == 1 for row in table)
    assert [row["alpha"] for row in table] == [10.0] * 4 + [30.0] * 4


@pytest.mark.parametrize("more", [[], ["--cpu-offload"]], ids=["", "in turns"])
def test_nonfinite_loss_stops_or_is_passed_over(sound, more):
    """The embedding of Z is infinite, and of the samples only one of source b has a Z. The state
    before that step is saved, also where LISA has just drawn other blocks, and if the run may pass
    over it, it goes on from there, to the same bits as one that always might."""
    tensors = load_file("checkpoint/model.safetensors")
    tensors["model.embed_tokens.weight"][ord("Z")] = torch.inf
    save_file(tensors, "checkpoint/model.safetensors")
    write_json(Path("b.json"), [{"text": "Zzz" if i == 5 else "abc"} for i in range(12)])
    sound["--train"][1] = "b=b.json"
    argv = [*flags(sound), *"--steps 6 --batch-size 4 --val-batch-size 4 --dtype bf16".split()]
    argv += ["--lisa-layers", "1", "--lisa-interval", "1", *more]
    code, said = run(flags=argv)
    assert code == 1 and "Traceback" not in said
    why = ": not finite: the loss of source b under w, the loss of source b under u."
    step = int(said.partition(why)[0].rpartition("step ")[2])
    assert 0 < step < 6 and len(rows("out")) == step and saved("out") == [f"step-{step}"]
    assert "--resume out, or an earlier checkpoint of it, to go on." in said
    assert done("--skip-nonfinite", "--out", "straight", flags=argv)

    said = done("--skip-nonfinite", flags=argv)
    assert "not finite: 1" in said
    assert json.loads(Path("out/weights.json").read_text())["skipped"] == 1
    before, bad = rows("out")[step - 1 : step + 1]
    assert bad["source_loss_w"]["b"] is None and bad["source_loss_w"]["a"] is not None
    assert [row["step"] for row in rows("out") if not row["finite"]] == [step]
    assert bad["weights"] == before["weights"]
    assert_same("out", "straight")


def limit_memory() -> None:
    """To 2 GB of addresses beside what imports take."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = 2_000_000_000 + resource.getpagesize() * pages
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def test_out_of_memory_names_the_plan_and_what_helps():
    large = ["--batch-size", "8192", "--micro-batch-size", "8192", "--steps", "1"]
    code, said = run(*large, "--out", "out", fault=limit_memory)
    assert code == 1 and "Traceback" not in said
    planned = said.split("memory: ")[1].splitlines()[0]
    (line,) = (line for line in said.splitlines() if "rank 0 ends: " in line)
    assert f"out of memory: {planned}; most likely" in line and "--activation-checkp" in line
    assert "Traceback" in Path("out/error-rank0.log").read_text()


def test_all_problems_are_printed_together(sound, refusal):
    Path("broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    Path("odd.jsonl").write_text('{"text": "fine"}\n{"colour": "red"}')
    Path("empty.json").write_text("[]")
    sound["--train"] += ["c=broken.jsonl", "d=odd.jsonl", "e=empty.json", "f=missing.json"]
    sound |= {"--batch-size": "63", "--lisa-layers": "4", "--max-length": "129", "--tau": "0"}
    sound["--shard-size"] = "3"
    lines = refusal(flags(sound), world=2)
    for expected in ("broken.jsonl:2: ", "odd.jsonl:2: ", "empty.json: ", "missing.json: ",
                     "--shard-size 3 does not divide the 2 rank(s)",
                     "--batch-size 63 is not divisible by 2 ranks: take 62 or 64",
                     "--lisa-layers 4: the model has 3 blocks", "--tau 0.0: ",
                     "--max-length 129: the model has 128 positions"):  # fmt: skip
        assert sum(expected in line for line in lines) == 1, (expected, lines)


A, B = "a=train_a.jsonl", "train_b.jsonl"
TOO_LONG = "[Errno 36] File name too long: 'x"


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"--train": [A, f"a={B}"]}, f"--train {B}: the name a is used twice: give NAME=PATH"),
        ({"--train": [A, f"={B}"]}, f"--train ={B}: expected NAME=PATH"),
        ({"--train": [A, "b="]}, "--train b=: expected NAME=PATH"),
        ({"--train": [B, f"twins/{B}"]}, f"--train twins/{B}: the name train_b is used twice"),
        ({"--train": [A, f"b,c={B}"]}, f"--train b,c={B}: a name may have no comma"),
        ({"--train": [A, f"b={'x' * 300}"]}, TOO_LONG),
        ({"--out": "x" * 300}, TOO_LONG),
        ({"--out": "x" * 300, "--resume": "never"}, TOO_LONG),
        ({"--train": ["nowhere*.json"]}, "--train nowhere*.json: no file matches"),
        ({"--train": ["twins"]}, "--train twins/train_x.jsonl: the name x is used twice"),
        ({"--val": "train_a.jsonl"}, "--val train_a.jsonl has the same records as --train a"),
        ({"--test": "array.json"}, "--test array.json has the same records as --val"),
        ({"--train": [A, "b=as-val.jsonl"], "--drop-overlap": []},
         "train b: no record is left after --drop-overlap"),
        ({"--val": "as-val.jsonl", "--test": "array.json", "--drop-overlap": []},
         "val: no record is left after --drop-overlap"),
        ({"--train": ["a=twins"]}, "--train a=twins: a folder, whose train_* files are sources"),
        ({"--task": "graded"}, "--task graded contradicts --train: "),
        ({"--tau": "2"}, "--tau 2.0: needs --outer-rounds"),
        ({"--mode": "finetune", "--weights": "uniform", "--also": "c=val.jsonl"},
         "--val val.jsonl has the same records as --also c"),
        ({"--val-batch-size": "0"}, "--val-batch-size 0: "),
        ({"--val-batch-size": "1000001"}, "--val-batch-size 1000001: permitted is"),
        ({"--batch-size": "100000000"}, "--batch-size 100000000: permitted is a whole number"),
        ({"--micro-batch-size": "10000000"}, "--micro-batch-size 10000000: permitted is"),
        ({"--steps": "0"}, "--steps 0: "),
        ({"--steps": "9" * 9, "--outer-rounds": "9" * 9},
         "--steps and --outer-rounds make 1e+18 steps: permitted are 1e9"),
        ({"--epochs": "9" * 9, "--batch-size": "1"}, "--steps and --outer-rounds make 8e+10 steps"),
        ({"--alpha": "nan"}, "--alpha nan: "),
        ({"--alpha": "1e308"}, "--alpha 1e+308: "),
        ({"--lr-lambda": "1e308"}, "--lr-lambda 1e+308: permitted is"),
        ({"--seed": "-1"}, "--seed -1: "),
        ({"--seed": str(2**32)}, "--seed 4294967296: "),
        ({"--tau": "1e5", "--outer-rounds": "3"}, "--tau 100000.0: "),
        ({"--tau": "0.1", "--outer-rounds": "1000"}, "--tau 0.1: permitted is what leaves alpha"),
        ({"--resume": "loop"}, "--resume loop: no such directory"),
        ({"--mode": "finetune", "--weights": "uniform", "--samples": "9" * 9, "--repeat": []},
         "--samples 999999999: "),
        ({"--template": "llama3"}, "--template llama3: "),
        ({"--model": "no/such/model"}, "no/such/model: "),
        ({"--model": "short"}, "--template plain: the token '<eos>' has the id 257: the embedding"),
        ({"--model": "run"}, "run/config.json: is of a run: its model is in the directory model"),
    ],
)
def test_refusals(sound, refusal, change, expected):
    held_out = Path("val.jsonl").read_text().splitlines()
    Path("as-val.jsonl").write_text("\n".join(some := held_out[:5]))
    Path("array.json").write_text(f"[{','.join(held_out[::-1])}]")
    Path("loop").symlink_to("loop")
    write_model(Path("short"), vocab_size=200)
    Path("twins").mkdir()
    Path("run").mkdir()
    write_json(Path("run/config.json"), {"flags": {}, "versions": {}})
    for name in ("train_x.json", "train_x.jsonl"):
        Path("twins", name).write_text(some[0])
    lines = refusal(flags(sound | change))
    assert len(lines) == 1 and lines[0].startswith(expected), lines


def test_sources_may_be_given_one_by_one_and_what_is_odd_is_noted(sound):
    assert source_paths(["a.json", "x/b.jsonl"]) == {"a": Path("a.json"), "b": Path("x/b.jsonl")}
    a, b = sound.pop("--train")
    same = a.replace("a=", "again=", 1)
    found = prepare(parse([*flags(sound), "--train", a, "--train", b, same]), 1)
    assert list(found.sources) == ["a", "b", "again"]
    assert "40 records of a have a prompt of again; 40 are the same throughout" in found.notes
    found = prepare(parse([*flags(sound), "--train", a]), 1)
    assert any("there is one source" in note for note in found.notes)


def chat_template(folder: Path, source: str | None) -> None:
    """Give a checkpoint this chat template, and no other."""
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config.pop("scalebio_template", None)
    file.write_text(json.dumps(config | {"chat_template": source}))


OWN = "{% for m in messages %}{{ m.role + ':' + m.content + eos_token }}{% endfor %}" \
      "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"


def test_a_run_goes_on_with_the_template_it_began_with(sound, refusal):
    model = Path(sound["--model"])
    chat_template(model, OWN)
    argv = flags(sound | {"--template": "auto", "--steps": "2", "--save-every": "1"})
    assert "note: --template auto: own, the chat template of" in done(*argv, flags=[])
    saved = json.loads(Path("out/model/tokenizer_config.json").read_text())
    assert (saved["scalebio_template"], saved["chat_template"]) == ("own", OWN)
    assert json.loads(Path("out/config.json").read_text())["flags"]["template"] == "own"
    shutil.rmtree("out/model")
    assert "goes on from" in done(*argv, flags=[])
    shutil.rmtree("out/model")
    chat_template(model, "{# anew #}" + OWN)
    assert [line.split(": ")[1] for line in refusal(argv)] == ["the tokenizer has changed"]
    chat_template(model, None)
    assert "--template was own, now alpaca" in refusal(argv)[0]


def test_a_vocabulary_may_have_more_ids_than_the_embedding_if_none_is_used(sound, refusal):
    model = Path(sound["--model"])
    spec = json.loads((model / "tokenizer.json").read_text())
    more = {"id": 258, "content": "zebra", "special": False, "single_word": False,
            "lstrip": False, "rstrip": False, "normalized": False}  # fmt: skip
    (model / "tokenizer.json").write_text(json.dumps(spec | {
        "added_tokens": [*spec["added_tokens"], more]}))  # fmt: skip
    prepare(parse(flags(sound)), 1)
    Path("train_a.jsonl").write_text('{"text": "a horse"}\n\n{"text": "a zebra"}\n')
    assert refusal(flags(sound)) == [
        "train_a.jsonl: the token 'zebra' has the id 258: the embedding has only 258 rows"
    ]


def test_an_out_that_holds_something_else_is_left_alone(sound, refusal):
    Path("kept").mkdir()
    Path("kept/letter.txt").write_text("dear")
    of_no_run = (None, "{", "[]", '{"model_type": "llama"}',
                 '{"flags": {"a": 1}, "data": {"train a": 3}, "mixture": null}',
                 '{"flags": {"a": 1}, "data": {}, "mixture": [1]}')  # fmt: skip
    for content in of_no_run:
        if content:
            Path("kept/config.json").write_text(content)
        (line,) = refusal(flags(sound | {"--out": "kept"}))
        assert line == "--out kept: holds files, but no run to go on with"
    assert Path("kept/letter.txt").read_text() == "dear"


def test_bad_input_under_torchrun_prints_its_lines_and_no_traceback_of_ours():
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2"
    ended = launch("--batch-size", "63", "--lisa-layers", "9", launcher=torchrun)
    assert ended.returncode != 0 and not Path("runs").exists()
    assert "take 62 or 64" in ended.stderr and "--lisa-layers 9" in ended.stderr
    assert "train.py\", line" not in ended.stderr
    *_, first, second, _ = ended.stderr.splitlines()  # what torchrun prints ends with ours
    assert first.endswith("2 ranks: take 62 or 64") and second.strip().startswith("--lisa-layers 9")


@pytest.mark.parametrize("program, said", [("train", "[0]\n"), ("evaluate", "mt-bench")])
def test_help_does_not_wait_for_torch(program, said):
    code = (f"import runpy, sys; sys.modules['torch'] = None; sys.argv[1:] = ['--help']; "
            f"runpy.run_path({str(ROOT / program)!r} + '.py', run_name='__main__')")  # fmt: skip
    done, other = (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                       env=os.environ | {"RANK": rank})
        for rank in "01"
    )  # fmt: skip
    assert done.returncode == 0 and said in done.stdout, done.stderr
    assert other.returncode == 0 and other.stdout == ""  # torchrun's ranks say it once
    if program == "train":
        assert done.stdout.partition("examples:\n")[2].count("torchrun ") == 3
        choices = {f.name: f.metadata["choices"] for f in dataclasses.fields(Flags)}
        assert choices["lisa_ends"] == ENDS and choices["dtype"] == ("auto", *DTYPES)


@pytest.mark.parametrize("argv, out", [
    ("", "denoising-seed0"), ("--task graded --seed 3", "graded-seed3"),
    ("--train a.json b/c.jsonl.gz", "tiny-a-c-seed0"),
    ("--model org/M-8B --mode finetune --train x=a=b.json d=org/wiki:test[en] 'y/t*' z=e a/",
     "M-8B-x-d-t-and-2-more-finetune-seed0"),
    ("--mode draw --train tatsu-lab/alpaca", "alpaca-draw-seed0"),
])  # fmt: skip
def test_where_a_run_goes_names_model_and_data(argv, out):
    assert parse(shlex.split(argv)).out == Path("runs", out)


def test_flags_may_stand_in_a_file(capsys):
    lines = ("\ufeff# a \"comment", "--steps 7  # and another \\", "", "--train 'a b.json' \\",
             "  c=#d '# e' \\", "f\\\\")  # fmt: skip
    Path("run.args").write_text("\n".join(lines), encoding="utf-8")
    flags = parse(["@run.args", "--seed", "2"])
    assert (flags.steps, flags.seed) == (7, 2)
    assert flags.train == ["a b.json", "c=#d", "# e", "f\\"]
    for content in (b"--out 'x", b"--train a\\\nb", b"--out caf\xe9\xff", b"@run.args", None):
        Path("run.args").write_bytes(content) if content else Path("run.args").unlink()
        with pytest.raises(SystemExit):
            parse(["@run.args"])
        assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("flags", [["--seed", "1e3"], ["--sed", "1"], ["--lr-lambda", "x"],
                                   ["--steps", "2", "--epochs", "2"]])  # fmt: skip
def test_flags_that_cannot_be_read_are_refused_in_a_line(capsys, flags):
    with pytest.raises(SystemExit) as stopped:
        train.main(flags)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and not out
    assert flags[0] in err and len(err.splitlines()) == 1


def test_a_held_out_loss_that_is_not_finite_is_said(monkeypatch, capsys):
    monkeypatch.setattr(train.evaluate, "loss", lambda *_: SimpleNamespace(mean=math.nan))
    assert train.main("--steps 2 --batch-size 8 --val-batch-size 8 --out out".split()) == 0
    assert "\nheld-out test loss: not finite after\n" in capsys.readouterr().out
    assert [row["test_loss"] for row in rows("out")] == [None, None]


def test_compile_without_a_compiler_is_refused_in_a_line(refusal, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    (line,) = refusal(["--compile"])
    assert line.startswith("--compile needs a C++ compiler")


def test_a_tracker_that_is_missing_is_refused_in_a_line(refusal, monkeypatch):
    monkeypatch.setattr(flags_of_train, "find_spec", lambda name: None)
    assert refusal(["--report-to", "trackio"]) == ["--report-to trackio: pip install trackio"]


def test_contradictory_flags_of_a_plan_are_refused_together(refusal):
    lines = refusal(("--plan --gpus 0 --gpu-memory 2 --lisa-layers 0 --lisa-ends sampled "
                     "--lisa-coupling independent --max-length 513").split())  # fmt: skip
    assert sorted(re.split(" contradicts |: ", line)[0] for line in lines) == [
        "--gpu-memory 2.0", "--gpus 0", "--lisa-coupling independent", "--lisa-ends sampled",
        "--max-length 513",
    ]  # fmt: skip
    for bad in ("--batch-size 0", "--epochs inf", "--epochs nan --mode finetune"):  # in the steps
        (line,) = refusal(["--plan", *bad.split()])
        assert line.startswith(" ".join(bad.split()[:2]))
    assert refusal(["--json", "--gpu-memory", "80"]) == [
        "--gpu-memory goes with --plan alone", "--json goes with --plan alone",
    ]  # fmt: skip


def test_the_learning_rate_of_w_is_that_of_u_unless_it_is_given():
    given = [parse(words.split()) for words in ("", "--lr-w 3e-4", "--lr-w 3e-4 --lr-u 1e-4")]
    assert [(f.lr_w, f.lr_u) for f in given] == [(1e-3, 1e-3), (3e-4, 3e-4), (3e-4, 1e-4)]
    assert parse("--mode finetune --weights uniform --lr-w 3e-4".split()).lr_u is None


def test_learning_rate_schedule():
    factors = [train.lr_factor(t, 100, 0.03, "cosine") for t in range(100)]
    assert factors[:4] == [1 / 3, 2 / 3, 1.0, 1.0]
    assert factors[-1] < 1e-3 and factors == sorted(factors[:3]) + sorted(factors[3:])[::-1]
    assert train.lr_factor(50, 100, 0, "linear") == pytest.approx(0.5)
    assert train.lr_factor(99, 100, 0.1, "constant") == 1
