"""evaluate.py: losses with their standard errors, accuracy, generation, as a user starts them."""

import gzip
import json
import math
import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors

import data
import evaluate
import grading
import train
from grading import answers, replies
from grading.replies import Journal, read
from hf import shown, templates
from model import from_pretrained, generate
from sources import tasks
from tests.cases import example
from tests.forked import finish, start, write_model

pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("checkpoint") / "model", template="plain")


@pytest.fixture
def records():
    words = ["a", "some", "longer words here", "four", "and five", "x" * 50, "seven"]
    Path("val.jsonl").write_text("".join(json.dumps({"text": w}) + "\n" for w in words))
    return Path("val.jsonl")


def judge() -> None:
    """In a process of tests/forked.py: run evaluate.py instead of train.py."""
    train.main = evaluate.main


def on_two_ranks(*args) -> tuple[int, str]:
    """(exit code, all that was printed) of evaluate.py."""
    return finish(start([*map(str, args)], ranks=2, faults={0: judge, 1: judge}, flags=[]))


@pytest.fixture
def here(capsys):
    """here(flags…) runs evaluate.py in this process: (exit code, stdout, stderr)."""

    def call(*args):
        code = evaluate.main([*map(str, args)])
        return code, *capsys.readouterr()

    return call


# Losses


def test_loss_matches_a_loop_over_samples(checkpoint, records, tmp_path):
    model = from_pretrained(checkpoint)
    dataset = data.load_dataset(records, data.byte_tokenizer(), "plain", 64, tmp_path / "cache")
    losses, counts = [], []
    for i in range(len(dataset)):
        tokens, labels = map(torch.from_numpy, example(dataset, i))
        tokens, labels = tokens[None], labels[None]
        losses.append(model(tokens, labels).item())
        counts.append((labels[:, 1:] != -100).sum().item())
    losses, counts = torch.tensor(losses).double(), torch.tensor(counts).double()
    x, tokens = evaluate.sample_losses(model, dataset, micro_batch_size=3)
    torch.testing.assert_close(x, losses, check_dtype=False)
    assert tokens.tolist() == counts.tolist()
    result = evaluate.loss(model, dataset, micro_batch_size=3)
    assert result.n == 7
    assert result.mean == pytest.approx(losses.mean().item(), 1e-6)
    assert result.mean_se == pytest.approx(losses.std().item() / math.sqrt(7), 1e-5)
    assert result.token_mean == pytest.approx((losses @ counts / counts.sum()).item(), 1e-6)


def test_standard_error_of_the_token_mean_matches_the_jackknife():
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 50, (400,), generator=g).double()
    x = torch.rand(400, generator=g).double() + 20 / tokens
    total, count = tokens @ x, tokens.sum()
    left_out = (total - tokens * x) / (count - tokens)
    jackknife = math.sqrt(399 / 400 * ((left_out - left_out.mean()) ** 2).sum())
    # Both estimate the same to O(1/n).
    assert evaluate.summarise(x, tokens).token_mean_se == pytest.approx(jackknife, rel=0.02)


def test_loss_table_is_the_same_on_one_process_and_two(checkpoint, records, here):
    """Of a directory of sources, a file with sources within, and a built-in task."""
    other = write_model(Path("other"), template="plain", seed=1)
    mixture = [{"text": "x" * n, "source": "short" if n < 9 else "long"} for n in range(3, 20)]
    Path("mix.json").write_text(json.dumps(mixture))
    nameless = [{"text": "x" * n, "source": ""} for n in range(3, 5)]
    Path("nameless.json").write_text(json.dumps(nameless))
    Path("sources").mkdir()
    for name in ("math", "code"):
        Path(f"sources/train_{name}.jsonl").write_text(records.read_text())
    args = ("loss", "--model", checkpoint, other, "--data", "sources", "both=mix.json",
            "none=nameless.json", "instruction-seed3", "--micro-batch-size", 2)  # fmt: skip
    code, one, _ = here(*args)
    assert (code, one) == (0, one) == on_two_ranks(*args)
    notes, (_, *lines) = one.splitlines()[:2], one.splitlines()[2:]
    assert all("template plain, which the model was trained with" in note for note in notes)
    rows = [line.replace("±", "").split() for line in lines]
    _, _, test = tasks.task("instruction", 3)
    turns = {label: [[("text", r["text"])] for r in mixture if label in ("both", r["source"])]
             for label in ("both", "long", "short")}  # fmt: skip
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    text = [[("text", r["text"])] for r in lines]
    none = [[("text", r["text"])] for r in nameless]
    expected = {"code": text, "math": text, **turns, "none": none, "instruction-seed3": test}
    models = [str(checkpoint), str(other)]
    assert [row[:2] for row in rows] == [[label, name] for label in expected for name in models]
    for label, name, *values in rows:
        dataset = data.Dataset.from_records(expected[label], data.byte_tokenizer(), "plain", 128)
        r = evaluate.loss(from_pretrained(name), dataset)
        p = math.exp(r.token_mean)
        wanted = [r.n, r.mean, r.mean_se, p, p * r.token_mean_se]
        assert [float(x) for x in values] == pytest.approx(wanted, abs=6e-4)


def test_the_template_is_told_by_the_models_files(tmp_path):
    def told(**config):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        name, why = templates.trained_with(data.load_tokenizer(tmp_path))
        return name, why.split()[-1]

    templates.save_tokenizer(data.byte_tokenizer(), tmp_path, "plain")
    assert told(scalebio_template="plain", chat_template="<|im_start|>") == ("plain", "with")
    assert told(chat_template="{{ messages }}") == ("own", "checkpoint")
    assert told(chat_template=[{"name": "default", "template": "x"}]) == ("own", "checkpoint")
    assert told(chat_template=[{"name": "tools", "template": "x"}]) == told() == (None, "template")
    (tmp_path / "chat_template.jinja").write_text("{{ strftime_now('%Y') }}")
    assert told() == ("own", "2025-01-01")


def test_a_template_is_not_guessed_and_an_end_that_the_files_lack_is_told(checkpoint, sums, here):
    model = shutil.copytree(checkpoint, Path("model"))
    config = model / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {
        "chat_template": None, "scalebio_template": None}))  # fmt: skip
    Path("text.jsonl").write_text('{"text": "some text"}\n')
    Path("chat.jsonl").write_text('{"instruction": "Hi", "output": "you"}\n')
    code, out, _ = here("loss", "--model", model, "--data", "text.jsonl")  # needs no template
    assert code == 0 and "note" not in out
    for args in (("loss", "--data", "chat.jsonl"), ("gsm8k", "--data", sums)):
        code, out, err = here(*args, "--model", model)
        assert code == 2 and out == "" and "no chat template: --template says how" in err
    say = "generate", "--model", model, "--prompt", "Hi", "--max-new-tokens", 2
    assert here(*say)[0] == 0
    for name in ("config.json", "generation_config.json"):
        told = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps(told | {"eos_token_id": 7}))
    code, out, _ = here(*say, "--template", "plain")
    assert code == 0 and "model: <eos> ends an answer, but neither config.json" in out
    assert "note" not in here(*say)[1]


# Generation


def test_generation_goes_on_from_each_prompt(checkpoint, here):
    prompts, model, tok = ("Hi", "Tell me more"), from_pretrained(checkpoint), data.byte_tokenizer()
    args = "generate", "--model", checkpoint, "--max-new-tokens", 8, "--prompt", *prompts
    code, out, _ = here(*args)
    assert (code, out) == (0, out) == on_two_ranks(*args)
    for text in prompts:
        prompt = [tok.bos_id] * tok.add_bos + tok.encode(text)
        (new,) = generate(model, [prompt], 8, eos_id=tok.eos_id)
        said = f"{text}{tok.decode(new)}\n".split("\n")
        assert "\n".join(map(shown, said)) in out  # what a terminal obeys is spelled out


def test_a_story_by_a_real_model(asset, here):
    model, start = asset("model/stories260K-hf"), "Once upon a time"
    _, out, _ = here("generate", "--model", model, "--prompt", start, "--max-new-tokens", 30)
    story = f"{start}, there was a little girl named Lily."
    assert story in out
    assert "Once upon a time" in here("generate", "--model", model, "--prompt", "Once upon")[1]
    for name, text in (("told", story), ("backwards", story[::-1])):
        record = {"text": f"{text} She loved to play."}
        Path(f"{name}.json").write_text(json.dumps([record]))
    _, out, _ = here("loss", "--model", model, "--data", "told.json", "backwards.json")
    told, backwards = (float(line.split()[3]) for line in out.splitlines()[1:3])
    assert told < 2 < 4 < backwards


# GSM8K and MATH


@pytest.fixture
def sums():
    """A file of sums, some of which have the same length."""
    problems = [{"question": f"{a} + {a * a}?", "answer": f"So.\n#### {a + a * a}"}
                for a in range(1, 12)]  # fmt: skip
    Path("sums.json").write_text(json.dumps(problems))
    return "sums.json"


FLAGS = ("--instruction", "Go.", "--max-new-tokens", 6, "--batch-size", 2, "--template", "plain")


def of_index(file: str) -> dict[int, dict]:
    rows = read(Path(file))
    assert len({row["index"] for row in rows}) == len(rows)
    return {row["index"]: row for row in rows}


def test_gsm8k_is_the_same_on_two_ranks_and_goes_on_where_it_was_cut(
    checkpoint, sums, here, monkeypatch
):
    args = ("gsm8k", "--model", checkpoint, "--data", sums, *FLAGS, "--out")
    code_of_two, printed = on_two_ranks(*args, "two")
    code, out, _ = here(*args, "one")
    assert code == code_of_two == 0 and out.replace("one/", "two/") in printed
    rows = of_index("one/gsm8k.jsonl")
    assert rows == of_index("two/gsm8k.jsonl") and rows.keys() == set(range(11))
    model = from_pretrained(checkpoint)
    tok = data.byte_tokenizer()
    for row in rows.values():  # the batch and its padding make no difference
        prompt = templates.render_prompt(tok, "plain", [("user", row["question"] + "\nGo.")])
        (alone,) = generate(model, [prompt], 6, eos_id=tok.eos_id)
        assert row["output"] == tok.decode(alone).strip() and row["tokens"] == len(alone)

    file = Path("one/gsm8k.jsonl")
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])  # within a line
    kept = read(file)
    assert 0 < len(kept) < 11
    assert here(*args, "one")[1] == out and of_index(file) == rows
    assert read(file)[: len(kept)] == kept  # and of_index: none is there twice
    monkeypatch.setattr(replies, "generate", None)  # what is complete needs no generation
    assert here(*args, "one")[1] == out
    assert here("gsm8k", "--rescore", file)[1] == "".join(out.splitlines(True)[1:])


@pytest.fixture
def says(monkeypatch):
    """says(reply): every model replies so from here on, or as reply(prompt) where it is a function;
    returns the prompts that come, as text."""

    def set_up(reply):
        tok, seen = data.byte_tokenizer(), []

        def generate(model, prompts, *args, **kwargs):
            texts = [tok.decode(p) for p in prompts]
            seen.extend(texts)
            return [tok.encode(reply(text) if callable(reply) else reply) for text in texts]

        monkeypatch.setattr(replies, "generate", generate)
        return seen

    return set_up


@pytest.mark.parametrize("task", ["gsm8k", "math"])
def test_accuracy_of_a_model_that_knows_every_third_answer(checkpoint, task, here, says):
    rows = [{"problem": f"{a} + 2?", "solution": f"\\boxed{{{a + 2}}}"} for a in range(30)]
    rows += [{"question": "2" * 300, "answer": "#### 2"}]
    Path("p.json").write_text(json.dumps(rows))

    def third(prompt):
        n = int(prompt.split()[0])
        return f"It is {n + 2 + (n % 3 > 0)}."

    says(third)
    code, out, _ = here(task, "--model", checkpoint, "--data", "p.json", *FLAGS)
    se = math.sqrt(10 / 31 * 21 / 31 / 30)
    assert code == 0 and f"accuracy {10 / 31:.4f} ± {se:.4f} (10 of 31)" in out
    assert "math-verify" in out and "1 questions too long for the model" in out
    assert of_index(f"runs/eval-checkpoint0/{task}.jsonl")[30]["end"] == "no room"


def test_exemplars_are_turns_before_the_question(sums, here, says):
    prompts, model = says("2"), write_model(Path("model"), max_position_embeddings=2048)
    args = ("gsm8k", "--model", model, "--data", sums, *FLAGS, "--shots", 2)
    assert here(*args, "--out", "a")[0] == here(*args, "--exemplars", sums, "--out", "b")[0] == 0
    ours = [answers.read_problems(answers.EXEMPLARS / f"{x}.jsonl") for x in ("gsm8k", "math")]
    for exemplars in ours:
        assert len(exemplars) >= 4 and all("\\boxed{" in e.solution for e in exemplars)
    for prompt, solution in ((prompts[0], ours[0][0].solution), (prompts[-1], "So.\n#### 2")):
        assert prompt.count("\nGo.\n") == 3 and f"\nGo.\n{solution}" in prompt


def test_replies_end_where_the_model_goes_on_with_a_question_of_its_own(sums, here, says):
    says("4\n\n### Instruction:\n5?")
    model = write_model(Path("model"), max_position_embeddings=512)
    assert here("gsm8k", "--model", model, "--data", sums, "--template", "alpaca")[0] == 0
    assert {row["output"] for row in of_index("runs/eval-model/gsm8k.jsonl").values()} == {"4"}


def test_without_math_verify_the_command_says_what_to_install(here, monkeypatch):
    monkeypatch.delitem(sys.modules, "grading.answers")
    monkeypatch.delattr(grading, "answers")
    monkeypatch.setitem(sys.modules, "math_verify", None)
    code, _, err = here("math", "--rescore", "x.jsonl")
    assert code == 2 and err.count("\n") == 1 and "pip install math-verify" in err


def test_a_sampled_reply_depends_on_the_seed_the_question_and_the_turn_alone(checkpoint, here):
    """24 questions at temperature 0.7, in batches of 1 and 16 on one process, and of 5 on two."""
    asked = [{"question_id": n, "category": "writing", "turns": [f"Q{n}?", "Why?"]}
             for n in range(24)]  # fmt: skip
    Path("q.json").write_text(json.dumps(asked))
    args = ("mt-bench", "--model", checkpoint, "--questions", "q.json", "--max-new-tokens", 8)

    def told(out):
        rows = read(Path(out, "mt-bench-answers.jsonl"))
        found = {row["question_id"]: row["choices"][0]["turns"] for row in rows}
        assert len(rows) == 24 and found.keys() == set(range(24))
        return found

    for size, run in ((1, here), (16, here), (5, on_two_ranks)):
        assert run(*args, "--batch-size", size, "--out", f"of{size}")[0] == 0
        assert told(f"of{size}") == told("of1")
    said = told("of1").values()
    assert len(set(map(tuple, said))) == 24 and any(first != second for first, second in said)
    # What is kept is gone on with, and another seed is another file's.
    file = Path("of16/mt-bench-answers.jsonl")
    file.write_text("".join(file.read_text().splitlines(True)[7:]))
    for limit in (20, 24):
        assert here(*args, "--out", "of16", "--limit", limit)[0] == 0
    assert told("of16") == told("of1")
    code, _, err = here(*args, "--out", "of16", "--seed", 1)
    assert code == 2 and "other settings (seed)" in err
    assert here(*args, "--out", "other", "--seed", 1)[0] == 0 and told("other") != told("of1")


def test_other_settings_and_other_questions_are_refused(checkpoint, sums, here):
    args = ("gsm8k", "--model", checkpoint, "--data", sums, *FLAGS, "--out", "out")
    assert here(*args, "--limit", 2)[0] == 0
    before = Path("out/gsm8k.jsonl").read_bytes()

    def refused(*flags):
        code, _, err = here(*args, *flags)
        assert code == 2 and Path("out/gsm8k.jsonl").read_bytes() == before
        return err.partition("(")[2].partition(")")[0]

    assert refused("--shots", 3, "--dtype", "fp64") == "dtype, exemplars"
    Path(sums).write_text(Path(sums).read_text().replace("1 + 1?", "1 plus 1?"))
    assert refused() == "questions"


# Files and bad input


def test_a_journal_drops_a_torn_line_and_has_one_writer(tmp_path):
    file, torn = tmp_path / "new" / "x.jsonl", tmp_path / "torn.jsonl"
    with Journal(file) as journal:
        for n in range(3):
            journal.append({"n": n, "text": "\ud800 ü\n"})
        with pytest.raises(ValueError, match="another process"):
            Journal(file)
    for cut in range(0, file.stat().st_size, 7):
        torn.write_bytes(file.read_bytes()[:cut])
        with Journal(torn) as journal:
            kept = len(journal.rows)
            journal.append({"n": 9})
        assert kept == file.read_bytes()[:cut].count(b"\n")
        assert [row["n"] for row in read(torn)] == [*range(kept), 9]
    torn.write_text('{"n": 1}\n{"n"\n{"n": 2}\n')
    with pytest.raises(ValueError, match="torn.jsonl:2"):
        read(torn)


def test_questions_from_a_hub_dataset(sums, monkeypatch):
    def download(repo, repo_type, revision, allow_patterns):
        if (repo, repo_type) == ("full/disk", "dataset"):
            raise OSError(28, "No space left on device")
        if (repo, repo_type, revision) != ("some/sums", "dataset", None):
            raise errors.LocalEntryNotFoundError("offline")
        Path("cache/data").mkdir(parents=True, exist_ok=True)
        if allow_patterns == ["data/test.jsonl"]:
            shutil.copy(sums, "cache/data/test.jsonl")
        return "cache"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert len(answers.read_problems(evaluate.local_file("some/sums/data/test.jsonl"))) == 11
    for file, why in (
        ("some/sums/data/dev.jsonl", "some/sums/data/dev.jsonl: there is no such file"),
        ("no/sums/x.jsonl", "no/sums/x.jsonl: .* no/sums: neither a file .*LocalEntryNotFound"),
        ("full/disk/x.jsonl", ".* no such file; full/disk: cannot be downloaded: .*No space left"),
    ):
        with pytest.raises(ValueError, match=f"^{why}"):
            evaluate.local_file(file)
    Path("data").mkdir()  # a misspelt path of one's own is not looked for on the hub
    assert evaluate.local_file("data/math/tset.jsonl") == Path("data/math/tset.jsonl")


def test_bad_input_is_a_line_for_each_problem_and_writes_nothing(checkpoint, records, here):
    Path("bad.jsonl").write_text('{"question": 1}\n')
    Path("long.jsonl").write_text('{"question": 1}\n' * 100)
    Path("folder").mkdir()
    packed = gzip.compress(b'{"question": "1 + 1?", "answer": "2"}\n' * 1000)
    Path("broken.gz").write_bytes(packed[:30] + bytes(30) + packed[60:])
    row = {"answer": "2", "output": "2", "settings": {"model": "m"}}
    for n, other in enumerate(({"output": None}, {"settings": {}}, {"settings": []})):
        Path(f"scored{n}.jsonl").write_text(json.dumps(row | other) + "\n")
    question = {"question_id": 1, "category": "math", "turns": ["a", "b"]}
    Path("q.jsonl").write_text(json.dumps(question))
    judge = "--judge-url", "http://localhost:9/v1", "--judge-model", "m"
    loss, no_model, mt = ("loss", "--model", checkpoint, "--data"), ("--model", "no/x"), "mt-bench"
    say = "generate", "--model", checkpoint, "--prompt", "Hi"
    for n, args in (
        (3, ("loss", *no_model, checkpoint, "--data", "missing.json", "no.json")),
        (1, (*loss, "a=missing.json")),
        (1, (*loss, records, records)),
        (1, (*loss, "nothing*.json")),
        (1, (*loss, "denoising", "--max-length", 2)),
        (1, (*say, "--template", "llama3")),
        (1, (*say, "word " * 999)),
        (2, ("gsm8k",)),
        (3, ("gsm8k", *no_model, "--data", "bad.jsonl", "--shots", 9)),
        (1, ("gsm8k", "--model", checkpoint, "--data", "broken.gz")),
        (1, ("math", "--rescore", "bad.jsonl")),
        (1, ("math", "--rescore", "folder")),
        *[(1, ("math", "--rescore", f"scored{n}.jsonl")) for n in range(3)],
        (1, (mt, "--model", checkpoint, "--questions", "q.jsonl", "--judge-prompts", "bad.jsonl",
             *judge)),
        (1, (mt, "--model", checkpoint)),
        (3, (mt, *no_model, "--questions", "bad.jsonl", "--judge-url", "x")),
        (3, (mt, "--answers", "no", "--questions", "no", "--judge-url", "x", "--judge-model", "y")),
        (3, (mt, "--model", checkpoint, "--questions", "bad.jsonl", "--judge-prompts", "no")),
    ):
        code, out, err = here(*args)
        assert code == 2 and out == "" and len(err.splitlines()) == n, (args, err)
    code, _, err = here(*loss, "long.jsonl", "bad.jsonl")
    assert code == 2 and len(err.splitlines()) == 7 and "more: unknown record" in err
    assert not Path("runs").exists()
