"""Learn how much of each data source to train on, with the ScaleBiO bilevel loop; fine-tune on it.

    torchrun --standalone --nproc_per_node=2 train.py         # built-in task and model, no download
    torchrun --nproc_per_node=8 train.py --model meta-llama/Meta-Llama-3-8B \\
        --train alpaca=a.json math=b.jsonl --val val.json --test test.json --out runs/x
    torchrun --nproc_per_node=8 train.py --mode finetune --model meta-llama/Meta-Llama-3-70B \\
        --train alpaca=a.json math=b.jsonl --weights runs/x/weights.json --out runs/y

The training loop; the algorithm is in bilevel.py and lisa.py, the flags in inputs.py. Writes to
--out: config.json, metrics.jsonl, weights.json or mixture.jsonl, a picture, checkpoints/, model/.
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
import mixture
import model as hf
import plan
import plots
import report
import shard
import templates
from bilevel import PenaltyStep, PlainStep, SourceWeights
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


WATCHED = 10  # evaluations on the validation records in a fine-tuning run, evenly spaced
Trainer = PenaltyStep | PlainStep


def load_copies(args: argparse.Namespace, inputs: Inputs, device: torch.device, names: str):
    """Sharded copies of the model, equal to the last bit. Collective: every rank calls it."""
    auto = "bf16" if device.type == "cuda" else "fp32"
    dtype = DTYPES[auto if args.dtype == "auto" else args.dtype]
    w, *others = copies = [shard.build(inputs.config, dtype, device) for _ in names]
    if inputs.checkpoint:
        shard.fill(w, hf.read_weights(inputs.checkpoint, inputs.config))
    else:
        shard.fill(w, hf.random_weights(inputs.config, args.seed))
    for copy in others:
        shard.copy_shards(copy, w)
    for copy in copies:
        copy.recompute = args.activation_checkpointing
    return copies


def make_trainer(args: argparse.Namespace, inputs: Inputs, device: torch.device) -> Trainer:
    """The model with its optimiser, or both copies with theirs and the source weights. Collective.
    """
    lisa = (args.lisa_layers, args.lisa_interval, args.seed, args.lisa_ends)
    rest = {"clip": args.clip, "on_micro": shard.once_per_pass}
    if args.mode == "finetune":
        (w,) = load_copies(args, inputs, device, "w")
        opt_w = Lisa(w, *lisa, lr=args.lr_w, weight_decay=args.weight_decay)
        return PlainStep(w, opt_w, **rest)
    w, u = load_copies(args, inputs, device, "wu")
    copy = int(args.lisa_coupling == "independent")
    opt_w = Lisa(w, *lisa, copy=0, lr=args.lr_w, weight_decay=args.weight_decay)
    opt_u = Lisa(u, *lisa, copy=copy, lr=args.lr_u, weight_decay=args.weight_decay)
    wide = torch.promote_types(next(w.parameters()).dtype, torch.float32)
    sources = SourceWeights(len(inputs.sources), wide, args.lr_lambda)
    return PenaltyStep(w, u, opt_w, opt_u, sources, args.alpha, **rest)


def make_batches(args: argparse.Namespace, inputs: Inputs) -> data.Batches:
    """This rank's batches: stratified over the sources, or of the mixture drawn from them."""
    ranks = dist.get_rank(), dist.get_world_size()
    if args.mode == "finetune":
        return mixture.MixtureBatches(
            list(inputs.mixture.values()), args.batch_size, args.micro_batch_size, args.seed, *ranks
        )
    return data.Batches(
        list(inputs.sources.values()), inputs.val, args.batch_size, args.val_batch_size,
        args.micro_batch_size, args.seed, *ranks,
    )  # fmt: skip


def begin_step(
    args: argparse.Namespace, trainer: Trainer, step: int, per_round: int, factor: float
) -> None:
    """Learning rates, the blocks that train, and alpha of this outer round."""
    if args.mode == "bilevel":
        trainer.alpha = args.alpha * args.tau ** (step // per_round)
        if step and step % per_round == 0 and args.tau != 1:
            trainer.sources.reset_optimizer()
        trainer.sources.opt.param_groups[0]["lr"] = factor * args.lr_lambda
    for name, (_, opt) in trainer.copies.items():
        opt.param_groups[0]["lr"] = factor * getattr(args, f"lr_{name}")
        opt.switch(step)


def train(
    args: argparse.Namespace, inputs: Inputs, device: torch.device, signals: list[int] | None = None
) -> Trainer:
    """The loop of both modes, from loading to the saved model. Collective: every rank calls it.

    signals: grows when this process is asked to stop; one rank's is enough
    """
    trainer = make_trainer(args, inputs, device)
    batches = make_batches(args, inputs)
    names = list(inputs.mixture or inputs.sources)
    per_round = args.steps or math.ceil(args.epochs * batches.steps_per_epoch)
    total = (args.outer_rounds or 1) * per_round
    start = resume(args, trainer)
    log = report.Log(args.out, about(args, inputs), start, total, main=dist.get_rank() == 0)

    for step in range(start, total):
        factor = lr_factor(step, total, args.warmup, args.schedule)
        begin_step(args, trainer, step, per_round, factor)
        held_out = held_out_losses(args, inputs, trainer.w, step, total)
        began = time.perf_counter()
        train_part, val_part, counts = batches.step(step)
        # Padded tokens of this rank that go through a forward and a backward, in every copy.
        copies = len(trainer.copies)
        tokens = sum(b.tokens.numel() for b in [*copies * train_part, *val_part])
        train_part, val_part = ([b.to(device) for b in part] for part in (train_part, val_part))
        stats = trainer.step(train_part, val_part, counts, stop=bool(signals))

        seconds = time.perf_counter() - began
        row = report.row(step, stats, counts, names)
        row |= {"lr": factor * args.lr_w, "seconds": seconds}
        if args.mode == "bilevel":
            row |= report.weights_row(trainer, names)
        row["tokens_per_s"] = tokens * dist.get_world_size() / seconds
        if not (stats.finite or args.skip_nonfinite):
            log.write_weights()
            raise NonFinite(report.blame(row, counts, args.out))
        if step == total - 1:
            trainer.opt_w.finish(total)
            held_out = held_out_losses(args, inputs, trainer.w, total, total)
        log.write(row | held_out)
        if step < total - 1:
            if stats.stop or (args.save_every and (step + 1) % args.save_every == 0):
                save(args, trainer, step + 1)
            if stats.stop:
                raise Stopped(f"stopped after {step + 1} of {total} steps")

    def add_tokenizer(directory: Path) -> None:
        templates.save_tokenizer(inputs.tokenizer, directory, args.template)

    shard.save(trainer.w, args.out / "model", add_tokenizer)
    return trainer


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The sharded state of a run: the copies' parameters, and their active sets' AdamW state."""
    state = {}
    for copy, (model, opt) in trainer.copies.items():
        state |= {f"{copy}.{name}": p.detach() for name, p in model.named_parameters()}
        state |= {f"{copy}.lisa.{name}": tensor for name, tensor in opt.state_dict().items()}
    return state


def save(args: argparse.Namespace, trainer: Trainer, done: int) -> None:
    """Write the checkpoint of a run of which `done` steps are done. Collective."""
    if dist.get_rank() == 0:
        shard.sync(args.out / "metrics.jsonl")
    run = {"done": done}
    if args.mode == "bilevel":
        run["sources"] = trainer.sources.state_dict()
    shard.save_checkpoint(args.out / "checkpoints", done, state_of(trainer), run, args.keep)


def resume(args: argparse.Namespace, trainer: Trainer) -> int:
    """Go on from the newest whole checkpoint in --out; returns the steps done. Collective."""
    checkpoint, complaints = shard.newest_checkpoint(args.out / "checkpoints")
    if dist.get_rank() == 0:
        print(*complaints, sep="\n", end="\n" * bool(complaints))
    if checkpoint is None:
        return 0
    run = shard.read_run(checkpoint)
    for _, opt in trainer.copies.values():
        opt.switch(run["done"] - 1)  # the blocks that were active when it was saved
    shard.load_checkpoint(checkpoint, state_of(trainer))
    if args.mode == "bilevel":
        trainer.sources.load_state_dict(run["sources"])
    if dist.get_rank() == 0:
        print(f"goes on from {checkpoint}")
    return run["done"]


def held_out_losses(
    args: argparse.Namespace, inputs: Inputs, w: hf.Transformer, done: int, total: int
) -> dict:
    """The mean sample losses that are due after `done` steps: on the test records before and after
    the run; in a fine-tuning run on the validation records, also now and then. Collective."""
    due = {"test_loss": (inputs.test, done in (0, total))}
    if args.mode == "finetune":
        due["val_loss"] = inputs.val, done == total or done % math.ceil(total / WATCHED) == 0
    return {
        name: evaluate.loss(w, dataset, args.micro_batch_size).mean if dataset else None
        for name, (dataset, now) in due.items()
        if now
    }


def about(args: argparse.Namespace, inputs: Inputs) -> dict | None:
    """What weights.json says of the run beside its results; None: the run learns no weights."""
    if args.mode == "finetune":
        return None
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
            if inputs.mixture:
                report.replace(args.out / "mixture.jsonl", mixture.as_jsonl(inputs.mixture))
        train(args, inputs, device, signals)
        if first:
            no_picture = draw(args)
            last_words = "\n".join([report.render(args.out), *no_picture])
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


def draw(args: argparse.Namespace) -> list[str]:
    """The picture of a finished run; or a line that says why there is none."""
    name = "weights.png" if args.mode == "bilevel" else "losses.png"
    try:
        plots.plot([args.out], args.out / name)
    except ValueError as error:
        return [f"no {name}: {error}"]
    return []


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
            "copies": 1 if args.mode == "finetune" else 2,
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
    used = inputs.mixture or inputs.sources
    sizes = ", ".join(f"{name} {len(source)}" for name, source in used.items())
    validation = f"; validation {len(inputs.val)}" if inputs.val else ""
    print(f"ScaleBiO: {args.mode} of {args.model}, {dist.get_world_size()} rank(s); "
          f"{'mixture' if inputs.mixture else 'sources'}: {sizes}{validation}; {args.out}")
    for note in inputs.notes:
        print(f"note: {note}")


if __name__ == "__main__":
    shard.leave(main())
