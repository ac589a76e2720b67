"""Final answers: found in replies, and recognised however they are spelled.

    python -m tests.test_answers gsm8k.jsonl math.jsonl   # the two rates
"""

import random
import re
import sys
from collections import Counter
from fractions import Fraction

import pytest

pytest.importorskip("math_verify")

from grading import answers  # noqa: E402
from grading.answers import equal, extract, number, read_problems  # noqa: E402

# Ways to write a reference answer differently: a pattern and what replaces it. Where the pattern is
# not found there is nothing to change.
WHOLE = r"^(-?\d+)$"
FRAC = r"\\[dt]?frac\s*(?:\{(\d+)\}\{(\d+)\}|(\d)(\d))"


def thousands(separator):
    return r"^-?\d{4,}$", lambda m: f"{int(m[0]):,}".replace(",", separator)


def decimal(m):
    exact = Fraction(int(m[2] or m[4]), int(m[3] or m[5]))
    return m[1] + f"{float(exact):g}" if 1000 % exact.denominator == 0 else m[0]


SPELLINGS = {
    "1,234": thousands(","),
    "1{,}234": thousands("{,}"),
    "1\\,234": thousands("\\,"),
    "\\text{ cm}": (WHOLE, r"\1\\text{ cm}"),
    "18 dollars": (WHOLE, r"\1 dollars"),
    "18 cm^2": (WHOLE, r"\1 cm^2"),
    "\\$18": (WHOLE, r"\\$\1"),
    "18.00": (WHOLE, r"\1.00"),
    "degrees": (WHOLE, r"\1^\\circ"),
    "x = 18": (WHOLE, r"x = \1"),
    "a/b for \\frac": (f"^(-?){FRAC}$", lambda m: f"{m[1]}{m[2] or m[4]}/{m[3] or m[5]}"),
    "\\frac for a/b": (r"(?<![\d.])(\d+)/(\d+)(?![\d.])", r"\\frac{\1}{\2}"),
    "\\dfrac": (r"\\[dt]?frac", r"\\dfrac"),
    "\\tfrac": (r"\\[dt]?frac", r"\\tfrac"),
    "\\frac12": (r"\\[dt]?frac\{(\d)\}\{(\d)\}", r"\\frac\1\2"),
    "a fraction as a decimal": (f"^(-?){FRAC}$", decimal),
    "\\frac not in lowest terms": (
        f"^(-?){FRAC}$",
        lambda m: f"{m[1]}\\frac{{{2 * int(m[2] or m[4])}}}{{{2 * int(m[3] or m[5])}}}"),
    "\\sqrt2": (r"\\sqrt\{(\d)\}", r"\\sqrt\1"),
    "words in \\textbf": (r"^(?:\\text\{)?([A-Za-z ]{2,})\}?$", r"\\textbf{\1}"),
    "\\left( \\right)": (r"^\(([^()\[\]]*)\)$", r"\\left(\1\\right)"),
    "spaces after commas": (r"(?<![\\{]),(?![\\}])\s*", ",  "),
    "a trailing period": (r"$", "."),
    "$...$": (r"^(.*)$", r"$\1$"),
    "\\( ... \\)": (r"^(.*)$", r"\\( \1 \\)"),
    "a box in the box": (r"^(.*)$", r"\\boxed{\1}"),
}  # fmt: skip


def respelled(references):
    """(form, reference, how it is also written) of every form and reference that has it."""
    for form, (pattern, new) in SPELLINGS.items():
        for a in references:
            other = re.sub(pattern, new, a, count=form == "a trailing period")
            listed = form != "spaces after commas" or number(a) is None
            if other != a and listed:
                yield form, a, other


CHANGES = str.maketrans("+-()[]", "-+[]()")


def changed(references):
    """(kind, reference, another answer) for each digit and sign, and each bracket of an answer with
    a comma, that stands in the references: with that one character changed."""
    rng = random.Random(0)
    for a in references:
        for i, char in enumerate(a):
            if char.isdigit():
                yield "digit", a, a[:i] + rng.choice("0123456789".replace(char, "")) + a[i + 1 :]
            elif char in "+-" or "," in a and char in "()[]":
                kind = "sign" if char in "+-" else "bracket"
                yield kind, a, a[:i] + char.translate(CHANGES) + a[i + 1 :]


@pytest.mark.parametrize(
    ("reply", "reference", "answer"),
    [
        ("So 3 + 4 = \\boxed{7}. Check: 7 - 4 = 3.", "7", "7"),
        ("It is \\boxed{2} or \\boxed{3}.", "2,3", "2,3"),
        ("First \\boxed{2}, and then \\boxed{3}.", "3", "3"),
        ("It is \\boxed 5", "5", "5"),
        ("Cut off: \\boxed{5", "5", "5"),
        ("Put it in \\boxed{}: \\boxed{5}. I put it in \\boxed{}, as \\boxed asks.", "5", "5"),
        ("I should write \\boxed{your answer}. 6*7 = 42.\nThe answer is 42.", "42", "42"),
        ("It goes into \\boxed{\\text{answer}} or \\boxed{\\ldots}.\n#### 42", "42", "42"),
        ("The answer is \\boxed{}.", "18", None),
        ("We add.\n#### 1,234\n\nQuestion: 99?", "1234", "1,234"),
        ("#### 18\nShe makes it in 7 days.", "18", "18"),
        ("#### 1. Count\nThere are 5.\n#### 2. Double\nThat makes 10.", "10", "10"),
        ("We add.\n#### \\frac{x+2}{7}", "\\frac{x+2}{7}", "\\frac{x+2}{7}"),
        ("The answer is 66.\n\nQuestion: of 30 students?\nAnswer: 120", "66", "66"),
        ("It is 66.\n\n**Problem 2:** 2 + 3?\n\\boxed{5}", "66", "66"),
        ("It is 66.<|im_end|>\n<|im_start|>user\nAnd 5?", "66", "66"),
        ("Sure!\n\n**Problem:** add 60 and 6.\n\n**Solution:** It is 66.", "66", "66"),
        ("<think>\\boxed{20}? no.</think> The answer is 18.", "18", "18"),
        ("<think>Perhaps \\boxed{18}, but", "18", None),
        ("There are 3 cars and 4.50 dollars.", "1", "4.50"),
        ("The answer is 20, but that forgets the tip. Adding 9 gives 29 in total.", "29", "29"),
        ("The answer is 18, because 3 groups of 6 come.", "18", "18"),
        ("**Answer: 18**\n\n**Explanation:** 9 eggs at $2.", "18", "18"),
        ("答案是：$12$。这是因为一共有 8 个。", "12", "12"),
        ("The area is 18 m2.", "18", "18"),
        ("The answer is 12 (3 boxes of 4).", "12", "12"),
        ("The answer is 12, as 3 boxes hold 4 each.", "12", "12"),
        ("The answer is 12, not 13.", "12", "12"),
        ("The answer is $12$ for 3 people, so $x = 4$ for one.", "12", "12"),
        ("The answer is 12.5 dollars.\n\nTo see this, take 50 / 4.", "12.5", "12.5"),
        ("The answer is 5. However, the tip is missing: it is 10.", "10", "10"),
        ("The answer is 12, because she had 20 but gave 8 away.", "12", "12"),
        ("La réponse est 12 : 3 fois 4.", "12", "12"),
        ("So it is 12.\n\nWould you like to see step 2 again?", "12", "12"),
        ("\\boxed{42}\n\n## Problem 2\nAdd 3 and 3.\n\\boxed{6}", "42", "42"),
        ("(a) is \\boxed{3}.\n\nWith this, (b) is \\boxed{4}.", "3, 4", "3,4"),
        ("The answer is $\\frac{36}{2}$.", "18", "\\frac{36}{2}"),
        ("The answer is $\\frac{1}{2}$, for there are 8.", "\\frac12", "\\frac{1}{2}"),
        ("Thus the answer is $x^2$, where $x$ is the price.", "x^2", "x^2"),
        ("The answer is (2,5).", "(2,5)", "(2,5)"),
        ("Option A is wrong, so the answer is (C).", "\\text{(C)}", "C"),
        ("since $\\boxed{\\lambda \\ll E}$ holds.\n**Answer: D**", "\\text{(D)}", "D"),
        ("故选：C。", "C", "C"),
        ("I do not know.", "x", None),
    ],
)
def test_extract_finds_the_final_answer(reply, reference, answer):
    assert extract(reply, reference) == answer


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("31/2", "3\\frac{1}{2}"), ("3", "3x"), ("5", "5\\pi"), ("(1,2)", "(2,1)"), ("7", ""),
        ("[0,1)", "(0,1]"), ("12", "1,2"), ("x^2", "x^3"), ("1/(2x)", "\\frac{1}{2}x"), ("E", "F"),
        ("2^{10}", "2^1"), ("10_3", "11_3"), ("\\text{even}", "\\text{odd}"), ("18", "18 or 20"),
        ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix} 1 & 2 \\end{pmatrix}"),
        ("0.0000001", "0.0000002"), ("\\frac{1}{2^{98}}", "\\frac{1}{2^{99}}"), ("3", None),
        ("52_8", "52_6"), ("\\frac{1}{2004!}", "\\frac{1}{2006!}"), ("100200", "100, 200"),
        ("\\frac{2^{2005}+1}{3 \\cdot 2^{2006}}", "\\frac{1}{3 \\cdot 2^{2006}}"),
        ("1, 2, \\ldots, n", "n, 2, \\ldots, 1"), ("(0,\\infty)", "(0,\\infty]"), ("2", "2 2/3"),
        ("12", "12\\text{ hours and }30\\text{ minutes}"), ("(1,2,3)", "[1,2,3)"), ("7", "minus 7"),
        ("1 + i.", "1 - i."), ("\\text{June 20}", "July 20"), ("2021", "\\pm 2021"),
    ],
)  # fmt: skip
def test_different_answers_are_not_equal(a, b):
    assert not equal(a, b) and (b is None or not equal(b, a))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("1 + \\sqrt{2}", "\\sqrt{2} + 1"), ("(x - 1)(x + 1)", "x^2 - 1"), ("18", "1.8e1"),
        ("\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt{2}}"), ("10080", "10 080"), ("18", "１８"),
        ("(2,5)", "2 < x < 5"), ("1,-2", "-2, 1"), ("28\\%", "28 \\text{ percent}"),
        ("100,200,300", "300, 200, 100"), ("18", "\\text{Mary has } 18 \\text{ apples}"),
        ("\\text{(E)}", "E: a score"), ("B", "\\textbf{(B)}\\ 12"), ("1,2,\\dots,n", "1, 2, …, n"),
        ("\\begin{pmatrix}1\\\\3\\end{pmatrix}", "\\begin{bmatrix}1\\\\[2pt]3\\end{bmatrix}"),
        ("1550", "1.55 \\times 10^{3}"), ("24+4\\pi", "24 + 4pi"), ("3\\sqrt{2}", "3√2"),
        ("\\text{1:03 PM}", "1:03 pm"), ("-7", "negative 7"), ("15", "\\approx 15"), ("7.5", "7½"),
        ("12.5", "12 1/2"), ("3.5", "3{,}5"), ("25", "25元"), ("0.75", "75\\%"), ("45\\%", "0.45"),
        ("52_{8}", "52_8"), ("\\frac{10!}{2}", "1814400"),
    ],
)  # fmt: skip
def test_equal_answers_are_seen_whatever_their_spelling(a, b):
    assert equal(a, b)


WILD = ("\\frac|{|\\boxed{|9,|answer is |1|x=|\\text{ |^{|$1$ |ab |#### 1\n|,123|.1/2|\n| |/|5 $ "
        .split("|"))  # fmt: skip


@pytest.mark.parametrize("unit", [*WILD, "9^{9^{9^{9}}}x"])
def test_replies_gone_wild_are_wrong_and_come_to_an_end(unit, monkeypatch):
    monkeypatch.setattr(answers, "SECONDS", 1)
    for reply in (unit * 300, f"\\boxed{{5 {unit * 90}1}}", unit * 9000):
        for reference in ("7x", "7", "\\text{(C)}"):
            assert not equal(reference, extract(reply, reference))
    assert not equal("7x", unit) and not equal("7x", unit * 150)


FILES = {"math/gsm8k/test.jsonl": 1319, "scalebio/eval_math/math_test.jsonl": 5000}
REPLIES = (  # around the answer, in whole replies
    "We add both.\nSo the answer is $\\boxed{@}$.",
    "We add 1 and 2. The answer is $@$.",
)


@pytest.mark.parametrize("file", FILES)
def test_real_references_are_told_from_others_and_known_in_every_spelling(asset, file):
    problems = read_problems(asset(file))
    assert len(problems) == FILES[file]
    some = problems[::100]
    assert all(equal(p.answer, extract(p.solution, p.answer)) for p in some)
    references = [p.answer for p in some]
    assert all(equal(a, extract(reply.replace("@", a), a)) for a in references for reply in REPLIES)
    assert [x for x in respelled(references) if not equal(*x[1:])] == []
    formulas = [a for a in dict.fromkeys(p.answer for p in problems) if number(a) is None]
    assert [x for x in changed(formulas[::25]) if equal(*x[1:])] == []
    for a, b in zip(references, references[1:], strict=False):
        assert a == b or not equal(a, b)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"question": "1 + 1?"}', ":1: lacks question and answer"),
        ('{"question": "1?", "answer": "none"}', ":1: lacks question and answer"),
        ('\n{"question', ":2: broken JSON"),
        ("", ": no rows"),
    ],
)
def test_a_bad_file_is_named_with_its_line(write, text, problem):
    with pytest.raises(ValueError, match=f"birds.jsonl{problem}[^\n]*$"):
        read_problems(write(text))


def main(paths):
    for path in paths:
        references = [p.answer for p in read_problems(path)]
        formulas = [a for a in dict.fromkeys(references) if number(a) is None]
        for what, cases in (
            ("in other spellings", respelled(references)),
            ("but for plain numbers with a character changed", changed(formulas)),
        ):
            counts = Counter((kind, equal(a, b)) for kind, a, b in cases)
            right, n = sum(counts[key] for key in counts if key[1]), sum(counts.values())
            print(f"{path}: {len(references)} references {what}: {right} of {n} taken for right")
            print(*(f"    {kind}: {n} {verdict}" for (kind, verdict), n in sorted(counts.items())),
                  sep="\n")  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
