"""model.py against transformers, on tiny models whose weights are large enough that every norm,
bias, soft cap, window and frequency changes the result."""

import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as hf
import pretrained
from model import ModelConfig

ROOT = Path(hf.__file__).parent
SIZES = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GPT2_SIZES = {"vocab_size": 67, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# name: class in transformers, its fields
CASES = {
    "gpt2": ("GPT2", GPT2_SIZES),
    "gpt2-untied": (
        "GPT2",
        GPT2_SIZES
        | {
            "tie_word_embeddings": False,
            "n_inner": 40,
            "activation_function": "gelu",
            "scale_attn_weights": False,
        },
    ),
    "llama": ("Llama", SIZES | {"attention_bias": True, "mlp_bias": True}),
    "llama-3.1": (
        "Llama",
        SIZES
        | {
            "num_key_value_heads": 2,
            "head_dim": 12,
            "rope_parameters": LLAMA3,
            "tie_word_embeddings": True,
        },
    ),
    "mistral": ("Mistral", SIZES | {"num_key_value_heads": 1, "sliding_window": 6}),
    "qwen2": (
        "Qwen2",
        SIZES
        | {
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3": (
        "Qwen3",
        SIZES | {"num_key_value_heads": 2, "head_dim": 16, "attention_bias": True},
    ),
    "gemma2": (
        "Gemma2",
        SIZES
        | {
            "num_key_value_heads": 2,
            "head_dim": 12,
            "sliding_window": 5,
            "query_pre_attn_scalar": 7,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 4.0,
        },
    ),
    "gemma2-untied": (
        "Gemma2",
        SIZES
        | {
            "num_key_value_heads": 4,
            "head_dim": 8,
            "attention_bias": True,
            "tie_word_embeddings": False,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        },
    ),
    "gpt_neox": ("GPTNeoX", SIZES | {"rope_parameters": {"rope_theta": 100.0}}),
    "gpt_neox-sequential": (
        "GPTNeoX",
        SIZES
        | {
            "use_parallel_residual": False,
            "attention_bias": False,
            "hidden_act": "gelu_fast",
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_theta": 100.0, "partial_rotary_factor": 0.5},
        },
    ),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """checkpoint(case): transformers' model of a case, and the directory it saved itself to."""
    transformers = pytest.importorskip("transformers")
    made = {}

    def make(case):
        if case not in made:
            name, fields = CASES[case]
            no_tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
            config = getattr(transformers, name + "Config")(**no_tokens | fields)
            suffix = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
            theirs = getattr(transformers, name + suffix)(config).eval()
            rng = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for key, p in theirs.named_parameters():
                    p.copy_(0.3 * torch.randn(p.shape, generator=rng))
                    if p.dim() == 1 and key.endswith("weight") and name != "Gemma2":
                        p.add_(1)
            directory = tmp_path_factory.mktemp(case)
            theirs.save_pretrained(directory)
            made[case] = theirs, directory
        return made[case]

    return make


@pytest.fixture
def llama(checkpoint, tmp_path):
    """A copy of the llama-3.1 checkpoint that a test may spoil."""
    return shutil.copytree(checkpoint("llama-3.1")[1], tmp_path / "llama")


def batch(pad=3):
    """Tokens, the mask that transformers wants, and labels on the second half of each sample but
    the last, which has none. The first sample ends in padding."""
    rng = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 67, (4, 18), generator=rng)
    mask, labels = torch.ones_like(tokens), torch.full_like(tokens, -100)
    mask[0, 18 - pad :] = 0
    labels[:3, 9:] = tokens[:3, 9:]
    labels[1, 12:15] = -100
    return tokens, mask, labels.where(mask == 1, -100)


def sample_losses(logits, labels):
    """The mean loss of each sample, by a loop."""
    losses = []
    for row, target in zip(logits[:, :-1], labels[:, 1:], strict=True):
        here = target != -100
        loss = torch.nn.functional.cross_entropy(row[here], target[here], reduction="sum")
        losses.append(loss / here.sum().clamp(min=1))
    return torch.stack(losses)


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("case", CASES)
def test_logits_losses_gradients_match_transformers(case, checkpoint):
    theirs, directory = checkpoint(case)
    ours = hf.from_pretrained(directory)
    tokens, mask, labels = batch()
    logits = theirs(tokens, attention_mask=mask).logits
    assert distance(ours(tokens)[mask == 1], logits[mask == 1]) < 1e-5

    want, got = sample_losses(logits, labels), ours(tokens, labels)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert got[3] == 0

    coef = torch.tensor([0.7, 0.2, 1.5, 1.0])
    theirs.zero_grad()
    (coef * want).sum().backward()
    (coef * got).sum().backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    if case.startswith("gpt_neox") and not ours.config.tied:  # in files it has its old name
        expected["embed_out.weight"] = expected.pop("lm_head.weight")
    grads = dict(pretrained.to_hf(ours.config, ((n, p.grad) for n, p in ours.named_parameters())))
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        assert distance(grad, expected[name]) < 1e-4, name


@pytest.mark.parametrize("case", CASES)
def test_bf16_is_as_close_to_fp32_as_transformers_bf16_is(case, checkpoint):
    theirs, directory = checkpoint(case)
    tokens, _, _ = batch(pad=0)
    with torch.no_grad():
        low = type(theirs).from_pretrained(directory, dtype=torch.bfloat16)
        exact = type(theirs).from_pretrained(directory, dtype=torch.bfloat16).float()
        exact = exact(tokens).logits
        ours = hf.from_pretrained(directory, torch.bfloat16)(tokens)
        theirs_error = distance(low(tokens).logits.float(), exact)
    assert ours.dtype == torch.float32
    # Two ways to round, neither better: the errors' sizes agree, not their values.
    assert distance(ours, exact) < 1.5 * theirs_error + 1e-3


@pytest.mark.parametrize("case", CASES)
def test_greedy_generation_matches_transformers(case, checkpoint):
    theirs, directory = checkpoint(case)
    ours = hf.from_pretrained(directory)
    prompts = [[5], [9, 3, 60, 2, 11, 8, 4], [1, 2, 3]]
    want = []
    for prompt in prompts:
        out = theirs.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
        want.append(out[0, len(prompt) :].tolist())
    assert hf.generate(ours, prompts, 12) == want
    assert hf.generate(ours, prompts, 12, use_cache=False) == want


@pytest.mark.parametrize("case", CASES)
def test_saved_model_is_bit_exact_and_opens_in_transformers(case, checkpoint, tmp_path):
    theirs, directory = checkpoint(case)
    ours = hf.from_pretrained(directory)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    hf.save_pretrained(ours, tmp_path / "out", tmp_path / "tokenizer")
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert written == {"config.json", "model.safetensors", "tokenizer.json"}

    before, after = (load_file(d / "model.safetensors") for d in (directory, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    again = hf.from_pretrained(tmp_path / "out")
    for a, b in zip(ours.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    tokens, _, _ = batch()
    reopened = type(theirs).from_pretrained(tmp_path / "out")
    assert torch.equal(reopened(tokens).logits, theirs(tokens).logits)


def test_checkpoint_in_many_files(checkpoint, tmp_path):
    theirs, directory = checkpoint("gpt_neox")
    config = pretrained.load_config(directory)
    half = ((name, tensor.bfloat16()) for name, tensor in hf.read_weights(directory, config))
    pretrained.write_weights(tmp_path, config, half, max_bytes=8000)
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
    ours = hf.from_pretrained(tmp_path)
    assert distance(ours(tokens), reopened(tokens).logits) < 1e-5

    # Where two files hold a tensor, the index says which to read.
    last = load_file(files[-1])
    save_file(last | {"gpt_neox.embed_in.weight": torch.zeros(67, 32)}, files[-1])
    assert torch.equal(hf.from_pretrained(tmp_path).embed.weight, ours.embed.weight)

    files[1].unlink()
    assert [files[1].name in p for p in refusal(tmp_path)] == [True]
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    assert "not an index" in refusal(tmp_path)[0]


def test_writing_holds_one_file_of_tensors_and_the_next_tensor(checkpoint, tmp_path):
    ours = hf.from_pretrained(checkpoint("llama-3.1")[1])
    alive, most = [], 0

    def copies():
        nonlocal most
        for name, p in ours.named_parameters():
            tensor = p.detach().clone()
            alive.append(weakref.ref(tensor))
            most = max(most, sum(ref().nbytes for ref in alive if ref() is not None))
            yield name, tensor

    pretrained.write_weights(tmp_path, ours.config, copies(), max_bytes=10_000)
    assert most < 10_000 + max(p.nbytes for p in ours.parameters())

    taken = len(alive)
    pretrained.write_weights(None, ours.config, copies())
    assert len(alive) == 2 * taken


def test_save_replaces_a_model_and_nothing_else(checkpoint, tmp_path):
    ours = hf.from_pretrained(checkpoint("gpt2")[1])
    hf.save_pretrained(ours, tmp_path / "out")
    with torch.no_grad():
        ours.norm.weight.add_(1)
    hf.save_pretrained(ours, tmp_path / "out")
    assert torch.equal(hf.from_pretrained(tmp_path / "out").norm.weight, ours.norm.weight)
    with pytest.raises(ZeroDivisionError), pretrained.written_whole(tmp_path / "out") as temporary:
        (temporary / "config.json").write_text("half")
        raise ZeroDivisionError
    assert torch.equal(hf.from_pretrained(tmp_path / "out").norm.weight, ours.norm.weight)

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(ValueError, match="no model to replace"):
        hf.save_pretrained(ours, tmp_path / "mine")


def test_stories_are_those_of_transformers(asset):
    transformers = pytest.importorskip("transformers")
    directory = asset("model/stories260K-hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory)
    prompt = torch.tensor([[1]])
    out = theirs.generate(prompt, max_new_tokens=200, do_sample=False, eos_token_id=None)
    ours = hf.from_pretrained(directory)
    assert hf.generate(ours, [[1]], 200) == [out[0, 1:].tolist()]
    assert hf.generate(ours, [[1]], 200, use_cache=False) == [out[0, 1:].tolist()]


# Generation


def test_generation_stops_each_row_at_its_own_eos(checkpoint):
    ours = hf.from_pretrained(checkpoint("llama-3.1")[1])
    prompts = [[5], [9, 3, 60, 2, 11, 8, 4], [1, 2, 3]]
    free = hf.generate(ours, prompts, 12)
    ends = free[0][4], free[2][7]
    stopped = hf.generate(ours, prompts, 12, eos_id=list(ends))
    for row, reply in zip(free, stopped, strict=True):
        first = next((i for i, token in enumerate(row) if token in ends), 12)
        assert reply == row[:first]
    assert hf.generate(ours, prompts[:1], 12, eos_id=ends[0]) == [
        free[0][: free[0].index(ends[0])]
    ]


def test_generation_runs_until_the_caller_stops_it(checkpoint):
    ours = hf.from_pretrained(checkpoint("llama-3.1")[1])
    forwards, told = [], []
    ours.register_forward_pre_hook(lambda *_: forwards.append(1))
    eos = hf.generate(ours, [[5]], 1)[0][0]
    forwards.clear()
    assert hf.generate(ours, [[5]], 6, eos_id=eos) == [[]]
    assert len(forwards) == 1
    forwards.clear()
    stop_when = lambda done: bool(told.append(done))  # noqa: E731
    assert hf.generate(ours, [[5]], 6, eos_id=eos, stop_when=stop_when) == [[]]
    assert len(forwards) == 6
    assert told == [True] * 6


def test_generation_refuses_what_does_not_fit(checkpoint):
    ours = hf.from_pretrained(checkpoint("gpt2")[1])
    with pytest.raises(ValueError, match=r"prompts \[0, 2\]: each needs 1 to 54 tokens"):
        hf.generate(ours, [[], [1], [1] * 55], 10)
    with pytest.raises(ValueError, match="65 tokens: the model has 64 positions"):
        ours(torch.zeros(1, 65, dtype=torch.long))
    assert len(hf.generate(ours, [[1] * 54], 10)[0]) == 10
    for wrong in {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            hf.generate(ours, [[1]], 10, **wrong)


def test_sampling_follows_temperature_and_top_p():
    probs = torch.tensor([0.1, 0.5, 0.15, 0.25])
    logits = (2 * probs.log()).expand(20_000, 4)  # at temperature 2: probs

    def frequencies(top_p):
        rng = torch.Generator().manual_seed(0)
        return torch.bincount(hf.sample(logits, 2.0, top_p, rng), minlength=4) / 20_000

    torch.testing.assert_close(frequencies(1.0), probs, atol=0.015, rtol=0)
    # 0.5 + 0.25 < 0.8: the third token is the one that reaches it.
    nucleus = torch.tensor([0, 0.5, 0.15, 0.25]) / 0.9
    torch.testing.assert_close(frequencies(0.8), nucleus, atol=0.015, rtol=0)
    assert frequencies(0.4).tolist() == [0, 1, 0, 0]


def test_sampling_is_reproducible(checkpoint):
    ours = hf.from_pretrained(checkpoint("qwen3")[1])
    draws = [hf.generate(ours, [[5]], 12, temperature=3.0, seed=seed) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


# The head


class Ops(TorchDispatchMode):
    """Counts the operations that run inside it."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", ["gpt2", "gemma2"])
def test_chunked_head_matches_whole_head(case, checkpoint):
    tokens, _, labels = batch()
    n_bytes = (labels[:, 1:] != -100).sum().item() * 67 * 4
    results, softmaxes = [], []
    for logits_bytes in (n_bytes, n_bytes - 1):
        ours = hf.from_pretrained(checkpoint(case)[1], torch.float64)
        ours.head.logits_bytes = logits_bytes
        with Ops() as ops:
            losses = ours(tokens, labels)
            losses[:3].prod().backward()
        grads = torch.cat([p.grad.flatten() for p in ours.parameters()])
        results.append((losses.detach(), grads))
        softmaxes.append(ops.counts["_log_softmax"])
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)
    assert softmaxes[0] == 1  # nothing is computed twice
    assert softmaxes[1] > 2 and softmaxes[1] % 2 == 0


class LiveBytes(TorchDispatchMode):
    """Tracks how many bytes the tensors made inside it hold at once."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.storages = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.storages:
                    self.storages.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.release, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def release(self, storage, n_bytes):
        self.storages.remove(storage)
        self.now -= n_bytes


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_recomputing_head_never_holds_a_tenth_of_the_logits(family):
    fields = {"model_type": family, "head_dim": 8} | SIZES | {"vocab_size": 128_000}
    logits_bytes = 8 * 1024 * 128_000 * 4
    peaks = []
    for limit in (hf.Head.logits_bytes, logits_bytes):
        with torch.device("meta"):  # sizes and lifetimes without the work
            head = hf.Head(ModelConfig.from_hf(fields))
            hidden = torch.empty(8 * 1024, 32, requires_grad=True)
            targets = torch.empty(8 * 1024, dtype=torch.long)
        head.logits_bytes = limit
        with LiveBytes() as live:
            head.token_losses(hidden, targets).sum().backward()
        peaks.append(live.peak)
        assert head.weight.grad.shape == (128_000, 32)
    assert peaks[0] < 0.1 * logits_bytes
    assert peaks[0] - 3 * head.weight.nbytes < hf.Head.logits_bytes  # 3: gradients being added
    assert peaks[1] > 2 * logits_bytes  # what the chunks are there for


def test_batch_without_labels_has_loss_and_gradient_zero(checkpoint):
    ours = hf.from_pretrained(checkpoint("llama")[1])
    tokens, _, labels = batch()
    losses = ours(tokens, torch.full_like(labels, -100))
    assert losses.tolist() == [0, 0, 0, 0]
    losses.sum().backward()
    assert all(p.grad.abs().sum() == 0 for p in ours.parameters())


def test_frozen_parameters_cost_no_gradient(checkpoint):
    ours = hf.from_pretrained(checkpoint("llama-3.1")[1]).requires_grad_(False)
    ours.blocks[1].requires_grad_(True)
    tokens, _, labels = batch()
    losses = ours(tokens, labels)
    with Ops() as ops:
        losses.sum().backward()
    assert {n for n, p in ours.named_parameters() if p.grad is not None} == {
        n for n, _ in ours.named_parameters() if n.startswith("blocks.1.")
    }
    # Matrix products: 7 for the inputs of the head's and block 2's linear layers, 7 + 7 for the
    # inputs and weights of block 1's, none for block 0.
    assert ops.counts["mm"] == 1 + 7 + 14


def test_model_has_no_buffers_and_computes_in_float64():
    config = ModelConfig.from_hf({"model_type": "gemma2", "head_dim": 8} | SIZES)
    model = hf.build(config, hf.random_weights(config, 0), torch.float64)
    assert list(model.buffers()) == []
    tokens, _, labels = batch()
    assert model(tokens).dtype == model(tokens, labels).dtype == torch.float64


def test_random_weights_depend_on_seed_and_place_alone():
    config = ModelConfig.from_hf({"model_type": "gpt2"} | GPT2_SIZES)
    first, again = (dict(hf.random_weights(config, 3)) for _ in range(2))
    other = dict(hf.random_weights(config, 4))
    assert list(first) == list(hf.parameter_shapes(config))
    assert all(torch.equal(first[name], again[name]) for name in first)
    a, b = "blocks.0.mlp.up.weight", "blocks.1.mlp.up.weight"
    assert not torch.equal(first[a], other[a]) and not torch.equal(first[a], first[b])
    assert first[a].std().item() == pytest.approx(0.02, rel=0.1)
    assert first["blocks.0.mlp.down.weight"].std().item() == pytest.approx(0.01, rel=0.1)
    assert first["norm.weight"].eq(1).all() and first["norm.bias"].eq(0).all()
    config = ModelConfig.from_hf({"model_type": "gemma2", "head_dim": 8} | SIZES)
    assert dict(hf.random_weights(config, 3))["norm.weight"].eq(0).all()  # of 1 + weight


# Configurations

LLAMA = {"model_type": "llama"} | SIZES


@pytest.mark.parametrize("case", CASES)
def test_config_of_transformers_4_is_that_of_transformers_5(case, checkpoint):
    new = json.loads((checkpoint(case)[1] / "config.json").read_text())
    old = {key: value for key, value in new.items() if key not in ("layer_types", "dtype")}
    rope = dict(old.pop("rope_parameters", {}))
    if case.startswith("gpt_neox"):
        old["rotary_emb_base"] = old["rope_theta"] = rope["rope_theta"]
        old["rotary_pct"] = old["partial_rotary_factor"] = rope["partial_rotary_factor"]
    elif rope:
        old["rope_theta"] = rope.pop("rope_theta")
        old["rope_scaling"] = None if rope["rope_type"] == "default" else rope | {"type": "llama3"}
    old["torch_dtype"] = "float16"
    assert ModelConfig.from_hf(old) == ModelConfig.from_hf(new)
    assert ModelConfig.from_hf(old).hf == old


def test_config_reads_token_ids_and_dropout():
    config = ModelConfig.from_hf(
        LLAMA | {"eos_token_id": [3, 4], "bos_token_id": 1, "attention_dropout": 0.1}
    )
    assert (config.bos_id, config.eos_ids) == (1, (3, 4))
    assert config.ignored_dropout == ("attention_dropout",)


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["'linear'"]),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, ["'yarn'"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["'llama3'"]),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, ["full_attention"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        ({"rope_theta": 5.0, "rope_parameters": {"rope_theta": 1e4}}, ["rope_theta"]),
        ({"rope_scaling": {"rope_theta": 5.0}, "rope_parameters": {"factor": 2}}, ["only one"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
        ({"num_local_experts": 8, "hidden_act": "relu"}, ["num_local_experts", "hidden_act"]),
        ({"sliding_window": 8}, ["sliding_window"]),
        ({"some_new_thing": 3, "hidden_size": "32"}, ["some_new_thing", "hidden_size"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads"]),
        ({"num_attention_heads": 5}, ["num_attention_heads"]),
        ({"num_hidden_layers": None}, ["num_hidden_layers"]),
        ({"model_type": "mamba"}, ["mamba"]),
        ({"model_type": "gpt2"} | GPT2_SIZES, list(SIZES)[1:]),
        (
            {"model_type": "gemma2", "head_dim": 8, "use_bidirectional_attention": True},
            ["use_bidirectional_attention"],
        ),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, ["layer_types"]),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 3}, ["sliding_window"]),
        ({"model_type": "gpt_neox", "rope_theta": 5.0}, ["rope_theta"]),
        ({"model_type": "gpt_neox", "rotary_pct": 0.15}, ["rotated"]),
        (
            {
                "model_type": "gpt_neox",
                "rotary_pct": 0.5,
                "rope_parameters": {"partial_rotary_factor": 0.25},
            },
            ["rotary_pct"],
        ),
    ],
)
def test_config_names_every_field_it_does_not_support(fields, named):
    with pytest.raises(ValueError) as error:
        ModelConfig.from_hf(LLAMA | fields)
    lines = str(error.value).splitlines()
    assert len(lines) == len(named)
    assert all(any(name in line for line in lines) for name in named)


@pytest.mark.parametrize(
    "fields",
    [
        {"scale_attn_by_inverse_layer_idx": True},
        {"add_cross_attention": True},
        {"activation_function": "relu"},
    ],
)
def test_gpt2_config_refuses(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        ModelConfig.from_hf({"model_type": "gpt2"} | GPT2_SIZES | fields)


# Fields of config.json on the hub that say how a model computes, and how many parameters it has.
HUB = {
    "gpt2": (
        {"n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "vocab_size": 50257},
        124_439_808,
    ),
    "llama": (  # Meta-Llama-3-8B
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 8192,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "rope_theta": 500000.0,
            "vocab_size": 128256,
        },
        8_030_261_248,
    ),
    "gpt_neox": (  # gpt-neox-20b
        {
            "hidden_act": "gelu_fast",
            "hidden_size": 6144,
            "intermediate_size": 24576,
            "max_position_embeddings": 2048,
            "num_attention_heads": 64,
            "num_hidden_layers": 44,
            "rotary_emb_base": 10000,
            "rotary_pct": 0.25,
            "vocab_size": 50432,
        },
        20_554_567_680,
    ),
    "gemma2": (  # gemma-2-9b
        {
            "cache_implementation": "hybrid",
            "head_dim": 256,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 3584,
            "intermediate_size": 14336,
            "max_position_embeddings": 8192,
            "num_attention_heads": 16,
            "num_hidden_layers": 42,
            "num_key_value_heads": 8,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "sliding_window_size": 4096,
            "vocab_size": 256000,
        },
        9_241_705_984,
    ),
    "qwen2": (  # Qwen2-7B
        {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "max_position_embeddings": 131072,
            "max_window_layers": 28,
            "num_attention_heads": 28,
            "num_hidden_layers": 28,
            "num_key_value_heads": 4,
            "sliding_window": 131072,
            "use_sliding_window": False,
            "vocab_size": 152064,
        },
        7_615_616_512,
    ),
}


BOOKKEEPING = {
    "architectures": ["SomethingForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.02,
    "n_ctx": 1024,
    "predict_special_tokens": True,
    "pretraining_tp": 1,
    "summary_type": "cls_index",
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "torch_dtype": "float16",
    "transformers_version": "4.19.0.dev0",
    "use_cache": True,
}


@pytest.mark.parametrize("family", HUB)
def test_published_models_have_their_published_number_of_parameters(family):
    fields, n_parameters = HUB[family]
    config = ModelConfig.from_hf({"model_type": family} | fields | BOOKKEEPING)
    shapes = hf.parameter_shapes(config).values()
    assert sum(torch.Size(shape).numel() for shape in shapes) == n_parameters


def test_config_ignores_what_is_off_or_harmless():
    fields = {"num_local_experts": None, "use_mrope": False, "transformers_version": "4.40.0"}
    assert ModelConfig.from_hf(LLAMA | fields) == ModelConfig.from_hf(LLAMA)


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
        hf.from_pretrained(directory)
    except ValueError as error:
        return str(error).splitlines()
    return []


def test_missing_extra_misshaped_and_integer_tensors_are_named(llama):
    directory = llama

    def change(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.3.mlp.up_proj.weight"] = torch.zeros(48, 32)
        tensors["model.norm.weight"] = torch.zeros(31)
        tensors["model.embed_tokens.weight"] = torch.zeros(67, 32, dtype=torch.int8)
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(48, 32).to(torch.float8_e4m3fn)

    found = problems(directory, change)
    assert len(found) == 5
    for name, words in {
        "layers.1.mlp.up_proj": "missing",
        "layers.3.mlp.up_proj": "not a tensor of this model",
        "model.norm": "(31,)",
        "embed_tokens": "I8",
        "layers.0.mlp.up_proj": "F8_E4M3",
    }.items():
        assert [words in p and str(directory) in p for p in found if name in p] == [True]


def test_harmless_extra_tensors_are_accepted(llama, checkpoint, tmp_path):
    def buffers(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(6)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()  # tied: the same

    assert problems(llama, buffers) == []
    for case, module in {
        "gpt2": "transformer.h.0.attn",
        "gpt_neox": "gpt_neox.layers.0.attention",
    }.items():
        directory = shutil.copytree(checkpoint(case)[1], tmp_path / case)

        def masks(tensors, module=module):
            tensors[f"{module}.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool)
            tensors[f"{module}.masked_bias"] = torch.tensor(-1e9)

        assert problems(directory, masks) == []


def test_misshaped_copy_of_a_tied_head_is_not_harmless(llama):
    directory = llama
    head = {"lm_head.weight": torch.zeros(66, 32)}
    found = problems(directory, lambda tensors: tensors.update(head))
    assert ["lm_head" in problem for problem in found] == [True]


def test_gpt2_keys_without_prefix(checkpoint, tmp_path):
    theirs, source = checkpoint("gpt2")
    tensors = load_file(source / "model.safetensors")
    bare = {key.removeprefix("transformer."): tensor for key, tensor in tensors.items()}
    save_file(bare, tmp_path / "model.safetensors")
    shutil.copy(source / "config.json", tmp_path)
    tokens, _, _ = batch()
    assert distance(hf.from_pretrained(tmp_path)(tokens), theirs(tokens).logits) < 1e-5


def test_truncated_file_is_named(llama):
    directory = llama
    file = directory / "model.safetensors"
    for end in (-1, 100, 0):
        file.write_bytes(file.read_bytes()[:end])
        assert [str(file) in p for p in refusal(directory)] == [True]


def test_directory_without_usable_weights(llama):
    directory = llama
    (directory / "model.safetensors").unlink()
    assert "neither model.safetensors" in refusal(directory)[0]
    (directory / "pytorch_model.bin").touch()
    assert "pickle" in refusal(directory)[0]
    (directory / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json"):
        hf.from_pretrained(directory)


# The hub


def test_hub_errors_say_what_to_do(monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors

    for kind, words in {
        errors.GatedRepoError: "HF_TOKEN",
        errors.RepositoryNotFoundError: "check the spelling",
        errors.HFValidationError: "check the spelling",
        errors.LocalEntryNotFoundError: "out of reach",
        errors.HfHubHTTPError: "out of reach",
        ConnectionError: "out of reach",
    }.items():

        def fail(*args, kind=kind, **options):
            raise kind.__new__(kind)  # some need a server's response to be initialised

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(ValueError, match=rf"^no/such: .*{words}") as error:
            pretrained.find_checkpoint("no/such")
        assert "\n" not in str(error.value)


def test_hub_is_asked_for_no_other_files(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda id, **kw: asked.update(kw, id=id) or tmp_path
    )
    assert pretrained.find_checkpoint("some/model") == tmp_path
    wanted = "config.json model-00001-of-00002.safetensors model.safetensors.index.json merges.txt"
    wanted += " tokenizer.json tokenizer_config.json tokenizer.model vocab.json"
    others = "pytorch_model.bin original/consolidated.00.pth consolidated.safetensors tf_model.h5"
    others += " onnx/model.onnx README.md flax_model.msgpack"
    kept = filter_repo_objects(
        (wanted + " " + others).split(), allow_patterns=asked.pop("allow_patterns")
    )
    assert list(kept) == wanted.split()
    assert asked == {"id": "some/model"}  # cache, token and offline mode are the library's


def test_offline_hub_uses_its_cache_or_says_so(checkpoint, tmp_path):
    commit = "0" * 40
    repo = tmp_path / "hub" / "models--some--model"
    shutil.copytree(checkpoint("gpt2")[1], repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    script = """
import pretrained
print(pretrained.find_checkpoint("some/model"))
try:
    pretrained.find_checkpoint("some/other")
except ValueError as error:
    print(error)
"""
    env = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True
    )
    found, error = run.stdout.splitlines()
    assert found == str(repo / "snapshots" / commit)
    assert error.startswith("some/other: ") and "hf download" in error
