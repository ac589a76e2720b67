"""Speed and memory, as ratios against a plain implementation that runs beside ours.

    python -m benchmarks.speed [--device cpu|cuda]    # on a CPU, start-up and a second rank, too
    python -m benchmarks.speed memory

`--quick` tries a command at small sizes, `--only TITLE` does the rows whose title has this. Each
prints a table, then what was measured as one line of JSON.

The **reference** does what is usually written: two `transformers` models, torch.optim.AdamW over
all parameters with `requires_grad` flipped for LISA, logits at every position, micro-batches in
order of arrival padded to their longest sample, a pass each for L2(u), L2(w) and L1(w), and a wait
for the loss in every micro-batch. It sees the same samples, weights and blocks, and is tested to
have the same losses and gradients. Steps of the two sides take turns in one process (one a rank);
on a GPU, and for peaks of memory, each side has a process of its own.

B batch, T time, V vocabulary, S sources.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.utils.rnn import pad_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import data
import lisa
import shard
import train
from cli import plan
from cli.flags import Flags, Parser, parse
from cli.inputs import TINY, Inputs
from hf import pretrained, templates, tokenizer
from model import DTYPES, ModelConfig, Transformer, build, random_weights, save_pretrained
from sources import tasks

# glibc maps a block above a threshold anew each time, and each of its pages then costs a fault and
# is zeroed. Both sides run with blocks of every size taken from one heap that is never given back.
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(1 << 26),
}  # fmt: skip

SHAPES = {
    "gpt2": {
        "model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024,
        "vocab_size": 50257, "bos_token_id": 50256, "eos_token_id": 50256, "resid_pdrop": 0.0,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    },
    "tiny": TINY | {"vocab_size": 258, "bos_token_id": 256, "eos_token_id": 257},
    "llama3-8b": {
        "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "rms_norm_eps": 1e-5,
        "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
        "max_position_embeddings": 8192, "vocab_size": 128256, "rope_theta": 500000.0,
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
    """Steps that one worker measures."""

    title: str
    shape: str
    lengths: str  # "alpaca", "task" (the built-in one), or "PROMPT+ANSWER" tokens of every sample
    goal: float | None = None  # largest ratio of our time to the reference's
    batch: int = 8  # samples of training, and as many of validation
    micro: int = 4
    ranks: int = 1
    threads: int = 2  # of each rank
    repeats: int = 3
    dtype: str = "fp32"
    device: str = "cpu"
    sides: tuple[str, ...] = ("ours", "reference")
    more: str = ""  # flags of train.py

    @property
    def config(self) -> ModelConfig:
        return ModelConfig.from_hf(SHAPES[self.shape])

    @property
    def flags(self) -> Flags:
        sizes = f"--batch-size {self.batch} --val-batch-size {self.batch} --micro-batch-size"
        paper = "--lr-lambda 1e-2 --lambda-z 0"  # λ's step, as in the reference
        line = f"--model {self.shape} {sizes} {self.micro} --dtype {self.dtype} {paper} {self.more}"
        return parse(line.split())


def apart(base: Case, *variants: str) -> list[Case]:
    """The reference, then ours with the flags of each variant: a process each."""
    reference = replace(base, title=f"{base.title}, reference", sides=("reference",))
    return [reference] + [
        replace(base, title=f"{base.title}, ours {v}", more=f"{base.more} {v}", sides=("ours",))
        for v in variants
    ]


LONG = {"lengths": "1+1023", "batch": 64, "dtype": "bf16", "device": "cuda",
        "more": "--max-length 1024"}  # fmt: skip
VARIANTS = (
    "", "--gap difference", "--compile", "--gap difference --compile",
    "--gap difference --lisa-ends frozen",
)  # fmt: skip
CASES = {
    "cpu": [
        Case("built-in task, 1 rank", "tiny", "task", 0.5, 64, 32, repeats=20, threads=1),
        Case("built-in task, 2 ranks", "tiny", "task", 0.5, 64, 32, 2, 1, repeats=20),
        Case("built-in task, --gap gradient", "tiny", "task", None, 64, 32, repeats=20, threads=1,
             more="--gap gradient"),
        Case("124M, alpaca", "gpt2", "alpaca", 0.5, 8, 4),
        Case("124M, 256 tokens, all labels", "gpt2", "0+256", 1.0, 4),
        Case("124M, 256 tokens, 160 response", "gpt2", "96+160", 0.8, 4),
    ],
    "cuda": [
        *apart(Case("124M", "gpt2", micro=16, repeats=5, **LONG), *VARIANTS),
        *apart(Case("8B", "llama3-8b", micro=4, repeats=2, **LONG), *VARIANTS),
    ],
    "memory": apart(  # the peak of ten steps, before each of which LISA's blocks are switched
        Case("124M", "gpt2", "alpaca", micro=8, repeats=10, more="--lisa-interval 1"),
        "", "--lisa-ends frozen",
    ),
}  # fmt: skip


def quick(case: Case) -> Case:
    """The same at a small size."""
    return replace(case, shape="quick", batch=8, micro=4, repeats=2, threads=1)


# The samples

def random_dataset(lengths: str, name: str, vocab: int, seed: int, n: int = 1000) -> data.Dataset:
    """n samples of random tokens, of which those of prompts are without loss."""
    rng = np.random.default_rng(seed)
    if lengths == "alpaca":
        quantiles = (np.interp(rng.random(n), QUANTILES, at) for at in ALPACA[name])
        prompt, answer = (tokens.astype(np.int64) for tokens in quantiles)
        answer = np.minimum(answer, 512 - prompt)
    else:
        prompt, answer = (np.full(n, int(tokens)) for tokens in lengths.split("+"))
    length, i = prompt + answer, np.arange(n)
    tokens = rng.integers(0, vocab, length.sum(), dtype=np.int32)
    in_prompt = np.repeat(np.tile([True, False], n), np.stack([prompt, answer], 1).flatten())
    tokens = np.where(in_prompt, ~tokens, tokens)
    starts, hashes = np.cumsum(length) - length, i.astype(np.uint64)
    return data.Dataset(tokens, starts, length, hashes, hashes, i, int(length.max()))


def make_batches(case: Case, micro: int, pad_to: int | None = None) -> data.Batches:
    """This rank's."""
    if case.lengths == "task":
        sources, val, _ = tasks.task("denoising", 0)
        make, tok = data.Dataset.from_records, tokenizer.byte_tokenizer()
        *sources, val = (make(r, tok, "plain", 64) for r in (*sources.values(), val))
    else:
        vocab = SHAPES[case.shape]["vocab_size"]
        *sources, val = (random_dataset(case.lengths, name, vocab, i)
                         for i, name in enumerate(ALPACA))  # fmt: skip
    at = dist.get_rank(), dist.get_world_size()
    return data.Batches(sources, val, case.batch, case.batch, micro, 0, *at, pad_to)


# The two sides

class Ours:
    """The loop of train.py, without its log."""

    def __init__(self, case: Case, device: torch.device):
        self.device, self.batches = device, make_batches(case, case.micro)
        names = dict.fromkeys(range(self.batches.n_sources))
        made = Inputs(case.config, None, None, sources=names, val=None, test=None, notes=[])
        self.penalty = train.make_trainer(case.flags, made, device)

    def step(self, t: int, train_part: list, val_part: list, counts: Tensor) -> list[float]:
        """Losses of the sources under w, then under u, then of validation."""
        for _, opt in self.penalty.copies.values():
            opt.switch(t)
        train_part, val_part = ([b.to(self.device) for b in x] for x in (train_part, val_part))
        stats = self.penalty.step(train_part, val_part, counts)
        return [*stats.source_loss_w.tolist(), *stats.source_loss_u.tolist(), stats.val_loss]


class Reference:
    """The plain implementation: see the head of this file. Stratified batches, sample losses and
    shared blocks are ours, so that both sides compute the same."""

    def __init__(self, case: Case, device: torch.device):
        from transformers import AutoConfig, AutoModelForCausalLM

        self.device, self.flags = device, case.flags
        # Each sample arrives alone, and is put together with others here.
        self.batches = make_batches(case, micro=1, pad_to=1)
        self.n_sources = self.batches.n_sources
        dtype = DTYPES[case.dtype]
        config = AutoConfig.for_model(**SHAPES[case.shape], dtype=dtype)
        with device:
            w = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        ours = random_weights(case.config, self.flags.seed, device)
        w.load_state_dict(dict(pretrained.to_hf(case.config, ours)), strict=False)
        self.w, self.u = w, copy.deepcopy(w)
        if dist.get_world_size() > 1:
            for model in (self.w, self.u):
                for module in (*self.blocks(model), model):
                    fully_shard(module)
        # Gradients are alpha times ours, which are divided by it.
        adam = {"weight_decay": self.flags.weight_decay, "eps": self.flags.alpha * 1e-8}
        self.opt_w = torch.optim.AdamW(self.w.parameters(), self.flags.lr_w, **adam)
        self.opt_u = torch.optim.AdamW(self.u.parameters(), self.flags.lr_u, **adam)
        wide = torch.promote_types(dtype, torch.float32)
        self.lam = torch.zeros(self.n_sources, device=device, dtype=wide, requires_grad=True)
        self.opt_lam = torch.optim.Adam([self.lam], lr=self.flags.lr_lambda)

    @staticmethod
    def blocks(model) -> list:
        return list(model.transformer.h if hasattr(model, "transformer") else model.model.layers)

    def step(self, t: int, train_part: list, val_part: list, counts: Tensor) -> list[float]:
        """As Ours.step, of samples that are each a micro-batch, in random order."""
        order = np.random.default_rng(t).permutation
        train_part, val_part = ([x[i] for i in order(len(x))] for x in (train_part, val_part))
        alpha, counts = self.flags.alpha, counts.to(self.device)
        period, seed = t // self.flags.lisa_interval, self.flags.seed
        for model in (self.w, self.u):
            blocks = self.blocks(model)
            active = lisa.draw(seed, period, len(blocks), self.flags.lisa_layers)
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
        for n in range(0, len(samples), self.flags.micro_batch_size):
            part = samples[n : n + self.flags.micro_batch_size]
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


# What a worker measures

def timed(call: Callable, *args) -> tuple[float, object]:
    """Seconds of a call, on all ranks and their devices, and what it returns."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else int
    wait()
    dist.barrier()
    began = time.perf_counter()
    result = call(*args)
    wait()
    dist.barrier()
    return time.perf_counter() - began, result


class Operations(TorchDispatchMode):
    """Counts the calls of torch's operations, forward and backward, but for views."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += not func.is_view
        return func(*args, **(kwargs or {}))


def worker(case: Case) -> None:
    """Print as JSON, on rank 0: seconds and losses of each side's steps by turns, bytes at most,
    operations, tokens and products of a step."""
    torch.set_num_threads(case.threads)
    device = shard.start(timeout=600)
    sides = {name: SIDES[name](case, device) for name in case.sides}
    done, steps, operations = {}, range(1, case.repeats + 1), {}
    count = Operations if device.type == "cpu" else nullcontext  # under it nothing is compiled
    for name, side in sides.items():  # to warm up
        with count() as counted:
            done[name] = [timed(side.step, 0, *side.batches.step(0))]
        operations[name] = counted.n if counted else ""
    for t, (name, side) in itertools.product(steps, sides.items()):
        done[name].append(timed(side.step, t, *side.batches.step(t)))
    peak = plan.peak_memory()  # before what follows needs any
    batches = map(make_batches(case, case.micro).step, steps)
    passes = [[*2 * train_part, *val_part] for train_part, val_part, _ in batches]
    result = {
        "seconds": {name: [took for took, _ in its[1:]] for name, its in done.items()},
        "losses": {name: [losses for _, losses in its] for name, its in done.items()},
        "operations": operations,
        "peak": peak,
        "flops": median(map(partial(flop_count, case), steps, passes)),
        "flops_per_s": rate_of_products(case, device),
        "tokens": case.ranks * median(sum(b.n_tokens for b in part) for part in passes),
    }
    if dist.get_rank() == 0:
        print(json.dumps(result))
    dist.destroy_process_group()
    shard.exit_now(0)


def flop_count(case: Case, step: int, passes: list[data.MicroBatch]) -> int:
    """Of all matrix products in this rank's forward and backward passes, counted on the meta
    device. No weight gradients where LISA trains nothing, and nothing is computed twice."""
    with torch.device("meta"):
        model = Transformer(case.config)
    model.head.logits_bytes = math.inf
    f = case.flags
    lisa.Lisa(model, f.lisa_layers, f.lisa_interval, f.seed, f.lisa_ends).switch(step)
    total, kinds = 0, {}  # batches that count the same
    for batch in passes:
        kind = batch.tokens.shape, (batch.labels == data.IGNORE).numpy().tobytes()
        kinds.setdefault(kind, []).append(batch)
    for batch, *others in kinds.values():
        with plan.Live([]) as live:
            model(batch.tokens.to("meta"), batch.labels).sum().backward()
        total += (1 + len(others)) * int(live.work[0])
    return total


def rate_of_products(case: Case, device: torch.device) -> float:
    """Floating-point operations a second in the MLP's product, of a micro-batch whose samples have
    as many tokens as the case says, or else 256."""
    config = case.config
    n_tokens = sum(map(int, case.lengths.split("+"))) if "+" in case.lengths else 256
    new = partial(torch.randn, device=device, dtype=DTYPES[case.dtype])
    x, weight = new(n_tokens * case.micro, config.width), new(config.hidden, config.width)
    n = 1 if device.type == "cpu" else 100  # on a GPU a wait takes as long as a call

    def products() -> None:
        for _ in range(n):
            F.linear(x, weight)

    return n * 2 * x.numel() * config.hidden / median(timed(products)[0] for _ in range(21))


def start_side(side: str, *args: str) -> None:
    """Print the seconds from the end of imports to the first step: of train.py with the flags
    given, or of the reference, which maps two models and makes their optimisers."""
    import torch._dynamo  # noqa: F401  (which AdamW imports when it is first made)
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel  # noqa: F401

    began = time.perf_counter()

    def first_step(*_, **__) -> None:
        print(time.perf_counter() - began)
        shard.exit_now(0)

    if side == "ours":
        with mock.patch("train.PenaltyStep.step", first_step):
            train.main(args)
    AutoTokenizer.from_pretrained(f"{args[0]}/model")
    for tokens, lengths in torch.load(f"{args[0]}/samples.pt"):
        tokens.split(lengths)
    copies = [AutoModelForCausalLM.from_pretrained(f"{args[0]}/model") for _ in "wu"]
    opts = [torch.optim.AdamW(model.parameters(), 1e-5) for model in copies]
    opts.append(torch.optim.Adam([torch.zeros(2, requires_grad=True)], 1e-2))
    first_step()


# What the first process does: start workers, print the table

COLUMNS = {
    "step": 9, "ours / reference": 26, "goal": 6, "operations": 16, "tokens/s": 10, "of rate": 8,
    "peak": 10, "of peak": 8, "planned": 10,
}  # fmt: skip


def show(title: str, cells: dict) -> None:
    """A row of the table."""
    row = "".join(f"{cells.get(name, ''):>{width}}" for name, width in COLUMNS.items())
    print(f"{title:38}{row}", flush=True)


def start(command: list[str], threads: int = 1, device: str = "cpu") -> dict | list | float:
    """Run a command with the interpreter; the JSON in the last line it prints."""
    path = f"{Path(__file__).resolve().parents[1]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    env = os.environ | ALLOCATOR | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
    if device == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def run(case: Case) -> dict:
    """What `worker` says, in processes of its own."""
    several = f"-m torch.distributed.run --standalone --nproc_per_node={case.ranks}".split()
    command = ["-m", "benchmarks.speed", "worker", json.dumps(asdict(case))]
    return start(several * (case.ranks > 1) + command, case.threads, case.device)


def ratio(a: list[float], b: list[float]) -> str:
    """Median and range of the quotients of what was measured by turns."""
    values = [x / y for x, y in zip(a, b, strict=True)]
    return f"{median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def steps(cases: list[Case]) -> dict:
    """Run the cases and show a row of each; the reference of a shape comes before ours."""
    results, references = {}, {}
    for case in cases:
        try:
            r = results[case.title] = run(case)
        except RuntimeError as error:
            if "OutOfMemoryError" not in str(error):
                raise
            show(case.title, {"ours / reference": "does not fit"})
            continue
        if "reference" in case.sides:
            references[case.shape] = r
        show(case.title, figures(case, r, references.get(case.shape)))
    return results


def figures(case: Case, r: dict, reference: dict | None) -> dict:
    """Of a row. `of rate`: matrix products a second, over the rate that they alone reach."""
    took, ours = r["seconds"][case.sides[0]], "ours" in case.sides
    step, alone = median(took), len(case.sides) == 1  # a peak is a process's
    cells = {"step": f"{step:.3f}s", "goal": case.goal or "",
             "operations": " / ".join(map(str, r["operations"].values())),
             "tokens/s": f"{r['tokens'] / step:.0f}",
             "of rate": f"{r['flops'] / step / r['flops_per_s']:.2f}"}  # fmt: skip
    if alone:
        cells["peak"] = f"{r['peak'] / 1e9:.2f}GB"
    if ours and alone:
        settings = plan.settings(case.flags, case.ranks, DTYPES[case.dtype])
        cells["planned"] = f"{plan.plan(case.config, **settings).peak / 1e9:.2f}GB"
    if ours and reference:
        cells["ours / reference"] = ratio(took, reference["seconds"]["reference"])
        cells["of peak"] = f"{r['peak'] / reference['peak']:.3f}" if alone else ""
    return cells


def scaling(case: Case) -> dict:
    """Throughput of two ranks over that of one, a thread each, by turns; and what the machine gives
    to matrix products alone."""
    took, products = {1: [], 2: []}, {1: [], 2: []}
    for n in (1, 2, 1, 2):
        r = run(replace(case, ranks=n, sides=("ours",), repeats=1, threads=1, micro=2))
        took[n] += r["seconds"]["ours"]
        products[n].append(n * r["flops_per_s"])
    show("1 -> 2 ranks, throughput", {"ours / reference": ratio(took[1], took[2]), "goal": 1.7})
    show("the same, products alone", {"ours / reference": ratio(products[2], products[1])})
    return {"seconds": took, "products": products}


def start_up(small: bool, repeats: int = 3) -> dict:
    """From the end of imports to the first step, by turns: GPT-2 124M and the same tokenised
    records from the disk."""
    took = {"ours": [], "reference": []}
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ):
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        write_files(Path(folder), *(("quick", 100) if small else ("gpt2", 9000)))
        sources = ["--train", *(f"{name}={folder}/{name}.json" for name in "ab")]
        ours = ["--model", f"{folder}/model", *sources, "--val", f"{folder}/val.json", "--out"]
        for n in range(repeats):
            words = {"ours": [*ours, f"{folder}/run{n}"], "reference": [folder]}
            for side, times in took.items():
                command = ["-m", "benchmarks.speed", "start", side, *words[side]]
                times.append(start(command, threads=2))
    cells = {"step": f"{median(took['ours']):.3f}s", "goal": 0.5}
    show("start-up, imports to first step", cells | {"ours / reference": ratio(*took.values())})
    return took


def write_files(folder: Path, shape: str, n: int) -> None:
    """A checkpoint with the byte tokenizer, and three files of n records each, whose tokens are in
    our cache and in the reference's."""
    config = ModelConfig.from_hf(SHAPES[shape])
    save_pretrained(build(config, random_weights(config, 0)), folder / "model")
    templates.save_tokenizer(tokenizer.byte_tokenizer(), folder / "model", "alpaca")
    tok, cached = tokenizer.load_tokenizer(folder / "model"), []
    for name in ("a", "b", "val"):
        records = [{"instruction": f"{name}{i} " * (3 + i % 20), "output": f"{i} " * (3 + i % 30)}
                   for i in range(n)]  # fmt: skip
        file = folder / f"{name}.json"
        file.write_text(json.dumps(records))
        dataset = data.load_dataset(file, tok, "alpaca", 512, data.cache_dir())
        cached.append((torch.tensor(dataset.tokens), dataset.lengths.tolist()))
    torch.save(cached, folder / "samples.pt")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("command", nargs="?", default="speed", choices=("speed", "memory"))
    parser.add_argument("--quick", action="store_true", help="small sizes, to try it")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="of speed [cuda where there is "
                        "one]; memory runs on the CPU")
    parser.add_argument("--only", default="", help="the rows whose title has this")
    args = parser.parse_args(argv)
    cuda = torch.cuda.is_available() and args.command == "speed"
    if args.device == "cuda" and not cuda:
        parser.error("--device cuda goes with speed, where there is a GPU")
    kind = "memory" if args.command == "memory" else args.device or ("cuda" if cuda else "cpu")
    cases, more = [quick(case) if args.quick else case for case in CASES[kind]], {}
    if kind == "cpu":
        more["start-up"] = partial(start_up, args.quick)
        more["1 -> 2 ranks"] = partial(scaling, next(c for c in cases if c.lengths == "alpaca"))
    chosen = [case for case in cases if args.only in case.title]
    more = {title: call for title, call in more.items() if args.only in title}
    if not chosen and not more:
        parser.error(f"--only {args.only}: no row has this in its title")
    machine = {
        "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }  # fmt: skip
    print(*(f"{key}: {value}" for key, value in machine.items()), sep="\n")
    show("", {name: name for name in COLUMNS})
    results = {"steps": steps(chosen)} | {title: call() for title, call in more.items()}
    print(json.dumps({"about": machine, args.command: results}))
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:  # started by `run`
        worker(Case(**json.loads(sys.argv[2])))
    if sys.argv[1:2] == ["start"]:  # started by `start_up`
        start_side(*sys.argv[2:])
    sys.exit(main())
