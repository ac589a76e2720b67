"""Speed and memory, as ratios against a plain implementation that runs beside ours.

    python benchmark.py [speed|memory|tokenize|fidelity] [--quick] [--device cpu|cuda]

The **reference** does what is usually written: two `transformers` models, torch.optim.AdamW over
all parameters with `requires_grad` flipped for LISA, logits at every position, micro-batches in
order of arrival padded to their longest sample, a pass each for L2(u), L2(w) and L1(w), and a wait
for the loss in every micro-batch. It sees the same samples, weights and blocks, and is tested to
have the same losses and gradients. Times are interleaved, A B A B, in one process (one a rank);
peaks of memory are of a process each. Prints a table, then the same as one line of JSON.

The **floor** of a step is the time its matrix products take at the rate that the same threads reach
on products of these shapes, and that AdamW's bytes take at the rate of a copy.

B batch, T time, V vocabulary, S sources.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence
from torch.utils.flop_counter import FlopCounterMode

import data
import lisa
import model as hf
import plan
import pretrained
import report
import shard
import tasks
import templates
import tokenizer
import train
from inputs import DTYPES, TINY, Inputs, parse

# glibc maps a block above a threshold anew each time, and each of its pages then costs a fault and
# is zeroed. Both sides run with blocks of every size taken from one heap that is never given back.
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(1 << 26),
}  # fmt: skip

SHAPES = {
    "gpt2": {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 768, "n_layer": 12,
        "n_head": 12, "n_positions": 1024, "vocab_size": 50257, "bos_token_id": 50256,
        "eos_token_id": 50256, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    },
    "tiny": TINY | {"vocab_size": 258, "bos_token_id": 256, "eos_token_id": 257},
    "llama3-8b": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 14336, "max_position_embeddings": 8192, "vocab_size": 128256,
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
}  # fmt: skip
SHAPES["quick"] = SHAPES["gpt2"] | {"n_embd": 64, "n_layer": 3, "n_head": 2, "vocab_size": 512}

# Tokens of prompt and answer, with GPT-2's tokenizer and the alpaca template, at the quantiles
# given, in the files of https://github.com/2003pro/ScaleBiO, data_tiny.
QUANTILES = [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1]
ALPACA = {
    "alpaca": ([34, 39, 40, 42, 43, 46, 56, 62, 66, 74, 83, 116, 285],
               [2, 8, 12, 17, 27, 43, 62, 78, 96, 124, 157, 272, 472]),
    "gpt4": ([34, 39, 40, 42, 43, 46, 53, 61, 67, 76, 86, 113, 177],
             [2, 11, 18, 33, 62, 104, 152, 209, 280, 340, 395, 463, 475]),
    "val": ([34, 39, 40, 42, 44, 46, 57, 62, 67, 74, 84, 116, 180],
            [2, 11, 18, 34, 57, 97, 139, 198, 282, 346, 411, 467, 475]),
}  # fmt: skip


@dataclass
class Case:
    """What one worker measures."""

    title: str
    shape: str
    lengths: str  # "alpaca", "task" (the built-in one), or "PROMPT+ANSWER" tokens of every sample
    goal: float | None = None  # largest ratio of our time to the reference's
    batch: int = 8  # samples of training, and as many of validation
    micro: int = 4
    ranks: int = 1
    threads: int = 2  # of each rank
    repeats: int = 3
    sources: int = 2
    records: int = 1000  # of each source
    dtype: str = "fp32"
    device: str = "cpu"
    sides: tuple[str, ...] = ("ours", "reference")
    flags: str = ""  # of train.py

    def args(self) -> argparse.Namespace:
        sizes = f"--batch-size {self.batch} --val-batch-size {self.batch} --micro-batch-size"
        line = f"--model {self.shape} {sizes} {self.micro} --dtype {self.dtype} {self.flags}"
        return parse(line.split())


def speed_cases(quick: bool) -> list[Case]:
    tiny = Case("built-in task and model", "tiny", "task", 0.5, 64, 32, repeats=10, threads=1)
    if quick:
        return [Case("alpaca, 1 rank", "quick", "alpaca", 0.5, repeats=2, threads=1)]
    return [
        tiny,
        Case("124M, alpaca, 1 rank", "gpt2", "alpaca", 0.5, 32, 8, repeats=2),
        # Half the micro-batch: the reference's logits and activations for 8 take some 10 GB a rank.
        Case("124M, alpaca, 2 ranks", "gpt2", "alpaca", 0.5, 32, 4, ranks=2, threads=1, repeats=2),
        Case("124M, 256 tokens, all labels", "gpt2", "0+256", 1.0, 4),
        Case("124M, 256 tokens, 160 response", "gpt2", "96+160", 0.8, 4),
    ]


# --------------------------------------------------------------------------------------------------
# The samples


def random_dataset(prompt: np.ndarray, answer: np.ndarray, vocab: int, seed: int) -> data.Dataset:
    """Random tokens: `prompt` of them without and `answer` of them with loss, (n,) each."""
    rng = np.random.default_rng(seed)
    lengths = (prompt + answer).astype(np.int64)
    starts = np.cumsum(lengths) - lengths
    tokens = rng.integers(0, vocab, lengths.sum(), dtype=np.int32)
    place = np.arange(len(tokens)) - np.repeat(starts, lengths)
    tokens = np.where(place < np.repeat(prompt, lengths), ~tokens, tokens)
    n = np.arange(len(lengths))
    return data.Dataset(
        tokens, starts, lengths, n.astype(np.uint64), n, n, max_length=int(lengths.max())
    )


def random_lengths(lengths: str, name: str, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of prompts and answers, (n,) each."""
    if lengths != "alpaca":
        return tuple(np.full(n, int(x)) for x in lengths.split("+"))
    rng = np.random.default_rng(seed)
    p, a = (np.interp(rng.random(n), QUANTILES, q).astype(np.int64) for q in ALPACA[name])
    return p, np.minimum(a, 512 - p)


def datasets(case: Case) -> tuple[list[data.Dataset], data.Dataset]:
    """(sources, validation)."""
    if case.lengths == "task":
        sources, val, _ = tasks.task("denoising", 0)
        make, tok = data.Dataset.from_records, tokenizer.byte_tokenizer()
        *sources, val = (make(r, tok, "plain", 64) for r in (*sources.values(), val))
        return sources, val
    names = [("alpaca", "gpt4")[i % 2] for i in range(case.sources)]
    vocab = SHAPES[case.shape]["vocab_size"]
    *sources, val = (
        random_dataset(*random_lengths(case.lengths, name, case.records, i), vocab, i)
        for i, name in enumerate((*names, "val"))
    )
    return sources, val


# --------------------------------------------------------------------------------------------------
# The two sides


def batches(side, batch: int, micro: int, pad_to: int | None = None) -> data.Batches:
    rank, world, seed = dist.get_rank(), dist.get_world_size(), side.args.seed
    return data.Batches(side.sources, side.val, batch, batch, micro, seed, rank, world, pad_to)


class Ours:
    """The loop of train.py, without its log."""

    def __init__(self, case: Case, device: torch.device):
        self.device, self.args = device, case.args()
        self.config = hf.ModelConfig.from_hf(SHAPES[case.shape])
        self.sources, self.val = datasets(case)
        made = Inputs(
            config=self.config, checkpoint=None, tokenizer=None, val=self.val, test=None, notes=[],
            sources={str(i): source for i, source in enumerate(self.sources)},
        )  # fmt: skip
        self.penalty = train.make_trainer(self.args, made, device)

    def feed(self, batch: int) -> None:
        """Go on with steps of this many samples."""
        self.batches = batches(self, batch, self.args.micro_batch_size)

    def arrived(self, t: int) -> int:
        """What is at hand before a step is timed: here, no more than its number."""
        return t

    def step(self, t: int, arrived: int) -> list[float]:
        """Losses of the sources under w, then under u, then of validation."""
        self.penalty.opt_w.switch(t)
        self.penalty.opt_u.switch(t)
        train_part, val_part, counts = self.batches.step(t)
        train_part, val_part = ([b.to(self.device) for b in x] for x in (train_part, val_part))
        stats = self.penalty.step(train_part, val_part, counts)
        return [*stats.source_loss_w.tolist(), *stats.source_loss_u.tolist(), stats.val_loss]


class Reference:
    """The plain implementation: see the head of this file. Stratified batches, sample losses and
    shared blocks are ours, so that both sides compute the same."""

    def __init__(self, case: Case, device: torch.device):
        from transformers import AutoConfig, AutoModelForCausalLM

        self.device, self.args = device, case.args()
        self.sources, self.val = datasets(case)
        self.n_sources = len(self.sources)
        dtype = DTYPES[case.dtype]
        config = AutoConfig.for_model(**SHAPES[case.shape], dtype=dtype)
        with device:
            w = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        ours = hf.ModelConfig.from_hf(SHAPES[case.shape])
        weights = pretrained.to_hf(ours, hf.random_weights(ours, self.args.seed))
        w.load_state_dict(dict(weights), strict=False)
        self.w, self.u = w, copy.deepcopy(w)
        if dist.get_world_size() > 1:
            for model in (self.w, self.u):
                for module in (*self.blocks(model), model):
                    fully_shard(module)
        # Gradients are alpha times ours, which are divided by it.
        adam = {"weight_decay": self.args.weight_decay, "eps": self.args.alpha * 1e-8}
        self.opt_w = torch.optim.AdamW(self.w.parameters(), self.args.lr_w, **adam)
        self.opt_u = torch.optim.AdamW(self.u.parameters(), self.args.lr_u, **adam)
        wide = torch.promote_types(dtype, torch.float32)
        self.lam = torch.zeros(self.n_sources, device=device, dtype=wide, requires_grad=True)
        self.opt_lam = torch.optim.Adam([self.lam], lr=self.args.lr_lambda)

    def feed(self, batch: int) -> None:
        """As Ours.feed; each sample is a micro-batch, to be put together here."""
        self.batches = batches(self, batch, micro=1, pad_to=1)

    @staticmethod
    def blocks(model) -> list:
        return list(model.transformer.h if hasattr(model, "transformer") else model.model.layers)

    def arrived(self, t: int) -> tuple[list, list, Tensor]:
        """This rank's samples of step t, each as a micro-batch of one, and the global counts."""
        train_part, val_part, counts = self.batches.step(t)
        order = np.random.default_rng(t).permutation
        return *([x[i] for i in order(len(x))] for x in (train_part, val_part)), counts

    def step(self, t: int, arrived: tuple[list, list, Tensor]) -> list[float]:
        """As Ours.step."""
        train_part, val_part, counts = arrived
        alpha, counts = self.args.alpha, counts.to(self.device)
        period, seed = t // self.args.lisa_interval, self.args.seed
        for model in (self.w, self.u):
            blocks = self.blocks(model)
            active = lisa.draw(seed, period, len(blocks), self.args.lisa_layers)
            for i, block in enumerate(blocks):
                block.requires_grad_(i in active)
        probs = self.lam.softmax(0)
        val_coef = F.one_hot(torch.tensor(self.n_sources)) / counts[-1].item()
        coef = alpha * probs.detach() / counts[:-1]  # (S,)
        loss_u = self.passes(self.u, train_part, coef)[:-1] / counts[:-1]
        loss_w = self.passes(self.w, train_part, coef)[:-1] / counts[:-1]
        val_loss = self.passes(self.w, val_part, val_coef.to(self.device))[-1] / counts[-1]
        probs.backward(alpha * (loss_w - loss_u))
        for opt in (self.opt_u, self.opt_w, self.opt_lam):
            opt.step()
            opt.zero_grad()
        return [*loss_w.tolist(), *loss_u.tolist(), val_loss.item()]

    def passes(self, model, samples: list, coef: Tensor) -> Tensor:
        """Gradients of Σ_j coef[group_j] ℓ_j; returns the global sum of ℓ_j by group, (S + 1,)."""
        sums = self.lam.new_zeros(self.n_sources + 1)
        for n in range(0, len(samples), self.args.micro_batch_size):
            part = samples[n : n + self.args.micro_batch_size]
            tokens = pad_sequence([s.tokens[0] for s in part], True).to(self.device)  # (B, T)
            labels = pad_sequence([s.labels[0] for s in part], True, -100).to(self.device)
            mask = pad_sequence([torch.ones_like(s.tokens[0]) for s in part], True).to(self.device)
            group = torch.cat([s.group for s in part]).to(self.device)
            logits = model(input_ids=tokens, attention_mask=mask).logits.to(self.lam)  # (B, T, V)
            targets = labels[:, 1:]
            losses = F.cross_entropy(
                logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="none"
            ).view(targets.shape)
            losses = losses.sum(1) / (targets != -100).sum(1)  # (B,)
            (dist.get_world_size() * coef[group] * losses).sum().backward()
            for i, loss in zip(group.tolist(), losses.tolist(), strict=True):
                sums[i] += loss
        dist.all_reduce(sums)
        return sums


SIDES = {"ours": Ours, "reference": Reference}


# --------------------------------------------------------------------------------------------------
# What a worker measures


def seconds(call: Callable, *args) -> float:
    """Of one call, on all ranks and their devices."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else int
    wait()
    dist.barrier()
    began = time.perf_counter()
    call(*args)
    wait()
    dist.barrier()
    return time.perf_counter() - began


def times(case: Case, device: torch.device) -> dict:
    """Seconds of interleaved steps of each side, and what the floor is made of."""
    sides = {name: SIDES[name](case, device) for name in case.sides}
    for side in sides.values():  # warm up
        side.feed(case.ranks * len(side.sources))
        side.step(0, side.arrived(0))
        side.feed(case.batch)
    result, rates, copies = {name: [] for name in sides}, [], []
    for t in range(1, case.repeats + 1):
        for name, side in sides.items():
            # In bf16 our attention may use the flash kernel alone: without it this raises.
            flash = case.dtype == "bf16" and name == "ours"
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if flash else nullcontext():
                result[name].append(seconds(side.step, t, side.arrived(t)))
        rates.append(matmul_rate(case, device))
        copies.append(copy_rate(device))
    train_part, val_part, _ = sides["ours"].batches.step(1)
    passes = [*train_part, *train_part, *val_part]
    masters = sides["ours"].penalty.opt_w.masters.values()
    adamw = 2 * 7 * sum(lisa.local(m).nbytes for m in masters)  # reads p, g, m, v; writes p, m, v
    flops = flop_count(case, passes)
    return result | {
        "padded_tokens": sum(b.tokens.numel() for b in passes) * case.ranks,
        "flops": flops,
        "flops_per_s": median(rates),
        "adamw_bytes": adamw,
        "copy_bytes_per_s": median(copies),
        "floor": flops / median(rates) + adamw / median(copies),
        "peak": report.peak_memory(),
    }


def flop_count(case: Case, passes: list[data.MicroBatch]) -> int:
    """Of all matrix products in this rank's forward and backward passes, counted on the meta
    device. No weight gradients where LISA trains nothing."""
    args, config = case.args(), hf.ModelConfig.from_hf(SHAPES[case.shape])
    with torch.device("meta"):
        model = hf.Transformer(config)
    n = config.n_layers
    active = lisa.draw(args.seed, 0, n, args.lisa_layers, args.lisa_ends)
    model.requires_grad_(n in active)
    for i, block in enumerate(model.blocks):
        block.requires_grad_(i in active)
    with FlopCounterMode(display=False) as counter:
        for batch in passes:
            model(batch.tokens.to("meta"), batch.labels).sum().backward()
    return counter.get_total_flops()


def matmul_rate(case: Case, device: torch.device) -> float:
    """Floating-point operations a second in the MLP's product, of a micro-batch of 256 tokens."""
    config, dtype = hf.ModelConfig.from_hf(SHAPES[case.shape]), DTYPES[case.dtype]
    x = torch.randn(256 * case.micro, config.width, device=device, dtype=dtype)
    weight = torch.randn(config.hidden, config.width, device=device, dtype=dtype)
    took = [seconds(F.linear, x, weight) for _ in range(10)]
    return 2 * x.numel() * config.hidden / median(took)


def copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written, in a copy of 64 MB."""
    a = torch.ones(1 << 24, device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / median(seconds(b.copy_, a) for _ in range(5))


def peak(case: Case, device: torch.device) -> dict:
    """Bytes at most, after ten switches of the blocks and one full step."""
    before = report.peak_memory()
    (name,) = case.sides
    side = SIDES[name](case, device)
    side.feed(len(side.sources))
    for t in range(10):
        side.step(t, side.arrived(t))
    side.feed(case.batch)
    took = seconds(side.step, 10, side.arrived(10))
    return {"peak": report.peak_memory(), "before": before, "seconds": took}


def products(case: Case, device: torch.device) -> dict:
    """What matrix products alone get, each rank its own at the same time."""
    return {"flops_per_s": median(matmul_rate(case, device) for _ in range(10))}


WORKERS = {"times": times, "peak": peak, "products": products}


def worker(what: str, case: Case) -> None:
    """Measure, and print a line of JSON on rank 0."""
    torch.set_num_threads(case.threads)
    device = shard.start(timeout=600)
    result = WORKERS[what](case, device)
    if dist.get_rank() == 0:
        print(json.dumps(result))
    dist.destroy_process_group()
    shard.leave(0)


# --------------------------------------------------------------------------------------------------
# What the first process does: start workers, make tables


def start(command: list[str], threads: int = 1, allocator: dict | None = None) -> dict | list:
    """Run a command; the JSON in the last line it prints."""
    env = os.environ | (ALLOCATOR if allocator is None else allocator)
    env |= {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def run(what: str, case: Case, **kwargs) -> dict:
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={case.ranks}"]
    launch = [sys.executable, *(several if case.ranks > 1 else [])]
    return start([*launch, __file__, "worker", what, json.dumps(asdict(case))], case.threads)


def spread(values: list[float]) -> str:
    return f"{median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def ratios(a: list[float], b: list[float]) -> list[float]:
    return [x / y for x, y in zip(a, b, strict=True)]


def speed(args: argparse.Namespace) -> dict:
    """The bilevel step of both sides, start-up, and the cost against sizes."""
    if args.device == "cuda":
        return {"steps": gpu_steps()}
    results = {"steps": steps(args.quick, args.only)}
    if args.only:
        return results
    if not args.quick:
        results["1 to 2 ranks"] = scaling()
    return results | {"start-up": start_up(args.quick), "cost": cost(args.quick)}


def steps(quick: bool, only: str) -> dict:
    print(f"\n{'bilevel step':33}{'ours':>8}{'reference':>11}  {'ratio':25}{'goal':>5}{'floor':>7}")
    results = {}
    for case in speed_cases(quick):
        if only not in case.title:
            continue
        r = results[case.title] = run("times", case)
        r["ratio"] = ratios(r["ours"], r["reference"])
        a, b = median(r["ours"]), median(r["reference"])
        print(f"{case.title:33}{a:7.2f}s{b:10.2f}s  {spread(r['ratio']):25}{case.goal:5}"
              f"{r['floor'] / b:7.2f}", flush=True)  # fmt: skip
    for r in list(results.values())[:1]:
        print(f"floor: the products at {r['flops_per_s'] / 1e9:.0f} GFLOP/s and AdamW's bytes at "
              f"{r['copy_bytes_per_s'] / 1e9:.1f} GB/s (as measured in the first case), over the "
              "reference's time")  # fmt: skip
    return results


def scaling() -> dict:
    """Throughput of two ranks over that of one, a thread each, by turns; and what the machine gives
    to matrix products alone."""
    two = next(case for case in speed_cases(False) if case.ranks == 2)
    cases = [replace(two, ranks=n, sides=("ours",)) for n in (1, 2)]
    took, rates = ([], []), ([], [])
    for _, i in itertools.product(range(2), range(2)):
        rates[i].append(run("products", cases[i])["flops_per_s"])
        took[i].extend(run("times", cases[i])["ours"])
    gains = ratios(*took)  # of the same global batch
    products = [2 * rate for rate in ratios(rates[1], rates[0])]
    print(f"1 -> 2 ranks, a thread each: {spread(gains)} times the throughput (goal 1.7); matrix "
          f"products alone: {spread(products)}", flush=True)  # fmt: skip
    return {"gains": gains, "products": products}


def cost(quick: bool) -> dict:
    """How a step of ours grows with each size alone; the model is the tiny one."""
    base = Case("", "tiny", "32+32", None, 64, 32, threads=1, repeats=5, sides=("ours",))
    sizes = {
        "length": [replace(base, lengths=f"{n // 2}+{n // 2}") for n in (64, 128, 256, 512)],
        "batch": [replace(base, batch=n) for n in (32, 64, 128, 256)],
        "sources": [replace(base, sources=n) for n in (2, 10, 100, 1000)],
        "records": [replace(base, records=n // 2) for n in (10**3, 10**4, 10**5, 10**6)],
    }
    value = {"length": lambda c: 2 * int(c.lengths.split("+")[0]), "batch": lambda c: c.batch,
             "sources": lambda c: c.sources, "records": lambda c: 2 * c.records}  # fmt: skip
    results = {}
    print("\ncost against        milliseconds a step, per 1000 padded tokens")
    for name, cases in sizes.items():
        row = results[name] = {}
        for case in cases[:: 3 if quick else 1]:
            r = run("times", case)
            row[value[name](case)] = 1e6 * median(r["ours"]) / r["padded_tokens"]
        print(f"{name:19} " + "  ".join(f"{n}: {ms:.1f}" for n, ms in row.items()), flush=True)
    return results


# --------------------------------------------------------------------------------------------------
# Start-up: from the end of imports to the first step, in processes of their own

OURS_STARTS = """
import time; began = time.perf_counter()
import json, sys
import bilevel, shard, train
imported = time.perf_counter()
def first_step(*_, **__):
    print(json.dumps([imported - began, time.perf_counter() - imported]))
    shard.leave(0)
bilevel.PenaltyStep.step = first_step
train.main(sys.argv[1:])
"""
REFERENCE_STARTS = """
import time; began = time.perf_counter()
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel
imported = time.perf_counter()
directory, cached = sys.argv[1:]
tokenizer, samples = AutoTokenizer.from_pretrained(directory), torch.load(cached)
copies = [AutoModelForCausalLM.from_pretrained(directory) for _ in "wu"]
optimizers = [torch.optim.AdamW(model.parameters(), 1e-5) for model in copies]
lam = torch.zeros(2, requires_grad=True)
optimizers.append(torch.optim.Adam([lam], 1e-2))
print(json.dumps([imported - began, time.perf_counter() - imported]))
"""


def start_up(quick: bool) -> dict:
    """GPT-2 124M and tokenised records from the disk, three times in turn."""
    results = {"ours": [], "reference": []}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        files = write_files(folder, "quick" if quick else "gpt2", 100 if quick else 9000)
        flags = f"--model {folder / 'model'} --train {files[0]} {files[1]} --val {files[2]}"
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        for n in range(4):
            line = [*flags.split(), "--out", str(folder / f"run{n}")]
            ours = start([sys.executable, "-c", OURS_STARTS, *line])
            if n == 0:  # fills the cache
                continue
            reference = [str(folder / "model"), str(folder / "samples.pt")]
            results["ours"].append(ours)
            results["reference"].append(start([sys.executable, "-c", REFERENCE_STARTS, *reference]))
    took = {name: [second for _, second in pairs] for name, pairs in results.items()}
    imports = {name: median(first for first, _ in pairs) for name, pairs in results.items()}
    print("\nstart-up               ours  reference  ratio")
    print(f"imports             {imports['ours']:6.2f}s{imports['reference']:10.2f}s")
    print(f"then to first step  {median(took['ours']):6.2f}s{median(took['reference']):10.2f}s  "
          f"{spread(ratios(took['ours'], took['reference']))} (goal 0.5, and 3 s)")  # fmt: skip
    return results


def write_files(folder: Path, shape: str, n: int) -> list[str]:
    """A checkpoint with a tokenizer, two sources of n records and validation, and the reference's
    cached samples. Returns NAME=PATH of the sources, and the path of validation."""
    config = hf.ModelConfig.from_hf(SHAPES[shape])
    model = hf.build(config, hf.random_weights(config, 0))
    hf.save_pretrained(model, folder / "model")
    texts = random_texts(3 * n)
    train_tokenizer(texts[:1000], folder / "model")
    paths = []
    for i, name in enumerate(("train_a", "train_b", "val")):
        records = [{"instruction": t[:80], "output": t[80:]} for t in texts[i * n : (i + 1) * n]]
        paths.append(folder / f"{name}.json")
        paths[-1].write_text(json.dumps(records))
    sources, val = datasets(Case("", shape, "alpaca", records=n))
    examples = (d.example(i) for d in (*sources, val) for i in range(len(d)))
    samples = [tuple(map(torch.from_numpy, example)) for example in examples]
    torch.save(samples, folder / "samples.pt")
    return [f"a={paths[0]}", f"b={paths[1]}", str(paths[2])]


def random_texts(n: int) -> list[str]:
    rng = random.Random(0)
    words = tasks.words(rng, 2000, 3, tasks.CONSONANTS)
    return [" ".join(rng.choices(words, k=rng.randint(20, 120))) for _ in range(n)]


def train_tokenizer(texts: list[str], directory: Path) -> None:
    """Write a byte-level BPE tokenizer of 400 ids."""
    from tokenizers import ByteLevelBPETokenizer

    made = ByteLevelBPETokenizer()
    made.train_from_iterator(texts, 400, special_tokens=["<|endoftext|>"], show_progress=False)
    made.save(str(directory / "tokenizer.json"))


# --------------------------------------------------------------------------------------------------
# The other commands


def memory(args: argparse.Namespace) -> dict:
    """Peaks after ten switches of LISA's blocks."""
    size = {"shape": "quick"} if args.quick else {"shape": "gpt2", "micro": 8}
    ours = Case("ours", lengths="alpaca", sides=("ours",), flags="--lisa-interval 1", **size)
    cases = [
        replace(ours, title="reference", sides=("reference",)),
        ours,
        replace(ours, title="ours, ends frozen", flags="--lisa-interval 1 --lisa-ends frozen"),
    ]
    results = {}
    print(f"\n{'after 10 switches':19}{'peak':>9}{'at start':>10}{'ratio of peaks':>16}{'step':>8}")
    for case in cases:
        r = results[case.title] = run("peak", case)
        r["ratio"] = r["peak"] / results["reference"]["peak"]
        print(f"{case.title:19}{r['peak'] / 1e6:6.0f} MB{r['before'] / 1e6:7.0f} MB"
              f"{r['ratio']:16.3f}{r['seconds']:7.1f}s", flush=True)  # fmt: skip
    return results


def tokenize(args: argparse.Namespace) -> dict:
    """Records to tokens with loss masks, and texts to tokens, against `tokenizers` on the texts."""
    import tokenizers

    with tempfile.TemporaryDirectory() as folder:
        if args.texts:
            records = [turns for *_, turns in data.read_records(args.texts)]
            directory = Path(args.tokenizer)
        else:
            directory, texts = Path(folder), random_texts(500 if args.quick else 20_000)
            train_tokenizer(texts[:1000], directory)
            records = [[("user", t[:80]), ("assistant", t[80:])] for t in texts]
        tok = tokenizer.load_tokenizer(directory)
        theirs = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    rendered = (templates.render(tok, "alpaca", turns) for turns in records)
    texts = ["".join(s for s, _ in segments if isinstance(s, str)) for segments in rendered]
    calls = {
        "tokenizers": lambda: theirs.encode_batch(texts, add_special_tokens=False),
        "texts": lambda: tok.codec.encode_batch(texts),
        "records": lambda: templates.encode_conversations(tok, "alpaca", records, 10**6),
    }
    took = {name: [] for name in calls}
    for _, (name, call) in itertools.product(range(5), calls.items()):
        began = time.perf_counter()
        call()
        took[name].append(time.perf_counter() - began)
    total = sum(map(len, tok.codec.encode_batch(texts)))
    print(f"\n{len(texts)} texts, {total} tokens; `tokenizers` encode_batch: "
          f"{total / median(took['tokenizers']) / 1e6:.2f} million tokens a second")  # fmt: skip
    speeds = {name: ratios(took["tokenizers"], took[name]) for name in ("texts", "records")}
    print(f"ours, of its speed (goal 1.0): texts to tokens {spread(speeds['texts'])}, "
          f"records to tokens and masks {spread(speeds['records'])}")  # fmt: skip
    return {"seconds": took, "tokens": total, "speed": speeds}


def gpu_steps() -> dict:
    """GPT-2 124M and LLaMA-3-8B with random weights in bf16, 64 samples of 1024 tokens, with and
    without --compile; the reference where it fits. Attention is refused but by the flash kernel."""
    results = {}
    print(f"\n{'':40}{'step':>9}{'tokens/s':>10}{'of peak':>8}{'memory':>9}{'plan':>9}")
    for shape, ends, compiled, name in itertools.product(
        ("gpt2", "llama3-8b"), ("always", "frozen"), (False, True), SIDES
    ):
        if name == "reference" and compiled:
            continue
        flags = f"--max-length 1024 --lisa-ends {ends}" + " --compile" * compiled
        case = Case(
            f"{shape}, {name}, ends {ends}{', compiled' * compiled}", shape, "1+1023", None, 64,
            16 if shape == "gpt2" else 4, repeats=5, dtype="bf16", device="cuda", sides=(name,),
            flags=flags,
        )  # fmt: skip
        planned = plan.plan(
            hf.ModelConfig.from_hf(SHAPES[shape]), ranks=1, dtype=torch.bfloat16,
            micro_batch_size=case.micro, max_length=1024, lisa_layers=2, lisa_ends=ends,
            activation_checkpointing=False, cpu_offload=False,
        ).peak  # fmt: skip
        try:
            r = results[case.title] = run("times", case)
        except RuntimeError as error:
            full = "OutOfMemoryError" in str(error)
            reason = "does not fit" if full else str(error).splitlines()[-1]
            print(f"{case.title:40} {reason}", flush=True)
            continue
        took = median(r[name])
        print(f"{case.title:40}{took:8.3f}s{r['padded_tokens'] / took:10.0f}"
              f"{r['flops'] / took / r['flops_per_s']:8.2f}{r['peak'] / 1e9:7.1f}GB"
              f"{planned / 1e9:7.1f}GB", flush=True)  # fmt: skip
    return results


COMMANDS = {"speed": speed, "memory": memory, "tokenize": tokenize}


def about() -> dict:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    named = (line.split(": ")[1] for line in lines if line.startswith("model name"))
    cpu = next(named, platform.machine())
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": time.strftime("%Y-%m-%d"), "cpu": cpu, "cores": os.cpu_count(), "gpu": gpu,
        "python": platform.python_version(), "torch": str(torch.__version__),
        "allocator": " ".join(f"{key}={value}" for key, value in ALLOCATOR.items()),
    }  # fmt: skip


def main() -> int:
    """Returns the exit code."""
    if sys.argv[1:2] == ["worker"]:  # started by `run`
        worker(sys.argv[2], Case(**json.loads(sys.argv[3])))
    if sys.argv[1:2] == ["fidelity"]:  # has flags and tables of its own
        import fidelity

        return fidelity.main(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", nargs="?", default="speed",
                        choices=(*COMMANDS, "fidelity"))
    parser.add_argument("--quick", action="store_true", help="small sizes, to try it")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, choices=("cpu", "cuda"))
    parser.add_argument("--only", default="", help="speed: steps of cases whose title has this")
    parser.add_argument("--tokenizer", help="tokenize: a directory with tokenizer.json")
    parser.add_argument("--texts", help="tokenize: a file of records")
    args = parser.parse_args()
    if not any(args.only in case.title for case in speed_cases(args.quick)):
        titles = "; ".join(case.title for case in speed_cases(args.quick))
        parser.error(f"--only {args.only}: no case has this in its title. They are: {titles}")
    if bool(args.texts) != bool(args.tokenizer):
        parser.error("--texts and --tokenizer go together")
    print(*(f"{key}: {value}" for key, value in about().items()), sep="\n")
    results = COMMANDS[args.command](args)
    print(json.dumps({"about": about(), args.command: results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
