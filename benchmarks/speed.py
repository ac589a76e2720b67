"""Speed and memory, as ratios against a plain implementation that runs beside ours.

    python benchmark.py [speed|memory] [--quick] [--device cpu|cuda]
    python benchmark.py tokenize                            # preparation.py
    python benchmark.py fidelity                            # fidelity.py, with flags of its own

The **reference** does what is usually written: two `transformers` models, torch.optim.AdamW over
all parameters with `requires_grad` flipped for LISA, logits at every position, micro-batches in
order of arrival padded to their longest sample, a pass each for L2(u), L2(w) and L1(w), and a wait
for the loss in every micro-batch. It sees the same samples, weights and blocks, and is tested to
have the same losses and gradients. Times of steps are interleaved, A B A B, in one process (one a
rank); on a GPU, and for peaks of memory, each side has a process of its own. Prints a table, then
the same as one line of JSON; fidelity writes both to files.

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
import re
import subprocess
import sys
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
from cli.flags import Parser, parse
from cli.inputs import TINY, Inputs
from hf import pretrained, tokenizer
from model import DTYPES, ModelConfig, Transformer, random_weights
from sources import tasks

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
        Case("124M, alpaca, 1 rank", "gpt2", "alpaca", 0.5, 32, 8, repeats=5),
        # Half the micro-batch: the reference's logits and activations for 8 take some 10 GB a rank.
        Case("124M, alpaca, 2 ranks", "gpt2", "alpaca", 0.5, 32, 4, ranks=2, threads=1),
        Case("124M, 256 tokens, all labels", "gpt2", "0+256", 1.0, 4, repeats=9),
        Case("124M, 256 tokens, 160 response", "gpt2", "96+160", 0.8, 4, repeats=9),
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
        tokens, starts, lengths, n.astype(np.uint64), n, max_length=int(lengths.max())
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
        self.config = ModelConfig.from_hf(SHAPES[case.shape])
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
        ours = ModelConfig.from_hf(SHAPES[case.shape])
        weights = pretrained.to_hf(ours, random_weights(ours, self.args.seed, device))
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
        side.feed(case.ranks * case.micro)
        side.step(0, side.arrived(0))
        side.feed(case.batch)
    result, rates, copies = {name: [] for name in sides}, [], []
    steps = range(1, case.repeats + 1)
    for t in steps:
        for name, side in sides.items():
            result[name].append(seconds(side.step, t, side.arrived(t)))
        rates.append(matmul_rate(case, device))
        copies.append(copy_rate(device))
    side = next(iter(sides.values()))
    as_ours = batches(side, case.batch, case.micro)
    parts = [as_ours.step(t)[:2] for t in steps]
    passes = [[*train_part, *train_part, *val_part] for train_part, val_part in parts]
    flops = [flop_count(case, t, part) for t, part in zip(steps, passes, strict=True)]
    adamw = 2 * 7 * trained_bytes(case) / case.ranks  # reads p, g, m, v; writes p, m, v
    rate, copied = median(rates), median(copies)
    side.feed(case.ranks * case.micro)
    kernels = attention_kernels(lambda: side.step(0, side.arrived(0)))
    return result | {
        "attention": kernels,
        "tokens": [case.ranks * sum(b.n_tokens for b in part) for part in passes],
        "flops": flops,
        "flops_per_s": rate,
        "adamw_bytes": adamw,
        "copy_bytes_per_s": copied,
        "floor": [n / rate + adamw / copied for n in flops],
        "peak": report.peak_memory(),
    }


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


def trained_bytes(case: Case) -> int:
    """Of a copy's masters, over all ranks."""
    trained = (p for p in meta_model(case, 0).parameters() if p.requires_grad)
    return sum(p.numel() for p in trained) * max(4, DTYPES[case.dtype].itemsize)


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


def per_call(call: Callable, device: torch.device) -> float:
    """Median seconds of a call; on a GPU of many in a row, since a wait takes as long as one."""
    n = 1 if device.type == "cpu" else 100

    def many() -> None:
        for _ in range(n):
            call()

    return median(seconds(many) for _ in range(7)) / n


def matmul_rate(case: Case, device: torch.device) -> float:
    """Floating-point operations a second in the MLP's product, of a micro-batch whose samples have
    as many tokens as the case says, or else 256."""
    config, dtype = ModelConfig.from_hf(SHAPES[case.shape]), DTYPES[case.dtype]
    n_tokens = sum(map(int, case.lengths.split("+"))) if "+" in case.lengths else 256
    x = torch.randn(n_tokens * case.micro, config.width, device=device, dtype=dtype)
    weight = torch.randn(config.hidden, config.width, device=device, dtype=dtype)
    return 2 * x.numel() * config.hidden / per_call(lambda: F.linear(x, weight), device)


def copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written, in a copy of 64 MB."""
    a = torch.ones(1 << 24, device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / per_call(lambda: b.copy_(a), device)


def attention_kernels(step: Callable) -> list[str]:
    """Names of the kernels that attention ran in, by a profile of one step."""
    with profile() as seen:
        step()
    names = {event.key for event in seen.key_averages()}
    return sorted(name for name in names if re.search("flash|fmha|_scaled_dot_product", name))


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
    shard.exit_now(0)


# --------------------------------------------------------------------------------------------------
# What the first process does: start workers, make tables


def start(command: list[str], threads: int = 1, device: str = "cpu") -> dict | list:
    """Run a command; the JSON in the last line it prints."""
    here, given = str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")
    env = os.environ | ALLOCATOR | {"PYTHONPATH": f"{here}{os.pathsep}{given}" if given else here}
    env |= {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
    if device == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def run(what: str, case: Case) -> dict:
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={case.ranks}"]
    launch = [sys.executable, *(several if case.ranks > 1 else [])]
    command = [*launch, "-m", "benchmarks.speed", "worker", what, json.dumps(asdict(case))]
    return start(command, case.threads, case.device)


def spread(values: list[float]) -> str:
    return f"{median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def ratios(a: list[float], b: list[float]) -> list[float]:
    return [x / y for x, y in zip(a, b, strict=True)]


def speed(args: argparse.Namespace) -> dict:
    """The bilevel step of both sides, start-up, and the cost against sizes."""
    from benchmarks import preparation  # which imports this file

    if args.device == "cuda":
        cases = [case for case in gpu_cases(args.quick) if args.only in case.title]
        return {"steps": gpu_steps(cases)}
    results = {"steps": steps(args.quick, args.only)}
    if args.only:
        return results
    if not args.quick:
        results["1 to 2 ranks"] = scaling()
    return results | {"start-up": preparation.start_up(args.quick), "cost": cost(args.quick)}


def steps(quick: bool, only: str) -> dict:
    print(f"\n{'bilevel step':33}{'ours':>8}{'reference':>11}  {'ratio':25}{'goal':>5}{'floor':>7}")
    results = {}
    for case in speed_cases(quick):
        if only not in case.title:
            continue
        r = results[case.title] = run("times", case)
        r["ratio"] = ratios(r["ours"], r["reference"])
        a, b = median(r["ours"]), median(r["reference"])
        floor = median(ratios(r["floor"], r["reference"]))
        print(f"{case.title:33}{a:7.2f}s{b:10.2f}s  {spread(r['ratio']):25}{case.goal:5}"
              f"{floor:7.2f}", flush=True)  # fmt: skip
    for r in list(results.values())[:1]:
        print(f"floor: the products at {r['flops_per_s'] / 1e9:.0f} GFLOP/s and AdamW's bytes at "
              f"{r['copy_bytes_per_s'] / 1e9:.1f} GB/s (as measured in the first case), over the "
              "reference's time")  # fmt: skip
    return results


def scaling() -> dict:
    """Throughput of two ranks over that of one, a thread each, by turns; and what the machine gives
    to matrix products alone."""
    two = next(case for case in speed_cases(False) if case.ranks == 2)
    cases = [replace(two, ranks=n, sides=("ours",), repeats=2) for n in (1, 2)]
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
    print("\ncost against        milliseconds a step, per 1000 tokens")
    for name, cases in sizes.items():
        row = results[name] = {}
        for case in cases[:: 3 if quick else 1]:
            r = run("times", case)
            tokens = median(r["tokens"])
            row[value[name](case)] = 1e6 * median(r["ours"]) / tokens
        print(f"{name:19} " + "  ".join(f"{n}: {ms:.1f}" for n, ms in row.items()), flush=True)
    return results


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
    """Against `tokenizers`: see preparation.py."""
    from benchmarks import preparation  # which imports this file

    return preparation.tokenize(args.texts, args.tokenizer, args.quick)


def gpu_cases(quick: bool) -> list[Case]:
    """GPT-2 124M and LLaMA-3-8B with random weights in bf16, 64 samples of 1024 tokens: with the
    ends trained and frozen, each with and without --compile; and the reference."""
    sizes = {"gpt2": (16, 5), "llama3-8b": (4, 2)}  # micro-batch, steps
    base = Case("", "quick", "1+63", None, 8, 4, repeats=2, dtype="bf16", device="cuda",
                flags="--max-length 64")  # fmt: skip
    if quick:
        shapes = [base]
    else:
        base = replace(base, lengths="1+1023", batch=64, flags="--max-length 1024")
        shapes = [replace(base, shape=shape, micro=m, repeats=n) for shape, (m, n) in sizes.items()]
    cases = []
    for shape in shapes:
        cases.append(replace(shape, title=f"{shape.shape}, reference", sides=("reference",)))
        for flags in ("", "--compile", "--lisa-ends frozen", "--lisa-ends frozen --compile"):
            title, more = f"{shape.shape}, ours {flags}", f"{shape.flags} {flags}"
            cases.append(replace(shape, title=title, flags=more, sides=("ours",)))
    return cases


def gpu_steps(cases: list[Case]) -> dict:
    """Each case in a process of its own, beside the reference's time, and the peak that plan.py
    foretells for ours."""
    results, reference = {}, {}  # seconds by shape
    heads = f"{'step':>9}{'ratio':>7}{'tokens/s':>10}{'of peak':>8}{'memory':>10}{'plan':>10}"
    print(f"\n{'':42}{heads}  attention")
    for case in cases:
        (name,), args = case.sides, case.args()
        try:
            r = results[case.title] = run("times", case)
        except RuntimeError as error:
            if "OutOfMemoryError" not in str(error):
                raise
            print(f"{case.title:42} does not fit", flush=True)
            continue
        took = median(r[name])
        if name == "reference":
            reference[case.shape] = took
            ratio = planned = ""
        else:
            settings = plan.settings(args, 1, DTYPES[case.dtype])
            foretold = plan.plan(ModelConfig.from_hf(SHAPES[case.shape]), **settings).peak
            planned = f"{foretold / 1e9:8.2f}GB"
            ratio = f"{took / reference[case.shape]:.3f}" if case.shape in reference else ""
        ran_in = {n.rpartition("product_")[2] for n in r["attention"] if n.startswith("aten::")}
        forward = ", ".join(sorted(n for n in ran_in if "backward" not in n))
        print(f"{case.title:42}{took:8.3f}s{ratio:>7}{median(r['tokens']) / took:10.0f}"
              f"{median(r['flops']) / took / r['flops_per_s']:8.2f}{r['peak'] / 1e9:8.2f}GB"
              f"{planned:>10}  {forward}", flush=True)  # fmt: skip
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
    }  # fmt: skip


def main() -> int:
    """Returns the exit code."""
    if sys.argv[1:2] == ["worker"]:  # started by `run`
        worker(sys.argv[2], Case(**json.loads(sys.argv[3])))
    if sys.argv[1:2] == ["fidelity"]:  # has flags and tables of its own
        from benchmarks import fidelity

        return fidelity.main(sys.argv[2:])
    parser = Parser(
        description=__doc__.split("\n")[0],
        epilog="'benchmark.py fidelity' has flags of its own: 'benchmark.py fidelity --help'",
    )
    parser.add_argument("command", nargs="?", default="speed", choices=COMMANDS)
    parser.add_argument("--quick", action="store_true", help="small sizes, to try it")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="of speed [cuda where there is "
                        "one]; memory and tokenize run on the CPU")
    parser.add_argument("--only", default="", help="speed: steps of cases whose title has this")
    parser.add_argument("--tokenizer", help="tokenize: a directory with tokenizer.json")
    parser.add_argument("--texts", help="tokenize: a file of records")
    args = parser.parse_args()
    has_gpu = torch.cuda.is_available() and args.command == "speed"
    if args.device == "cuda" and not has_gpu:
        parser.error("--device cuda goes with speed, where there is a GPU")
    args.device = args.device or ("cuda" if has_gpu else "cpu")
    if args.only and args.command != "speed":
        parser.error("--only goes with speed")
    cases = (gpu_cases if args.device == "cuda" else speed_cases)(args.quick)
    if not any(args.only in case.title for case in cases):
        titles = "; ".join(case.title for case in cases)
        parser.error(f"--only {args.only}: no case has this in its title. They are: {titles}")
    if bool(args.texts) != bool(args.tokenizer):
        parser.error("--texts and --tokenizer go together")
    found = about()
    if args.command != "tokenize":  # which starts no processes
        found["allocator"] = " ".join(f"{key}={value}" for key, value in ALLOCATOR.items())
    print(*(f"{key}: {value}" for key, value in found.items()), sep="\n")
    try:
        results = COMMANDS[args.command](args)
    except ValueError as error:  # a file that cannot be used
        print(error, file=sys.stderr)
        return 2
    print(json.dumps({"about": found, args.command: results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
