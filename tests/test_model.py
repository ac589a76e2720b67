"""model.py against transformers, on tiny models of every family (tests/cases.py)."""

import dataclasses
import math
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cli.plan import Live
from hf import pretrained
from hf.families import Rope
from model import (
    Head,
    ModelConfig,
    TokenLosses,
    build,
    from_pretrained,
    generate,
    parameter_shapes,
    random_weights,
    sample,
)
from tests.cases import CASES, GPT2_SIZES, SIZES, batch, distance


def sample_losses(logits, labels):
    """The mean loss of each sample, by a loop."""
    losses = []
    for row, target in zip(logits[:, :-1], labels[:, 1:], strict=True):
        loss = torch.nn.functional.cross_entropy(row, target, reduction="sum")
        losses.append(loss / (target != -100).sum().clamp(min=1))
    return torch.stack(losses)


@pytest.mark.parametrize("case", CASES)
def test_logits_losses_gradients_match_transformers(case, checkpoint):
    theirs, directory = checkpoint(case)
    ours = from_pretrained(directory)
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


# Fields of ModelConfig, and the value with which what they stand for is not done.
NEUTRAL = {
    "qkv_bias": False, "out_bias": False, "mlp_bias": False, "qk_norm": "", "post_norms": False,
    "parallel": False, "ropes": (Rope(100.0),) * 3, "score_cap": None, "logit_cap": None,
    "embed_scale": 1.0, "residual_scale": 1.0, "logit_scale": 1.0, "score_scale": 8**-0.5,
    "windows": (None,) * 3, "rotary": 8,
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_peculiarity_changes_the_logits(case, checkpoint):
    """So that the comparison with transformers would notice one that is not done."""
    ours, (tokens, _, _) = from_pretrained(checkpoint(case)[1]), batch(pad=0)
    config, weights, logits = ours.config, dict(ours.named_parameters()), ours(tokens)
    without = {k: v for k, v in NEUTRAL.items() if getattr(config, k) != v}
    if case.startswith("gpt2") or config.rotary == config.head_size:
        without.pop("rotary", None)
    if case in ("gemma2-untied", "gemma3-untied") or case.startswith("gpt2"):  # wide; none
        without.pop("windows")
    if case.startswith("gpt2"):
        without.pop("ropes")
    for field, value in without.items():
        other = dataclasses.replace(config, **{field: value})
        model = build(other, [(name, weights[name]) for name in parameter_shapes(other)])
        assert distance(model(tokens), logits) > 1e-2, field


@pytest.mark.parametrize("case", CASES)
def test_bf16_is_as_close_to_fp32_as_transformers_bf16_is(case, checkpoint):
    theirs, directory = checkpoint(case)
    tokens, _, _ = batch(pad=0)
    with torch.no_grad():
        options = {"dtype": torch.bfloat16, "attn_implementation": "eager"}
        low, same = (type(theirs).from_pretrained(directory, **options) for _ in range(2))
        exact = same.float()(tokens).logits
        ours = from_pretrained(directory, torch.bfloat16)(tokens)
        theirs_error = distance(low(tokens).logits.float(), exact)
    assert ours.dtype == torch.float32
    # Two ways to round, neither better: the errors' sizes agree, not their values.
    assert distance(ours, exact) < 1.5 * theirs_error + 1e-3


PROMPTS = [[5], [9, 3, 60, 2, 11, 8, 4], [1, 2, 3]]


def greedy(theirs, prompt, n):
    """What transformers' model goes on with."""
    options = {"max_new_tokens": n, "do_sample": False, "eos_token_id": None}
    return theirs.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("case", CASES)
def test_greedy_generation_matches_transformers(case, checkpoint):
    theirs, directory = checkpoint(case)
    want = [greedy(theirs, prompt, 12) for prompt in PROMPTS]
    assert generate(from_pretrained(directory), PROMPTS, 12) == want


def test_stories_are_those_of_transformers(asset):
    transformers = pytest.importorskip("transformers")
    directory = asset("model/stories260K-hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory)
    assert generate(from_pretrained(directory), [[1]], 200) == [greedy(theirs, [1], 200)]


def test_generation_stops_each_row_at_its_own_eos_and_when_the_caller_says_so(checkpoint):
    ours = from_pretrained(checkpoint("llama-3.1")[1])
    free = generate(ours, PROMPTS, 12)
    ends = free[0][4], free[2][7]
    cut = [[*row, *ends] for row in free]
    cut = [row[: min(map(row.index, ends))][:12] for row in cut]
    assert generate(ours, PROMPTS, 12, eos_id=list(ends)) == cut

    forwards, told = [], []
    ours.register_forward_pre_hook(lambda *_: forwards.append(1))
    eos = {"eos_id": free[0][0]}
    assert generate(ours, PROMPTS[:1], 6, **eos) == [[]] and len(forwards) == 1
    stop_when = lambda done: bool(told.append(done))  # noqa: E731
    assert generate(ours, PROMPTS[:1], 6, **eos, stop_when=stop_when) == [[]]
    assert len(forwards) == 1 + 6 and told == [True] * 6


@pytest.mark.parametrize("case", ["gpt2", "llama-3.1"])
def test_generation_ends_at_the_last_position_and_refuses_what_does_not_fit(case, checkpoint):
    ours = from_pretrained(checkpoint(case)[1])  # of 64 positions
    prompts = [[3, 1, 4] * 20, [2] * 50, [7, 8]]
    alone = [generate(ours, [prompt], 20)[0] for prompt in prompts]
    assert list(map(len, alone)) == [4, 14, 20]
    assert generate(ours, prompts, 20) == alone
    with pytest.raises(ValueError, match=r"prompts \[0, 2\].* 1 to 63 "):
        generate(ours, [[], [1], [1] * 64], 10)
    if case == "gpt2":  # whose positions are learned
        with pytest.raises(ValueError, match="65 tokens.* 64 positions"):
            ours(torch.zeros(1, 65, dtype=torch.long))
    for wrong in {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            generate(ours, [[1]], 10, **wrong)


def test_sampling_follows_temperature_and_top_p_and_the_prompts_own_seed(checkpoint):
    ours = from_pretrained(checkpoint("qwen3")[1])
    three = generate(ours, [[5], [5], [2, 7, 4]], 12, temperature=3.0, seeds=[0, 1, 9])
    alone = [generate(ours, [[5]], 12, temperature=3.0, seeds=[seed])[0] for seed in (0, 1)]
    assert alone == three[:2] and alone[0] != alone[1]

    probs = torch.tensor([0.1, 0.5, 0.15, 0.25])
    logits = (2 * probs.log()).expand(20_000, 4)  # at temperature 2: probs

    def frequencies(top_p):
        draws = torch.rand(20_000, dtype=torch.double, generator=torch.Generator().manual_seed(0))
        return torch.bincount(sample(logits, 2.0, top_p, draws), minlength=4) / 20_000

    torch.testing.assert_close(frequencies(1.0), probs, atol=0.015, rtol=0)
    # 0.5 + 0.25 < 0.8: the third token is the one that reaches it.
    nucleus = torch.tensor([0, 0.5, 0.15, 0.25]) / 0.9
    torch.testing.assert_close(frequencies(0.8), nucleus, atol=0.015, rtol=0)
    assert frequencies(0.4).tolist() == [0, 1, 0, 0]


class Ops(TorchDispatchMode):
    """Counts the operations that run inside it."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", ["gpt2", "gemma2"])
def test_chunked_head_matches_whole_head(case, checkpoint):
    """All of the logits' gradient is kept for backward, from one chunk or several; a part; none."""
    tokens, _, labels = batch()
    n_bytes = (labels[:, 1:] != -100).sum().item() * 67 * 8
    results, products, chunks = [], [], []
    for logits_bytes in (8 * n_bytes, 1.2 * n_bytes, n_bytes / 2, 67 * 8 - 1):
        ours = from_pretrained(checkpoint(case)[1], torch.float64)
        ours.head.logits_bytes = logits_bytes
        with Ops() as ops:
            losses = ours(tokens, labels)
            losses[:3].prod().backward()
        grads = torch.cat([p.grad.flatten() for p in ours.parameters()])
        results.append((losses.detach(), grads))
        products.append(ops.counts["mm"] + ops.counts["addmm_"])
        chunks.append(ops.counts["_log_softmax"])
    for result in results[1:]:
        torch.testing.assert_close(results[0], result, rtol=1e-12, atol=1e-12)
    M = 21
    assert chunks[0] == 1 < chunks[1] < chunks[2] == chunks[3] == M
    of_backward = [n - m - products[0] + 3 for n, m in zip(products, chunks, strict=True)]
    # Two for what is kept, as a whole; the logits again and two for each of the other chunks.
    assert of_backward == [2, 2, 2 + 3 * (M - M // 2), 3 * M]


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("chunk, keep", [(64, 64), (20, 64), (20, 40), (20, 0)])
def test_losses_in_bf16_are_those_of_the_same_numbers_in_float64(cap, chunk, keep):
    """Of a vocabulary of 9, which is padded to 16: a padding that had weight would be seen."""
    rng = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(k, 32, generator=rng).bfloat16() / 3 for k in (64, 9))
    targets = torch.randint(0, 9, (64,), generator=rng)
    coef = torch.rand(64, generator=rng)
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        a, b = (t.to(dtype, copy=True).requires_grad_() for t in (x, weight))
        losses = TokenLosses.apply(a, b, targets, cap, chunk, keep)
        (coef.to(losses) * losses).sum().backward()
        results.append([t.detach().double() for t in (losses, a.grad, b.grad)])
    assert results[0][2].shape == weight.shape
    far = [distance(low, exact) for low, exact in zip(*results, strict=True)]
    assert far[0] < 2e-3 and max(far) < 1e-2, far


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_head_holds_little_more_than_it_may_keep(family):
    """And a larger micro-batch, or one with more answers in it, never takes less."""
    fields = {"model_type": family, "head_dim": 8} | SIZES | {"vocab_size": 128_000}
    peaks = []
    for n, limit in [*((k * 1000, Head.logits_bytes) for k in range(1, 9)), (8000, math.inf)]:
        with torch.device("meta"):  # sizes and lifetimes without the work
            head = Head(ModelConfig.from_hf(fields))
            hidden = torch.empty(n, 32, requires_grad=True)
            targets = torch.empty(n, dtype=torch.long)
        head.logits_bytes = limit
        with Live([]) as live:
            head(hidden, targets).sum().backward()
        peaks.append(live.peak - head.weight.nbytes)  # beside the weight's gradient
        assert head.weight.grad.shape == (128_000, 32)
    assert peaks == sorted(peaks) and peaks[0] > 1000 * 128_000 * 4
    assert peaks[-2] < 1.25 * Head.logits_bytes < 0.7 * 8000 * 128_000 * 4 < peaks[-1]


def padded(tokens, labels, width):
    """The same with more columns, of tokens that are not to matter."""
    rng = torch.Generator().manual_seed(width)
    rest = torch.randint(0, 67, (len(tokens), width), generator=rng)
    return torch.cat([tokens, rest], 1), torch.nn.functional.pad(labels, (0, width), value=-100)


@pytest.mark.parametrize("case", CASES)
def test_padding_neither_matters_nor_costs(case, checkpoint):
    ours, seen = from_pretrained(checkpoint(case)[1], torch.float64), []
    assert not list(ours.buffers())
    for block in ours.blocks:
        block.register_forward_hook(lambda module, args, out: seen.append((len(args[0]), len(out))))

    def losses_and_grads(tokens, labels):
        ours.zero_grad()
        losses = ours(tokens, labels)
        assert losses.dtype == torch.float64
        (losses * torch.arange(1, len(losses) + 1)).sum().backward()
        return losses.detach(), torch.cat([p.grad.flatten() for p in ours.parameters()])

    tokens, _, labels = batch()
    results = [losses_and_grads(*padded(tokens, labels, width)) for width in (0, 3, 17)]
    alone = [ours(t[None], label[None]) for t, label in zip(tokens, labels, strict=True)]
    ours.zero_grad()
    alone[3].sum().backward()  # without labels: a loss and a gradient of zero
    assert not alone[3].any() and not any(p.grad.any() for p in ours.parameters())
    torch.testing.assert_close(torch.cat(alone), results[0][0], rtol=1e-12, atol=1e-12)
    answered, L = labels[:, 1:] != -100, len(ours.blocks)
    needed = sum(int(row.nonzero().max()) + 1 for row in answered if row.any())
    for n in range(3):
        assert seen[n * L] == (needed, needed)
        assert seen[(n + 1) * L - 1] == (needed, answered.sum())
    assert seen[-1] == (0, 0)

    seen.clear()  # where there is hardly any padding it is left in place
    full = torch.randint(0, 67, (2, 30), generator=torch.Generator().manual_seed(0))
    results += [losses_and_grads(*padded(full, full, width)) for width in (0, 20)]
    assert [seen[0][0], seen[L][0]] == [2 * 30, 2 * 29]
    for one, other in (results[:2], results[1:3], results[3:]):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    ours.recompute = True  # activation checkpointing: the same bits
    assert all(map(torch.equal, losses_and_grads(full, full), results[3]))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("case", ["llama-3.1", "qwen3"])  # tied or not
def test_frozen_parameters_cost_no_gradient(case, recompute, checkpoint):
    ours, (tokens, _, labels) = from_pretrained(checkpoint(case)[1]), batch()
    ours.recompute = recompute
    for i, block in enumerate(ours.blocks):
        ours.requires_grad_(False).zero_grad()
        block.requires_grad_(True)
        losses = ours(tokens, labels)
        with Ops() as ops:
            losses.sum().backward()
        for name, p in ours.named_parameters():
            assert (p.grad is not None) == name.startswith(f"blocks.{i}."), name
        # Matrix products: 7 for the inputs of the head's and later blocks' linear layers, 7 + 7 for
        # the inputs and weights of this block's, none for those before; and the forward passes of
        # these blocks again but for their last product, which backward does not need.
        later = len(ours.blocks) - 1 - i
        counted = ops.counts["mm"] + ops.counts["addmm"]
        assert counted == 1 + 7 * later + 14 + 6 * (later + 1) * recompute, i


def test_random_weights_depend_on_seed_and_place_alone():
    config = ModelConfig.from_hf({"model_type": "gpt2"} | GPT2_SIZES)
    first, again, other = (dict(random_weights(config, seed)) for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    a, b = "blocks.0.mlp.up.weight", "blocks.1.mlp.up.weight"
    assert not torch.equal(first[a], other[a]) and not torch.equal(first[a], first[b])
    assert first[a].std().item() == pytest.approx(0.02, rel=0.1)
    assert first["blocks.0.mlp.down.weight"].std().item() == pytest.approx(0.01, rel=0.1)
    assert first["norm.weight"].eq(1).all() and first["norm.bias"].eq(0).all()
    config = ModelConfig.from_hf({"model_type": "gemma2", "head_dim": 8} | SIZES)
    assert dict(random_weights(config, 3))["norm.weight"].eq(0).all()  # of 1 + weight
