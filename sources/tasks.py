"""Built-in tasks: small data that a tiny model learns in seconds, made from a seed.

All are about invented facts: each of some names has a value for each of some attributes, asked for
in many forms ("please, what is kalo mub" -> "tezi"). Every source has so many records, of at most
36 bytes, that a short run sees few of them twice: noise cannot be learned by heart.
"""

from __future__ import annotations

import random

from hf.tokenizer import Turns

Task = tuple[dict[str, list[Turns]], list[Turns], list[Turns]]  # sources, validation, test

OPENINGS = ("", "hi, ", "so ", "now ", "well, ", "please, ", "hey! ", "ok, ")
FORMS = (
    "{x} {a}", "{x}, {a}", "{x}: {a}", "what is {x} {a}", "say {x} {a}", "give {x} {a}",
    "ask {x} {a}", "find {x} {a}", "get {x} {a}", "show {x} {a}", "tell {x} {a}", "name {x} {a}",
)  # fmt: skip
CONSONANTS = "bdfgklmnprstvz"
JUNK = "chjqwxy"  # consonants of words without meaning
# Share of answers swapped in each source of `graded`: in the authors' part k of ten, min(1, k/5).
NOISE = {"clean": 0.0, "noisy20": 0.2, "noisy40": 0.4, "noisy60": 0.6, "noisy80": 0.8}
NOISE |= {f"random{n}": 1.0 for n in range(1, 6)}


def task(name: str, seed: int) -> Task:
    """(sources, validation, test) of a built-in task; the records of a seed are always the same."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: expected one of {', '.join(TASKS)}")
    return TASKS[name](random.Random(f"{name} {seed}"))


def words(rng: random.Random, n: int, syllables: int, consonants: str) -> list[str]:
    """Distinct invented words."""
    made = {}
    while len(made) < n:
        made["".join(rng.choice(consonants) + rng.choice("aeiou") for _ in range(syllables))] = None
    return list(made)


def facts(rng: random.Random, consonants: str = CONSONANTS, n_attributes: int = 8) -> tuple:
    """Questions and answers about 12 names: (train, validation, test), 88 : 4 : 4 of each fact.

    Every fact and every form occurs in training, but no question of validation or test does.
    """
    names = words(rng, 12, 2, consonants)
    forms = [opening + form for opening in OPENINGS for form in FORMS]
    parts = [], [], []
    for end in rng.sample(consonants, n_attributes):
        attribute = rng.choice(consonants) + rng.choice("aeiou") + end
        values = words(rng, 3, 2, consonants)
        for name in names:
            answer = ("assistant", rng.choice(values))
            for n, form in enumerate(rng.sample(forms, len(forms))):
                question = ("user", form.format(x=name, a=attribute))
                parts[(n >= 88) + (n >= 92)].append([question, answer])
    return parts


def denoising(rng: random.Random) -> Task:
    """Right answers, the same questions with each other's answers, and unrelated words."""
    clean, val, test = facts(rng)
    answers = rng.sample([answer for _, answer in clean], len(clean))
    shuffled = [[question, answer] for (question, _), answer in zip(clean, answers, strict=True)]
    questions = [" ".join(words(rng, 3, 3, JUNK)) for _ in clean]
    junk = [[("user", q), ("assistant", words(rng, 1, 2, JUNK)[0])] for q in questions]
    return {"clean": clean, "shuffled": shuffled, "junk": junk}, val, test


def graded(rng: random.Random) -> Task:
    """Ten sources of right answers, of which a growing share is swapped: NOISE says how much."""
    facts_, val, test = facts(rng)
    sources = {}
    for name, rate in NOISE.items():
        part = rng.sample(facts_, len(facts_) // 3)
        wrong = rng.sample(range(len(part)), round(rate * len(part)))
        swapped = dict(zip(wrong, rng.sample(wrong, len(wrong)), strict=True))
        sources[name] = [[part[n][0], part[swapped.get(n, n)][1]] for n in range(len(part))]
    return sources, val, test


def multilingual(rng: random.Random) -> Task:
    """Four languages of different sounds; validation is 70% the first, 30% the second."""
    sounds = {"aru": "bdgr", "eli": "fslv", "oko": "ktpm", "unu": "nzhj"}
    languages = {name: facts(rng, consonants, 4) for name, consonants in sounds.items()}

    def mixture(part: int) -> list[Turns]:
        return rng.sample(languages["aru"][part], 140) + rng.sample(languages["eli"][part], 60)

    return {name: parts[0] for name, parts in languages.items()}, mixture(1), mixture(2)


def instruction(rng: random.Random) -> Task:
    """Few questions answered to the point; all, evasively and half the time at random."""
    good, val, test = facts(rng)
    poor = []
    for question, right in good:
        _, said = right if rng.random() < 0.5 else rng.choice(good)[1]
        poor.append([question, ("assistant", f"hm, {said}")])
    return {"good": rng.sample(good, len(good) // 3), "poor": poor}, val, test


TASKS = {make.__name__: make for make in (denoising, graded, multilingual, instruction)}
