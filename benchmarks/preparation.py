"""What comes before the steps, against well-known parts: start-up, and tokenising.

    python benchmark.py tokenize [--quick] [--texts FILE --tokenizer DIRECTORY]

Start-up is a part of `python benchmark.py speed`: from the end of imports to the first step, with
GPT-2 124M and the same tokenised records on the disk. Its reference maps two `transformers` models
and makes their optimisers.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

import data
from benchmarks.speed import SHAPES, ratios, spread, start
from data import cache_dir
from hf import templates, tokenizer
from model import ModelConfig, build, random_weights, save_pretrained
from sources import tasks
from sources.records import read_records

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
    """GPT-2 124M and the same tokenised records from the disk, by turns."""
    results = {"ours": [], "reference": []}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        files = write_files(folder, "quick" if quick else "gpt2", 100 if quick else 9000)
        flags = f"--model {folder / 'model'} --train a={files[0]} b={files[1]} --val {files[2]}"
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        save_samples(files, folder)  # which fills our cache, too
        reference = [str(folder / "model"), str(folder / "samples.pt")]
        for n in range(repeats):
            line = [*flags.split(), "--out", str(folder / f"run{n}")]
            for name, code, words in (
                ("ours", OURS_STARTS, line), ("reference", REFERENCE_STARTS, reference)
            ):  # fmt: skip
                results[name].append(start([sys.executable, "-c", code, *words], threads=2))
    took = {name: [second for _, second in pairs] for name, pairs in results.items()}
    imports = {name: median(first for first, _ in pairs) for name, pairs in results.items()}
    print("\nstart-up               ours  reference  ratio")
    print(f"imports             {imports['ours']:6.2f}s{imports['reference']:10.2f}s")
    print(f"then to first step  {median(took['ours']):6.2f}s{median(took['reference']):10.2f}s  "
          f"{spread(ratios(took['ours'], took['reference']))} (goal 0.5, and 3 s)")  # fmt: skip
    return results


def write_files(folder: Path, shape: str, n: int) -> list[Path]:
    """A checkpoint with a tokenizer, two sources of n records and validation. Returns their paths.
    """
    config = ModelConfig.from_hf(SHAPES[shape])
    model = build(config, random_weights(config, 0))
    save_pretrained(model, folder / "model")
    texts = random_texts(3 * n)
    train_tokenizer(texts[:1000], folder / "model")
    paths = []
    for i, name in enumerate(("train_a", "train_b", "val")):
        records = [{"instruction": t[:80], "output": t[80:]} for t in texts[i * n : (i + 1) * n]]
        paths.append(folder / f"{name}.json")
        paths[-1].write_text(json.dumps(records))
    return paths


def save_samples(files: list[Path], folder: Path) -> None:
    """The reference's cache: all tokens, their labels, and the samples' lengths."""
    tok = tokenizer.load_tokenizer(folder / "model")
    sets = [data.load_dataset(file, tok, "alpaca", 512, cache_dir()) for file in files]
    examples = [dataset.example(i) for dataset in sets for i in range(len(dataset))]
    tokens, labels = (torch.from_numpy(np.concatenate(x)) for x in zip(*examples, strict=True))
    lengths = [len(ids) for ids, _ in examples]
    torch.save((tokens, labels, lengths), folder / "samples.pt")


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


def tokenize(file: str | None, tokenizer_dir: str | None, quick: bool) -> dict:
    """Records to tokens with loss masks, and texts to tokens, against `tokenizers` on the texts."""
    import tokenizers

    with tempfile.TemporaryDirectory() as folder:
        if file:
            records = [turns for *_, turns in read_records(file)]
            directory = Path(tokenizer_dir)
        else:
            directory, texts = Path(folder), random_texts(500 if quick else 20_000)
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
