"""Learn how much of each data source to train on, with the ScaleBiO bilevel loop.

    torchrun --standalone --nproc_per_node=2 train.py         # built-in task and model, no download
    torchrun --nproc_per_node=8 train.py --model meta-llama/Meta-Llama-3-8B \\
        --train alpaca=a.json math=b.jsonl --val val.json --test test.json --out runs/x

The training loop; the algorithm is in bilevel.py and lisa.py, the flags in inputs.py. Writes to
--out: config.json, metrics.jsonl, weights.json, weights.png, checkpoints/ and model/.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

import data
import evaluate
import model as hf
import plan
import report
import shard
import templates
from bilevel import PenaltyStep, SourceWeights
from inputs import DTYPES, Inputs, check_flags, parse, prepare, read_config, record
from lisa import Lisa


def lr_factor(step: int, total: int, warmup: float, schedule: str) -> float:
    """Factor on all three learning rates: up over the warm-up, then as the schedule says."""
    rise = math.ceil(warmup * total)
    if step < rise:
        return (step + 1) / rise
    done = (step - rise) / max(1, total - rise)
    return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[
        schedule
    ]


class NonFinite(Exception):
    """A loss or gradient is not finite, and nothing was updated."""


class Stopped(Exception):
    """A signal asked the run to stop, and its state is saved."""


def load_copies(args: argparse.Namespace, inputs: Inputs, device: torch.device):
    """The sharded copies (w, u), equal to the last bit. Collective: every rank calls it."""
    auto = "bf16" if device.type == "cuda" else "fp32"
    dtype = DTYPES[auto if args.dtype == "auto" else args.dtype]
    w, u = (shard.build(inputs.config, dtype, device) for _ in "wu")
    if inputs.checkpoint:
        shard.fill(w, hf.read_weights(inputs.checkpoint, inputs.config))
    else:
        shard.fill(w, hf.random_weights(inputs.config, args.seed))
    shard.copy_shards(u, w)
    w.recompute = u.recompute = args.activation_checkpointing
    return w, u


def make_penalty(args: argparse.Namespace, inputs: Inputs, device: torch.device) -> PenaltyStep:
    """Both copies with their optimisers, and the source weights. Collective."""
    w, u = load_copies(args, inputs, device)
    lisa = (args.lisa_layers, args.lisa_interval, args.seed, args.lisa_ends)
    copy = int(args.lisa_coupling == "independent")
    opt_w = Lisa(w, *lisa, copy=0, lr=args.lr_w, weight_decay=args.weight_decay)
    opt_u = Lisa(u, *lisa, copy=copy, lr=args.lr_u, weight_decay=args.weight_decay)
    wide = torch.promote_types(next(w.parameters()).dtype, torch.float32)
    sources = SourceWeights(len(inputs.sources), wide, args.lr_lambda)
    return PenaltyStep(
        w, u, opt_w, opt_u, sources, args.alpha, clip=args.clip, on_micro=shard.once_per_pass
    )


def train(
    args: argparse.Namespace, inputs: Inputs, device: torch.device, signals: list[int] | None = None
) -> PenaltyStep:
    """The bilevel loop, from loading to the saved model. Collective: every rank calls it.

    signals: grows when this process is asked to stop; one rank's is enough
    """
    penalty = make_penalty(args, inputs, device)
    w, opt_w, opt_u, sources = penalty.w, penalty.opt_w, penalty.opt_u, penalty.sources
    batches = data.Batches(
        list(inputs.sources.values()), inputs.val, args.batch_size, args.val_batch_size,
        args.micro_batch_size, args.seed, dist.get_rank(), dist.get_world_size(),
    )  # fmt: skip
    per_round = args.steps or math.ceil(args.epochs * batches.steps_per_epoch)
    total = args.outer_rounds * per_round
    start = resume(args, penalty)
    log = report.Log(args.out, about(args, inputs), start, total, main=dist.get_rank() == 0)
    before = test_loss(args, inputs, w) if start == 0 else None

    for step in range(start, total):
        penalty.alpha = args.alpha * args.tau ** (step // per_round)
        if step and step % per_round == 0 and args.tau != 1:
            sources.reset_optimizer()
        factor = lr_factor(step, total, args.warmup, args.schedule)
        for opt, lr in (opt_w, args.lr_w), (opt_u, args.lr_u), (sources.opt, args.lr_lambda):
            opt.param_groups[0]["lr"] = factor * lr
        opt_w.switch(step)
        opt_u.switch(step)
        began = time.perf_counter()
        train_part, val_part, counts = batches.step(step)
        # Padded tokens of this rank that go through a forward and a backward, of u and of w.
        tokens = sum(b.tokens.numel() for b in [*train_part, *train_part, *val_part])
        train_part, val_part = ([b.to(device) for b in part] for part in (train_part, val_part))
        stats = penalty.step(train_part, val_part, counts, stop=bool(signals))

        seconds = time.perf_counter() - began
        row = report.row(step, stats, list(inputs.sources), sources.probs())
        row |= {"lr": factor * args.lr_w, "alpha": penalty.alpha, "seconds": seconds}
        row["tokens_per_s"] = tokens * dist.get_world_size() / seconds
        if not (stats.finite or args.skip_nonfinite):
            log.write_weights()
            raise NonFinite(report.blame(row, counts, args.out))
        if step == 0:
            row["test_loss"] = before
        if step == total - 1:
            opt_w.finish(total)
            row["test_loss"] = test_loss(args, inputs, w)
        log.write(row)
        if step < total - 1:
            if stats.stop or (args.save_every and (step + 1) % args.save_every == 0):
                save(args, penalty, step + 1)
            if stats.stop:
                raise Stopped(f"stopped after {step + 1} of {total} steps")

    def add_tokenizer(directory: Path) -> None:
        templates.save_tokenizer(inputs.tokenizer, directory, args.template)

    shard.save(w, args.out / "model", add_tokenizer)
    return penalty


def state_of(penalty: PenaltyStep) -> dict[str, torch.Tensor]:
    """The sharded state of a run: both copies' parameters, and their active sets' AdamW state."""
    copies = {"w": (penalty.w, penalty.opt_w), "u": (penalty.u, penalty.opt_u)}
    state = {}
    for copy, (model, opt) in copies.items():
        state |= {f"{copy}.{name}": p.detach() for name, p in model.named_parameters()}
        state |= {f"{copy}.lisa.{name}": tensor for name, tensor in opt.state_dict().items()}
    return state


def save(args: argparse.Namespace, penalty: PenaltyStep, done: int) -> None:
    """Write the checkpoint of a run of which `done` steps are done. Collective."""
    if dist.get_rank() == 0:
        shard.sync(args.out / "metrics.jsonl")
    run = {"done": done, "sources": penalty.sources.state_dict()}
    shard.save_checkpoint(args.out / "checkpoints", done, state_of(penalty), run, args.keep)


def resume(args: argparse.Namespace, penalty: PenaltyStep) -> int:
    """Go on from the newest whole checkpoint in --out; returns the steps done. Collective."""
    checkpoint, complaints = shard.newest_checkpoint(args.out / "checkpoints")
    if dist.get_rank() == 0:
        print(*complaints, sep="\n", end="\n" * bool(complaints))
    if checkpoint is None:
        return 0
    run = shard.read_run(checkpoint)
    for opt in (penalty.opt_w, penalty.opt_u):
        opt.switch(run["done"] - 1)  # the blocks that were active when it was saved
    shard.load_checkpoint(checkpoint, state_of(penalty))
    penalty.sources.load_state_dict(run["sources"])
    if dist.get_rank() == 0:
        print(f"goes on from {checkpoint}")
    return run["done"]


def test_loss(args: argparse.Namespace, inputs: Inputs, w: hf.Transformer) -> float | None:
    """Mean sample loss on the held-out records; None without any. Collective."""
    return evaluate.loss(w, inputs.test, args.micro_batch_size).mean if inputs.test else None


def about(args: argparse.Namespace, inputs: Inputs) -> dict:
    """What weights.json says of the run beside its results."""
    files = record(args, inputs)["data"]
    sources = {k.removeprefix("train "): v for k, v in files.items() if k.startswith("train ")}
    return {"model": args.model, "sources": sources}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 a run that failed, 2 bad input."""
    args = parse(argv)
    for stream in (sys.stdout, sys.stderr):  # a terminal may lack a character of the report
        stream.reconfigure(errors="replace")
    first = os.environ.get("RANK", "0") == "0"
    if args.plan:
        return show_plan(args)
    try:
        inputs = prepare(args, int(os.environ.get("WORLD_SIZE", 1)))
    except ValueError as error:
        if not first:
            time.sleep(10)  # rank 0 prints, and torchrun ends the other ranks when it leaves
        else:
            show_problems(str(error).splitlines())
        return 2
    if (args.out / "model").is_dir():
        if first:
            print(report.render(args.out), "", f"{args.out} is a finished run.", sep="\n")
        return 0
    device, signals, code, last_words = shard.start(args.timeout), catch_signals(), 0, ""
    try:
        if first:
            announce(args, inputs)
            args.out.mkdir(parents=True, exist_ok=True)
            report.write_json(args.out / "config.json", record(args, inputs))
        train(args, inputs, device, signals)
        if first:
            report.plot(args.out)
            last_words = report.render(args.out)
    except Stopped as stopped:
        code = 128 + (signals or [signal.SIGTERM])[0]
        last_words = f"{stopped}; the same command goes on from there"
    except NonFinite as error:
        code, last_words = 1, str(error)
    except (Exception, dcp.CheckpointException) as error:  # the latter is no Exception
        # Leave at once: where a rank is gone, taking the process group down would wait for it.
        traceback.print_exc()
        what = str(error).splitlines() or [type(error).__name__]
        print(f"rank {dist.get_rank()} ends: {what[0]}", file=sys.stderr)
        shard.leave(1)
    if first:
        print(last_words, file=sys.stderr if code == 1 else sys.stdout, flush=True)
    dist.destroy_process_group()
    return code


def show_plan(args: argparse.Namespace) -> int:
    """The memory plan of these flags. Returns 0, 1 if the memory does not do, 2 for bad input."""
    try:
        config = read_config(args.model)
        if problems := check_flags(args, args.gpus):
            raise ValueError("\n".join(problems))
        settings = {
            "ranks": args.gpus,
            "dtype": DTYPES["bf16" if args.dtype == "auto" else args.dtype],
            "micro_batch_size": args.micro_batch_size,
            "max_length": args.max_length,
            "lisa_layers": args.lisa_layers,
            "lisa_ends": args.lisa_ends,
            "activation_checkpointing": args.activation_checkpointing,
            "cpu_offload": False,
        }
        needed = plan.plan(config, **settings)
    except ValueError as error:
        show_problems(str(error).splitlines())
        return 2
    if args.json:
        print(json.dumps(plan.as_dict(needed, args.gpu_memory)))
    else:
        print(f"{args.model} on {args.gpus} GPUs, bytes per GPU:")
        print(plan.render(needed, args.gpu_memory))
    if args.gpu_memory is None or plan.fits(needed, args.gpu_memory):
        return 0
    if not args.json:
        fix = plan.first_fix(config, args.gpu_memory, **settings)
        print(f"would fit with: {fix}" if fix else "no flag makes it fit")
    return 1


def catch_signals() -> list[int]:
    """A list that the first SIGTERM or SIGINT is put into; a second one has its usual effect."""
    received = []

    def note(number: int, _) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    return received


def show_problems(problems: list[str]) -> None:
    shown = data.Problems.shown
    print(*problems[:shown], sep="\n", file=sys.stderr)
    if len(problems) > shown:
        print(f"... and {len(problems) - shown} more", file=sys.stderr)


def announce(args: argparse.Namespace, inputs: Inputs) -> None:
    """Say what the run is made of, and what should be known of it."""
    sizes = ", ".join(f"{name} {len(source)}" for name, source in inputs.sources.items())
    print(f"ScaleBiO: {args.model}, {dist.get_world_size()} rank(s); sources: {sizes}; "
          f"validation {len(inputs.val)}; {args.out}")  # fmt: skip
    for note in inputs.notes:
        print(f"note: {note}")


if __name__ == "__main__":
    shard.leave(main())
