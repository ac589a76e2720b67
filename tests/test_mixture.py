"""From weights to a mixture: what --weights may say, and what is drawn."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import data
from cli import inputs

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
    assert inputs.apportion({"a": 0.5, "b": 0.3, "c": 0.2}, 11) == {"a": 6, "b": 3, "c": 2}
    thirds = inputs.apportion(dict.fromkeys(NAMES, 1 / 3), 10_000)
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
    parts, notes = inputs.count_samples(weights, sizes, samples)
    assert list(parts) == list(weights)
    assert all(0 <= parts[name] <= sizes[name] * (weights[name] > 0) for name in parts)
    assert sum(parts.values()) == min(samples, sum(sizes[n] for n in parts if weights[n] > 0))
    wanted = inputs.apportion(weights, samples)
    assert bool(notes) == any(wanted[name] > sizes[name] for name in parts)
    open_ones = [name for name in parts if parts[name] < sizes[name]]
    for a in open_ones:
        for b in open_ones:
            share = weights[a] * parts[b] - weights[b] * parts[a]
            assert abs(share) <= weights[a] + weights[b]  # within one sample of each
    assert sum(inputs.count_samples(weights, sizes, samples, repeat=True)[0].values()) == samples


def test_a_short_source_is_named_and_the_rest_is_spread():
    weights, sizes = {"a": 0.8, "b": 0.15, "c": 0.05}, {"a": 10, "b": 100, "c": 100}
    parts, (note,) = inputs.count_samples(weights, sizes, 50)
    assert parts == {"a": 10, "b": 30, "c": 10}
    assert note.startswith("a is short: 40 samples by its weight, but it has 10;")
    assert "the mixture has 50 in all" in note
    parts, (note,) = inputs.count_samples({"a": 1, "b": 0, "c": 0}, sizes, 50)
    assert parts == {"a": 10, "b": 0, "c": 0} and "the mixture has 10 in all" in note


def test_a_draw_is_without_replacement_and_depends_on_its_own_source_alone():
    sources = {"a": dataset(40), "b": dataset(30, "b"), "c": dataset(5, "c")}
    weights = {"a": 0.5, "b": 0.5, "c": 0.0}
    drawn, notes = inputs.draw_samples(sources, weights, 40, seed=3)
    assert list(drawn) == ["a", "b"] and not notes
    for name, source in drawn.items():
        assert len(set(source.numbers.tolist())) == len(source) == 20
        for i, number in enumerate(source.numbers):  # the records go with their numbers
            assert np.array_equal(source.stored(i), sources[name].stored(number - 1))
    again = inputs.draw_samples(dict(reversed(sources.items())), weights, 40, seed=3)[0]
    other = inputs.draw_samples(sources, weights, 40, seed=4)[0]
    assert again["a"].numbers.tolist() == drawn["a"].numbers.tolist()
    assert other["a"].numbers.tolist() != drawn["a"].numbers.tolist()

    repeated = inputs.draw_samples(sources, {"a": 0, "b": 0, "c": 1}, 13, repeat=True)[0]["c"]
    assert sorted(Counter(repeated.numbers.tolist()).values()) == [2, 2, 3, 3, 3]
    samples = [json.loads(line) for line in inputs.mixture_jsonl(drawn).splitlines()]
    assert samples[0] == {"source": "a", "record": drawn["a"].numbers[0]}
    assert [sample["source"] for sample in samples] == ["a"] * 20 + ["b"] * 20
