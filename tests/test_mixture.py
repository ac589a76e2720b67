"""From weights to a mixture: what --weights may say, and what is drawn."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import data
import train
from cli import inputs, report
from cli.flags import as_json, parse
from sources.records import write_records

NAMES = ["a", "b", "c"]


def dataset(n: int, word: str = "x") -> data.Dataset:
    records = [[("text", f"{word} {i} {'y' * (i % 7)}")] for i in range(n)]
    return data.Dataset.from_records(records, data.byte_tokenizer(), "plain", 64)


def test_what_weights_may_be(tmp_path):
    assert inputs.parse_source_weights("uniform", NAMES) == dict.fromkeys(NAMES, 1 / 3)
    assert inputs.parse_source_weights("proportional", NAMES) is None
    assert inputs.parse_source_weights("c=3,a=1", NAMES) == {"a": 0.25, "b": 0.0, "c": 0.75}
    names = [f"a_source_with_a_long_name_{i}" for i in range(20)]  # as a path, it would be too long
    stated = inputs.parse_source_weights(",".join(f"{name}=1" for name in names), names)
    assert stated == dict.fromkeys(names, 1 / 20)
    file = tmp_path / "lr=3.json"  # a path may hold a "="
    file.write_text(json.dumps({"weights": {"c": 0.5, "b": 0.25, "a": 0.25}, "step": 9}))
    assert inputs.parse_source_weights(str(file), NAMES) == {"a": 0.25, "b": 0.25, "c": 0.5}


OTHERS = "but to train on are ['a', 'b', 'c']"


@pytest.mark.parametrize("spec, expected", [
    ("a=1,b=-0.5", ["the weight of b is -0.5: permitted is a number of at least 0"]),
    ("a=1,b=x,,d=1", [OTHERS, "the weight of b is x", "the weight of  is "]),
    ("a=1,a=2", ["named twice"]),
    ("a=0,b=0", ["all weights are 0"]),
    ("uniformly", [f"No such file or directory); permitted is {inputs.WEIGHTS}"]),
    ('{"weights": {"a": 0.5, "b": 0.2, "d": 0.3}}', [OTHERS]),
    ('{"weights": {"a": true, "b": null, "c": "0.5"}}',
     ["the weight of a is True", "the weight of b is None", "the weight of c is 0.5"]),
    ('{"weights": {"a": 1.5, "b": 1e308, "c": -0.5}}',
     ["the weight of b is 1e+308", "the weight of c is -0.5"]),
    ('{"weights": {"a": 1.5, "b": NaN, "c": -0.5}}', ["NaN is not a finite number"]),
    ("a=nan,b=1e400", ["the weight of a is nan", "the weight of b is inf"]),
    ('{"weights": {}}', [OTHERS]),
    ('{"weights": [1, 2]}', ["not the weights.json of a run"]),
    ("[1, 2]", ["not a JSON object"]),
    ("{", ["cannot be read"]),
    ("", ["cannot be read"]),
])  # fmt: skip
def test_weights_that_are_refused(tmp_path, monkeypatch, spec, expected):
    monkeypatch.chdir(tmp_path)
    if spec[:1] in ("[", "{", ""):
        Path("weights.json").write_text(spec)
        spec = "weights.json"
    with pytest.raises(ValueError) as refusal:
        inputs.parse_source_weights(spec, NAMES)
    for line, said in zip(str(refusal.value).splitlines(), expected, strict=True):
        assert line.startswith(f"--weights {spec}: ") and said in line


def test_apportion_by_largest_remainder():
    assert data.apportion({"a": 0.5, "b": 0.3, "c": 0.2}, 11) == {"a": 6, "b": 3, "c": 2}
    thirds = data.apportion(dict.fromkeys(NAMES, 1 / 3), 10_000)
    assert sorted(thirds.values()) == [3333, 3333, 3334]


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 50)), min_size=1, max_size=6),
       st.integers(1, 200))  # fmt: skip
def test_counts(sources, samples):
    """No source gives more than it has or, without weight, anything; nothing is left that could
    have been had; what is not short keeps its proportions."""
    weights = {str(i): p for i, (p, _) in enumerate(sources)}
    sizes = {str(i): n for i, (_, n) in enumerate(sources)}
    if sum(weights.values()) < 1e-3:
        weights["0"] = 1.0
    parts, notes = data.count_samples(weights, sizes, samples)
    assert list(parts) == list(weights)
    assert all(0 <= parts[name] <= sizes[name] * (weights[name] > 0) for name in parts)
    assert sum(parts.values()) == min(samples, sum(sizes[n] for n in parts if weights[n] > 0))
    wanted = data.apportion(weights, samples)
    assert bool(notes) == any(wanted[name] > sizes[name] for name in parts)
    open_ones = [name for name in parts if parts[name] < sizes[name]]
    for a in open_ones:
        for b in open_ones:
            share = weights[a] * parts[b] - weights[b] * parts[a]
            assert abs(share) <= weights[a] + weights[b]  # within one sample of each
    assert sum(data.count_samples(weights, sizes, samples, repeat=True)[0].values()) == samples


def test_a_short_source_is_named_and_the_rest_is_spread():
    weights, sizes = {"a": 0.8, "b": 0.15, "c": 0.05}, {"a": 10, "b": 100, "c": 100}
    parts, (note, other) = data.count_samples(weights, sizes, 50)
    assert parts == {"a": 10, "b": 30, "c": 10}
    assert other == ("so the shares are a 0.20, b 0.60, c 0.20, not as the weights say: "
                     "--samples 12 would keep to them")  # fmt: skip
    assert data.count_samples(weights, sizes, 12) == ({"a": 10, "b": 2, "c": 0}, [])
    assert note.startswith("a is short: 40 samples by its weight, but it has 10;")
    assert "the mixture has 50 in all" in note
    parts, (note,) = data.count_samples({"a": 1, "b": 0, "c": 0}, sizes, 50)
    assert parts == {"a": 10, "b": 0, "c": 0} and "the mixture has 10 in all" in note


def test_a_draw_is_without_replacement_and_depends_on_its_own_source_alone():
    sources = {"a": dataset(40), "b": dataset(30, "b"), "c": dataset(5, "c")}
    weights = {"a": 0.5, "b": 0.5, "c": 0.0}
    drawn, notes = data.draw_samples(sources, weights, 40, seed=3)
    assert list(drawn) == ["a", "b"] and not notes
    for name, source in drawn.items():
        assert len(set(source.numbers.tolist())) == len(source) == 20
        for i, number in enumerate(source.numbers):  # the records go with their numbers
            assert np.array_equal(source.stored(i), sources[name].stored(number - 1))
    again = data.draw_samples(dict(reversed(sources.items())), weights, 40, seed=3)[0]
    other = data.draw_samples(sources, weights, 40, seed=4)[0]
    assert again["a"].numbers.tolist() == drawn["a"].numbers.tolist()
    assert other["a"].numbers.tolist() != drawn["a"].numbers.tolist()

    repeated = data.draw_samples(sources, {"a": 0, "b": 0, "c": 1}, 13, repeat=True)[0]["c"]
    assert sorted(Counter(repeated.numbers.tolist()).values()) == [2, 2, 3, 3, 3]
    samples = [json.loads(line) for line in report.mixture_jsonl(drawn)]
    assert samples[0] == {"source": "a", "record": drawn["a"].numbers[0]}
    assert [sample["source"] for sample in samples] == ["a"] * 20 + ["b"] * 20


# --mode draw, --per-source, --also, and how other tools are told of a mixture

def qa(word: str, n: int) -> list[dict]:
    return [{"question": f"{word} {i}?", "answer": f"{i}", "id": i} for i in range(n)]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with a.json (40 records), b.jsonl (30 of Alpaca's), few.json (3) and val.json."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    content = {"a": qa("a", 40), "few": qa("few", 3), "val": [*qa("val", 4), qa("a", 1)[0]]}
    for name, records in content.items():
        Path(f"{name}.json").write_text(json.dumps(records))
    rows = [{"instruction": f"b {i}", "input": "z", "output": f"{i}"} for i in range(30)]
    Path("b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return content | {"b": rows}


DRAW = "--mode draw --train a=a.json b=b.jsonl --out mix --seed 3".split()


def lines_of(file: str) -> list[dict]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def test_draw_writes_the_records_themselves_and_trains_nothing(files, capsys):
    argv = [*DRAW, "--weights", "a=3,b=1", "--samples", "16", "--also", "val=val.json"]
    assert train.main(argv) == 0
    said = capsys.readouterr().out
    assert "mixture: a 12, b 4, val 5" in said and "keys that are not read: id (40 records)" in said
    where, records = lines_of("mix/mixture.jsonl"), lines_of("mix/records.jsonl")
    assert [row["source"] for row in where] == ["a"] * 12 + ["b"] * 4 + ["val"] * 5
    assert records == [files[row["source"]][row["record"] - 1] for row in where]
    assert records[16:] == files["val"] and len({json.dumps(r) for r in records[:16]}) == 16
    chats = [row["messages"] for row in lines_of("mix/messages.jsonl")]
    assert [m["content"] for m in chats[0]] == [records[0]["question"], records[0]["answer"]]
    assert chats[12][0] == {"role": "user", "content": f"{records[12]['instruction']}\nz"}
    assert all([m["role"] for m in chat] == ["user", "assistant"] for chat in chats)
    assert {p.name for p in Path("mix").iterdir()} == {
        ".lock", "config.json", "dataset_info.json", "messages.jsonl", "mixture.jsonl",
        "records.jsonl",
    }  # fmt: skip
    before = Path("mix/records.jsonl").read_bytes()
    assert train.main(argv) == 0 and Path("mix/records.jsonl").read_bytes() == before
    assert train.main([*argv, "--samples", "17"]) == 2  # another run is in this place
    assert "--samples was 16, now 17" in capsys.readouterr().err


def test_a_draw_is_that_of_a_fine_tuning_run(files):
    common = [*DRAW[2:], "--weights", "a=0.8,b=0.2", "--samples", "20", "--per-source", "15"]
    drawn = [inputs.prepare(parse(["--mode", mode, *common]), 1) for mode in ("draw", "finetune")]
    one, other = ([*report.mixture_jsonl(each.mixture)] for each in drawn)
    assert one == other and len(one) == 20 and drawn[0].notes[-2].startswith("a is short: ")
    assert [len(source) for source in drawn[0].sources.values()] == [15, 15]


def test_overlap_is_dropped_before_validation_records_are_appended(files):
    argv = [*DRAW, "--weights", "proportional", "--samples", "70", "--val", "val.json",
            "--drop-overlap", "--also", "val=val.json"]  # fmt: skip
    drawn = inputs.prepare(parse(argv), 1).mixture
    assert {name: len(part) for name, part in drawn.items()} == {"a": 39, "b": 30, "val": 5}
    assert 1 not in drawn["a"].numbers
    alone = [*DRAW, "--weights", "uniform", "--samples", "9", "--drop-overlap"]
    assert "drops nothing: there is neither --val nor --test" in inputs.prepare(
        parse(alone), 1).notes[-1]  # fmt: skip


def test_what_is_drawn_but_not_all_there_in_messages_is_told(files, capsys):
    """And the records are JSON, whatever is in keys that are not read."""
    Path("b.jsonl").write_text('{"text": "one", "score": NaN}\n{"text": "two", "x": [1e999]}\n')
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    chat = {"messages": [turns[0], turns[1] | {"weight": 0}, *turns]}
    Path("c.json").write_text(json.dumps([chat]))
    argv = [*DRAW, "--weights", "uniform", "--samples", "4", "--also", "c=c.json"]
    assert train.main(argv) == 0
    said = capsys.readouterr().out
    assert "note: 2 records are text: messages.jsonl lacks them" in said
    assert "note: 1 conversations have answers of weight 0, which other trainers may learn" in said
    records = lines_of("mix/records.jsonl")
    assert records[2:] == [{"text": "one", "score": None}, {"text": "two", "x": [None]}, chat]
    assert lines_of("mix/messages.jsonl")[2:] == [chat]


def test_per_source_draws_as_many_of_each(files):
    flags = [*DRAW[2:], "--val", "val.json", "--train", "few=few.json", "--per-source", "10"]
    found = inputs.prepare(parse(flags), 1)
    assert {name: len(part) for name, part in found.sources.items()} == {"a": 10, "b": 10, "few": 3}
    assert found.notes[-3:] == ["a: 10 of 40 samples are drawn", "b: 10 of 30 samples are drawn",
                                "few: has 3 samples of --per-source 10"]  # fmt: skip
    same, other = (inputs.prepare(parse([*flags, "--seed", seed]), 1) for seed in "34")
    assert same.sources["a"].numbers.tolist() == found.sources["a"].numbers.tolist()
    assert other.sources["a"].numbers.tolist() != found.sources["a"].numbers.tolist()
    about = inputs.about(found.sources)
    assert [(about[name]["samples"], about[name]["of"]) for name in ("a", "few")] == [
        (10, 40), (3, 3)
    ]  # fmt: skip
    Path("long.json").write_text(json.dumps([{"text": "word " * 100}] * 3))
    texts = data.load_dataset("long.json", data.byte_tokenizer(), "plain", 64, "cache")
    about = inputs.about({"a": texts})["a"]  # each cut to pieces
    assert about["of"] == 3 < 20 < about["samples"]


def test_what_draw_cannot_do_is_refused(files, refusal):
    lines = refusal(["--mode", "draw", "--lr-w", "1", "--max-length", "9", "--plan"])
    expected = ["--plan goes with --mode bilevel or finetune alone", "--max-length goes with",
                "--lr-w goes with", "--train is missing"]  # fmt: skip
    assert [line.startswith(what) for line, what in zip(lines, expected, strict=True)] == [True] * 4
    (line,) = refusal(DRAW)
    assert line.startswith("--weights is missing: --mode draw needs")
    (line,) = refusal([*DRAW, "--weights", "uniform", "--also", "a=val.json"])
    assert line == "--also a=val.json: --train has a source of this name"
    (line,) = refusal([*DRAW[2:], "--val", "val.json", "--also", "c=few.json"])
    assert line == "--also goes with --mode finetune or draw alone"


def test_a_file_that_lost_records_since_they_were_drawn_is_named(files, tmp_path):
    flags = parse([*DRAW, "--weights", "uniform", "--samples", "20"])
    drawn = inputs.prepare(flags, 1).mixture
    Path("a.json").write_text(json.dumps(files["a"][:5]))
    with pytest.raises(ValueError, match="a.json: was written to while it was read"):
        write_records(tmp_path, drawn)


def mixture_elsewhere(
    sizes: dict[str, int], weights: list[float], ending: str = ".json", **more
) -> str:
    about = {name: {"samples": n, "path": f"{name}{ending}"} for name, n in sizes.items()}
    result = {"weights": dict(zip(sizes, weights, strict=True)), "sources": about}
    flags = as_json(parse([])) | {"train": [f"{name}={name}.json" for name in sizes]} | more
    return "\n".join(report.elsewhere(result, flags, Path("runs/x")))


def test_the_size_of_a_recipe_and_what_limits_it_are_said():
    said = mixture_elsewhere({"a": 9000, "b": 9000}, [0.6, 0.4])
    assert "elsewhere, 10000 records:\n  python train.py --mode draw --train a=a.json" in said
    collapsed = mixture_elsewhere({"a": 12000, "few": 3, "none": 50}, [0.7, 0.3, 0.0])
    assert "few is short: 3000 samples by its weight, but it has 3; the mixture has" in collapsed
    assert said.endswith("\nwhich yields about 15000 samples: then a is used up")
    assert collapsed.endswith("\nwhich yields about 10 samples: then few is used up")
    assert "fraction" not in mixture_elsewhere({"a": 9000}, [1.0], ".json:prompt=q,answer=a")
    said = mixture_elsewhere({"a": 9000}, [1.0], val="v.json", drop_overlap=True)
    assert "--train a=a.json --val v.json --drop-overlap --weights" in said


def test_loaders_of_others_read_what_is_drawn(files):
    """TRL's and LLaMA-Factory's own; open-instruct and axolotl hand the file to load_dataset."""
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    yaml = pytest.importorskip("yaml")
    train.main([*DRAW, "--weights", "uniform", "--samples", "20"])
    rows = lines_of("mix/messages.jsonl")
    read = datasets.load_dataset("json", data_files="mix/messages.jsonl", split="train")
    assert read.to_list() == rows
    trl = pytest.importorskip("trl.scripts.utils", reason="needs trl")
    config = trl.DatasetMixtureConfig([{"path": "json", "data_files": "mix/messages.jsonl"}])
    assert trl.get_dataset(config)["train"].to_list() == rows
    *_, line, last = mixture_elsewhere({"a": 40, "few": 3}, [0.75, 0.25]).splitlines()
    assert last == "which yields about 12 samples: then few is used up"
    shares = yaml.safe_load(line)["datasets"]
    assert Counter(row["question"].split()[0] for row in (
        trl.get_dataset(trl.DatasetMixtureConfig(shares))["train"].to_list())) == {"a": 9, "few": 3}
    parser = pytest.importorskip("llamafactory.data.parser", reason="needs llamafactory")
    from llamafactory.data.converter import get_dataset_converter

    (about,) = parser.get_dataset_list(["mixture"], "mix")
    convert = get_dataset_converter(about.formatting, about, None)
    assert about.dataset_name == "messages.jsonl" and about.load_from == "file"
    for row in rows:
        turns = convert(row)
        assert turns["_prompt"] + turns["_response"] == row["messages"]
