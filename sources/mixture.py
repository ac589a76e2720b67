"""From source weights to a mixture to fine-tune on: how many samples of each source, and which.

    weights = parse_source_weights("runs/x/weights.json", ["alpaca", "math"])
    drawn, notes = draw({"alpaca": dataset, "math": dataset}, weights, samples=10_000, seed=0)

The paper fine-tunes on 10,000 samples drawn by the weights that it learned on 3,000 of each source
(Pan et al., arXiv 2406.19976). S sources.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path

import numpy as np

from data import Dataset

PERMITTED = "a weights.json, uniform, proportional, or NAME=WEIGHT,..."


def parse_source_weights(spec: str, names: list[str]) -> dict[str, float] | None:
    """The weights of the sources `names` that `spec` states, summing to 1; None for "proportional"
    to their sizes. A weights.json must be about these sources; in NAME=WEIGHT,... those that are
    not named get nothing. ValueError with a line per problem."""
    if spec == "proportional":
        return None
    if spec == "uniform":
        return dict.fromkeys(names, 1 / len(names))
    is_list = "=" in spec and not os.path.exists(spec)  # a long list is no path at all
    problems, stated = [], {}
    try:
        pairs = [item.rpartition("=")[::2] for item in spec.split(",")]
        stated = dict(pairs if is_list else json.loads(Path(spec).read_text())["weights"].items())
    except OSError as error:
        problems.append(f"{error.strerror}; permitted is {PERMITTED}")
    except (ValueError, KeyError, TypeError, AttributeError):
        problems.append("not the weights.json of a run")
    if is_list and len(stated) < len(pairs):
        problems.append("a source is named twice")
    others = set(stated) - set(names) if is_list else set(stated) ^ set(names)
    if others and not problems:
        problems.append(f"it is about {sorted(stated)}, but to train on are {sorted(names)}")
    for name, p in stated.items():
        with contextlib.suppress(ValueError):
            stated[name] = p = float(p) if is_list else p
        if isinstance(p, bool) or not (isinstance(p, (int, float)) and 0 <= p < math.inf):
            problems.append(f"the weight of {name} is {p}: permitted is a number of at least 0")
    if not problems and sum(stated.values()) == 0:
        problems.append("all weights are 0")
    if problems:
        raise ValueError("\n".join(f"--weights {spec}: {problem}" for problem in problems))
    total = sum(stated.values())
    return {name: stated.get(name, 0) / total for name in names}


def apportion(weights: dict[str, float], total: int) -> dict[str, int]:
    """`total` in whole parts proportional to the weights, by largest remainder."""
    whole = sum(weights.values())
    exact = {name: total * (p / whole) for name, p in weights.items()}
    parts = {name: math.floor(x) for name, x in exact.items()}
    by_remainder = sorted(weights, key=lambda name: parts[name] - exact[name])
    for name in by_remainder[: total - sum(parts.values())]:
        parts[name] += 1
    return parts


def count(
    weights: dict[str, float], sizes: dict[str, int], samples: int, repeat: bool = False
) -> tuple[dict[str, int], list[str]]:
    """How many samples of each source, and a note on each that is short: without `repeat` what it
    lacks goes to the others, in proportion to their weights."""
    wanted = parts = apportion(weights, samples)
    if repeat:
        return parts, []
    full = {}
    while short := {name: sizes[name] for name, n in parts.items() if n > sizes[name]}:
        full |= short
        rest = {name: p for name, p in weights.items() if name not in full}
        left = samples - sum(full.values())
        parts = full | (apportion(rest, left) if sum(rest.values()) else dict.fromkeys(rest, 0))
    notes = [
        f"{name} is short: {wanted[name]} samples by its weight, but it has {full[name]}; the "
        f"mixture has {sum(parts.values())} in all (--repeat would repeat records)"
        for name in weights if name in full
    ]  # fmt: skip
    return {name: parts[name] for name in weights}, notes


def draw(
    sources: dict[str, Dataset], weights: dict[str, float], samples: int,
    repeat: bool = False, seed: int = 0,
) -> tuple[dict[str, Dataset], list[str]]:
    """The sources cut down to a mixture, those without a sample left out; and notes for the user.

    Drawn without replacement; with `repeat`, all of a short source as often as it fits, and then
    the rest. What is drawn depends on the seed, the source's name and size, and the count alone.
    """
    sizes = {name: len(source) for name, source in sources.items()}
    parts, notes = count(weights, sizes, samples, repeat)
    drawn = {}
    for name, n in parts.items():
        if n:
            rng = np.random.default_rng([seed, *name.encode()])
            picked = [rng.permutation(sizes[name]) for _ in range(math.ceil(n / sizes[name]))]
            drawn[name] = sources[name].select(np.sort(np.concatenate(picked)[:n]))
    return drawn, notes


def as_jsonl(drawn: dict[str, Dataset]) -> str:
    """A line for each sample: its source, and its record's number in the source's file (from 1; in
    JSON Lines, the line)."""
    rows = [{"source": name, "record": number}
            for name, source in drawn.items() for number in source.numbers.tolist()]  # fmt: skip
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
