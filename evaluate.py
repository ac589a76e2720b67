"""Judge a model, or listen to it: the loss on held-out records, and generation.

    python evaluate.py loss --model runs/x/model gpt2 --data val.json math=test.jsonl
    python evaluate.py generate --model runs/x/model --prompt "Once upon a time"

Runs on one process, or under torchrun with the model sharded by FSDP2 over the ranks.

n samples, b of one micro-batch.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import data
import model as hf
import shard
import templates
import tokenizer
from inputs import DTYPES, cache_dir


class Loss(NamedTuple):
    """Of a dataset: means with their standard errors, in nats."""

    n: int
    mean: float  # of the samples' losses, each the mean over its response tokens
    mean_se: float
    token_mean: float  # over all response tokens; its exp is the perplexity
    token_mean_se: float


@torch.no_grad()
def sample_losses(
    model: hf.Transformer, dataset: data.Dataset, micro_batch_size: int = 8
) -> tuple[Tensor, Tensor]:
    """Each sample's loss and number of response tokens, (n,) fp64, longest sample first.

    Collective: every rank calls it and computes its part; all get the whole.
    """
    device = next(model.parameters()).device
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    parts = []
    for batch in data.eval_batches(dataset, micro_batch_size, rank, world):
        moved = batch.to(device)
        losses = model(moved.tokens, moved.labels).double()  # (b,)
        tokens = (batch.labels[:, 1:] != data.IGNORE).sum(1)
        parts.append(torch.stack([losses, tokens.to(losses), moved.group.to(losses)], 1))
    shard.release(model)
    table = torch.cat(parts)  # (n / ranks, 3)
    if dist.is_initialized():
        every = [torch.empty_like(table) for _ in range(world)]
        dist.all_gather(every, table)
        table = torch.stack(every, 1).flatten(0, 1)  # back into the order of the dataset
    table = table[table[:, 2] >= 0].cpu()  # without the fillers of the last micro-batch
    return table[:, 0], table[:, 1]


def loss(model: hf.Transformer, dataset: data.Dataset, micro_batch_size: int = 8) -> Loss:
    """The loss of a model on a dataset. Collective: every rank calls it."""
    x, tokens = sample_losses(model, dataset, micro_batch_size)
    n, token_mean = len(x), (tokens @ x / tokens.sum()).item()
    spread = (tokens * (x - token_mean)).norm() / tokens.sum()  # of a ratio of sums over samples
    se = x.std().item() / math.sqrt(n) if n > 1 else math.nan
    return Loss(n, x.mean().item(), se, token_mean, spread.item())


def load(id_or_dir: str, dtype: str, device: torch.device) -> tuple[hf.Transformer, Path]:
    """A model, sharded where there are several ranks, and its directory. Collective."""
    directory, config = hf.open_checkpoint(id_or_dir)
    weights = hf.read_weights(directory, config)
    if dist.get_world_size() == 1:
        return hf.build(config, weights, DTYPES[dtype], device), directory
    model = shard.build(config, DTYPES[dtype], device)
    shard.fill(model, weights)
    return model, directory


def loss_table(args: argparse.Namespace, device: torch.device) -> list[str]:
    """Models side by side on every file."""
    lines = [f"{'model':30} {'data':20} {'samples':>7}  mean sample loss   perplexity"]
    for name in args.model:
        model, directory = load(name, args.dtype, device)
        tok = tokenizer.load_tokenizer(directory)
        for item in args.data:
            label, _, path = item.rpartition("=")
            template = args.template or templates.trained_with(directory)
            length = min(args.max_length, model.config.max_positions)
            dataset = data.load_dataset(path, tok, template, length, cache_dir())
            r = loss(model, dataset, args.micro_batch_size)
            perplexity = math.exp(r.token_mean)
            lines.append(
                f"{name:30} {label or Path(path).stem:20} {r.n:7}  "
                f"{r.mean:.4f} ± {r.mean_se:.4f}    {perplexity:.3f} ± "
                f"{perplexity * r.token_mean_se:.3f}"
            )
    return lines


def replies(args: argparse.Namespace, device: torch.device) -> list[str]:
    """What the model says to each prompt."""
    (name,) = args.model
    model, directory = load(name, args.dtype, device)
    tok = tokenizer.load_tokenizer(directory)
    if args.template:
        prompts = [templates.render_prompt(tok, args.template, [("user", p)]) for p in args.prompt]
        stops = templates.stop_ids(tok, args.template)
    else:  # the prompt is text to go on with
        prompts = [[tok.bos_id] * tok.add_bos + tok.encode(p) for p in args.prompt]
        stops = [*tok.eos_ids, *model.config.eos_ids]
    new = hf.generate(
        model, prompts, args.max_new_tokens, args.temperature, args.top_p, stops, args.seed,
        device=device,
    )  # fmt: skip
    answers = [tok.decode(ids) for ids in new]
    if args.template:
        return [f"{p}\n-> {a}\n" for p, a in zip(args.prompt, answers, strict=True)]
    return [f"{p}{a}\n" for p, a in zip(args.prompt, answers, strict=True)]


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: permitted is a whole number above 0")
    return int(text)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Judge a model on held-out data, or let it talk.")
    commands = parser.add_subparsers(dest="command", required=True)
    both = argparse.ArgumentParser(add_help=False)
    both.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the parameters [fp32]")

    p = commands.add_parser("loss", parents=[both], help="mean sample loss and perplexity")
    p.add_argument("--model", nargs="+", required=True, help="directories or hub ids")
    p.add_argument("--data", nargs="+", required=True, metavar="[NAME=]PATH", help="records")
    p.add_argument("--template", choices=templates.TEMPLATES,
                   help="[the one that the model was trained with, else alpaca]")
    p.add_argument("--max-length", type=positive, default=512,
                   help="tokens of a sample, at most the model's positions [512]")
    p.add_argument("--micro-batch-size", type=positive, default=8, help="samples of a forward [8]")

    p = commands.add_parser("generate", parents=[both], help="continue prompts")
    p.add_argument("--model", nargs=1, required=True, help="a directory or hub id")
    p.add_argument("--prompt", nargs="+", required=True)
    p.add_argument("--template", choices=templates.TEMPLATES,
                   help="put each prompt as a user's turn; else it is text to go on with")
    p.add_argument("--max-new-tokens", type=int, default=128, help="[128]")
    p.add_argument("--temperature", type=float, default=0.0, help="0 = the likeliest token [0]")
    p.add_argument("--top-p", type=float, default=1.0, help="nucleus of the distribution [1]")
    p.add_argument("--seed", type=int, default=0, help="[0]")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 bad input."""
    args = parse(argv)
    device = shard.start(timeout=1800)
    try:
        lines = {"loss": loss_table, "generate": replies}[args.command](args, device)
        if dist.get_rank() == 0:
            print(*lines, sep="\n")
    except ValueError as error:
        if dist.get_rank() == 0:
            print(error, file=sys.stderr)
        return 2
    finally:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    shard.leave(main())
