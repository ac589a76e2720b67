"""Datasets and their cache, the sampler, the built-in tasks."""

import json
import multiprocessing
import shutil
from collections import Counter

import numpy as np
import pytest
import torch

import data
from data import Batches, Dataset, eval_batches
from hf.templates import encode_conversations
from hf.tokenizer import byte_tokenizer
from sources.tasks import NOISE, TASKS, task
from tests.cases import example

TOKENIZER = byte_tokenizer()

ALPACA = {"instruction": "Say hi", "input": "", "output": "hi"}


# Datasets and the cache

def test_examples_are_the_encoded_conversations(write, load):
    conversations = [[("user", f"Say {i}"), ("assistant", "é" * i)] for i in range(1, 50)]
    path = write(*({"instruction": q, "output": a} for (_, q), (_, a) in conversations))
    dataset = load(path, "alpaca", max_length=200)
    for i, (ids, has_loss) in enumerate(
        encode_conversations(TOKENIZER, "alpaca", conversations[: len(dataset)], 200)
    ):
        tokens, labels = example(dataset, i)
        assert tokens.tolist() == ids
        assert labels.tolist() == [t if x else -100 for t, x in zip(ids, has_loss, strict=True)]
    in_memory = Dataset.from_records(conversations, TOKENIZER, "alpaca", 200)
    for name in ("tokens", "lengths", "hashes", "numbers"):
        assert np.array_equal(getattr(dataset, name), getattr(in_memory, name))


def test_unusable_records_are_counted_by_reason(write, load):
    dataset = load(write(
        ALPACA, ALPACA, {**ALPACA, "output": " \n"}, {**ALPACA, "instruction": "x" * 64},
        {**ALPACA, "instruction": "x" * 60},
    ))  # fmt: skip
    assert dataset.dropped == {"empty answer": 1, "no response token left after truncation": 1}
    assert dataset.numbers.tolist() == [1, 2, 5] and dataset.duplicates == 1
    assert example(dataset, 2)[1][-2:].tolist() == list(b"hi")  # cut before its end token
    ask, reply, bye = ({"role": role, "content": text} for role, text in (
        ("user", "Say hi"), ("assistant", "hi"), ("user", "bye")))  # fmt: skip
    empty = [], [bye], [ask, reply | {"content": None}], [ask, reply | {"weight": 0}]
    dataset = load(write(*({"messages": chat} for chat in ([ask, reply, bye], *empty))))
    assert len(dataset) == 1 and dataset.dropped["empty answer"] == 4
    assert bytes(example(dataset, 0)[0][1:-1].tolist()) == b"Say hi\nhi"
    with pytest.raises(ValueError, match="no records left: 1 dropped: empty answer"):
        load(write({"text": ""}))


def test_cache_is_built_once_and_mapped_again(write, load, monkeypatch):
    path = write(*[ALPACA] * 3)
    built = load(path)
    monkeypatch.setattr(data, "_build_entry", None)  # another build would fail
    again = load(path)
    assert isinstance(again.tokens, np.memmap)
    for name, value in vars(built).items():
        assert np.array_equal(getattr(again, name), value), name
    moved = write(*[ALPACA] * 3, name="other name")
    assert load(moved).path == str(moved)
    changed = write(*[ALPACA] * 4, name="changed")
    for change in ({"max_length": 65}, {"template": "alpaca"}, {"path": changed}):
        with pytest.raises(TypeError):
            load(**{"path": path} | change)


@pytest.mark.parametrize("pattern, damage", [
    ("*.bin", lambda content: bytes([*content[:-3], content[-3] ^ 4, *content[-2:]])),
    ("*.bin", lambda content: content[:-1]),
    ("*.bin", None),
    ("meta.json", lambda content: b""),
    ("meta.json", lambda content: b"[]"),
    ("meta.json", lambda content: content.replace(b'answer": 1', b'answer": 2')),
])
def test_damaged_cache_is_rebuilt_and_what_a_killed_build_left_is_cleared(
    pattern, damage, write, load, tmp_path
):
    path, cache = write(*[ALPACA] * 3, {**ALPACA, "output": ""}), tmp_path / "cache"
    whole = vars(load(path))
    entry, = cache.glob("*/")
    for file in sorted(entry.glob(pattern)):
        content = file.read_bytes()
        file.unlink()
        if damage:
            assert damage(content) != content
            file.write_bytes(damage(content))
        shutil.copytree(entry, entry.with_suffix(".tmp"))
        for name, value in vars(load(path)).items():
            assert np.array_equal(value, whole[name]), name
        assert file.read_bytes() == content
        assert list(cache.glob("*/")) == [entry]


@pytest.mark.parametrize("name, value", [
    ("tokens", 10**6), ("lengths", -5), ("lengths", 2**62), ("numbers", None),
])  # fmt: skip
def test_an_entry_that_training_would_trip_over_is_rebuilt(name, value, write, load, tmp_path):
    """Its checksums are right: the folder may be shared."""
    path = write(*[ALPACA] * 3)
    whole = vars(load(path))
    entry, = tmp_path.glob("cache/*/")
    file, meta = entry / f"{name}.bin", json.loads((entry / "meta.json").read_text())
    array = np.fromfile(file, data.ARRAYS[name])
    array[0] = value or 0
    file.unlink()  # it is mapped
    (array if value else array[1:]).tofile(file)
    meta["checks"] = data._checks(data._map_arrays(entry), meta["counts"])
    (entry / "meta.json").write_text(json.dumps(meta))
    for name, value in vars(load(path)).items():
        assert np.array_equal(value, whole[name]), name


def test_one_process_builds_and_the_others_wait(write, load, monkeypatch):
    path = write(*({"text": f"{i}"} for i in range(500)))
    context = multiprocessing.get_context("fork")
    builds, start, build = context.Queue(), context.Barrier(4), data._build_entry
    monkeypatch.setattr(data, "_build_entry", lambda *args: builds.put(1) or build(*args))

    def load_once():
        start.wait()
        assert len(load(path)) == 500

    workers = [context.Process(target=load_once) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert builds.get() and builds.empty()


def test_a_file_written_to_while_it_is_read_and_an_unwritable_cache_are_named(
    write, load, tmp_path, monkeypatch
):
    path, read = write(ALPACA), data.iter_records

    def and_write(*args):
        yield from read(*args)
        with open(path, "a") as file:
            file.write("more")

    monkeypatch.setattr(data, "iter_records", and_write)
    with pytest.raises(ValueError, match="was written to while it was read"):
        load(path)
    assert not list(tmp_path.glob("cache/*/"))
    with pytest.raises(ValueError, match="cannot write the cache"):
        load(path, cache=path)  # a file where the directory should be


# Batches

def source(n, letter="a", max_length=64):
    """n records of different lengths that can be told apart by their tokens."""
    records = [[("user", f"{letter}{i:03d}"), ("assistant", "x" * (1 + i * 7 % 13))]
               for i in range(n)]
    return Dataset.from_records(records, TOKENIZER, "plain", max_length)


def make(sizes=(7, 20, 11), val=9, batch=8, **options):
    arguments = {"val_batch_size": 4, "micro_batch_size": 3, "seed": 5} | options
    sources = [source(n, "abcdefghij"[i]) for i, n in enumerate(sizes)]
    return Batches(sources, source(val, "v") if val else None, batch, **arguments)


def rows(micro_batches):
    """The samples of micro-batches, each as its text."""
    return [
        TOKENIZER.decode(tokens.tolist()).replace("\0", "")
        for batch in micro_batches for tokens in batch.tokens
    ]


def real(parts):
    """The samples of all ranks without fillers, sorted. All ranks make the same forwards."""
    assert len({tuple(len(batch.group) for batch in part) for part in parts}) == 1
    whole = [batch for part in parts for batch in part]
    groups = torch.cat([batch.group for batch in whole])
    return sorted(row for row, group in zip(rows(whole), groups, strict=True) if group >= 0)


def plain(step):
    """A step as lists, to be compared."""
    train, val, counts = step
    return counts.tolist(), *(
        [(x.tokens.tolist(), x.labels.tolist(), x.group.tolist()) for x in part]
        for part in (train, val)
    )


@pytest.mark.parametrize("sizes, batch", [
    ((7, 20, 11), 6), ((7, 20, 11), 8), ((7, 20, 11), 10), ((5,) * 7, 3),
])
def test_batches_are_stratified_and_sources_take_turns(sizes, batch):
    S, batches, seen = len(sizes), make(sizes, batch=batch), []
    assert batches.steps_per_epoch == -(-sum(sizes) // batch)
    for t in range(5 * S):
        train, val, counts = batches.step(t)
        assert counts.sum() == batch + 4 and counts[S] == 4 and counts.dtype == torch.int64
        groups = torch.cat([micro.group for micro in train])
        assert torch.equal(torch.bincount(groups, minlength=S + 1)[:S], counts[:S])
        assert all((micro.group == S).all() for micro in val)
        assert ["abcdefg"[group] for group in groups] == [row[0] for row in rows(train)]
        seen.append(counts[:S])
    seen = torch.stack(seen)
    assert (seen.max(1).values - seen.min(1).values).max() <= 1
    for t in range(4 * S):
        assert (seen[t : t + S].sum(0) == batch).all()


def test_each_epoch_of_a_source_is_a_permutation():
    batches = make()
    seen = Counter(r for t in range(60) for part in batches.step(t)[:2] for r in rows(part))
    for letter, n in zip("abcv", (7, 20, 11, 9), strict=True):
        times = [count for row, count in seen.items() if row[0] == letter]
        assert len(times) == n and max(times) - min(times) <= 1
    one = make(sizes=(20,), val=None, batch=10)
    assert one.step(0)[1] == [] and one.step(0)[2].tolist() == [10, 0]
    halves = [set(rows(one.step(t)[0])) for t in range(6)]
    assert all(len(halves[t] | halves[t + 1]) == 20 for t in (0, 2, 4))
    assert halves[0] != halves[2] != halves[4]


def test_step_is_a_pure_function():
    forward, backward, other = make(), make(), make(seed=6)
    steps = [plain(forward.step(t)) for t in range(12)]
    assert [plain(backward.step(t)) for t in reversed(range(12))] == steps[::-1]
    assert [plain(other.step(t)) for t in range(12)] != steps
    ahead = [(t, plain(made)) for t, made in data.prefetch(make(), range(3, 9))]
    assert ahead == list(enumerate(steps))[3:9]
    assert list(data.prefetch(make(), range(9, 9))) == []


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 3, 100])
def test_global_batch_does_not_depend_on_ranks_or_micro_batches(world, micro):
    ranks = [make(rank=r, world=world, micro_batch_size=micro) for r in range(world)]
    for t in range(5):
        whole, parts = make().step(t), [batches.step(t) for batches in ranks]
        for which in (0, 1):
            assert real([part[which] for part in parts]) == sorted(rows(whole[which]))
            assert max(len(b.group) for part in parts for b in part[which]) <= micro
        assert all(torch.equal(part[2], whole[2]) for part in parts)


def test_ranks_share_the_micro_batches_of_one_evenly():
    records = [[("user", "q"), ("assistant", "x" * int(1.17**i))] for i in range(32)]
    dataset = Dataset.from_records(records, TOKENIZER, "plain", 256)

    def widths(rank, world):
        train, val, _ = Batches([dataset], dataset, 32, 32, 8, 0, rank, world).step(0)
        return [[batch.tokens.shape[1] for batch in part] for part in (train, val)]

    one, ranks = widths(0, 1), [widths(rank, 2) for rank in range(2)]
    for part in range(2):
        assert sorted(ranks[0][part] + ranks[1][part]) == sorted(one[part])
    # Which rank has more of training has less of validation: w's pass, of both, is even.
    assert sum(ranks[0][0]) > sum(ranks[1][0])
    assert sum(map(sum, ranks[0])) == sum(map(sum, ranks[1]))


def test_micro_batches_are_padded_to_a_multiple_within_max_length():
    for batch in make(pad_to=8).step(0)[0]:
        longest = int((batch.tokens != 0).sum(1).max())
        assert batch.tokens.shape[1] == -(-longest // 8) * 8
        assert batch.tokens.dtype == batch.labels.dtype == batch.group.dtype == torch.int64
        assert (batch.labels[batch.tokens == 0] == -100).all()
        assert batch.n_tokens == (batch.tokens != 0).sum()
        kept = batch.labels != -100
        assert torch.equal(batch.labels[kept], batch.tokens[kept]) and kept.any(1).all()
        assert batch.to("cpu") is batch
    short = Batches([source(5, max_length=13)], None, 4, 4, 4, seed=0, pad_to=8)
    assert short.step(0)[0][0].tokens.shape[1] == 13


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 2, 10, 12])
def test_evaluation_sees_each_sample_once(n, world):
    dataset = source(n)
    parts = [list(eval_batches(dataset, 2, rank, world)) for rank in range(world)]
    every = [TOKENIZER.decode(example(dataset, i)[0].tolist()) for i in range(n)]
    assert real(parts) == sorted(every)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_each_sample_of_a_mixture_comes_once_an_epoch_whatever_the_number_of_ranks(world):
    sources, epochs = [source(17, "a"), source(9, "b")], []
    ranks = [data.MixtureBatches(sources, 6, 2, 5, rank, world) for rank in range(world)]
    one = data.MixtureBatches(sources, 6, 6, 5)
    assert one.steps_per_epoch == 5
    for t in range(10):
        trains, vals, counts = zip(*(batches.step(t) for batches in ranks), strict=True)
        samples, (whole, _, expected) = real(trains), one.step(t)
        assert samples == sorted(rows(whole)) and not any(vals)
        assert all(torch.equal(each, expected) for each in counts)
        names = [row[0] for row in samples]
        assert expected.tolist() == [names.count("a"), names.count("b"), 0]
        assert len(samples) == (6 if t % 5 < 4 else 2)
        epochs += [[]] if t % 5 == 0 else []
        epochs[-1] += samples
    assert all(len(set(epoch)) == len(epoch) == 26 for epoch in epochs) and epochs[0] != epochs[1]


# Tasks

@pytest.mark.parametrize("name", TASKS)
def test_tasks_are_deterministic_short_and_held_out(name):
    with pytest.raises(ValueError, match="'x': expected one of .*" + name):
        task("x", 0)
    sources, val, test = made = task(name, 3)
    assert made == task(name, 3) and val != task(name, 4)[1]
    parts = {**sources, "val": val, "test": test}
    records = {key: {tuple(turns) for turns in part} for key, part in parts.items()}
    for key, part in parts.items():
        assert len(records[key]) == len(part)  # no duplicates
        sizes = [[len(text) for _, text in turns] for turns in part]
        assert min(map(min, sizes)) > 0 and max(map(sum, sizes)) + 3 <= 36  # with BOS, EOS, "\n"
        for held in {"val", "test"} - {key}:
            assert not records[key] & records[held]


def test_denoising_shuffles_answers_between_the_same_questions():
    sources, val, _ = task("denoising", 0)
    questions = {name: [q for q, _ in records] for name, records in sources.items()}
    answers = {name: sorted(a for _, a in records) for name, records in sources.items()}
    assert questions["shuffled"] == questions["clean"] and answers["shuffled"] == answers["clean"]
    right = sum(a == b for a, b in zip(sources["shuffled"], sources["clean"], strict=True))
    assert right < 0.1 * len(sources["clean"])
    assert not set(questions["junk"]) & {*questions["clean"], *(q for q, _ in val)}


def test_graded_swaps_the_stated_share_of_answers():
    sources, _, _ = task("graded", 0)
    answers = dict(map(tuple, sources["clean"]))
    assert list(sources) == list(NOISE) and len({*map(len, sources.values())}) == 1
    for name, rate in NOISE.items():
        known = [(q, a) for q, a in sources[name] if q in answers]
        wrong = sum(answers[q] != a for q, a in known) / len(known)
        # Answers are swapped among 24 values of uneven frequency: some are right by chance.
        assert wrong == pytest.approx(rate, abs=0.1)


def test_instruction_answers_the_same_questions_well_and_poorly():
    sources, val, _ = task("instruction", 0)
    good, poor = (dict(map(tuple, sources[name])) for name in ("good", "poor"))
    assert good.keys() < poor.keys() and len(poor) == 3 * len(good)
    right = sum(poor[q][1] == f"hm, {a[1]}" for q, a in good.items()) / len(good)
    assert right == pytest.approx(0.5, abs=0.06)
    assert not any(answer[1].startswith("hm") for _, answer in val)
