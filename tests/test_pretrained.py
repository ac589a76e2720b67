"""Checkpoints in Hugging Face's format: written, read, refused, and fetched from the hub."""

import json
import os
import shutil
import subprocess
import sys
import threading
import weakref
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf import pretrained
from model import from_pretrained, read_tensors, save_pretrained
from tests.cases import CASES, batch, distance

ROOT = Path(__file__).parents[1]


@pytest.fixture
def llama(checkpoint, tmp_path):
    """A copy of the llama-3.1 checkpoint that a test may spoil."""
    return shutil.copytree(checkpoint("llama-3.1")[1], tmp_path / "llama")


@pytest.mark.parametrize("case", CASES)
def test_saved_model_is_bit_exact_and_opens_in_transformers(case, checkpoint, tmp_path):
    theirs, directory = checkpoint(case)
    ours = from_pretrained(directory)
    save_pretrained(ours, tmp_path / "out")
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert written == {"config.json", "model.safetensors"}

    before, after = (load_file(d / "model.safetensors") for d in (directory, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    again = from_pretrained(tmp_path / "out")
    for a, b in zip(ours.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    tokens, _, _ = batch()
    reopened = type(theirs).from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert torch.equal(reopened(tokens).logits, theirs(tokens).logits)


def test_checkpoint_in_many_files(checkpoint, tmp_path):
    theirs, directory = checkpoint("gpt_neox")
    config = pretrained.load_config(directory)
    half = ((name, tensor.bfloat16()) for name, tensor in read_tensors(directory, config))
    pretrained.write_tensors(tmp_path, config, half, max_bytes=8000)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    # A larger file is one tensor alone.
    assert all(f.stat().st_size < 8000 + 1000 or len(load_file(f)) == 1 for f in files)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for f in files for t in load_file(f).values()
    )

    assert refusal(tmp_path) == []
    tokens, _, _ = batch()
    reopened = type(theirs).from_pretrained(tmp_path, dtype=torch.float32)
    ours = from_pretrained(tmp_path)
    assert distance(ours(tokens), reopened(tokens).logits) < 1e-5

    # Where two files hold a tensor, the index says which to read.
    last = load_file(files[-1])
    save_file(last | {"gpt_neox.embed_in.weight": torch.zeros(67, 32)}, files[-1])
    assert torch.equal(from_pretrained(tmp_path).embed.weight, ours.embed.weight)

    files[1].unlink()
    assert [files[1].name in p for p in refusal(tmp_path)] == [True]
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    assert "not an index" in refusal(tmp_path)[0]


def test_writing_holds_one_file_of_tensors_and_the_next_tensor(checkpoint, tmp_path):
    ours = from_pretrained(checkpoint("llama-3.1")[1])
    alive, most = [], 0

    def copies():
        nonlocal most
        for name, p in ours.named_parameters():
            tensor = p.detach().clone()
            alive.append(weakref.ref(tensor))
            most = max(most, sum(ref().nbytes for ref in alive if ref() is not None))
            yield name, tensor

    pretrained.write_tensors(tmp_path, ours.config, copies(), max_bytes=10_000)
    assert most < 10_000 + max(p.nbytes for p in ours.parameters())

    taken = len(alive)
    pretrained.write_tensors(None, ours.config, copies())
    assert len(alive) == 2 * taken


def test_save_replaces_a_model_and_nothing_else(checkpoint, tmp_path):
    ours = from_pretrained(checkpoint("gpt2")[1])
    save_pretrained(ours, tmp_path / "out")
    with torch.no_grad():
        ours.norm.weight.add_(1)
    save_pretrained(ours, tmp_path / "out")
    assert torch.equal(from_pretrained(tmp_path / "out").norm.weight, ours.norm.weight)
    with pytest.raises(ZeroDivisionError), pretrained.written_whole(tmp_path / "out") as temporary:
        (temporary / "config.json").write_text("half")
        raise ZeroDivisionError
    assert torch.equal(from_pretrained(tmp_path / "out").norm.weight, ours.norm.weight)

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(ValueError, match="no model to replace"):
        save_pretrained(ours, tmp_path / "mine")


# Checkpoints that are not what config.json says


def problems(directory, change):
    """What keeps a checkpoint from being loaded, once its tensors went through `change`."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    return refusal(directory)


def refusal(directory):
    """The lines that from_pretrained refuses a checkpoint with; none if it does not."""
    try:
        from_pretrained(directory)
    except ValueError as error:
        return str(error).splitlines()
    return []


def test_missing_extra_misshaped_and_integer_tensors_are_named(llama):
    def change(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.3.mlp.up_proj.weight"] = torch.zeros(48, 32)
        tensors["model.norm.weight"] = torch.zeros(31)
        tensors["model.embed_tokens.weight"] = torch.zeros(67, 32, dtype=torch.int8)
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(48, 32).to(torch.float8_e4m3fn)
        tensors["lm_head.weight"] = torch.zeros(66, 32)  # no copy of the embedding it is tied to

    found = problems(llama, change)
    assert len(found) == 6
    for name, words in {
        "layers.1.mlp.up_proj": "missing",
        "layers.3.mlp.up_proj": "not a tensor of this model",
        "model.norm": "(31,)",
        "embed_tokens": "I8",
        "layers.0.mlp.up_proj": "F8_E4M3",
        "lm_head": "(66, 32)",
    }.items():
        assert [words in p and str(llama) in p for p in found if name in p] == [True]


def test_harmless_extra_tensors_are_accepted(llama, checkpoint, tmp_path):
    def buffers(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(6)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()  # tied: the same

    assert problems(llama, buffers) == []
    for case, module in (
        ("gpt2", "transformer.h.0.attn"), ("gpt_neox", "gpt_neox.layers.0.attention"),
    ):  # fmt: skip
        directory = shutil.copytree(checkpoint(case)[1], tmp_path / case)

        def masks(tensors, module=module):
            tensors[f"{module}.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool)
            tensors[f"{module}.masked_bias"] = torch.tensor(-1e9)

        assert problems(directory, masks) == []


def test_gpt2_keys_without_prefix(checkpoint, tmp_path):
    theirs, source = checkpoint("gpt2")
    tensors = load_file(source / "model.safetensors")
    bare = {key.removeprefix("transformer."): tensor for key, tensor in tensors.items()}
    save_file(bare, tmp_path / "model.safetensors")
    shutil.copy(source / "config.json", tmp_path)
    tokens, _, _ = batch()
    assert distance(from_pretrained(tmp_path)(tokens), theirs(tokens).logits) < 1e-5


def test_truncated_file_is_named(llama):
    file = llama / "model.safetensors"
    for end in (-1, 100, 0):
        file.write_bytes(file.read_bytes()[:end])
        assert [str(file) in p for p in refusal(llama)] == [True]


def test_directory_without_usable_weights(llama):
    (llama / "model.safetensors").unlink()
    assert "neither model.safetensors" in refusal(llama)[0]
    (llama / "pytorch_model.bin").touch()
    assert "pickle" in refusal(llama)[0]
    (llama / "config.json").unlink()
    assert "config.json" in refusal(llama)[0]


# The hub

HUB_FILES = {
    "config.json": b"{}",
    "model-00001-of-00002.safetensors": b"one",
    "model-00002-of-00002.safetensors": b"two",
    "model.safetensors.index.json": b"{}",
    "tokenizer.json": b"[]",
    "tokenizer.model": b"pieces",
    "generation_config.json": b"{ }",
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"twice",
    "original/consolidated.00.pth": b"pickle",
    "onnx/model.onnx": b"graph",
    "README.md": b"words",
}
COMMIT = "0" * 40


class Hub(BaseHTTPRequestHandler):
    """What huggingface.co answers about one public model, a gated one, and all others."""

    protocol_version = "HTTP/1.1"
    seen = []  # (path, Authorization) of each request

    def do_GET(self):
        self.seen.append((self.path, self.headers.get("Authorization")))
        body, headers = b"{}", {}
        name = self.path.rpartition(f"/resolve/{COMMIT}/")[2]
        if self.path.startswith("/api/models/gated/model"):
            headers["X-Error-Code"] = "GatedRepo"
        elif self.path.startswith("/api/models/some/model/tree/"):
            body = json.dumps([
                {"type": "file", "path": file, "size": len(content), "oid": file}
                for file, content in HUB_FILES.items()
            ]).encode()  # fmt: skip
        elif self.path.startswith("/api/models/some/model"):
            siblings = [{"rfilename": file} for file in HUB_FILES]
            body = json.dumps({"id": "some/model", "sha": COMMIT, "siblings": siblings}).encode()
        elif name in HUB_FILES:
            body, headers = HUB_FILES[name], {"X-Repo-Commit": COMMIT, "ETag": f'"{name}"'}
        else:
            headers["X-Error-Code"] = "RepoNotFound"
        self.send_response({"GatedRepo": 403, "RepoNotFound": 404}.get(
            headers.get("X-Error-Code"), 200))  # fmt: skip
        for key, value in headers.items() | {("Content-Length", str(len(body)))}:
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


ASK = """
import sys
from hf import pretrained
for name in sys.argv[1:]:
    try:
        print(pretrained.find_checkpoint(name))
    except ValueError as error:
        print(error)
"""


def test_hub_is_asked_for_what_is_needed_and_its_refusals_say_what_to_do(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = os.environ | {
        "HF_HOME": str(tmp_path),
        "HF_TOKEN": "hf_secret",
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
    }

    def ask(*names, **more):
        command = [sys.executable, "-c", ASK, *names]
        done = subprocess.run(command, cwd=ROOT, env=env | more, capture_output=True, text=True)
        assert len(done.stdout.splitlines()) == len(names), done.stdout + done.stderr
        return done.stdout.splitlines()

    found, *errors = ask("some/model", "gated/model", "mis/typed", "./no/such/folder")
    server.shutdown()
    server.server_close()
    kept = {p.name: p.read_bytes() for p in Path(found).rglob("*") if p.is_file()}
    assert kept == dict(list(HUB_FILES.items())[:7])
    assert Path(found).is_relative_to(tmp_path)
    of_models = [token for path, token in Hub.seen if "/model" in path]
    assert of_models and set(of_models) == {"Bearer hf_secret"}
    expected = ("is gated: accept", "check the spelling", "check the spelling")
    for error, words in zip(errors, expected, strict=True):
        assert words in error

    assert ask("some/model")[0] == found  # the hub is gone, the cache is not
    found_again, error = ask("some/model", "some/other", HF_HUB_OFFLINE="1")
    assert found_again == found
    assert error.startswith("some/other: ") and "hf download some/other" in error
