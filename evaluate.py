"""Judge a model: its loss on held-out records, its answers to GSM8K, MATH and MT-Bench, its talk.

    python evaluate.py loss --model runs/x/model gpt2 --data val.json math=test.jsonl
    python evaluate.py gsm8k --model runs/x/model --data test.jsonl --limit 50
    python evaluate.py mt-bench --model runs/x/model --questions question.jsonl \\
        --judge-url http://localhost:8000/v1 --judge-model some-model
    python evaluate.py generate --model runs/x/model --prompt "Once upon a time"
    python evaluate.py plot runs/x runs/y

Runs on one process, or under torchrun with the model sharded by FSDP2 over the ranks. Whatever is
generated is appended to a file as it comes: the same command goes on from there, and a file can be
scored again without a model.

n samples, b of one micro-batch.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlparse

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import data
import shard
from cli import report
from cli.flags import Parser
from data import cache_dir
from grading import answers, journal, mtbench
from grading.replies import (
    Checkpoint,
    Writer,
    fingerprint,
    load,
    open_model,
    other_settings,
    progress_bar,
    respond,
    settings_of,
)
from hf import templates
from model import DTYPES, Transformer, generate
from sources import tasks
from sources.records import Problems, located_values, source_paths

Work = Callable[[torch.device], int]  # what a command does once all is checked: its exit code

# --------------------------------------------------------------------------------------------------
# Losses


class Loss(NamedTuple):
    """Of a dataset: means with their standard errors, in nats."""

    n: int
    mean: float  # of the samples' losses, each the mean over its response tokens
    mean_se: float
    token_mean: float  # over all response tokens; its exp is the perplexity
    token_mean_se: float


@torch.no_grad()
def sample_losses(
    model: Transformer, dataset: data.Dataset, micro_batch_size: int = 8
) -> tuple[Tensor, Tensor]:
    """Each sample's loss and number of response tokens, (n,) fp64, in the dataset's order.

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
        table = torch.stack(every, 1).flatten(0, 1)  # longest sample first, as eval_batches deals
    table = table[table[:, 2] >= 0].cpu()  # without the fillers of the last micro-batch
    order = np.argsort(-dataset.lengths, kind="stable")
    table[torch.from_numpy(order)] = table.clone()
    return table[:, 0], table[:, 1]


def summarise(x: Tensor, tokens: Tensor) -> Loss:
    """Of samples with losses x (n,) over so many tokens (n,)."""
    n, token_mean = len(x), (tokens @ x / tokens.sum()).item()
    spread = (tokens * (x - token_mean)).norm() / tokens.sum()  # of a ratio of sums over samples
    se = x.std().item() / math.sqrt(n) if n > 1 else math.nan
    token_se = spread.item() * math.sqrt(n / (n - 1)) if n > 1 else math.nan
    return Loss(n, x.mean().item(), se, token_mean, token_se)


def loss(model: Transformer, dataset: data.Dataset, micro_batch_size: int = 8) -> Loss:
    """The loss of a model on a dataset. Collective: every rank calls it."""
    return summarise(*sample_losses(model, dataset, micro_batch_size))


def data_paths(items: list[str]) -> dict[str, Path]:
    """{label: path} from [NAME=]PATH …; a directory or glob stands for its train_*.json(l)."""
    paths, problems = {}, Problems()
    for item in items:
        name, _, path = item.rpartition("=")
        if not name and (Path(path).is_dir() or re.search(r"[*?[]", path)):
            found = attempt(problems, source_paths, [path]) or {}
        else:
            found = {name or Path(path).stem: Path(path)}
        for label in found.keys() & paths.keys():
            problems.add(f"--data {found[label]}: the name {label} is used twice: give NAME=PATH")
        paths |= found
    problems.lines = [line.replace("--train", "--data") for line in problems.lines]
    problems.raise_if_any()
    return paths


def open_records(path: Path, c: Checkpoint, max_length: int) -> data.Dataset:
    """The records of a file; or TASK or TASK-seedN, the test records of a built-in task."""
    name, _, seed = path.name.partition("-seed")
    if name in tasks.TASKS and (seed or "0").isdecimal() and not path.exists():
        _, _, test = tasks.task(name, int(seed or 0))
        dataset = data.Dataset.from_records(test, c.tokenizer, c.template, max_length)
        if not len(dataset):
            raise ValueError(f"{path}: no record has an answer left in {max_length} tokens")
        return dataset
    return data.load_dataset(path, c.tokenizer, c.template, max_length, cache_dir())


def source_of_record(path: Path) -> dict[int, str]:
    """{number: source} of a file whose records all have a key "source"; {} of any other."""
    sources = {}
    if not path.is_file():
        return sources
    for number, _, record in located_values(path, Problems()):
        if not isinstance(record.get("source"), str):
            return {}
        sources[number] = record["source"]
    return sources


def loss_command(args: argparse.Namespace) -> Work:
    """Models side by side on every file, and on every source within a file."""
    problems = Problems()
    paths = attempt(problems, data_paths, args.data) or {}
    names = dict.fromkeys(args.model)
    opened = [attempt(problems, open_model, name, args.template) for name in names]
    checkpoints = [c for c in opened if c]
    datasets = {}
    for label, path in paths.items():
        for c in checkpoints:
            length = min(args.max_length, c.config.max_positions)
            datasets[c.name, label] = attempt(problems, open_records, path, c, length)
            if datasets[c.name, label] is None:
                break  # the other models would say the same of it
    problems.raise_if_any()
    sources = {label: source_of_record(path) for label, path in paths.items()}

    def work(device: torch.device) -> int:
        rows: dict[tuple[str, str], dict[str, Loss]] = {}  # (file, source or ""): {model: loss}
        for c in checkpoints:
            model = load(c, args.dtype, device)
            for label in paths:
                dataset = datasets[c.name, label]
                x, tokens = sample_losses(model, dataset, args.micro_batch_size)
                rows.setdefault((label, ""), {})[c.name] = summarise(x, tokens)
                names = np.array([sources[label].get(n, "") for n in dataset.numbers.tolist()])
                for source in sorted({*names} - {""}):
                    mine = torch.from_numpy(names == source)
                    part = summarise(x[mine], tokens[mine])
                    rows.setdefault((label, source), {})[c.name] = part
            del model  # before the next one is loaded
        say(*loss_table(rows, [c.name for c in checkpoints]))
        say(*(f"note: {name}, {label}: {count} records left out: {reason}"
              for (name, label), dataset in datasets.items()
              for reason, count in dataset.dropped.items() if count))  # fmt: skip
        if len({c.template for c in checkpoints}) > 1:
            used = ", ".join(f"{c.name} {c.template}" for c in checkpoints)
            say(f"note: the templates differ: {used}; --template sets one for all")
        return 0

    return work


def loss_table(rows: dict[tuple[str, str], dict[str, Loss]], models: list[str]) -> list[str]:
    """A line for each file and source, and in it three columns for each model."""
    labels = [f"  {source}" if source else label for label, source in rows]
    width = max(4, *map(len, labels))
    lines = [f"{label:{width}}" for label in ("", "data", *labels)]
    for name in models:
        block = [("samples", "mean sample loss", "perplexity")]
        for row in rows.values():
            r = row.get(name)  # no sample of a source may be left under one model's tokenizer
            cells = r and (str(r.n), f"{r.mean:.4f} ± {r.mean_se:.4f}", perplexity(r))
            block.append(cells or ("0", "-", "-"))
        widths = [max(map(len, column)) for column in zip(*block, strict=True)]
        room = sum(widths) + 4
        title = name if len(name) <= room else "…" + name[len(name) - room + 1 :]
        lines[0] += f"   {title:{room}}"
        for n, row in enumerate(block, start=1):
            lines[n] += "   " + "  ".join(f"{x:>{w}}" for x, w in zip(row, widths, strict=True))
    return [line.rstrip() for line in lines]


def perplexity(r: Loss) -> str:
    """exp of the token mean, and its standard error to first order."""
    value = math.exp(r.token_mean) if r.token_mean < 700 else math.inf
    return f"{value:.3f} ± {value * r.token_mean_se:.3f}"


# --------------------------------------------------------------------------------------------------
# Generation


def generate_command(args: argparse.Namespace) -> Work:
    """What the model says to each prompt."""
    c = open_model(args.model, args.template)
    tok = c.tokenizer
    if args.template:
        prompts = [templates.render_prompt(tok, args.template, [("user", p)]) for p in args.prompt]
        stops = c.stops
    else:  # the prompt is text to go on with
        prompts = [[tok.bos_id] * tok.add_bos + tok.encode(p) for p in args.prompt]
        stops = [*tok.eos_ids, *c.config.eos_ids]
    room = c.config.max_positions
    Problems(
        f"--prompt {text[:40]!r}: {len(ids)} tokens: permitted are 1 to {room - 1}"
        for text, ids in zip(args.prompt, prompts, strict=True) if not 0 < len(ids) < room
    ).raise_if_any()

    def work(device: torch.device) -> int:
        new = generate(
            load(c, args.dtype, device), prompts, args.max_new_tokens, args.temperature, args.top_p,
            stops, args.seed, device=device,
        )  # fmt: skip
        joint = "\n-> " if args.template else ""
        for prompt, ids in zip(args.prompt, new, strict=True):
            say(f"{prompt}{joint}{tok.decode(ids)}\n")
        return 0

    return work


# --------------------------------------------------------------------------------------------------
# GSM8K and MATH


def problems_command(args: argparse.Namespace) -> Work:
    """Accuracy on word problems; every generation is kept, so that it can be scored again."""
    if args.rescore:
        rows = journal.read(args.rescore)
        if not rows or any({"index", "answer", "output", "settings"} - row.keys() for row in rows):
            raise ValueError(f"--rescore {args.rescore}: not a file of generations")
        return lambda device: say(*accuracy(rows, args.command))
    problems = Problems(
        f"--{flag} is missing" for flag in ("model", "data") if not getattr(args, flag)
    )
    problems.raise_if_any()
    c = attempt(problems, open_model, args.model, args.template)
    asked = attempt(problems, lambda: answers.read_problems(local_file(args.data))) or []
    exemplars = answers.EXEMPLARS[args.command]
    if args.exemplars:
        read = attempt(problems, lambda: answers.read_problems(local_file(args.exemplars))) or []
        exemplars = [(p.question, p.solution) for p in read]
    if args.shots > len(exemplars):
        problems.add(f"--shots {args.shots}: there are {len(exemplars)} exemplars: "
                     "--exemplars names a file with more")  # fmt: skip
    problems.raise_if_any()
    asked, exemplars = asked[: args.limit], exemplars[: args.shots]
    settings = settings_of(c, args.max_new_tokens, args.dtype)
    settings |= {"shots": args.shots, "instruction": args.instruction,
                 "exemplars": fingerprint(exemplars)}  # fmt: skip
    out = out_directory(args) / f"{args.command}.jsonl"
    Problems(other_settings(out, settings)).raise_if_any()
    for row in journal.read(out):
        if row["index"] < len(asked) and row["question"] != asked[row["index"]].question:
            raise ValueError(f"{out} holds answers to other questions: take another --out")

    def work(device: torch.device) -> int:
        rows = shard.broadcast_from_rank0(lambda: journal.read(out))
        todo = sorted({*range(len(asked))} - {row["index"] for row in rows})
        chats = [
            answers.as_conversation(asked[i].question, exemplars, args.instruction) for i in todo
        ]
        with Writer(out, len(todo)) as writer:
            model = load(c, args.dtype, device) if todo else None
            for n, reply in respond(model, c, chats, args.max_new_tokens, args.batch_size):
                p = asked[todo[n]]
                row = {"index": todo[n], "question": p.question, "answer": p.answer,
                       "output": reply.text, "tokens": reply.tokens, "end": reply.end,
                       "settings": settings}  # fmt: skip
                writer.append(row)
                rows.append(row)
        if dist.get_rank() == 0:
            say(*accuracy([row for row in rows if row["index"] < len(asked)], args.command))
            say(f"{out} keeps every reply; --rescore {out} scores them again")
        return 0

    return work


def accuracy(rows: list[dict], task: str) -> list[str]:
    """The report on generations."""
    rows = list({row["index"]: row for row in rows}.values())
    grader, n = answers.Grader(), len(rows)
    right = sum(grader.right(row["output"], row["answer"]) for row in rows)
    p = right / n
    se = math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else math.nan
    lines = [
        f"{task}: accuracy {p:.4f} ± {se:.4f} ({right} of {n})   {rows[0]['settings']['model']}",
        f"compared by {grader.method}",
    ]
    silent = sum(answers.extract(row["output"]) is None for row in rows)
    cut, tight = (sum(row.get("end") == end for row in rows) for end in ("length", "no room"))
    if silent or cut or tight:
        lines.append(f"{silent} replies without an answer; {cut} replies cut by length; "
                     f"{tight} questions too long for the model")  # fmt: skip
    return lines


# --------------------------------------------------------------------------------------------------
# MT-Bench


def mtbench_command(args: argparse.Namespace) -> Work:
    """Answers to both turns of every question, and what a judge thinks of them."""
    problems = Problems()
    if not args.questions or not (args.model or args.answers):
        raise ValueError("needs --questions, and --model or --answers")
    references = args.reference and attempt(
        problems, lambda: mtbench.read_answers(local_file(args.reference))
    )
    questions = attempt(
        problems, lambda: mtbench.read_questions(local_file(args.questions), references or {})
    )
    questions = (questions or [])[: args.limit]
    c, given = None, {}
    if args.answers:
        given = attempt(problems, mtbench.read_answers, args.answers) or {}
        if given and (lacking := [q.id for q in questions if q.id not in given]):
            problems.add(f"--answers {args.answers}: lacks question {lacking[0]} (and "
                         f"{len(lacking) - 1} more)")  # fmt: skip
    else:
        c = attempt(problems, open_model, args.model, args.template)
    for problem in judge_problems(args):
        problems.add(problem)
    problems.raise_if_any()
    out = out_directory(args)
    if c:
        settings = settings_of(c, args.max_new_tokens, args.dtype)
        file = out / "mt-bench-answers.jsonl"
        Problems(other_settings(file, settings)).raise_if_any()

    def work(device: torch.device) -> int:
        replies = given or answer_questions(args, c, questions, out, device)
        if dist.get_rank() != 0:
            return 0
        if not args.judge_url:
            say(f"{out}/mt-bench-answers.jsonl holds the answers; --judge-url has them graded")
            return 0
        bare = [q.id for q in questions if q.category in mtbench.WITH_REFERENCE and not q.reference]
        if bare:
            say(f"note: {len(bare)} questions of {', '.join(mtbench.WITH_REFERENCE)} are graded "
                "without a reference answer: --reference gives them")  # fmt: skip
        judge = mtbench.Judge(args.judge_url, args.judge_model, args.judge_timeout,
                              args.judge_tries, concurrency=args.judge_concurrency)  # fmt: skip
        return have_graded(questions, replies, judge, out / "mt-bench-scores.jsonl")

    return work


def judge_problems(args: argparse.Namespace) -> list[str]:
    if bool(args.judge_url) != bool(args.judge_model):
        return ["--judge-url and --judge-model go together"]
    if not args.judge_url:
        return ["--answers needs a judge: --judge-url and --judge-model"] if args.answers else []
    try:
        url = urlparse(args.judge_url)
        fine = url.scheme in ("http", "https") and url.hostname and url.port != 0
    except ValueError:
        fine = False
    return [] if fine else [f"--judge-url {args.judge_url}: expected the like of http://host:8000/v1"]


def answer_questions(
    args: argparse.Namespace,
    c: Checkpoint,
    questions: list[mtbench.Question],
    out: Path,
    device: torch.device,
) -> dict[int | str, tuple[str, str]]:
    """{question id: both answers}, those that are kept and the rest. Collective."""
    file, settings = out / "mt-bench-answers.jsonl", settings_of(c, args.max_new_tokens, args.dtype)
    given = {}
    asked = {q.id: list(q.turns) for q in questions}
    for row in shard.broadcast_from_rank0(lambda: journal.read(file)):
        if asked.get(row["question_id"]) == row["questions"]:
            given[row["question_id"]] = tuple(row["choices"][0]["turns"])
    todo: dict[float, list[mtbench.Question]] = {}
    for q in questions:
        if q.id not in given:
            temperature = mtbench.TEMPERATURES.get(q.category, mtbench.OTHER_TEMPERATURE)
            todo.setdefault(temperature, []).append(q)
    size = args.batch_size * dist.get_world_size()
    parts = [
        (temperature, group[n : n + size])
        for temperature, group in todo.items() for n in range(0, len(group), size)
    ]  # fmt: skip
    with Writer(file, sum(len(part) for _, part in parts)) as writer:
        model = load(c, args.dtype, device) if parts else None
        for temperature, part in parts:
            options = args.max_new_tokens, args.batch_size, temperature, args.seed
            chats = [[("user", q.turns[0])] for q in part]
            first = dict(respond(model, c, chats, *options))
            for i, chat in enumerate(chats):
                chat += [("assistant", first[i].text), ("user", part[i].turns[1])]
            for i, second in respond(model, c, chats, *options):
                q, turns = part[i], (first[i].text, second.text)
                given[q.id] = turns
                writer.append({
                    "question_id": q.id, "model_id": c.name, "tstamp": time.time(),
                    "choices": [{"index": 0, "turns": turns}], "questions": q.turns,
                    "ends": [first[i].end, second.end], "temperature": temperature,
                    "settings": settings,
                })  # fmt: skip
    return given


def have_graded(
    questions: list[mtbench.Question], given: dict, judge: mtbench.Judge, file: Path
) -> int:
    """Grade, and print the table. Returns 1 if scores are missing at the end."""
    with journal.Journal(file) as scores_file:
        have = mtbench.scores(questions, given, judge.model, scores_file.rows)
        bar = progress_bar(2 * len(questions) - len(have))
        failure = mtbench.grade(questions, given, judge, scores_file, bar.update)
        bar.close()
        scored = mtbench.scores(questions, given, judge.model, scores_file.rows)
    say(*mtbench.table(questions, scored), f"graded by {judge.model}; {file} keeps every judgement")
    lacking = 2 * len(questions) - len(scored)
    if lacking:
        why = failure or f"no grade in {judge.readings} replies of the judge"
        print(f"{lacking} scores are missing ({why}); the same command asks for them again",
              file=sys.stderr)  # fmt: skip
    return int(lacking > 0)


# --------------------------------------------------------------------------------------------------
# Input and output


def attempt(problems: Problems, make: Callable, *args) -> object | None:
    """make(*args); where it raises ValueError, None, and its lines are among the problems."""
    with problems.collecting():
        return make(*args)


def out_directory(args: argparse.Namespace) -> Path:
    """--out, by default runs/eval-<name of the model or of its run>."""
    if args.out:
        return Path(args.out)
    parts = [p for p in Path(args.model or args.answers or "").parts if p != "model"]
    return Path("runs") / f"eval-{Path(parts[-1]).stem if parts else 'model'}"


def local_file(name: str) -> Path:
    """A file, or one of a hub dataset: owner/name/path/in/it. Raises ValueError."""
    like_the_hubs = re.fullmatch(r"([\w.-]+)/[\w.-]+/[\w./-]+", name)
    if Path(name).exists() or not like_the_hubs or Path(like_the_hubs[1]).is_dir():
        return Path(name)
    from huggingface_hub import errors, hf_hub_download
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # not a line for each retry
    owner, dataset, file = name.split("/", 2)
    try:
        return Path(hf_hub_download(f"{owner}/{dataset}", file, repo_type="dataset"))
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        reason = "nor is there such a dataset on huggingface.co"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        reason = "nor is it cached, and the hub is out of reach"
    except errors.EntryNotFoundError:
        reason = f"nor does the hub's dataset {owner}/{dataset} have it"
    except (errors.HfHubHTTPError, OSError) as error:
        reason = f"and the hub's datasets are out of reach ({type(error).__name__})"
    raise ValueError(f"{name}: there is no such file, {reason}")


# --------------------------------------------------------------------------------------------------
# The command line


def say(*lines: str) -> int:
    """Print on rank 0. Returns 0, the exit code of a command that ends well."""
    if lines and dist.get_rank() == 0:
        print(*lines, sep="\n", flush=True)
    return 0


def at_least(least: float, kind: type = int, most: float = math.inf) -> Callable[[str], float]:
    """A type for argparse."""

    def number(text: str) -> float:
        if not least <= kind(text) <= most:
            limits = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{text}: permitted is a number {limits}")
        return kind(text)

    return number


def task_flags(commands: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    """gsm8k, math and mt-bench, with the flags that they share."""
    positive, natural = at_least(1), at_least(0)
    kept = argparse.ArgumentParser(add_help=False, parents=[common])
    kept.add_argument("--model", help="a directory or hub id")
    kept.add_argument("--limit", type=positive, help="take the first so many questions [all]")
    kept.add_argument("--max-new-tokens", type=positive, default=1024, help="of a reply [1024]")
    kept.add_argument("--batch-size", type=positive, default=16, help="replies at a time, on each "
                      "rank [16]")
    kept.add_argument("--out", help="directory of the replies [runs/eval-<model>]")
    for name, keys in (("gsm8k", "question, answer"), ("math", "problem, solution")):
        p = commands.add_parser(name, parents=[kept], help=f"accuracy on {name.upper()}")
        p.add_argument("--data", help=f"JSON or JSONL of {{{keys}}}, or owner/dataset/file "
                       "of the hub")
        p.add_argument("--shots", type=natural, default=0, help="worked examples before each "
                       "question [0]")
        p.add_argument("--exemplars", help="a file to take them from, like --data [4 of our own]")
        p.add_argument("--instruction", default=answers.INSTRUCTION, help="what follows a question "
                       f"[{answers.INSTRUCTION}]")
        p.add_argument("--rescore", type=Path, metavar="FILE", help="score the replies of an "
                       "earlier run again; needs no model and no other flag")

    p = commands.add_parser("mt-bench", parents=[kept], help="two-turn questions, and a judge")
    p.add_argument("--questions", help="question.jsonl in FastChat's format, or owner/dataset/file "
                   "of the hub")
    p.add_argument("--reference", help="reference answers for reasoning, math and coding, like "
                   "FastChat's gpt-4.jsonl [those in --questions]")
    p.add_argument("--answers", help="grade these, in FastChat's format, instead of a --model's")
    p.add_argument("--judge-url", help="an OpenAI-compatible endpoint; its key, if it needs one, "
                   f"is read from the environment variable {mtbench.KEY}")
    p.add_argument("--judge-model", help="the endpoint's name of the judge")
    p.add_argument("--judge-concurrency", type=positive, default=4, help="requests at a time [4]")
    p.add_argument("--judge-timeout", type=at_least(1e-3, float), default=120,
                   help="seconds without a byte [120]")
    p.add_argument("--judge-tries", type=positive, default=8, help="of a request, before giving up "
                   "[8]")
    p.add_argument("--seed", type=natural, default=0, help="of the answers at temperature > 0 [0]")


def parse(argv: list[str] | None) -> argparse.Namespace:
    positive, natural = at_least(1), at_least(0)
    parser = Parser(description="Judge a model on held-out data, or let it talk.")
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--dtype", choices=("auto", *DTYPES), default="auto",
                        help="of the parameters; auto: bf16 on GPUs, fp32 on CPUs [auto]")
    common.add_argument("--template", choices=templates.TEMPLATES,
                        help="[that of the model, as far as its files tell, else alpaca]")

    p = commands.add_parser("loss", parents=[common], help="mean sample loss and perplexity")
    p.add_argument("--model", nargs="+", required=True, help="directories or hub ids")
    p.add_argument("--data", nargs="+", required=True, metavar="[NAME=]PATH",
                   help="records; a directory or quoted glob stands for its train_*.json(l), "
                   "TASK or TASK-seedN for the test records of a built-in task")
    p.add_argument("--max-length", type=positive, default=512,
                   help="tokens of a sample, at most the model's positions [512]")
    p.add_argument("--micro-batch-size", type=positive, default=8, help="samples of a forward [8]")

    task_flags(commands, common)
    p = commands.add_parser("generate", parents=[common], help="continue prompts")
    p.add_argument("--model", required=True, help="a directory or hub id")
    p.add_argument("--prompt", nargs="+", required=True,
                   help="put as users' turns with --template; else text to go on with")
    p.add_argument("--max-new-tokens", type=positive, default=128, help="[128]")
    p.add_argument("--temperature", type=at_least(0, float), default=0.0,
                   help="0 = the likeliest token [0]")
    p.add_argument("--top-p", type=at_least(1e-6, float, 1), default=1.0,
                   help="nucleus of the distribution [1]")
    p.add_argument("--seed", type=natural, default=0, help="[0]")

    p = commands.add_parser("plot", help="weights and losses of runs, as a picture")
    p.add_argument("run", nargs="+", type=Path, help="directories of train.py; runs that differ in "
                   "their seed alone are drawn together")
    p.add_argument("--out", type=Path, metavar="FILE", help="png, pdf or svg [weights.png, in the "
                   "run's directory if there is one]")
    return parser.parse_args(argv)


def plot_command(args: argparse.Namespace) -> int:
    """Draw runs into one picture."""
    folder = args.run[0] if len(args.run) == 1 else Path()
    file = args.out or folder / "weights.png"
    report.plot(args.run, file)
    print(file)
    return 0


COMMANDS = {"loss": loss_command, "gsm8k": problems_command, "math": problems_command,
            "mt-bench": mtbench_command, "generate": generate_command}  # fmt: skip


def refuse(error: Exception) -> int:
    """Say what is wrong, once where all ranks find it. Returns the exit code."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(10)  # torchrun ends the other ranks when rank 0 leaves
    print(error, file=sys.stderr)
    return 2


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 a judge that failed, 2 bad input."""
    args = parse(argv)
    try:  # before the process group, whose ranks would time out while data is tokenised
        if args.command == "plot":
            return plot_command(args)
        work = COMMANDS[args.command](args)
    except (ValueError, OSError) as error:
        return refuse(error)
    device = shard.start(timeout=1800)
    try:
        return work(device)
    except ValueError as error:
        return refuse(error)
    except KeyboardInterrupt:
        shard.exit_now(130)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    shard.exit_now(main())
