"""Learn how much of each data source to train on, with the ScaleBiO bilevel loop; fine-tune on it.

    torchrun --standalone --nproc_per_node=2 train.py         # built-in task and model, no download
    torchrun --nproc_per_node=8 train.py --model meta-llama/Meta-Llama-3-8B \\
        --train alpaca=a.json math=b.jsonl --val val.json --test test.json --out runs/x

The training loop; the algorithm is in bilevel.py and lisa.py, the flags in cli/flags.py. Writes to
--out: config.json, metrics.jsonl, weights.json or mixture.jsonl, a picture, checkpoints/, model/.
"""

from __future__ import annotations

if __name__ == "__main__":
    from cli import begin

    begin()

    from cli.flags import parse

    parse(None)  # --help, or a flag that cannot be read, does not wait for torch

import contextlib
import gc
import math
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
import torch.distributed as dist

import data
import evaluate
import shard
from bilevel import PenaltyStep, PlainStep, SourceWeights
from cli import plan, report, tracker
from cli.flags import Flags, as_json, parse
from cli.inputs import (
    Inputs,
    about,
    branch,
    checkpoints,
    held_run,
    open_run,
    plan_inputs,
    record,
    total_steps,
)
from hf import say, say_why, templates
from lisa import Lisa
from model import Transformer, dtype_of, random_weights, read_tensors
from sources.records import write_records


def lr_factor(step: int, total: int, warmup: float, schedule: str) -> float:
    """Factor on learning rates: up over the warm-up, then as the schedule says."""
    rise = math.ceil(warmup * total)
    if step < rise:
        return (step + 1) / rise
    done = (step - rise) / max(1, total - rise)
    return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[
        schedule
    ]


STOPPING = signal.SIGTERM, signal.SIGINT, signal.SIGHUP


class Failed(Exception):
    """The run cannot go on, for a reason that all ranks see."""


class Stopped(Exception):
    """A signal asked the run to stop, and its state is saved."""


Trainer = PenaltyStep | PlainStep


def load_copies(
    flags: Flags, inputs: Inputs, device: torch.device, n: int, keep_gathered: bool
) -> list[Transformer]:
    """n copies of the model, equal to the last bit. Collective: every rank calls it."""
    offload = shard.Offload(device, flags.shard_size) if flags.cpu_offload else None
    mesh = shard.make_mesh(device.type, flags.shard_size)
    settings = inputs.config, dtype_of(flags.dtype, device.type), device, offload, mesh
    build = partial(shard.build, *settings, keep_gathered)
    w = build()
    if inputs.checkpoint:
        shard.fill(w, read_tensors(inputs.checkpoint, inputs.config))
    else:
        shard.fill(w, random_weights(inputs.config, flags.seed, device))
    copies = [w, *(build() for _ in range(n - 1))]
    for copy in copies[1:]:
        shard.copy_shards(copy, w)
    for copy in copies:
        copy.recompute = flags.activation_checkpointing
        if flags.compile:
            shard.compile_blocks(copy, watched=flags.slopes(copy.embed.weight.dtype))
    return copies


def make_lisa(flags: Flags, model: Transformer, lr: float, copy: int) -> Lisa:
    """The optimiser of copy 0, w, or 1, u; its state moves with it if they take turns."""
    copy *= flags.lisa_coupling == "independent"
    rules = flags.lisa_layers, flags.lisa_interval, flags.seed, flags.lisa_ends, copy
    opt = Lisa(model, *rules, lr, flags.weight_decay, partial(shard.move_to_device, model))
    if model.offload is not None:
        model.offload.follow(model, opt.state_tensors)
    return opt


def make_trainer(
    flags: Flags, inputs: Inputs, device: torch.device, keep_gathered: bool = False
) -> Trainer:
    """The model with its optimiser, or both copies with theirs and the source weights. Collective.
    """
    rest = {"clip": flags.clip, "on_micro": shard.once_per_pass}
    if flags.mode == "finetune":
        (w,) = load_copies(flags, inputs, device, 1, keep_gathered)
        return PlainStep(w, make_lisa(flags, w, flags.lr_w, 0), **rest)
    w, u = load_copies(flags, inputs, device, 2, keep_gathered)
    opt_w = make_lisa(flags, w, flags.lr_w, 0)
    opt_u = make_lisa(flags, u, flags.lr_u, 1)
    wide = torch.promote_types(next(w.parameters()).dtype, torch.float32)
    sources = SourceWeights(len(inputs.sources), wide, z=flags.lambda_z)
    rest["gap"] = "gradient" if flags.slopes(next(w.parameters()).dtype) else "difference"
    rest["direction"] = shard.differences(w, u, opt_w, opt_u)
    rest["hold"] = w.gather_once and flags.lisa_coupling == "shared"
    return PenaltyStep(w, u, opt_w, opt_u, sources, flags.alpha, **rest)


def make_batches(flags: Flags, inputs: Inputs) -> data.Batches:
    """This rank's batches: stratified over the sources, or of the mixture drawn from them."""
    common = flags.micro_batch_size, flags.seed, dist.get_rank(), dist.get_world_size()
    if flags.mode == "finetune":
        return data.MixtureBatches(list(inputs.mixture.values()), flags.batch_size, *common)
    sources = list(inputs.sources.values())
    return data.Batches(sources, inputs.val, flags.batch_size, flags.val_batch_size, *common)


def train(
    flags: Flags, inputs: Inputs, device: torch.device, signals: list[int],
    track: Callable | None = None, keep_gathered: bool = False,
) -> Trainer:  # fmt: skip
    """The loop of both modes, from loading to the saved model. Collective: every rank calls it.

    signals: takes in those that ask this process to stop; one rank's is enough
    track: shows numbers and a step, on rank 0
    """
    trainer = make_trainer(flags, inputs, device, keep_gathered)
    batches = make_batches(flags, inputs)
    total = total_steps(flags, inputs)
    per_round = total // (flags.outer_rounds or 1)
    if flags.mode == "bilevel":
        trainer.sources.lr = flags.lambda_rate(total)
        if dist.get_rank() == 0:
            say(f"weights: {flags.reach(total, len(inputs.sources))}")
    start, origin = resume(flags, inputs, trainer)
    saved = start if origin == flags.out else 0  # steps that the newest checkpoint in --out has
    learned = {"model": flags.model, "sources": about(inputs.sources)}
    learned = learned if flags.mode == "bilevel" else None
    log = report.Log(flags.out, learned, start, total, dist.get_rank() == 0, origin, track)
    log.say(ahead(flags, inputs, total - start))
    shard.set_timeout(flags.timeout)
    catch_signals(signals)  # before, there was nothing to save

    for step, batch in data.prefetch(batches, range(start, total)):
        # λ's rate does not fall: its weights go on following u and w to the end.
        factors = (lr_factor(step, total, flags.warmup, s) for s in (flags.schedule, "constant"))
        alpha = flags.alpha and flags.alpha * flags.tau ** (step // per_round)
        rates = trainer.set_rates(*factors, alpha)
        for _, opt in trainer.copies.values():
            opt.switch(step)  # LISA: the blocks that train
        held_out = held_out_losses(flags, inputs, trainer.w, step, total, log)
        if step == start:
            log.bar.unpause()  # the clock starts here

        began = time.perf_counter()
        train_part, val_part, counts = batch
        moved = ([b.to(device) for b in part] for part in (train_part, val_part))
        stats = trainer.step(*moved, counts, stop=bool(signals))
        seconds = time.perf_counter() - began

        names = list(inputs.used)
        row = report.row(step, stats, counts, names) | rates
        row |= {key: report.by_name(names, values) for key, values in trainer.row().items()}
        row |= {"seconds": seconds, "tokens_per_s": tokens_of(trainer, batch) / seconds}
        if not (stats.finite or flags.skip_nonfinite):
            log.write_weights()
            if step != saved:
                log.say(save(flags, inputs, trainer, step, log, signals))
            raise Failed(report.nonfinite_message(row, counts, flags.out))
        log.write(row | held_out)
        done, last = step + 1, step + 1 == total
        due = flags.keep if last else flags.save_every and done % flags.save_every == 0
        if due or (stats.stop and not last):
            log.say(save(flags, inputs, trainer, saved := done, log, signals))
        if stats.stop and not last:
            raise Stopped(f"stopped after {done} of {total} steps")

    trainer.opt_w.finish(total)
    log.finish(held_out_losses(flags, inputs, trainer.w, total, total, log))
    shard.set_timeout(shard.FILES_TIMEOUT)
    add_tokenizer = partial(templates.save_tokenizer, inputs.tokenizer, template=inputs.template)
    write(partial(shard.save, trainer.w, flags.out / "model", add_tokenizer), log, signals)
    if not flags.keep and dist.get_rank() == 0:
        shard.delete(flags.out / "checkpoints", shard.whole_checkpoints(flags.out / "checkpoints"))
    return trainer


def ahead(flags: Flags, inputs: Inputs, steps: int) -> str:
    """What a run is about to do, in words."""
    lengths, what = [d.lengths for d in inputs.used.values()], f"{flags.batch_size} training"
    if flags.mode == "finetune":
        n = sum(map(len, lengths))  # once an epoch, whose last batch may be a smaller one
        tokens = n / math.ceil(n / flags.batch_size) * np.concatenate(lengths).mean()
        what = f"up to {what}" if n % flags.batch_size else what
    else:  # as many of every source
        what += f" and {flags.val_batch_size} validation"
        tokens = flags.batch_size * np.mean([each.mean() for each in lengths])
        tokens += flags.val_batch_size * inputs.val.lengths.mean()
    return f"{steps} steps of {what} samples: about {steps * tokens:,.0f} tokens"


def write(work: Callable[[], None], log: report.Log, signals: list[int]) -> None:
    """Do `work` after the log has all rows, once there is room for both, or until a signal that
    comes from now on. Collective."""
    before = len(signals)

    def both() -> None:
        shard.jointly(log.settle)
        work()

    shard.once_there_is_room(both, lambda: len(signals) > before)


def tokens_of(trainer: Trainer, batch: tuple) -> int:
    """Tokens of all ranks' samples that go through a forward and a backward, in every copy; taking
    the other ranks to have as many as this one."""
    train_part, val_part, _ = batch
    mine = sum(b.n_tokens for b in [*len(trainer.copies) * train_part, *val_part])
    return mine * dist.get_world_size()


def state_of(trainer: Trainer, saved: Iterable[str] = ()) -> dict[str, torch.Tensor]:
    """A run's state: the copies' parameters, their active sets' AdamW state, and the weights'. If
    there are names of a state that was `saved`, those blocks are active from now on that were."""
    state = trainer.state_dict()
    for copy, (_, opt) in trainer.copies.items() if saved else ():  # of which one may have to wait
        own = f"{copy}.lisa."
        opt.activate(name.removeprefix(own) for name in saved if name.startswith(own))
    for copy, (model, opt) in trainer.copies.items():
        named = {name: p.detach() for name, p in model.named_parameters()}
        named |= {f"lisa.{name}": tensor for name, tensor in opt.state_dict().items()}
        state |= {
            f"{copy}.{name}": shard.current_values(model, t) for name, t in named.items()
        }
    return state


def save(
    flags: Flags, inputs: Inputs, trainer: Trainer, done: int, log: report.Log, signals: list[int]
) -> str:
    """Write the checkpoint of a run of which `done` steps are done; says so. Collective."""
    began = time.perf_counter()
    shard.set_timeout(shard.FILES_TIMEOUT)
    folder, made_of = flags.out / "checkpoints", record(flags, inputs)
    settings = folder, done, state_of(trainer), made_of, max(1, flags.keep)
    write(partial(shard.save_checkpoint, *settings), log, signals)
    shard.set_timeout(flags.timeout)
    return f"saved {folder}/step-{done} in {time.perf_counter() - began:.1f} s"


def resume(flags: Flags, inputs: Inputs, trainer: Trainer) -> tuple[int, Path]:
    """Go on from the newest whole checkpoint; returns the steps done, and the directory of the run
    that did them. Collective."""
    checkpoint, complaints = shard.newest_checkpoint(
        shard.broadcast_from_rank0(lambda: checkpoints(flags))
    )
    if dist.get_rank() == 0:
        say(*complaints)
    if checkpoint is None:
        if complaints:
            raise Failed("no checkpoint is whole: '--resume never' starts anew, beside this run")
        return 0, flags.out
    try:
        done = shard.broadcast_from_rank0(lambda: shard.steps_done(checkpoint))
        state = shard.load_checkpoint(checkpoint, partial(state_of, trainer))
    except ValueError as error:
        raise Failed(str(error)) from None
    trainer.load_state_dict(state)
    origin = checkpoint.parent.parent
    if dist.get_rank() == 0:
        say(f"goes on from {checkpoint}")
        if origin != flags.out:
            write_config(flags, inputs, branch=branch(record(flags, inputs), checkpoint))
    return done, origin


def held_out_losses(
    flags: Flags, inputs: Inputs, w: Transformer, done: int, total: int, log: report.Log
) -> dict:
    """The mean sample losses that are due after `done` steps: on the test records before and after
    the run, and every --eval-every steps; in a fine-tuning run on the validation records, also now
    and then. Collective."""
    often = flags.eval_every and done % flags.eval_every == 0
    due = {"test_loss": (inputs.test, done in (0, total) or often)}
    if inputs.test and done in (0, total):
        log.say(f"evaluating {len(inputs.test)} test records")
    if flags.mode == "finetune":
        # Ten times at most, and so often that it takes no more than a tenth of the run's time: a
        # sample takes three times as long to train on as to evaluate.
        affordable = 3 * total * flags.batch_size // (10 * len(inputs.val or [0]))
        every = math.ceil(total / max(1, min(10, affordable)))
        due["val_loss"] = inputs.val, done == total or done % every == 0
    due = {name: dataset for name, (dataset, now) in due.items() if now and dataset}
    if due:
        shard.move_to_device(w)
    return {name: report.finite(evaluate.loss(w, dataset, flags.micro_batch_size).mean)
            for name, dataset in due.items()}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 a run that failed or a plan that does not fit, 2 bad input,
    128 + n stopped by signal n."""
    flags = parse(argv)
    for stream in (sys.stdout, sys.stderr):
        outlive(stream)
    if flags.plan:
        return shard.command(lambda _: plan.command(flags, *plan_inputs(flags)), group=False)
    handlers = {number: signal.getsignal(number) for number in STOPPING}
    try:
        return shard.command(partial(run, flags))
    finally:  # this may be a notebook
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: not set by Python
        gc.collect()  # the copies, which the hooks of slopes refer to and are held by


def run(flags: Flags, device: torch.device) -> int:
    """Train, and say how it ended. Returns the exit code. Collective: every rank calls it."""
    flags, inputs = open_run(flags)
    with contextlib.closing(inputs.lock) if inputs and inputs.lock else contextlib.nullcontext():
        return go(flags, inputs, device)


def go(flags: Flags, inputs: Inputs | None, device: torch.device) -> int:
    """See `run`: what it does in a directory that is locked."""
    if inputs is None:
        if dist.get_rank() == 0:
            say(*report.retold(flags.out), "", f"{flags.out} is a finished run.")
        return 0
    if flags.mode == "draw":
        if dist.get_rank() == 0:
            announce(flags, inputs)
            say(*write_records(flags.out, inputs.mixture), *report.render(flags.out))
        return 0
    rank, code, last_words, signals, memory = dist.get_rank(), 0, [], [], None
    track, end_track = None, lambda code: None
    try:
        settings = plan_settings(flags, inputs, device)
        memory = plan.Memory(inputs.config, device.type, settings)
        if rank == 0:
            tracked = announce(flags, inputs, memory)
            if flags.report_to:
                track, end_track = tracker(flags.report_to, flags.out, as_json(flags), *tracked)
        train(flags, inputs, device, signals, track, settings["keep_gathered"])
        if rank == 0:
            no_picture = draw_picture(flags)  # first, as the report lists the files
            used = [f"memory: {memory.planned}{seen}"] if (seen := memory.measured()) else []
            last_words = [*report.retold(flags.out), *no_picture, *used]
    except Stopped as stopped:
        code = 128 + (signals or [signal.SIGTERM])[0]
        last_words = [f"{stopped}; the same command goes on from there"]
    except Failed as error:
        code, last_words = 1, [str(error)]
    except Exception as error:
        what = report.why(error, flags.out, flags.timeout, memory, rank)
        say_why(f"rank {rank} ends: {what}")
        end(end_track, 1, flags)
        if dist.get_world_size() > 1:
            shard.exit_now(1)  # taking the process group down would wait for a rank that is gone
        return 1
    if rank == 0:
        (say_why if code == 1 else say)(*last_words)
    end(end_track, code, flags)
    return code


def end(end_track: Callable[[int], None], code: int, flags: Flags) -> None:
    """Of --report-to: what another's software raises changes nothing for a run that is over."""
    try:
        end_track(code)
    except Exception as error:
        say(f"--report-to {flags.report_to}: {error or repr(error)}")


def draw_picture(flags: Flags) -> list[str]:
    """The picture of a finished run; or a line that says why there is none."""
    try:
        report.plot([flags.out])
    except ValueError as error:
        return [f"no picture: {error}"]
    return []


def plan_settings(flags: Flags, inputs: Inputs, device: torch.device) -> dict:
    """What the plan of this run is made from; the longest sample may be shorter than permitted."""
    settings = plan.settings(flags, dist.get_world_size(), dtype_of(flags.dtype, device.type))
    used = [*inputs.used.values(), *([inputs.val] if inputs.val else [])]
    longest = max(int(dataset.lengths.max()) for dataset in used)
    padded = data.padding() * -(-longest // data.padding())
    settings["max_length"] = min(flags.max_length, padded)
    return plan.gathering(inputs.config, shard.free_memory(device), settings)


def catch_signals(received: list[int]) -> None:
    """From here on, signals to stop are put into a list. A second Ctrl-C has the effect that it had
    before; the others may come twice, from a cluster's manager and from torchrun."""
    usual = signal.getsignal(signal.SIGINT)

    def note(number: int, _) -> None:
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(number, usual or signal.SIG_DFL)

    for number in STOPPING:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup does
            signal.signal(number, note)


def outlive(stream: TextIO) -> None:
    """Let the run outlive the terminal, pipe or disk that it prints to: what cannot be written
    there is lost. A character that the terminal lacks is replaced."""

    if not hasattr(stream, "reconfigure") or isinstance(stream.write, partial):
        return  # a notebook's; or it was told before

    def attempt(method, *args, **kwargs):
        with contextlib.suppress(OSError):
            return method(*args, **kwargs)

    attempt(stream.reconfigure, errors="replace")
    stream.write = partial(attempt, stream.write)
    stream.flush = partial(attempt, stream.flush)


def announce(
    flags: Flags, inputs: Inputs, memory: plan.Memory | None = None
) -> tuple[str, bool]:
    """Say and write down what the run is made of, and say what should be known of it. Returns the
    id that --report-to knows it by, and whether it does so already."""
    sizes = ", ".join(f"{name} {len(source)}" for name, source in inputs.used.items())
    validation = f"; validation {len(inputs.val)}" if inputs.val else ""
    of = f" of {flags.model}, {dist.get_world_size()} rank(s)" if memory else ""
    say(f"ScaleBiO: {flags.mode}{of}; "
        f"{'mixture' if inputs.mixture else 'sources'}: {sizes}{validation}; {flags.out}",
        *(f"note: {note}" for note in inputs.notes))  # fmt: skip
    if flags.compile:
        say("note: --compile: the first steps wait for the compiler, a minute or more each")
    if flags.compile and memory.settings["slopes"]:
        say("note: --compile leaves the blocks that train as they are, for the gap from gradients"
            + ("" if flags.lisa_layers else ": which are all, so that nothing is compiled"))
    if memory:
        say(f"memory: {memory.planned}{plan.KEPT * memory.settings['keep_gathered']}")
    held = held_run(flags.out) or {}
    run_id = held.get("tracked") or secrets.token_hex(8)
    write_config(flags, inputs, **{"tracked": run_id} if flags.report_to else {})
    if inputs.mixture:
        report.replace(flags.out / "mixture.jsonl", report.mixture_jsonl(inputs.mixture))
    return run_id, "tracked" in held


def write_config(flags: Flags, inputs: Inputs, **more) -> None:
    """config.json, with `more` and what it has of this run beside the record."""
    held = held_run(flags.out) or {}
    kept = {key: held[key] for key in ("branch", "tracked") if key in held}
    if not shard.whole_checkpoints(flags.out / "checkpoints"):  # this is where it starts
        kept.pop("branch", None)
    report.write_json(flags.out / "config.json", record(flags, inputs) | kept | more)


if __name__ == "__main__":
    shard.exit_now(main())
