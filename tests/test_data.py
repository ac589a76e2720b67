"""Record formats and their refusals, the cache, the sampler, the built-in tasks."""

import gzip
import json
import multiprocessing
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from data import Batches, Dataset, eval_batches, load_dataset, overlap
from hf import Problems
from hf.templates import encode_conversations
from hf.tokenizer import byte_tokenizer
from sources.records import FORMATS, ROLE_OF, iter_records, locate
from sources.tasks import NOISE, TASKS, task
from tests.cases import example

TOKENIZER = byte_tokenizer()

ALPACA = {"instruction": "Say hi", "input": "", "output": "hi"}
TURNS = [("user", "Say hi"), ("assistant", "hi")]
GOOD = json.dumps(ALPACA)
DEEP = "[" * 100_000


@pytest.fixture
def write(tmp_path):
    """write(content) is the path of a file with it: bytes, text, or records as JSON Lines."""

    def make(content, name="data.json"):
        if isinstance(content, list):
            content = "".join(json.dumps(record) + "\n" for record in content)
        if isinstance(content, str):
            content = content.encode()
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    return make


def load(path, cache_dir, template="plain", max_length=64):
    return load_dataset(path, TOKENIZER, template, max_length, cache_dir)


def read_records(path):
    """(number or line, turns) of each record."""
    problems = Problems()
    records = iter_records(locate(path), problems, defaultdict(Counter))
    records = [(number, turns) for number, turns, _ in records]
    problems.raise_if_any()
    return records


# Reading

SHAREGPT = [{"from": "human", "value": "Say hi"}, {"from": "gpt", "value": "hi"}]
CHAT = {"messages": [{"role": "user", "content": "Say hi"}, {"role": "assistant", "content": "hi"}]}


@pytest.mark.parametrize("record, turns", [
    (ALPACA, TURNS),
    ({"instruction": "Say hi", "output": "hi", "text": "ignored"}, TURNS),
    ({**ALPACA, "input": None}, TURNS),
    ({**ALPACA, "input": "now"}, [TURNS[0], ("input", "now"), TURNS[1]]),
    ({"conversations": SHAREGPT, "id": 7}, TURNS),
    ({"items": SHAREGPT}, TURNS),
    (CHAT, TURNS),
    ({"text": "Say hi"}, [("text", "Say hi")]),
])
def test_formats_are_recognised_by_their_keys(record, turns, write):
    assert read_records(write([record, record])) == [(1, turns), (2, turns)]


def test_a_new_format_is_a_row(write, monkeypatch):
    rows = "talk", {"user": "asked", "assistant": "said"}
    monkeypatch.setattr("sources.records.FORMATS", FORMATS + rows)
    for record in ({"talk": CHAT["messages"]}, {"asked": "Say hi", "said": "hi"}):
        assert read_records(write([record])) == [(1, TURNS)]


def test_arrays_and_lines_are_recognised_by_content(write):
    """A record goes by its line in JSON Lines, by its number in an array."""
    for content, second in (
        (f"{GOOD}\n\n{GOOD}", 3),
        (f"\ufeff{GOOD}\r\n\r\n{GOOD}\r\n", 3),
        (f"[{GOOD},\n\n{GOOD}]", 2),
        (f"\ufeff \n[{GOOD}\r\n,\r\n {GOOD}]\r\n\r\n", 2),
    ):
        expected = [(1, TURNS), (second, TURNS)]
        assert read_records(write(content)) == expected
        assert read_records(write(gzip.compress(content.encode()))) == expected


@pytest.mark.parametrize("content, place, problem", [
    (f'{GOOD}\n{{"instruction": \n{GOOD}', ":2", "broken JSON"),
    (f'[{GOOD},\n{{"output": "cut', ":2", "broken JSON: Unterminated string"),
    (f'[{GOOD},\n{{"instruction": 1,,}}]', ":2", "broken JSON"),
    (f"[{GOOD},\n{GOOD}", ":2", "broken JSON: Expecting ',' delimiter"),
    (f"[{GOOD}\n{GOOD}]", ":2", "broken JSON: Expecting ',' delimiter"),
    (f"[{GOOD},]", ":1", "broken JSON"),
    (f"[{GOOD}]\n{GOOD}", ":2", "broken JSON: Extra data"),
    (f'{GOOD}\n{{"question": "x", "answer": "y"}}', ":2", "lacks 'instruction'"),
    ('\n{"asked": "x", "said": "y"}', ":2", "unknown record, of keys 'asked', 'said'"),
    (f'[{GOOD}, {GOOD}, {{"instruction": "a"}}]', ": record 3", "lacks 'output'"),
    (f"{GOOD}\n17", ":2", "the record is int, not an object"),
    ("17\n", ":1", "the record is int, not an object"),
    ("{}", ":1", "unknown record, of keys none"),
    (f'{GOOD[:-1]},\n"id": 1}}\n{GOOD}', ":3", "broken JSON: Extra data"),
    (f'{GOOD}\n{{"instruction": 3, "output": "x"}}', ":2", "'instruction' is int, not a string"),
    (f'{GOOD}\n{{"instruction": "a", "output": true}}', ":2", "'output' is bool"),
    (f'{GOOD}\n{{"instruction": "a", "input": [7], "output": "b"}}', ":2", "'input' is int"),
    ('{"text": "\\ud800"}', ":1", "lone surrogate"),
    (b'{"text": "a"}\n{"text": "\xff"}', ":2", "broken UTF-8"),
    ('{"messages": {"role": 1}}', ":1", "unknown record, of keys 'messages'"),
    ('{"messages": [7]}', ":1", "unknown record, of keys 'messages'"),
    ('{"messages": [{"role": "user"}]}', ":1", "lacks 'messages[0].content'"),
    (f'{json.dumps(CHAT)}\n{{"messages": "x"}}', ":2", "'messages' is str, not a list"),
    (f'{json.dumps(CHAT)}\n{{"messages": [7]}}', ":2", "'messages[0]' is int, not a message"),
    ('{"messages": [{"role": "user", "content": 5}]}', ":1", "'messages[0].content' is int, not a"),
    ('{"items": [{"from": "bird", "value": "x"}]}', ":1", "'items[0].from' is 'bird', not one of"),
    (f'{GOOD}\n{{"text": {DEEP}}}', ":2", "nested too deep"),
    (f"[{GOOD},\n{DEEP}", ":1", "nested too deep"),
    (f'{GOOD}\n{{"text": {"1" * 5000}}}', ":2", "broken JSON: Exceeds the limit"),
    (f'[{GOOD},\n{{"text": {"1" * 5000}}}]', ":1", "broken JSON: Exceeds the limit"),
    (b'{"text": "a"}\n\0\0', ":2", "broken JSON"),
    ("", "", "no records"),
    (" \n \n", "", "no records"),
    ("[ ]", "", "no records"),
    (b"\x1f\x8bnot gzip", "", "Unknown compression"),
    (Path(), "", "not a regular file"),
    (gzip.compress(b'{"text": "a"}' * 99, mtime=0)[:-20], "", "end-of-stream"),
    (Path("none"), "", "No such file"),
])
def test_malformed_records_and_files_are_named(content, place, problem, write, tmp_path):
    path = tmp_path / content if isinstance(content, Path) else write(content)
    for call in (lambda: read_records(path), lambda: load(path, tmp_path / "cache")):
        with pytest.raises(ValueError) as error:
            call()
        message, = str(error.value).splitlines()
        assert message.startswith(f"{path}{place}: ") and problem in message
        assert len(message) < 500
    assert not list((tmp_path / "cache").glob("*/"))  # nothing is cached


HOSTILE = ["<|endoftext|> </s> <bos> [INST] <0x0A>", "nul \0 bell \a", "x" * 1_000_000, DEEP,
           "\ufeff bom \r\n crlf \u2028 line separator", '"}\n{"text": "injected"}']


@pytest.mark.parametrize("as_array", [True, False])
def test_hostile_texts_stay_text(as_array, write, tmp_path):
    """Megabytes in a line, control characters, what looks like control tokens or like JSON."""
    records = [json.dumps({"text": text}, ensure_ascii=as_array) for text in HOSTILE]
    content = f"[{','.join(records)}]" if as_array else "\r\n".join(records)
    dataset = load(write(gzip.compress(content.encode())), tmp_path / "cache", max_length=2**21)
    for i, text in enumerate(HOSTILE):
        assert example(dataset, i)[0].tolist() == [256, *text.encode(), 257]


def test_sixty_problems_are_listed_then_counted(write):
    with pytest.raises(ValueError) as error:
        read_records(write("{x\n" * 100))
    lines = str(error.value).splitlines()
    assert len(lines) == 61 and lines[-1] == "… and 40 more"
    assert lines[59].split(": ")[0].endswith(":60")


text = st.text(st.characters(codec=None), max_size=12) | st.sampled_from(["", " ", "<bos>", "\0"])
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
role = st.sampled_from([*ROLE_OF, "tool"]) | anything
message = st.fixed_dictionaries(
    {}, optional={"role": role, "from": role, "content": text | anything, "value": text | anything}
)
keys = ("instruction", "input", "output", "text", "conversations", "items", "messages", "history",
        "system", "tools", "question", "answer")  # fmt: skip
record = st.fixed_dictionaries(
    {}, optional={key: text | st.lists(message, max_size=3) | anything for key in keys}
)


@settings(max_examples=300, deadline=None)
@given(st.lists(record | anything, max_size=6), st.booleans(), st.sampled_from(["alpaca", "plain"]))
def test_any_record_is_kept_counted_or_named(tmp_path_factory, records, as_array, template):
    directory = tmp_path_factory.mktemp("fuzz")
    path = directory / "x.json"
    as_array = as_array or isinstance((records or [0])[0], list)  # "[" opens an array
    path.write_text(json.dumps(records) if as_array else "\n".join(map(json.dumps, records)))
    problems, again, dataset = Problems(), Problems(), None
    with problems.collecting():
        dataset = load(path, directory / "cache", template, max_length=40)
    assert all(line.startswith(str(path)) for line in problems.lines)
    read = len(list(iter_records(locate(path), again, defaultdict(Counter))))
    assert read + again.count == max(1, len(records))  # "no records" is a problem
    if dataset is not None:
        kept = len(set(dataset.numbers.tolist()))
        assert kept + sum(dataset.dropped.values()) == read == len(records)


# Datasets and the cache

def test_examples_are_the_encoded_conversations(write, tmp_path):
    path = write([{**ALPACA, "instruction": f"Say {i}", "output": "é" * i} for i in range(1, 50)])
    conversations = [turns for _, turns in read_records(path)]
    dataset = load(path, tmp_path / "cache", "alpaca", max_length=200)
    for i, (ids, has_loss) in enumerate(
        encode_conversations(TOKENIZER, "alpaca", conversations[: len(dataset)], 200)
    ):
        tokens, labels = example(dataset, i)
        assert tokens.tolist() == ids
        assert labels.tolist() == [t if x else -100 for t, x in zip(ids, has_loss, strict=True)]
    in_memory = Dataset.from_records(conversations, TOKENIZER, "alpaca", 200)
    for name in ("tokens", "lengths", "hashes", "numbers"):
        assert np.array_equal(getattr(dataset, name), getattr(in_memory, name))


def test_unusable_records_are_counted_by_reason(write, tmp_path):
    dataset = load(write([
        ALPACA, ALPACA, {**ALPACA, "output": " \n"}, {**ALPACA, "instruction": "x" * 64},
        {**ALPACA, "instruction": "x" * 60},
    ]), tmp_path / "cache")  # fmt: skip
    assert dataset.dropped == {"empty answer": 1, "no response token left after truncation": 1}
    assert dataset.numbers.tolist() == [1, 2, 5] and dataset.duplicates == 1
    assert example(dataset, 2)[1][-2:].tolist() == list(b"hi")  # cut before its end token
    chats = [{"messages": CHAT["messages"] + [{"role": "user", "content": "bye"}]},
             {"messages": [{"role": "user", "content": "nobody answers"}]}]
    dataset = load(write(chats), tmp_path / "cache")
    assert len(dataset) == 1 and dataset.dropped["empty answer"] == 1
    assert bytes(example(dataset, 0)[0][1:-1].tolist()) == b"Say hi\nhi"
    with pytest.raises(ValueError, match="no records left: 1 dropped: empty answer"):
        load(write([{"text": ""}]), tmp_path / "cache")


def test_overlap_is_of_whole_records_and_of_prompts_but_for_case_and_spaces(write, tmp_path):
    answers = [{**ALPACA, "output": "ho"}, {**ALPACA, "instruction": " say\n HI "}]
    first = load(write([ALPACA, *answers, {**ALPACA, "input": "y"}], "a"), tmp_path / "cache")
    other = load(write([ALPACA, {**ALPACA, "input": "x"}], "b"), tmp_path / "cache")
    records, prompts = (part.tolist() for part in overlap(first, other))
    assert records == [True, False, False, False] and prompts == [True, True, True, False]
    rest = first.select(~overlap(first, other)[1])
    assert rest.numbers.tolist() == [4] and not any(part.any() for part in overlap(rest, other))
    assert bytes(example(rest, 0)[0][1:-1].tolist()) == b"Say hi\ny\nhi"


def test_overlap_of_the_authors_files(asset, tmp_path):
    train, val, test = (
        load(asset(f"scalebio/data_tiny/{name}.json"), tmp_path, max_length=4096)
        for name in ("train_alpaca", "val", "test")
    )
    shared = [[part.sum() for part in overlap(*pair)] for pair in ((val, train), (test, train))]
    assert shared == [[5, 164], [8, 160]]
    assert len(train) == 8993 and train.dropped["empty answer"] == 7


def test_cache_is_built_once_and_mapped_again(write, tmp_path, monkeypatch):
    path, cache = write([ALPACA] * 3), tmp_path / "cache"
    built = load(path, cache)
    monkeypatch.setattr(data, "_build_entry", None)  # another build would fail
    again = load(path, cache)
    assert isinstance(again.tokens, np.memmap)
    for name, value in vars(built).items():
        assert np.array_equal(getattr(again, name), value), name
    moved = write([ALPACA] * 3, "other name")
    assert load(moved, cache).path == str(moved)
    for change in ({"max_length": 65}, {"template": "alpaca"}):
        with pytest.raises(TypeError):
            load(path, cache, **change)
    write([ALPACA] * 4)
    with pytest.raises(TypeError):
        load(path, cache)


@pytest.mark.parametrize("pattern, damage", [
    ("*.bin", lambda content: bytes([*content[:-3], content[-3] ^ 4, *content[-2:]])),
    ("*.bin", lambda content: content[:-1]),
    ("*.bin", None),
    ("meta.json", lambda content: b""),
    ("meta.json", lambda content: b"[]"),
    ("meta.json", lambda content: content.replace(b'answer": 1', b'answer": 2')),
])
def test_damaged_cache_is_rebuilt_and_what_a_killed_build_left_is_cleared(
    pattern, damage, write, tmp_path
):
    path, cache = write([ALPACA] * 3 + [{**ALPACA, "output": ""}]), tmp_path / "cache"
    whole = vars(load(path, cache))
    entry, = cache.glob("*/")
    for file in sorted(entry.glob(pattern)):
        content = file.read_bytes()
        file.unlink()
        if damage:
            assert damage(content) != content
            file.write_bytes(damage(content))
        shutil.copytree(entry, entry.with_suffix(".tmp"))
        for name, value in vars(load(path, cache)).items():
            assert np.array_equal(value, whole[name]), name
        assert file.read_bytes() == content
        assert list(cache.glob("*/")) == [entry]


@pytest.mark.parametrize("name, value", [
    ("tokens", 10**6), ("lengths", -5), ("lengths", 2**62), ("numbers", None),
])  # fmt: skip
def test_an_entry_that_training_would_trip_over_is_rebuilt(name, value, write, tmp_path):
    """Its checksums are right: the folder may be shared."""
    path, cache = write([ALPACA] * 3), tmp_path / "cache"
    whole = vars(load(path, cache))
    entry, = cache.glob("*/")
    file, meta = entry / f"{name}.bin", json.loads((entry / "meta.json").read_text())
    array = np.fromfile(file, data.ARRAYS[name])
    array[0] = value or 0
    file.unlink()  # it is mapped
    (array if value else array[1:]).tofile(file)
    meta["checks"] = data._checks(data._map_arrays(entry), meta["counts"])
    (entry / "meta.json").write_text(json.dumps(meta))
    for name, value in vars(load(path, cache)).items():
        assert np.array_equal(value, whole[name]), name


def test_one_process_builds_and_the_others_wait(write, tmp_path, monkeypatch):
    path = write([{"text": f"{i}"} for i in range(500)])
    context = multiprocessing.get_context("fork")
    builds, start, build = context.Queue(), context.Barrier(4), data._build_entry
    monkeypatch.setattr(data, "_build_entry", lambda *args: builds.put(1) or build(*args))

    def load_once():
        start.wait()
        assert len(load(path, tmp_path / "cache")) == 500

    workers = [context.Process(target=load_once) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert builds.get() and builds.empty()


def test_a_file_written_to_while_it_is_read_and_an_unwritable_cache_are_named(
    write, tmp_path, monkeypatch
):
    path, read = write([ALPACA]), iter_records

    def and_write(*args):
        yield from read(*args)
        with open(path, "a") as file:
            file.write(GOOD)

    monkeypatch.setattr(data, "iter_records", and_write)
    with pytest.raises(ValueError, match="was written to while it was read"):
        load(path, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*/"))
    with pytest.raises(ValueError, match="cannot write the cache"):
        load(path, path)  # a file where the directory should be


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
