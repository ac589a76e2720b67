"""Final answers: found in replies, and recognised however they are spelled.

    python -m tests.test_answers gsm8k.jsonl math.jsonl     # the rate reached on every rewritten form
"""

import random
import re
import sys
from fractions import Fraction

import pytest

import answers
from answers import Grader

# ---------------------------------------------------------------------------------------------
# Ways to write a reference answer differently; None where there is nothing to change

PLAIN = re.compile(r"-?\d+")
FRAC = re.compile(r"\\[dt]?frac\s*(?:\{(\d+)\}\{(\d+)\}|(\d)(\d))")


def separated(separator: str):
    def rewrite(a: str) -> str | None:
        long = PLAIN.fullmatch(a) and len(a.lstrip("-")) > 3
        return f"{int(a):,}".replace(",", separator) if long else None

    return rewrite


def of_number(pattern: str):
    return lambda a: pattern.format(a) if PLAIN.fullmatch(a) else None


def replaced(pattern: str, new):
    def rewrite(a: str) -> str | None:
        changed = re.sub(pattern, new, a)
        return changed if changed != a else None

    return rewrite


def wrapped(pattern: str):
    return lambda a: pattern.replace("@", a)


def decimal(a: str) -> str | None:
    m = FRAC.fullmatch(a.removeprefix("-"))
    if not m or 1000 % (value := Fraction(m[1] or m[3]) / Fraction(m[2] or m[4])).denominator:
        return None
    return "-" * a.startswith("-") + f"{float(value):g}"


def slashed(m: re.Match) -> str:  # with a space in a mixed number
    return f"{m[1]} {m[2] or m[4]}/{m[3] or m[5]}".strip()


def swapped(m: re.Match) -> str:  # a - b = -b + a
    return f"{m[3]} + {m[1]}" if m[2] == "+" else f"-{m[3]} + {m[1]}"


def digits(a: str) -> str | None:  # \frac12
    m = re.fullmatch(r"(-?)\\[dt]?frac\{(\d)\}\{(\d)\}", a)
    return f"{m[1]}\\frac{m[2]}{m[3]}" if m else None


def in_text(a: str) -> str | None:
    words = re.fullmatch(r"(?:\\text\{)?([A-Za-z ]{2,})\}?", a)
    return f"\\textbf{{{words[1].strip()}}}" if words else None


def without_spaces(a: str) -> str | None:
    if "text" in a or "mbox" in a or "\\ " in a:
        return None
    return replaced(r"(?<![A-Za-z]) (?=\S)|(?<=[A-Za-z]) (?=[^A-Za-z\s])", "")(a)


REWRITES = {
    "1,234": separated(","),
    "1{,}234": separated("{,}"),
    "1\\,234": separated("\\,"),
    "\\text{ units}": of_number("{}\\text{{ cm}}"),
    "units": of_number("{} dollars"),
    "units with a power": of_number("{} cm^2"),
    "\\$18": of_number("\\${}"),
    "18.00": of_number("{}.00"),
    "degrees": of_number("{}^\\circ"),
    "x = 18": of_number("x = {}"),
    "a/b for \\frac": replaced(rf"(\d?)\s*{FRAC.pattern}", slashed),
    "\\frac for a/b": replaced(r"(?<![\d.])(\d+)/(\d+)(?![\d.])", r"\\frac{\1}{\2}"),
    "\\dfrac": replaced(r"\\[dt]?frac", r"\\dfrac"),
    "\\tfrac": replaced(r"\\[dt]?frac", r"\\tfrac"),
    "\\frac12": digits,
    "a fraction as a decimal": decimal,
    "\\sqrt2": replaced(r"\\sqrt\{(\d)\}", r"\\sqrt\1"),
    "words in \\textbf": in_text,
    "\\left( \\right)": lambda a: a if re.search("left", a) else (
        a.replace("(", "\\left(").replace(")", "\\right)") if "(" in a and "]" not in a
        and "[" not in a and "text" not in a else None),
    "no spaces": without_spaces,
    "spaces after commas": replaced(r"(?<![\\{]),(?![\\}])\s*", ",  "),
    "a trailing period": wrapped("@."),
    "$...$": wrapped("$@$"),
    "\\( ... \\)": wrapped("\\( @ \\)"),
    "the box within a box": wrapped("\\boxed{@}"),
    # These ask for algebra, or to understand what is said.
    "\\frac not in lowest terms": replaced(
        rf"^(-?){FRAC.pattern}$",
        lambda m: f"{m[1]}\\frac{{{2 * int(m[2] or m[4])}}}{{{2 * int(m[3] or m[5])}}}"),
    "terms in another order": replaced(r"^([\w\\{}]+) ([+-]) ([\w\\{}^]+)$", swapped),
    "sqrt(2) and pi": replaced(r"\\sqrt\{?(\w+)\}?|\\pi",
                               lambda m: f"sqrt({m[1]})" if m[1] else "pi"),
    "1.8 \\times 10^1": lambda a: (
        f"{a[0]}.{a[1:]} \\times 10^{{{len(a) - 1}}}" if re.fullmatch(r"\d{2,}", a) else None),
    "a sentence in the box": wrapped("\\text{the answer is } @"),
}  # fmt: skip
REPLIES = {  # around the answer, in whole replies
    "in a box": "We add both.\nSo the answer is \\boxed{@}.",
    "in a box, bold": "**Answer:** $\\boxed{@}$",
    "after ####": "We add both.\n#### @",
    "the answer is $...$": "We add 1 and 2. The answer is $@$.",
}


def rates(references: list[str], grader: Grader) -> dict[str, tuple[int, int]]:
    """{form: (recognised, rewritten)} over reference answers."""
    references = [" ".join(a.split()) for a in references]
    count = {"itself": (sum(grader.equal(a, a) for a in references), len(references))}
    for form, rewrite in REWRITES.items():
        pairs = [(a, b) for a in references if (b := rewrite(a)) is not None]
        count[form] = sum(grader.equal(a, b) for a, b in pairs), len(pairs)
    for form, reply in REPLIES.items():
        right = sum(grader.right(reply.replace("@", a), a) for a in references)
        count[form] = right, len(references)
    return count


def mistaken(references: list[str], grader: Grader) -> list[tuple[str, str]]:
    """Pairs of references, each with another drawn at random, that are called the same though
    their digits and letters are not."""
    others = random.Random(0).sample(references, len(references))

    def plain(a: str) -> str:
        return re.sub(r"[\W_]|text|mbox|[dt]?frac|sqrt|left|right|circ", "", a)

    return [
        (a, b) for a, b in zip(references, others, strict=True)
        if plain(a) != plain(b) and grader.equal(a, b)
    ]  # fmt: skip


def main(paths: list[str], grader: Grader) -> None:
    references = [[p.answer for p in answers.read_problems(path)] for path in paths]
    print(f"compared by {grader.method}")
    counts = [rates(group, grader) for group in references]
    for form in counts[0]:
        cells = [f"{100 * n / of:6.2f}% of {of:5}" if of else f"{'-':>16}" for n, of in
                 (count[form] for count in counts)]  # fmt: skip
        print(f"{form:26}", *cells)
    for path, group in zip(paths, references, strict=True):
        pairs = mistaken(group, grader)
        print(f"{path}: {len(pairs)} of {len(group)} random pairs called the same: {pairs[:9]}")


if __name__ == "__main__":
    main([p for p in sys.argv[1:] if p != "--strings"], Grader("--strings" not in sys.argv))
