"""Checkpoints in Hugging Face's format: written, read, refused, and fetched from the hub."""

import json
import os
import shutil
import weakref
from pathlib import Path
from unittest.mock import Mock

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from cli.inputs import read_config
from hf import pretrained
from model import from_pretrained, read_tensors, save_pretrained
from tests.cases import CASES, batch, distance
from tests.worker import small


@pytest.fixture
def llama(checkpoint, tmp_path):
    """A copy of the llama-3.1 checkpoint that a test may spoil."""
    return shutil.copytree(checkpoint("llama-3.1")[1], tmp_path / "llama")


@pytest.mark.parametrize("case", CASES)
def test_saved_model_is_bit_exact_and_opens_in_transformers(case, checkpoint, tmp_path):
    theirs, directory = checkpoint(case)
    ours = from_pretrained(directory)
    save_pretrained(ours, tmp_path / "out")
    before, after = (load_file(d / "model.safetensors") for d in (directory, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    tokens, _, _ = batch()
    reopened = type(theirs).from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert torch.equal(reopened(tokens).logits, theirs(tokens).logits)


def test_checkpoint_in_many_files(checkpoint, tmp_path):
    theirs, directory = checkpoint("gpt_neox")
    config = pretrained.load_config(directory)
    half = [(name, tensor.bfloat16()) for name, tensor in read_tensors(directory, config)]
    like = [(name, tensor.to("meta")) for name, tensor in half]
    pretrained.write_tensors(tmp_path, config, half, like, max_bytes=8000)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    # A larger file is one tensor alone.
    assert all(f.stat().st_size < 8000 + 1000 or len(load_file(f)) == 1 for f in files)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    sizes = [tensor.nbytes for file in files for tensor in load_file(file).values()]
    assert index["metadata"]["total_size"] == sum(sizes)

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
    assert "not a JSON object" in refusal(tmp_path)[0]


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

    like = ((name, p.detach().to("meta")) for name, p in ours.named_parameters())
    pretrained.write_tensors(tmp_path, ours.config, copies(), like, max_bytes=10_000)
    assert most < 10_000 + max(p.nbytes for p in ours.parameters())


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_every_file_of_a_model_is_readable_by_whom_the_umask_permits(mask, tmp_path):
    before = os.umask(mask)
    try:
        save_pretrained(small(), tmp_path / "out")
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()}
    assert modes == dict.fromkeys(["config.json", "model.safetensors"], 0o666 & ~mask)


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


def spoil(directory, changes):
    """Change tensors of a checkpoint, and return the lines that it is then refused with."""
    tensors = load_file(directory / "model.safetensors") | changes
    tensors = {key: tensor for key, tensor in tensors.items() if tensor is not None}
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
    changes = {
        "model.layers.1.mlp.up_proj.weight": (None, "missing"),
        "model.layers.3.mlp.up_proj.weight": (torch.zeros(48, 32), "not a tensor of this model"),
        "model.norm.weight": (torch.zeros(31), "(31,)"),
        "model.embed_tokens.weight": (torch.zeros(67, 32, dtype=torch.int8), "I8"),
        "model.layers.0.mlp.up_proj.weight": (
            torch.zeros(48, 32).to(torch.float8_e4m3fn), "F8_E4M3"),
        "lm_head.weight": (torch.zeros(66, 32), "(66, 32)"),  # tied to an embedding of 67 rows
    }  # fmt: skip
    found = spoil(llama, {key: tensor for key, (tensor, _) in changes.items()})
    assert len(found) == len(changes)
    for key, (_, words) in changes.items():
        assert [words in line and str(llama) in line for line in found if key in line] == [True]


@pytest.mark.parametrize("case, prefix, buffers", [
    ("llama-3.1", "model.layers.0.self_attn.", {"rotary_emb.inv_freq": (6,)}),
    ("llama-3.1", "lm_head.", {"weight": (67, 32)}),  # tied: what it holds is not looked at
    ("gpt2", "transformer.h.0.attn.", {"bias": (1, 1, 64, 64), "masked_bias": ()}),
    ("gpt_neox", "gpt_neox.layers.0.attention.", {"bias": (1, 1, 64, 64), "masked_bias": ()}),
])  # fmt: skip
def test_harmless_extra_tensors_are_accepted(case, prefix, buffers, checkpoint, tmp_path):
    directory = shutil.copytree(checkpoint(case)[1], tmp_path / case)
    masks = {"dtype": torch.bool} if "bias" in buffers else {}
    extra = {prefix + name: torch.ones(shape, **masks) for name, shape in buffers.items()}
    assert spoil(directory, extra) == []


def test_gpt2_keys_without_prefix(checkpoint, tmp_path):
    theirs, source = checkpoint("gpt2")
    tensors = load_file(source / "model.safetensors")
    bare = {key.removeprefix("transformer."): tensor for key, tensor in tensors.items()}
    save_file(bare, tmp_path / "model.safetensors")
    shutil.copy(source / "config.json", tmp_path)
    tokens, _, _ = batch()
    assert distance(from_pretrained(tmp_path)(tokens), theirs(tokens).logits) < 1e-5


def test_unusable_files_are_named(llama):
    file = llama / "model.safetensors"
    for end in (-1, 100, 0):
        file.write_bytes(file.read_bytes()[:end])
        assert [str(file) in p for p in refusal(llama)] == [True]
    file.unlink()
    assert "model.safetensors" in refusal(llama)[0] and "*.bin" in refusal(llama)[0]
    (llama / "config.json").unlink()
    assert "config.json" in refusal(llama)[0]


def test_what_is_taken_for_a_model_is_named_as_what_it_is(tmp_path, llama):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    (tmp_path / "quantised").mkdir()
    (tmp_path / "quantised" / "q4.gguf").write_bytes(b"GGUF\x03\0\0\0")
    for name, words in (("lora", "of a LoRA adapter"), ("quantised", "a GGUF file"),
                        ("quantised/q4.gguf", "a GGUF file"), ("llama/config.json", "a file: ")):
        (line,) = refusal(tmp_path / name)
        assert line.startswith(f"{tmp_path / name}") and words in line
        if "." not in name or name.endswith("gguf"):  # of what --plan reads
            with pytest.raises(ValueError, match=words):
                read_config(str(tmp_path / name))
    (llama / "adapter_config.json").write_text("{}")  # beside a whole model: not looked at
    assert refusal(llama) == []


def test_hub_is_asked_for_what_is_needed_and_its_refusals_say_what_to_do(monkeypatch):
    download, asked = Mock(return_value="cached"), []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    needed = ["config.json", "generation_config.json", "model-00001-of-00002.safetensors",
              "model.safetensors.index.json", "tokenizer.json"]  # fmt: skip
    others = ["README.md", "consolidated.safetensors", "onnx/model.onnx", "pytorch_model.bin"]
    for weights in (True, False):
        assert pretrained.find_checkpoint("some/model", weights) == Path("cached")
        patterns = download.call_args.kwargs["allow_patterns"]
        wanted = huggingface_hub.utils.filter_repo_objects(needed + others, allow_patterns=patterns)
        asked.append(sorted(wanted))
    assert asked == [needed, ["config.json"]]

    for error, words in ((huggingface_hub.errors.GatedRepoError, "Gated.*accept its terms"),
                         (huggingface_hub.errors.RepositoryNotFoundError, "check the spelling")):
        download.side_effect = error("no", response=Mock())
        with pytest.raises(ValueError, match=f"^some/model: .*{words}.*'hf download"):
            pretrained.find_checkpoint("some/model")


@pytest.mark.parametrize("name, value", [
    ("HF_HUB_OFFLINE", True), ("ENDPOINT", "http://127.0.0.1:9"),  # where nobody answers
])  # fmt: skip
def test_without_a_network_the_hubs_cache_is_read(name, value, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--some--model" / "snapshots" / ("0" * 40)
    for file, content in ((snapshot / "config.json", "{}"),
                          (snapshot.parents[1] / "refs" / "main", snapshot.name)):
        file.parent.mkdir(parents=True)
        file.write_text(content)
    assert pretrained.find_checkpoint("some/model") == snapshot
    for name in ("some/other", "./no/such/folder"):
        with pytest.raises(ValueError, match=f"^{name}: .*check the spelling"):
            pretrained.find_checkpoint(name)
