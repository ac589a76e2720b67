"""Speed and memory, as ratios against a plain implementation that runs beside ours.

    python -m benchmarks.speed [--device cpu|cuda] [--only TITLE]       # steps; CPU: start-up, too
    python -m benchmarks.speed memory
    python -m benchmarks.speed tokenize [--texts FILE --tokenizer DIRECTORY]

`--quick` tries a command at small sizes. Each prints tables, then the same as one line of JSON.

The **reference** does what is usually written: two `transformers` models, torch.optim.AdamW over
all parameters with `requires_grad` flipped for LISA, logits at every position, micro-batches in
order of arrival padded to their longest sample, a pass each for L2(u), L2(w) and L1(w), and a wait
for the loss in every micro-batch. It sees the same samples, weights and blocks, and is tested to
have the same losses and gradients. Steps of the two sides take turns in one process (one a rank);
on a GPU, and for peaks of memory, each side has a process of its own.

The **floor** of a step is the time its matrix products take at the rate that the same threads reach
on products of these shapes, and that AdamW's bytes take at the rate of a copy.

B batch, T time, V vocabulary, S sources.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.utils.rnn import pad_sequence
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

import data
import lisa
import shard
import train
from cli import plan, report
from cli.flags import Flags, Parser, parse
from cli.inputs import TINY, Inputs
from hf import pretrained, templates, tokenizer
from model import DTYPES, ModelConfig, Transformer, build, random_weights, save_pretrained
from sources import tasks
from sources.records import read_records

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

    def args(self) -> Flags:
        sizes = f"--batch-size {self.batch} --val-batch-size {self.batch} --micro-batch-size"
        line = f"--model {self.shape} {sizes} {self.micro} --dtype {self.dtype} {self.flags}"
        return parse(line.split())


def cpu_cases(quick: bool) -> list[Case]:
    if quick:
        return [Case("alpaca, 1 rank", "quick", "alpaca", 0.5, repeats=2, threads=1)]
    return [
        Case("built-in task and model", "tiny", "task", 0.5, 64, 32, repeats=10, threads=1),
        Case("124M, alpaca, 1 rank", "gpt2", "alpaca", 0.5, 32, 8, repeats=5),
        # Half the micro-batch: the reference's logits and activations for 8 take some 10 GB a rank.
        Case("124M, alpaca, 2 ranks", "gpt2", "alpaca", 0.5, 32, 4, ranks=2, threads=1),
        Case("124M, 256 tokens, all labels", "gpt2", "0+256", 1.0, 4, repeats=9),
        Case("124M, 256 tokens, 160 response", "gpt2", "96+160", 0.8, 4, repeats=9),
    ]


def cost_cases(quick: bool) -> list[Case]:
    """How a step of ours grows with each size alone; the model is the tiny one."""
    base = Case("", "tiny", "32+32", None, 64, 32, threads=1, repeats=5, sides=("ours",))
    sizes = {
        "lengths": ["32+32", "64+64", "128+128", "256+256"],
        "batch": [32, 64, 128, 256],
        "sources": [2, 10, 100, 1000],
        "records": [500, 5_000, 50_000, 500_000],  # of each of two sources
    }
    return [
        replace(base, title=f"tiny, {field} {value}", **{field: value})
        for field, values in sizes.items() for value in values[:: 3 if quick else 1]
    ]  # fmt: skip


def apart(base: Case, *variants: str) -> list[Case]:
    """The reference, then ours with the flags of each variant: a process each."""
    reference = replace(base, title=f"{base.title}, reference", sides=("reference",))
    return [reference] + [
        replace(base, title=f"{base.title}, ours {v}", flags=f"{base.flags} {v}", sides=("ours",))
        for v in variants
    ]


def memory_cases(quick: bool) -> list[Case]:
    """LISA's blocks are switched before each of ten steps."""
    base = Case("quick", "quick", "alpaca", repeats=10, threads=1, flags="--lisa-interval 1")
    base = base if quick else replace(base, title="124M", shape="gpt2", micro=8, threads=2)
    return apart(base, "", "--lisa-ends frozen")


def gpu_cases(quick: bool) -> list[Case]:
    """Random weights in bf16, 64 samples of 1024 tokens."""
    base = Case("quick", "quick", "1+63", threads=1, repeats=2, dtype="bf16", device="cuda",
                flags="--max-length 64")  # fmt: skip
    long = replace(base, lengths="1+1023", batch=64, threads=2, flags="--max-length 1024")
    shapes = [base] if quick else [
        replace(long, title="124M", shape="gpt2", micro=16, repeats=5),
        replace(long, title="8B", shape="llama3-8b", micro=4, repeats=2),
    ]
    variants = "", "--compile", "--lisa-ends frozen", "--lisa-ends frozen --compile"
    return [case for shape in shapes for case in apart(shape, *variants)]


# --------------------------------------------------------------------------------------------------
# The samples


def random_lengths(lengths: str, name: str, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of prompts and answers, (n,) each."""
    if lengths != "alpaca":
        return tuple(np.full(n, int(x)) for x in lengths.split("+"))
    rng = np.random.default_rng(seed)
    p, a = (np.interp(rng.random(n), QUANTILES, q).astype(np.int64) for q in ALPACA[name])
    return p, np.minimum(a, 512 - p)


def random_dataset(lengths: str, name: str, n: int, vocab: int, seed: int = 0) -> data.Dataset:
    """n samples of random tokens, of which those of prompts are without loss."""
    prompt, answer = random_lengths(lengths, name, n, seed)
    length = (prompt + answer).astype(np.int64)
    starts, i = np.cumsum(length) - length, np.arange(n)
    tokens = np.random.default_rng(seed).integers(0, vocab, length.sum(), dtype=np.int32)
    place = np.arange(len(tokens)) - np.repeat(starts, length)
    tokens = np.where(place < np.repeat(prompt, length), ~tokens, tokens)
    return data.Dataset(tokens, starts, length, i.astype(np.uint64), i, int(length.max()))


def datasets(case: Case) -> tuple[list[data.Dataset], data.Dataset]:
    """(sources, validation)."""
    if case.lengths == "task":
        sources, val, _ = tasks.task("denoising", 0)
        make, tok = data.Dataset.from_records, tokenizer.byte_tokenizer()
        *sources, val = (make(r, tok, "plain", 64) for r in (*sources.values(), val))
        return sources, val
    names = [("alpaca", "gpt4")[i % 2] for i in range(case.sources)]
    vocab = SHAPES[case.shape]["vocab_size"]
    *sources, val = (random_dataset(case.lengths, name, case.records, vocab, i)
                     for i, name in enumerate((*names, "val")))  # fmt: skip
    return sources, val


# --------------------------------------------------------------------------------------------------
# The two sides


class Side:
    """What both sides have: flags, samples, and batches of them."""

    micro = pad_to = None  # as the flags say, and as train.py pads

    def __init__(self, case: Case, device: torch.device):
        self.device, self.args = device, case.args()
        self.config = ModelConfig.from_hf(SHAPES[case.shape])
        self.sources, self.val = datasets(case)

    def feed(self, batch: int) -> None:
        """Go on with steps of this many samples."""
        micro, rank = self.micro or self.args.micro_batch_size, dist.get_rank()
        self.batches = data.Batches(
            self.sources, self.val, batch, batch, micro, self.args.seed, rank,
            dist.get_world_size(), self.pad_to,
        )  # fmt: skip


class Ours(Side):
    """The loop of train.py, without its log."""

    def __init__(self, case: Case, device: torch.device):
        super().__init__(case, device)
        made = Inputs(
            config=self.config, checkpoint=None, tokenizer=None, val=self.val, test=None, notes=[],
            sources={str(i): source for i, source in enumerate(self.sources)},
        )  # fmt: skip
        self.penalty = train.make_trainer(self.args, made, device)

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


class Reference(Side):
    """The plain implementation: see the head of this file. Stratified batches, sample losses and
    shared blocks are ours, so that both sides compute the same."""

    micro = pad_to = 1  # each sample arrives alone, and is put together with others here

    def __init__(self, case: Case, device: torch.device):
        from transformers import AutoConfig, AutoModelForCausalLM

        super().__init__(case, device)
        self.n_sources = len(self.sources)
        dtype = DTYPES[case.dtype]
        config = AutoConfig.for_model(**SHAPES[case.shape], dtype=dtype)
        with device:
            w = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        ours = random_weights(self.config, self.args.seed, device)
        weights = pretrained.to_hf(self.config, ours)
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


def measure(case: Case, device: torch.device) -> dict:
    """Seconds of steps of each side by turns, bytes at most, and what the floor is made of."""
    sides = {name: SIDES[name](case, device) for name in case.sides}
    for side in sides.values():  # warm up
        side.feed(case.ranks * case.micro)
        side.step(0, side.arrived(0))
        side.feed(case.batch)
    took, steps = {name: [] for name in sides}, range(1, case.repeats + 1)
    for t, (name, side) in itertools.product(steps, sides.items()):
        took[name].append(seconds(side.step, t, side.arrived(t)))
    peak = report.peak_memory()
    flops_per_s, bytes_per_s = rates(case, device)
    as_ours = Side(case, device)
    as_ours.feed(case.batch)
    passes = [[*2 * fit, *val] for fit, val, _ in map(as_ours.batches.step, steps)]
    flops = median(flop_count(case, t, part) for t, part in zip(steps, passes, strict=True))
    trained = sum(p.numel() for p in meta_model(case, 0).parameters() if p.requires_grad)
    moved = 7 * trained * max(4, DTYPES[case.dtype].itemsize)  # reads p, g, m, v; writes p, m, v
    side.feed(case.ranks * case.micro)
    with profile() as seen:
        side.step(0, side.arrived(0))
    kernels = sorted(event.key for event in seen.key_averages())
    return {
        "seconds": took, "peak": peak, "flops": flops, "flops_per_s": flops_per_s,
        "bytes_per_s": bytes_per_s,
        "floor": flops / flops_per_s + 2 * moved / case.ranks / bytes_per_s,  # of both copies
        "tokens": case.ranks * median(sum(b.n_tokens for b in part) for part in passes),
        "attention": [k for k in kernels if re.search("flash|fmha|_scaled_dot_product", k)],
    }  # fmt: skip


def meta_model(case: Case, step: int) -> Transformer:
    """On the meta device, with the blocks of a step trained."""
    args, config = case.args(), ModelConfig.from_hf(SHAPES[case.shape])
    with torch.device("meta"):
        model = Transformer(config)
    period, n = step // args.lisa_interval, config.n_layers
    active = lisa.draw(args.seed, period, n, args.lisa_layers, args.lisa_ends)
    model.requires_grad_(n in active)
    for i, block in enumerate(model.blocks):
        block.requires_grad_(i in active)
    return model


def flop_count(case: Case, step: int, passes: list[data.MicroBatch]) -> int:
    """Of all matrix products in this rank's forward and backward passes, counted on the meta
    device. No weight gradients where LISA trains nothing, and nothing is computed twice."""
    model = meta_model(case, step)
    model.head.logits_bytes = math.inf
    counted = {}  # by what decides
    kinds = [(b.tokens.shape, (b.labels == data.IGNORE).numpy().tobytes()) for b in passes]
    for kind, batch in zip(kinds, passes, strict=True):
        if kind not in counted:
            with FlopCounterMode(display=False) as counter:
                model(batch.tokens.to("meta"), batch.labels).sum().backward()
            counted[kind] = counter.get_total_flops()
    return sum(counted[kind] for kind in kinds)


def rates(case: Case, device: torch.device) -> tuple[float, float]:
    """Floating-point operations a second in the MLP's product, of a micro-batch whose samples have
    as many tokens as the case says, or else 256; bytes a second, read and written, of a copy."""
    config, dtype = ModelConfig.from_hf(SHAPES[case.shape]), DTYPES[case.dtype]
    n_tokens = sum(map(int, case.lengths.split("+"))) if "+" in case.lengths else 256
    x = torch.randn(n_tokens * case.micro, config.width, device=device, dtype=dtype)
    weight = torch.randn(config.hidden, config.width, device=device, dtype=dtype)
    a = torch.ones(1 << 24, device=device)
    b = torch.empty_like(a)
    n = 1 if device.type == "cpu" else 100  # on a GPU a wait takes as long as a call

    def rate(amount: int, call: Callable) -> float:
        def many() -> None:
            for _ in range(n):
                call()

        return n * amount / median(seconds(many) for _ in range(21))

    products = rate(2 * x.numel() * config.hidden, lambda: F.linear(x, weight))
    return products, rate(2 * a.nbytes, lambda: b.copy_(a))


def worker(case: Case) -> None:
    """Measure, and print a line of JSON on rank 0."""
    torch.set_num_threads(case.threads)
    result = measure(case, shard.start(timeout=600))
    if dist.get_rank() == 0:
        print(json.dumps(result))
    dist.destroy_process_group()
    shard.exit_now(0)


# --------------------------------------------------------------------------------------------------
# What the first process does: start workers, make tables


def start(command: list[str], threads: int = 1, device: str = "cpu") -> dict | list:
    """Run a command; the JSON in the last line it prints."""
    path = f"{Path(__file__).resolve().parents[1]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    env = os.environ | ALLOCATOR | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
    env |= {"TOKENIZERS_PARALLELISM": "true"}
    if device == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def run(case: Case) -> dict:
    """What `measure` says, in processes of its own."""
    several = f"-m torch.distributed.run --standalone --nproc_per_node={case.ranks}".split()
    command = [sys.executable, *(several if case.ranks > 1 else []), "-m", "benchmarks.speed"]
    command += ["worker", json.dumps(asdict(case))]
    return start(command, case.threads, case.device)


def spread(values: list[float]) -> str:
    return f"{median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def ratios(a: list[float], b: list[float]) -> list[float]:
    return [x / y for x, y in zip(a, b, strict=True)]


def table(cases: list[Case]) -> dict:
    """Run the cases and print a line of each. `of rate`: matrix products a second, over the rate
    that they alone reach. The reference of a shape comes before ours."""
    print(f"\n{'':38}{'step':>9}  {'ours / reference':26}{'goal':>5}{'floor':>7}{'tokens/s':>10}"
          f"{'of rate':>8}{'peak':>10}{'ratio':>7}{'planned':>10}")  # fmt: skip
    results, references = {}, {}
    for case in cases:
        try:
            r = results[case.title] = run(case)
        except RuntimeError as error:
            if "OutOfMemoryError" not in str(error):
                raise
            print(f"{case.title:38} does not fit", flush=True)
            continue
        if "reference" in case.sides:
            references[case.shape] = r
        print(f"{case.title:38}{line(case, r, references.get(case.shape))}", flush=True)
    return results


def line(case: Case, r: dict, reference: dict | None) -> str:
    """Of the table, after the title."""
    took, ours = r["seconds"][case.sides[0]], "ours" in case.sides
    step, alone = median(took), len(case.sides) == 1  # peaks are told where one side has run
    ratio = floor = peaks = ""
    if ours and reference:
        theirs = reference["seconds"]["reference"]
        r["ratio"] = ratios(took, theirs)
        ratio, floor = spread(r["ratio"]), f"{r['floor'] / median(theirs):.2f}"
    if alone:
        of_peak = f"{r['peak'] / reference['peak']:.3f}" if ours and reference else ""
        peaks = f"{r['peak'] / 1e9:8.2f}GB{of_peak:>7}"
    if ours and alone:
        settings = plan.settings(case.args(), case.ranks, DTYPES[case.dtype])
        config = ModelConfig.from_hf(SHAPES[case.shape])
        peaks += f"{plan.plan(config, **settings).peak / 1e9:8.2f}GB"
    return (f"{step:8.3f}s  {ratio:26}{case.goal or '':>5}{floor:>7}{r['tokens'] / step:10.0f}"
            f"{r['flops'] / step / r['flops_per_s']:8.2f}{peaks}")  # fmt: skip


def speed(args: argparse.Namespace) -> dict:
    """The bilevel step of both sides; on a CPU also its cost, more ranks, start-up."""
    if args.device == "cuda":
        cases = gpu_cases(args.quick)
    else:
        cases = cpu_cases(args.quick) + cost_cases(args.quick)
    chosen = [case for case in cases if args.only in case.title]
    if not chosen:
        titles = "; ".join(case.title for case in cases)
        raise ValueError(f"--only {args.only}: no case has this in its title. They are: {titles}")
    results = {"steps": table(chosen)}
    if args.device == "cpu" and not args.only:
        results["start-up"] = start_up(args.quick)
        if not args.quick:
            results["1 to 2 ranks"] = scaling(next(case for case in cases if case.ranks == 2))
    return results


def scaling(two: Case) -> dict:
    """Throughput of two ranks over that of one, a thread each, by turns; and what the machine gives
    to matrix products alone."""
    took, products = {1: [], 2: []}, {1: [], 2: []}
    for n in (1, 2, 1, 2):
        r = run(replace(two, ranks=n, sides=("ours",), repeats=2))
        took[n] += r["seconds"]["ours"]
        products[n].append(n * r["flops_per_s"])
    gains, most = ratios(took[1], took[2]), ratios(products[2], products[1])
    print(f"1 -> 2 ranks, a thread each: {spread(gains)} times the throughput (goal 1.7); matrix "
          f"products alone: {spread(most)}", flush=True)  # fmt: skip
    return {"gains": gains, "products": most}


# --------------------------------------------------------------------------------------------------
# What comes before the steps: start-up, and tokenising

OURS_STARTS = """
import time; began = time.perf_counter()
import json, sys
import torch._dynamo  # which AdamW imports when it is first made
import bilevel, shard, train
imported = time.perf_counter()
def first_step(*_, **__):
    print(json.dumps([imported - began, time.perf_counter() - imported]))
    shard.exit_now(0)
bilevel.PenaltyStep.step = first_step
train.main(sys.argv[1:])
"""
REFERENCE_STARTS = """
import time; began = time.perf_counter()
import json, sys
import torch, torch._dynamo
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel
imported = time.perf_counter()
directory, cached = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(directory)
tokens, labels, lengths = torch.load(cached)
samples = list(zip(tokens.split(lengths), labels.split(lengths)))
copies = [AutoModelForCausalLM.from_pretrained(directory) for _ in "wu"]
optimizers = [torch.optim.AdamW(model.parameters(), 1e-5) for model in copies]
lam = torch.zeros(2, requires_grad=True)
optimizers.append(torch.optim.Adam([lam], 1e-2))
print(json.dumps([imported - began, time.perf_counter() - imported]))
"""


def start_up(quick: bool, repeats: int = 5) -> dict:
    """From the end of imports to the first step, by turns: GPT-2 124M and the same tokenised
    records from the disk. The reference maps two models and makes their optimisers."""
    results = {"ours": [], "reference": []}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        write_files(folder, "quick" if quick else "gpt2", 100 if quick else 9000)
        a, b, val = (str(folder / f"{name}.json") for name in FILES)
        flags = ["--model", str(folder / "model"), "--train", f"a={a}", f"b={b}", "--val", val]
        reference = [REFERENCE_STARTS, str(folder / "model"), str(folder / "samples.pt")]
        for n in range(repeats):
            ours = [OURS_STARTS, *flags, "--out", str(folder / f"run{n}")]
            for name, words in (("ours", ours), ("reference", reference)):
                results[name].append(start([sys.executable, "-c", *words], threads=2))
    print("\nstart-up               ours  reference  ratio (goal 0.5, and 3 s, to first step)")
    for i, part in enumerate(("imports", "then to first step")):
        took, theirs = ([pair[i] for pair in pairs] for pairs in results.values())
        times = f"{median(took):8.2f}s{median(theirs):10.2f}s"
        print(f"{part:18}{times}  {spread(ratios(took, theirs))}", flush=True)
    return results


FILES = "train_a", "train_b", "val"


def write_files(folder: Path, shape: str, n: int) -> None:
    """A checkpoint with a tokenizer, and FILES of n records each, whose tokens are put in our cache
    and in the reference's: all tokens, their labels, and the samples' lengths."""
    config = ModelConfig.from_hf(SHAPES[shape])
    save_pretrained(build(config, random_weights(config, 0)), folder / "model")
    texts = random_texts(3 * n)
    train_tokenizer(texts[:1000], folder / "model")
    tok, examples = tokenizer.load_tokenizer(folder / "model"), []
    for i, name in enumerate(FILES):
        records = [{"instruction": t[:80], "output": t[80:]} for t in texts[i * n : (i + 1) * n]]
        file = folder / f"{name}.json"
        file.write_text(json.dumps(records))
        dataset = data.load_dataset(file, tok, "alpaca", 512, data.cache_dir())
        examples += [dataset.example(k) for k in range(len(dataset))]
    tokens, labels = (torch.from_numpy(np.concatenate(x)) for x in zip(*examples, strict=True))
    torch.save((tokens, labels, [len(ids) for ids, _ in examples]), folder / "samples.pt")


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


def tokenize(args: argparse.Namespace) -> dict:
    """Records to tokens with loss masks, and texts to tokens, against `tokenizers` on the texts."""
    import tokenizers

    with tempfile.TemporaryDirectory() as folder:
        if args.texts:
            records = [turns for *_, turns in read_records(args.texts)]
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


def about() -> dict:
    """The day and the machine, which go with every figure."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": next((s.split(": ")[1] for s in lines if s.startswith("model name")), "unknown"),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "allocator (but for tokenize)": " ".join(map("=".join, ALLOCATOR.items())),
    }


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    commands = {
        "speed": speed, "memory": lambda args: table(memory_cases(args.quick)), "tokenize": tokenize
    }  # fmt: skip
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("command", nargs="?", default="speed", choices=commands)
    parser.add_argument("--quick", action="store_true", help="small sizes, to try it")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="of speed [cuda where there is "
                        "one]; memory and tokenize run on the CPU")
    parser.add_argument("--only", default="", help="speed: steps of cases whose title has this")
    parser.add_argument("--tokenizer", help="tokenize: a directory with tokenizer.json")
    parser.add_argument("--texts", help="tokenize: a file of records")
    args = parser.parse_args(argv)
    has_gpu = torch.cuda.is_available() and args.command == "speed"
    if args.device == "cuda" and not has_gpu:
        parser.error("--device cuda goes with speed, where there is a GPU")
    args.device = args.device or ("cuda" if has_gpu else "cpu")
    if args.only and args.command != "speed":
        parser.error("--only goes with speed")
    if bool(args.texts) != bool(args.tokenizer):
        parser.error("--texts and --tokenizer go together")
    machine = about()
    print(*(f"{key}: {value}" for key, value in machine.items()), sep="\n")
    try:
        results = commands[args.command](args)
    except ValueError as error:  # a file that cannot be used
        parser.error(str(error))
    print(json.dumps({"about": machine, args.command: results}))
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:  # started by `run`
        worker(Case(**json.loads(sys.argv[2])))
    sys.exit(main())
