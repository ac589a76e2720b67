"""Judge a model: its loss on held-out records, its answers to GSM8K, MATH and MT-Bench, its talk.

    python evaluate.py loss --model runs/x/model gpt2 --data val.json math=test.jsonl
    python evaluate.py gsm8k --model runs/x/model --data test.jsonl --limit 50
    python evaluate.py mt-bench --model runs/x/model --questions question.jsonl \\
        --judge-url http://localhost:8000/v1 --judge-model some-model
    python evaluate.py generate --model runs/x/model --prompt "Once upon a time"
    python evaluate.py plot runs/x runs/y

Runs on one process, or under torchrun with the model sharded by FSDP2 over the ranks. Replies to
questions are appended to a file as they come: the same command goes on from there, and a file can
be scored again without a model. Before loading a model a command checks all its input.

n samples, b of one micro-batch.
"""

from __future__ import annotations

if __name__ == "__main__":
    from cli import begin

    begin()

    from cli.flags import parse_evaluation

    parse_evaluation(None)  # --help, or a flag that cannot be read, does not wait for torch

import argparse
import gc
import math
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import data
import hf
import shard
from cli.flags import parse_evaluation, spelt
from grading import mtbench, replies
from hf import Problems, templates
from model import Transformer, generate
from sources import tasks
from sources.records import located_values, source_paths

# Means

def mean_se(sums: Tensor, counts: Tensor) -> tuple[float, float]:
    """The mean over what n independent samples hold, each a sum and a count, (n,), and its standard
    error, of a ratio of sums to first order: nan for one sample."""
    n, count = len(sums), counts.sum()
    mean = sums.sum() / count
    spread = (sums - counts * mean).norm() / count
    return mean.item(), spread.item() * math.sqrt(n / (n - 1)) if n > 1 else math.nan


def plus_minus(mean: float, se: float, digits: int = 4) -> str:
    return f"{mean:.{digits}f}" + (f" ± {se:.{digits}f}" if not math.isnan(se) else "")


def aligned(rows: list[list[str]]) -> list[str]:
    """Rows of a table as lines, with the numbers of a column below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([f"{row[0]:{widths[0]}}", *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]


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
    if world > 1:
        every = [torch.empty_like(table) for _ in range(world)]
        dist.all_gather(every, table)
        table = torch.stack(every, 1).flatten(0, 1)  # longest sample first, as eval_batches deals
    table = table[table[:, 2] >= 0].cpu()  # without the fillers of the last micro-batch
    order = np.argsort(-dataset.lengths, kind="stable")
    table[torch.from_numpy(order)] = table.clone()
    return table[:, 0], table[:, 1]


def summarise(x: Tensor, tokens: Tensor) -> Loss:
    """Of samples with losses x (n,) over so many tokens (n,)."""
    return Loss(len(x), *mean_se(x, torch.ones_like(x)), *mean_se(tokens * x, tokens))


def loss(model: Transformer, dataset: data.Dataset, micro_batch_size: int = 8) -> Loss:
    """The loss of a model on a dataset. Collective: every rank calls it."""
    return summarise(*sample_losses(model, dataset, micro_batch_size))


def open_records(path: Path, c: replies.Checkpoint, max_length: int) -> data.Dataset:
    """The records of a file; or TASK or TASK-seedN, the test records of a built-in task."""
    name, _, seed = path.name.partition("-seed")
    if name in tasks.TASKS and (seed or "0").isdecimal() and not path.exists():
        _, _, test = tasks.task(name, int(seed or 0))
        dataset = data.Dataset.from_records(test, c.tokenizer, c.template, max_length)
        if not len(dataset):
            raise ValueError(f"{path}: no record has an answer left in {max_length} tokens")
        return dataset
    return data.load_dataset(path, c.tokenizer, c.template, max_length, data.cache_dir())


def source_of_record(path: Path) -> dict[int, str]:
    """{number: source} of a file whose records all have a key "source"; {} of any other."""
    records = located_values(path, Problems()) if path.is_file() else []
    sources = {number: record.get("source") for number, _, record in records}
    return sources if all(isinstance(s, str) for s in sources.values()) else {}


def loss_command(args: argparse.Namespace, device: torch.device) -> int:
    """Each model's losses on every file, and on every source within a file."""
    problems, paths, checkpoints, datasets = Problems(), {}, [], {}
    with problems.collecting():
        paths = source_paths(args.data, "--data")
    for name in dict.fromkeys(args.model):
        with problems.collecting():
            checkpoints.append(replies.open_model(name, args.template, talks=False))
    for label, path in paths.items():
        with problems.collecting():  # what is wrong for one model is wrong for the next
            for c in checkpoints:
                length = min(args.max_length, c.config.max_positions)
                datasets[c.name, label] = open_records(path, c, length)
    shard.jointly(problems.raise_if_any)
    shard.check_same({f"--data {label}": d.sha256 for (_, label), d in datasets.items()})
    sources = {label: source_of_record(path) for label, path in paths.items()}
    rows = []  # (number of the file, source or "", cells)
    for c in checkpoints:
        model = replies.load(c, args.dtype, device)
        for n, label in enumerate(paths):
            dataset = datasets[c.name, label]
            x, tokens = sample_losses(model, dataset, args.micro_batch_size)
            names = np.array([sources[label].get(i, "") for i in dataset.numbers.tolist()])
            for source in {"", *names}:
                mine = torch.from_numpy((names == source) | (source == ""))
                title = f"  {source}" if source else label
                rows.append((n, source, loss_row(title, c.name, summarise(x[mine], tokens[mine]))))
        del model  # before the next one is loaded; FSDP's modules refer to one another
        gc.collect()
    rows.sort(key=lambda row: row[:2])  # the models of a file stand below each other
    header = ["data", "model", "samples", "mean sample loss", "perplexity"]
    say(*aligned([header, *(cells for *_, cells in rows)]))
    for (name, label), dataset in datasets.items():
        if sources[label]:
            dataset.notes.get("keys that are not read", {}).pop("source", None)
        for remark in dataset.remarks():
            say(f"note: {name}, {label}: {remark}")
    if len({c.template for c in checkpoints}) > 1:
        used = ", ".join(f"{c.name} {c.template}" for c in checkpoints)
        say(f"note: the templates differ: {used}; --template sets one for all")
    return 0


def loss_row(title: str, model: str, r: Loss) -> list[str]:
    perplexity = math.exp(r.token_mean) if r.token_mean < 700 else math.inf
    return [title, model, str(r.n), plus_minus(r.mean, r.mean_se),
            plus_minus(perplexity, perplexity * r.token_mean_se, 3)]  # fmt: skip


# Generation

def generate_command(args: argparse.Namespace, device: torch.device) -> int:
    """What the model says to each prompt."""
    talks = bool(args.template)
    c = shard.jointly(lambda: replies.open_model(args.model, args.template, talks))
    tok, room = c.tokenizer, c.config.max_positions
    if args.template:
        prompts = [templates.render_prompt(tok, args.template, [("user", p)]) for p in args.prompt]
        stops = c.stops
    else:  # the prompt is text to go on with
        c = c._replace(notes=[])
        prompts = [[tok.bos_id] * tok.add_bos + tok.encode(p) for p in args.prompt]
        stops = [*tok.eos_ids, *c.config.eos_ids]
    Problems(
        f"--prompt {text[:40]!r}: {len(ids)} tokens: permitted are 1 to {room - 1}"
        for text, ids in zip(args.prompt, prompts, strict=True) if not 0 < len(ids) < room
    ).raise_if_any()  # fmt: skip
    seeds = [replies.seed_of(args.seed, prompt) for prompt in args.prompt]
    sampling = args.max_new_tokens, args.temperature, args.top_p, stops, seeds
    model = replies.load(c, args.dtype, device)
    new = generate(model, prompts, *sampling, stop_when=replies.all_finished)
    for prompt, asked, ids in zip(args.prompt, prompts, new, strict=True):
        if args.template:
            new_text = f"\n-> {tok.decode(ids)}"
        else:  # decoded with the prompt: the first token of a text may lose its blank
            new_text = tok.decode(asked + ids).removeprefix(tok.decode(asked))
        say(*f"{prompt}{new_text}\n".split("\n"))
    return 0


# GSM8K, MATH and MT-Bench

def problems_command(args: argparse.Namespace, device: torch.device) -> int:
    """Accuracy on word problems; every generation is kept, so that it can be scored again."""
    try:
        from grading import answers
    except ImportError as error:
        raise ValueError(f"{args.command}: {error}: pip install math-verify") from None
    rows = replies.read(args.rescore) if args.rescore else answer_problems(args, device)
    if args.rescore and not all(map(replies.is_graded, rows or [{}])):
        raise ValueError(f"--rescore {args.rescore}: not a file of generations")
    if dist.get_rank() != 0:
        return 0
    found = [answers.extract(row["output"], row["answer"]) for row in rows]
    right = [answers.equal(row["answer"], x) for row, x in zip(rows, found, strict=True)]
    x = torch.tensor(right, dtype=torch.float64)
    cut, tight = (sum(row.get("end") == end for row in rows) for end in ("length", "no room"))
    say(f"{args.command}: accuracy {plus_minus(*mean_se(x, torch.ones_like(x)))} "
        f"({sum(right)} of {len(rows)})   {rows[0]['settings']['model']}",
        f"compared by math-verify {version('math-verify')}; {found.count(None)} replies without an "
        f"answer, {cut} cut by length; {tight} questions too long for the model")  # fmt: skip
    return 0


def answer_problems(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """A row for each problem, on rank 0."""
    from grading import answers

    Problems(f"--{x} is missing" for x in ("model", "data") if not getattr(args, x)).raise_if_any()
    problems = Problems()
    exemplars = args.exemplars or f"{answers.EXEMPLARS}/{args.command}.jsonl"
    with problems.collecting():
        c = replies.open_model(args.model, args.template)
    with problems.collecting():
        every = answers.read_problems(local_file(args.data))
    with problems.collecting():
        shown = answers.read_problems(local_file(exemplars))
        if args.shots > len(shown):
            raise ValueError(f"--shots {args.shots}: there are {len(shown)} exemplars")
    shard.jointly(problems.raise_if_any)
    before = []
    for question, solution, *_ in shown[: args.shots]:
        before += [("user", f"{question}\n{args.instruction}"), ("assistant", solution)]
    asked = [replies.Asked({"index": i, "question": question, "answer": answer},
                           [f"{question}\n{args.instruction}"])
             for i, (question, _, answer) in enumerate(every)]  # fmt: skip
    out = out_directory(args) / f"{args.command}.jsonl"
    rows = replies.answer(out, c, asked, args.limit, lambda said: said[0]._asdict(), device,
                          args.dtype, args.max_new_tokens, args.batch_size, before)  # fmt: skip
    say(f"{out} keeps every reply; --rescore {out} scores them again")
    return rows


def mtbench_command(args: argparse.Namespace, device: torch.device) -> int:
    """Answers to both turns of every question, and what a judge thinks of them."""
    if not args.questions or not (args.model or args.answers):
        raise ValueError("needs --questions, and --model or --answers")
    out, problems, every, judge, prompts = out_directory(args), Problems(), [], None, None
    file = Path(args.answers or out / "mt-bench-answers.jsonl")
    with problems.collecting():
        prompts = args.judge_prompts and mtbench.read_prompts(args.judge_prompts)
    with problems.collecting():
        references = mtbench.read_answers(local_file(args.reference)) if args.reference else {}
        every = mtbench.read_questions(local_file(args.questions), references)
    questions = every[: args.limit]
    with problems.collecting():
        if not args.answers:
            c = replies.open_model(args.model, args.template)
        elif lacking := {q.id for q in questions} - mtbench.read_answers(file).keys():
            raise ValueError(f"--answers {file}: lacks {len(lacking)} of the questions")
    with problems.collecting():
        asks = args.answers or args.judge_prompts
        if bool(args.judge_url) != bool(args.judge_model) or asks and not args.judge_url:
            raise ValueError("--judge-url and --judge-model go together; --answers and "
                             "--judge-prompts need them")  # fmt: skip
        if args.judge_url:
            judge = mtbench.Judge(args.judge_url, args.judge_model, args.judge_timeout,
                                  args.judge_tries, args.judge_concurrency, args.judge_max_tokens,
                                  args.judge_temperature, prompts)  # fmt: skip
    shard.jointly(problems.raise_if_any)
    if not args.answers:
        about = [{"question_id": q.id, "model_id": c.name, "questions": q.turns,
                  "temperature": mtbench.TEMPERATURES.get(q.category, 0.7)} for q in every]
        asked = [replies.Asked(row, row["questions"], row["temperature"]) for row in about]
        replies.answer(file, c, asked, args.limit, mtbench.as_row, device, args.dtype,
                       args.max_new_tokens, args.batch_size, seed=args.seed)  # fmt: skip
    if not judge:
        say(f"{file} holds the answers; --judge-url has them graded")
    return judged(questions, file, judge, out) if judge and dist.get_rank() == 0 else 0


def judged(questions: list[mtbench.Question], file: Path, judge: mtbench.Judge, out: Path) -> int:
    """Have the answers in a file graded, and report. Returns 1 if scores are missing."""
    bare = [q for q in questions if q.category in mtbench.WITH_REFERENCE and not q.reference]
    if bare:
        say(f"note: {len(bare)} questions of {', '.join(mtbench.WITH_REFERENCE)} are graded "
            "without a reference answer: --reference gives them")  # fmt: skip
    scores = out / "mt-bench-scores.jsonl"
    scored, failure = mtbench.grade(questions, mtbench.read_answers(file), judge, scores)
    say(*(f"note: {note}" for note in sorted(judge.notes)), *score_table(questions, scored),
        f"graded by {judge.model}; {scores} keeps every judgement")  # fmt: skip
    if lacking := 2 * len(questions) - len(scored):
        hf.say_why(f"{lacking} scores are missing ({failure or 'replies without a grade'}); the "
                   "same command asks for them again")  # fmt: skip
    return int(lacking > 0)


def score_table(questions: list[mtbench.Question], scored: dict) -> list[str]:
    """Mean ± standard error by category and turn; a question's two turns are one sample."""
    rows = [["category", "turn 1", "turn 2", "both", "scored"]]
    for name in [*dict.fromkeys(q.category for q in questions), "all"]:
        ids, cells = [q.id for q in questions if name in (q.category, "all")], []
        for turns in ((0,), (1,), (0, 1)):
            groups = [[scored[i, t] for t in turns if (i, t) in scored] for i in ids]
            pairs = torch.tensor([(sum(g), len(g)) for g in groups if g], dtype=torch.float64)
            cells.append(plus_minus(*mean_se(*pairs.T), 2) if len(pairs) else "-")
        n = sum((i, t) in scored for i in ids for t in (0, 1))
        rows.append([name, *cells, f"{n} of {2 * len(ids)}"])
    return aligned(rows)


# Input and output

def out_directory(args: argparse.Namespace) -> Path:
    """--out, by default runs/eval-<name of the model or of its run>."""
    parts = [p for p in Path(args.model or args.answers or "").parts if p != "model"]
    return Path(args.out or f"runs/eval-{Path(parts[-1]).stem if parts else 'model'}")


def local_file(name: str) -> Path:
    """A file, or one of a hub dataset: owner/name/path/in/it. Raises ValueError."""
    owner, *rest = name.split("/", 2)
    if len(rest) < 2 or Path(owner).is_dir() or Path(name).exists():
        return Path(name)
    from hf.pretrained import snapshot

    problems, file = Problems(), Path()
    with problems.collecting(f"{name}: there is no such file; "):
        file = snapshot(f"{owner}/{rest[0]}", "dataset", [rest[1]]) / rest[1]
    problems.raise_if_any()
    if not file.exists():
        raise ValueError(f"{name}: there is no such file, nor one of that data set of the hub")
    return file


def say(*lines: str) -> None:
    """Print on rank 0."""
    if dist.get_rank() == 0:
        hf.say(*lines)


def plot_command(args: argparse.Namespace, _: None) -> int:
    """Draw runs into one picture."""
    from cli import report

    hf.say(report.plot(args.run, args.out))
    return 0


COMMANDS = {"loss": loss_command, "gsm8k": problems_command, "math": problems_command,
            "mt-bench": mtbench_command, "generate": generate_command,
            "plot": plot_command}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 a judge that failed, 2 bad input."""
    args = parse_evaluation(argv)
    command = COMMANDS[args.command]
    if command is plot_command:  # needs no ranks, and no room on a GPU that is in use
        return shard.command(partial(command, args), group=False)

    def work(device: torch.device) -> int:
        shard.check_same({spelt(name): value for name, value in vars(args).items()})
        return command(args, device)

    return shard.command(work)


if __name__ == "__main__":
    shard.exit_now(main())
