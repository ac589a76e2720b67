"""What the tests of sharded models run on each rank, by forked.call. Not a test itself.

    python tests/worker.py make CHECKPOINT
    torchrun --nproc_per_node=2 tests/worker.py load CHECKPOINT
"""

import contextlib
import functools
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
from torch._dynamo.utils import counters

sys.path.insert(0, str(Path(__file__).parents[1]))

import data
import shard
import train
from bilevel import PenaltyStep, Slopes, SourceWeights
from cli.inputs import prepare
from hf import pretrained
from hf.families import ModelConfig
from lisa import Lisa, local
from model import (
    Transformer,
    build,
    from_pretrained,
    parameter_shapes,
    random_weights,
    read_tensors,
)
from tests.cases import GPT2_SIZES, SIZES

VOCAB = data.byte_tokenizer().n_vocab
TOKENS = {"vocab_size": VOCAB, "bos_token_id": 256, "eos_token_id": 257}
BASE = SIZES | TOKENS | {"num_key_value_heads": 2, "max_position_embeddings": 128}
WINDOW = {"sliding_window": 5}
FAMILIES = {
    "gpt2": {"model_type": "gpt2", **GPT2_SIZES, **TOKENS, "n_layer": 3, "n_positions": 128},
    "llama": {"model_type": "llama", **BASE},
    "llama-tied": {"model_type": "llama", **BASE, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", **BASE, **WINDOW},
    "qwen2": {"model_type": "qwen2", **BASE},
    "qwen3": {"model_type": "qwen3", **BASE, "head_dim": 16},
    "gemma2": {
        "model_type": "gemma2", **BASE, **WINDOW, "head_dim": 16, "query_pre_attn_scalar": 16,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "gemma3_text": {"model_type": "gemma3_text", **BASE, **WINDOW, "head_dim": 16,
                    "sliding_window_pattern": 2},
    "phi3": {"model_type": "phi3", **BASE, **WINDOW, "partial_rotary_factor": 0.5},
    "olmo2": {"model_type": "olmo2", **BASE},
    "granite": {"model_type": "granite", **BASE, "residual_multiplier": 0.4, "logits_scaling": 2.0,
                "rope_scaling": {"type": "linear", "factor": 2.0}},
    "smollm3": {"model_type": "smollm3", **BASE, "no_rope_layer_interval": 2,
                "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
    "gpt_neox": {"model_type": "gpt_neox", **SIZES, **TOKENS, "max_position_embeddings": 128},
}  # fmt: skip
SGD = functools.partial(torch.optim.SGD, momentum=0.9)


def small(
    family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **changes
) -> Transformer:
    """A small random model of a family, with fields of its configuration changed."""
    config = ModelConfig.from_hf(FAMILIES[family] | changes)
    return build(config, random_weights(config, seed), dtype)


def trajectory(
    family: str, dtype: str, micro: int, pad_to: int, steps: int = 5, *flags: str
) -> dict:
    """Every parameter of w and u, and λ, after a few steps of train.py's own loop, on the records
    and the checkpoint of this name here. A run whose copies take turns is stopped after the first
    step, and gone on with."""
    settings = family, dtype, micro, pad_to, steps, dist.get_world_size(), shard.GATHER_ONCE_BYTES
    out = Path("-".join(map(str, [*settings, *flags])))
    args = train.parse(
        f"--model {family} --train records --val records/val.jsonl "
        f"--test records/test.jsonl --template plain --steps {steps} --dtype {dtype} "
        f"--max-length 64 --lr-w 1e-3 --lr-u 1e-3 --lr-lambda 2e-2 --lambda-z 0 "
        f"--lisa-interval 2 --lisa-layers 1 --alpha 1 --batch-size 32 --val-batch-size 32 "
        f"--micro-batch-size {micro} --out {out}".split()
        + list(flags)
    )
    inputs = prepare(args, dist.get_world_size())
    dist.barrier()  # no rank writes before all have looked
    out.mkdir(exist_ok=True)
    with mock.patch("data.padding", lambda: pad_to):
        if "--cpu-offload" in flags:
            with contextlib.suppress(train.Stopped):
                train.train(args, inputs, torch.device("cpu"), signals=[signal.SIGTERM])
        penalty = train.train(args, inputs, torch.device("cpu"), signals=[])
    parameters = {}
    for which, model in ("w", penalty.w), ("u", penalty.u):
        shard.move_to_device(model)
        for name, full in shard.full_tensors(model):
            parameters[f"{which}.{name}"] = full.clone()
    return parameters | {"lam": penalty.sources.lam.detach()}


GRADIENT, DIFFERENCE = ("--gap", "gradient"), ("--gap", "difference")


def trajectories() -> dict:
    """In fp64 by family, micro-batch size and padding; and after one step, by dtype."""
    sizes = [(4, 8), (16, 32)] if dist.get_world_size() == 1 else [(8, 8)]
    found = {(family, *size): trajectory(family, "fp64", *size, 5, *gap) for size in sizes
             for family, gap in (("gpt2", GRADIENT), ("llama", DIFFERENCE))}  # fmt: skip
    dtypes = "fp32", "bf16"
    return found | {dtype: trajectory("gpt2", dtype, 8, 8, 1, *DIFFERENCE) for dtype in dtypes}


def offload() -> list[list[dict]]:
    """The same trajectory with both copies on the device; and with turns, a stop and a resume. The
    second with another optimiser than AdamW."""
    sgd, results = functools.partialmethod(Lisa.__init__, optimizer=SGD), []
    for family, dtype, once, init in (
        ("gpt2", "bf16", True, Lisa.__init__), ("llama", "fp32", False, sgd),
    ):  # fmt: skip
        shard.GATHER_ONCE_BYTES = once << 30
        with mock.patch.object(Lisa, "__init__", init):
            results.append([trajectory(family, dtype, 8, 8, 3, *GRADIENT, *flags)
                            for flags in ((), ("--cpu-offload",))])  # fmt: skip
    return results


def compiled() -> tuple[float, float, int]:
    """Compiled blocks against eager ones over widths, batch sizes and LISA's draws, slopes taken or
    not: the worst difference of a loss or a slope, how far the weights end apart, and how many
    graphs there are."""
    config, models, worst = ModelConfig.from_hf(FAMILIES["llama"]), [], 0.0
    for fused, watched in (False, True), (True, False), (True, True):
        model = shard.build(config, torch.float64, torch.device("cpu"))
        shard.fill(model, random_weights(config, 1))
        if fused:  # by Dynamo alone: code generation takes minutes
            shard.compile_blocks(model, watched, "eager")
        slopes = Slopes(model, lambda p: torch.ones(p.shape, dtype=p.dtype)) if watched else None
        models.append((model, Lisa(model, 1, interval=2, seed=1, lr=1e-2, ends="frozen"), slopes))
    for step in range(6):
        g = torch.Generator().manual_seed(step)
        shape = 3 + step % 2, 8 * (1 + step % 3)
        tokens, losses, found = torch.randint(0, VOCAB, shape, generator=g), [], []
        for model, opt, slopes in models:
            opt.switch(step)
            shard.once_per_pass(model, last=True)
            if slopes:
                slopes.n_samples = len(tokens)
            losses.append(model(tokens, tokens))
            losses[-1].sum().backward()
            found += [slopes.take()] if slopes else []
            opt.step()
            opt.zero_grad()
        pairs = (losses[0], losses[1]), (losses[0], losses[2]), found
        worst = max(worst, *(difference([a], [b]) for a, b in pairs))
    first, *others = ([*model.parameters()] for model, *_ in models)
    ends = max(difference(first, other) for other in others)
    return worst, ends, counters["stats"]["unique_graphs"]


def batch(seed: int) -> SimpleNamespace:
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (6, 16), generator=g)
    labels = tokens.where(torch.arange(16) > 4, -100)
    return SimpleNamespace(tokens=tokens, labels=labels, group=torch.arange(6) % 2)


def models(family: str, gather_once: bool, dtype: torch.dtype, n: int = 1) -> tuple[list, list]:
    """n copies of a model sharded, and n dense, with weights large enough that every part matters.
    """
    config = ModelConfig.from_hf(FAMILIES[family])
    weights = [(name, t + 0.1 * torch.randn(t.shape, generator=torch.Generator().manual_seed(i)))
               for i, (name, t) in enumerate(random_weights(config, 1))]  # fmt: skip
    shard.GATHER_ONCE_BYTES = gather_once << 30
    cut = [shard.build(config, dtype, torch.device("cpu")) for _ in range(n)]
    whole = [build(config, weights, dtype) for _ in range(n)]
    for model in cut:
        shard.fill(model, weights)
    for model in whole:
        model.gather_once, model.offload = False, None
    return cut, whole


def backward(model, *seeds: int) -> None:
    """A pass of several micro-batches."""
    for seed in seeds:
        shard.once_per_pass(model, last=seed == seeds[-1])
        model(batch(seed).tokens, batch(seed).labels).sum().backward()


def dense() -> dict:
    """Sharded against dense models: relative differences, by what was compared."""
    differ = {}
    once = [(family, True) for family in ("gpt2", "llama", "llama-tied")]
    for family, gather_once in [(family, False) for family in FAMILIES] + once:
        # As one group; and, tied or not, as several.
        shard.ONE_GROUP_ON = ("cpu",) * (family == "gpt2")
        pairs = models(family, gather_once, torch.float64, n=2)
        cut, whole = pairs[0][0], pairs[1][0]
        key = family, gather_once
        losses = [model(batch(0).tokens, batch(0).labels) for model in (cut, whole)]
        differ[(*key, "loss")] = difference(losses[:1], losses[1:])
        for model in (cut, whole):
            backward(model, 0, 1)
        grads = [[p.grad for p in model.parameters()] for model in (cut, whole)]
        differ[(*key, "gradients")] = difference(*grads)
        cut.zero_grad()
        whole.zero_grad()
        differ[(*key, "after evaluation, switch, step")] = interleaved(*pairs)
        out = Path(f"{family}-{gather_once}")
        shard.save(cut, out, lambda path: None)
        read = from_pretrained(out, torch.float64)
        differ[(*key, "saved")] = difference(read.parameters(), whole.parameters())
    return differ


def interleaved(cut: list, whole: list) -> float:
    """Evaluate, switch blocks and step in turn; then compare what the two compute."""
    test, val, steps, worst = batch(7), batch(9), [], 0.0
    val.group = torch.full((6,), 2)
    for copies in (cut, whole):
        opts = [Lisa(model, 1, interval=1, seed=5, lr=1e-2) for model in copies]
        sources = SourceWeights(2, torch.float64)
        steps.append(PenaltyStep(*copies, *opts, sources, 5.0, on_micro=shard.once_per_pass))
    for step in range(4):
        with torch.no_grad():
            losses = [w(test.tokens, test.labels) for w, _ in (cut, whole)]
        shard.release(cut[0])
        worst = max(worst, difference(losses[:1], losses[1:]))
        for penalty in steps:
            for _, opt in penalty.copies.values():
                opt.switch(step)
            # All ranks hold the same samples here, so the objective counts each as many times.
            counts = torch.tensor([6, 6, 6]) * dist.get_world_size()
            penalty.step([batch(step), batch(step + 20)], [val], counts)
    return max(worst, difference(cut[0].parameters(), whole[0].parameters()))


def bf16() -> dict:
    """Sharded bf16 against dense bf16, through switches of LISA: how far apart the weights end, in
    terms of how far they moved."""
    result = {}
    for gather_once in (True, False):
        (cut,), (whole,) = models("llama", gather_once, torch.bfloat16)
        start = flat(whole.parameters())
        for model in (cut, whole):
            opt = Lisa(model, 1, interval=1, seed=5, lr=1e-2, ends="sampled")
            for step in range(6):
                opt.switch(step)
                backward(model, step, step + 10)
                opt.step()
                opt.zero_grad()
            opt.finish(6)
        a, b = flat(cut.parameters()), flat(whole.parameters())
        result[gather_once] = ((a - b).norm() / (b - start).norm()).item()
    return result


def flat(tensors) -> torch.Tensor:
    """All of them, whether sharded or not, in float64."""
    return torch.cat([shard.full(t).flatten() for t in tensors]).double()


def difference(a, b) -> float:
    """‖a − b‖ / ‖b‖ over all tensors."""
    a, b = flat(a), flat(b)
    return ((a - b).norm() / b.norm()).item()


class AnonymousMemory(threading.Thread):
    """Peak of this process's anonymous resident memory, in bytes, sampled every 20 ms."""

    def __init__(self):
        super().__init__(daemon=True)
        self.start_at = self.peak = self.now()
        self.start()

    @staticmethod
    def now() -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("RssAnon:")[1].split()[0])

    def run(self):
        while True:
            self.peak = max(self.peak, self.now())
            time.sleep(0.02)


def make(path: str) -> dict:
    """Write a checkpoint of TinyLlama-1.1B's shape, 4.4 GB in fp32, to measure `load` on."""
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
             "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000}  # fmt: skip
    config = ModelConfig.from_hf(FAMILIES["llama"] | sizes)
    Path(path).mkdir(parents=True)
    shapes = parameter_shapes(config).items()
    zeros = ((name, torch.zeros(shape)) for name, shape in shapes)
    like = ((name, torch.zeros(shape, device="meta")) for name, shape in shapes)
    pretrained.write_tensors(path, config, zeros, like, max_bytes=1e9)
    return {"files": len(list(Path(path).glob("*.safetensors")))}


def load(path: str) -> dict:
    """Load a checkpoint into shards; bytes of memory against the shards' and the largest tensor."""
    memory = AnonymousMemory()
    config = pretrained.load_config(path)
    model = shard.build(config, torch.float32, torch.device("cpu"))
    shard.fill(model, read_tensors(Path(path), config))
    time.sleep(0.05)
    sizes = [p.numel() * p.element_size() for p in model.parameters()]
    own = [local(p).numel() * p.element_size() for p in model.parameters()]
    return {"peak": memory.peak - memory.start_at, "shards": sum(own), "largest": max(sizes)}


if __name__ == "__main__":
    what, path = sys.argv[1:]
    shard.start(timeout=120)
    print(f"rank {dist.get_rank()}: {(make if what == 'make' else load)(path)}")
    dist.destroy_process_group()
