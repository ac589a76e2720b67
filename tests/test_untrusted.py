"""Files that others wrote: whatever they hold, they are refused in a line, and nothing in them is
executed."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

import data
import hf
import shard
import train
from cli.flags import parse
from cli.inputs import prepare
from hf import DEPTH, Problems, open_regular, parse_json, read_json, say, templates, tokenizer
from hf.tokenizer import byte_spec
from tests import forked
from tests.forked import done, run
from tests.worker import FAMILIES

HOSTILE_JSON = {
    "deep": ("[" * 100_000, "nested deeper than 100"),
    "deep object": ('{"a":' * 101 + "1" + "}" * 101, "nested deeper than 100"),
    "twice": ('{"a": {"b": 1, "b": 2}}', "the key 'b' comes twice"),
    "nan": ('{"a": NaN}', "NaN is not a finite number"),
    "infinity": ('{"a": -Infinity}', "-Infinity is not a finite number"),
    "overflow": ('{"a": 1e999}', "1e999 is not a finite number"),
    "digits": ('{"a": ' + "9" * 400 + "}", "a number of 400 digits"),
    "digits of Python's limit": ('{"a": ' + "9" * 5000 + "}", "a number of 5000 digits"),
    "surrogate": (r'{"a": "\ud800"}', "surrogates not allowed"),
    "broken": ('{"a": ', "Expecting value"),
    "bytes": (b'{"a": "\xff"}', "can't decode byte 0xff"),
    "array": ("[1]", "not a JSON object"),
    "size": ('{"a": "' + 1000 * "x" + '"}', "more than 1,000 bytes"),
}


@pytest.mark.parametrize("name", HOSTILE_JSON)
def test_json_that_is_refused(name, write):
    content, expected = HOSTILE_JSON[name]
    file = write(content)
    with pytest.raises(ValueError, match=expected) as caught:
        read_json(file, 1000 if name == "size" else 10**6)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(file))


def test_json_that_is_read():
    deep = "[" * (DEPTH - 1) + "1" + "]" * (DEPTH - 1)
    text = '{"a": [1, -2.5e-3, true, null, "\\ud83d\\ude00", 1000000000000000019884624838656]}'
    assert parse_json(text) == json.loads(text) and parse_json(deep) == json.loads(deep)


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(OSError, match="not a regular file"):
            open_regular(path)
        with pytest.raises(ValueError, match=r"cannot be read \(not a regular file\)"):
            read_json(path)


def test_lines_of_others_stay_lines(capsys):
    """No escape sequence, no other line, no text turned round reaches the terminal."""
    evil = "a\x1b[2J\x9b1A\r\nheld-out test loss: 0.0\u202e\u2028\x00\x7f\ud800"
    say(evil, "é 中 █ ±\t…", *Problems([evil, *["x"] * 70]))
    lines = capsys.readouterr().out.split("\n")
    spelled = r"a\x1b[2J\x9b1A\r\nheld-out test loss: 0.0\u202e\u2028\x00\x7f\ud800"
    assert lines[:3] == [spelled, "é 中 █ ±\t…", spelled] and lines[-2:] == ["… and 11 more", ""]


def test_a_field_of_a_config_that_is_refused_stays_in_its_line(write, capsys):
    file = write(FAMILIES["llama"] | {"a\x1b[2J\nhidden_size": 1})
    assert train.main(["--plan", "--model", str(file)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and r"a\x1b[2J\nhidden_size = 1: not supported" in err and err.count("\n") == 1


def split_by(pattern: str) -> dict:
    """byte_spec() with a pattern that tiktoken takes over."""
    split = {"type": "Split", "pattern": {"Regex": pattern + r"|\s+(?!\S)|\s+"},
             "behavior": "Isolated", "invert": False}  # fmt: skip
    steps = [split, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}


def normalized_by(*steps: dict) -> dict:
    """byte_spec() with a normalizer, which tiktoken has not: `tokenizers` takes it over."""
    return {"normalizer": {"type": "Sequence", "normalizers": [*steps]}}


def model_of(vocab: dict, merges: list = ()) -> dict:
    own = byte_spec()["model"]
    return {"model": own | {"vocab": own["vocab"] | vocab, "merges": [*merges]}}


DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
BACKTRACK = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"}
HOSTILE_TOKENIZERS = {
    "two tokens of one id": (model_of({"ab": 7}, [["a", "b"]]), "two tokens have one id"),
    "negative id": (model_of({"ab": -1}), "not a token and its id: ('ab', -1)"),
    "fractional id": (model_of({"ab": 1.5}), "not a token and its id: ('ab', 1.5)"),
    "id of 33 bits": (model_of({"ab": 2**33}), "not a token and its id: ('ab', 8589934592)"),
    "cyclic merges": (model_of({"ab": 300, "ba": 301}, [["a", "b"], ["ab", "a"], ["b", "a"]]),
                      "not understood: PanicException"),
    "long token": ({"added_tokens": [{"id": 300, "content": "x" * 10**6}]}, "not a token"),
    "empty token": ({"added_tokens": [{"id": 300, "content": ""}]}, "not a token and its id"),
    "pattern that matches nothing": (split_by("[0-9]"), "does not match all text"),
    "pattern that backtracks": (split_by("(?=(a+)+b)x"), "does not match all text"),
    "pattern that is empty": (split_by(""), "PanicException"),
    "normalizer that backtracks": (normalized_by(BACKTRACK), "retry-limit-in-match"),
    "normalizer that doubles": (normalized_by(*[DOUBLE] * 24), "crashes, or takes more than 1 s"),
    "normalizer that aborts": (normalized_by({"type": "Precompiled", "precompiled_charsmap":
                                              "/" * 21 + "w=="}), "crashes, or takes more"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE_TOKENIZERS)
def test_tokenizers_that_are_refused(name, write, monkeypatch, capfd):
    """Neither a panic nor its trace, nor the end of the process, nor a wait."""
    pytest.importorskip("tokenizers")
    monkeypatch.setattr(hf, "TRIAL_SECONDS", 1)
    changes, expected = HOSTILE_TOKENIZERS[name]
    file = write(byte_spec() | changes, name="tokenizer.json")
    with pytest.raises(ValueError) as caught:
        tokenizer.load_tokenizer(file.parent)
    assert expected in str(caught.value) and str(caught.value).startswith(f"{file}: ")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("jinja", [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'x' * 10000000000 }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ cycler.__init__.__globals__ }}",
    "{% include '/etc/passwd' %}",
    "{{ messages.append(1) }}",
])  # fmt: skip
def test_chat_templates_that_are_refused(jinja, tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "TRIAL_SECONDS", 1)
    tok = data.byte_tokenizer()
    tok.chat, tok.path = jinja, tmp_path
    with pytest.raises(ValueError, match="^" + str(tmp_path)) as caught:
        templates.stop_ids(tok, "own")
    assert len(str(caught.value)) < 400


def test_a_text_that_a_tokenizer_cannot_do_is_a_line():
    tok = data.byte_tokenizer()
    ranks = {bytes([i]): i for i in range(256) if i != ord("q")}
    tok.codec = tokenizer.BytePairCodec(ranks, ".", False, {})
    for work in (lambda: tok.encode("q"), lambda: tok.encode_runs([([("q", True)], True)])):
        with pytest.raises(ValueError, match="tokenizer.json: cannot do this text: "):
            work()


class Payload:
    """A pickle that leaves a folder "executed" where it is opened."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def put(payload: bytes, file: Path) -> None:
    """Write a payload, with the right checksum where there are such."""
    file.write_bytes(payload)
    sums = file.with_name(shard.CHECKSUMS)
    if sums.exists() and file != sums:
        kept = json.loads(sums.read_text()) | {file.name: shard.crc32(file)}
        sums.write_text(json.dumps(kept))


def test_no_payload_in_a_run_or_a_checkpoint_is_executed(own_folder):
    """In the place of every file, and of those that torch would unpickle if it were asked to."""
    pickle.loads(pickle.dumps(Payload()))
    os.rmdir("executed")  # it works
    done("--out", "whole", "--save-every", "6")
    for made in ("model", "checkpoints/step-12"):  # it goes on from step 6
        shutil.rmtree(f"whole/{made}")
    checkpoint, shards = Path("checkpoints/step-6"), "shard-00001-model-00001-of-00001.safetensors"
    found = {str(p.relative_to("whole")) for p in Path("whole").rglob("*") if p.is_file()}
    read = ["config.json", "weights.json", "metrics.jsonl", ".lock",
            *(str(checkpoint / name) for name in ("config.json", shard.CHECKSUMS, shards))]
    assert found == set(read)
    others = [str(checkpoint / name) for name in (".metadata", "run.pt", shards.replace("1", "9"))]
    torch.save(Payload(), "zip.pt")
    payloads = {True: Path("zip.pt").read_bytes(), False: pickle.dumps(Payload())}
    for n, name in enumerate(read + others):
        shutil.copytree("whole", "out")
        put(payloads[name.endswith(".pt")], Path("out", name))
        other = ["--out", f"new-{n}", "--resume", "out"] if checkpoint in Path(name).parents else []
        code, said = run("--out", "out", "--save-every", "6", *other)
        assert not Path("executed").exists(), (name, said)
        assert "Traceback" not in said and code in (0, 1, 2), said
        shutil.rmtree("out")


def test_no_payload_in_a_model_is_executed(own_folder):
    forked.write_model(Path("model"))
    read = ["special_tokens_map.json", "generation_config.json", "chat_template.jinja",
            *(p.name for p in Path("model").iterdir())]  # fmt: skip
    jinja = b"{{ cycler.__init__.__globals__.os.mkdir('executed') }}"
    for name in [*read, "pytorch_model.bin", "tokenizer.model", "modeling_llama.py"]:
        shutil.copytree("model", "m")
        put(jinja if name.endswith("jinja") else pickle.dumps(Payload()), Path("m", name))
        problems, flags = Problems(), [*forked.FLAGS, "--model", "m", "--max-length", "64"]
        with problems.collecting():
            prepare(parse([*flags, *["--template", "own"] * name.endswith("jinja")]), 1)
        assert not Path("executed").exists()
        assert problems.count == (name in read), (name, str(problems))
        shutil.rmtree("m")
