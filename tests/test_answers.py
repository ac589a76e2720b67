"""Final answers: found in replies, and recognised however they are spelled.

    python -m tests.test_answers gsm8k.jsonl math.jsonl   # the rate reached on every form
"""

import random
import re
import sys
from fractions import Fraction

import pytest

from grading import answers
from grading.answers import Grader

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


# ---------------------------------------------------------------------------------------------
# Tests

FILES = "math/gsm8k/test.jsonl", "scalebio/eval_math/math_test.jsonl"
ALGEBRA = list(REWRITES)[-5:]  # the forms that strings alone need not recognise


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("So 3 + 4 = \\boxed{7}. Check: 7 - 4 = 3.", "7"),
        ("First \\boxed{1}, then \\boxed{\\frac{1}{\\sqrt{2}}}, so", "\\frac{1}{\\sqrt{2}}"),
        ("It is \\boxed 5 and that is all.", "5"),
        ("Cut off: \\boxed{12", "12"),
        ("We add.\n#### 1,234\n\nQuestion: 99?", "1,234"),
        ("The answer is $18. She buys 5 more.", "$18"),
        ("**Final Answer**: $x = \\frac{1}{2}$.\nThat took 3 steps.", "x = \\frac{1}{2}"),
        ("The answer is $18 per day, and $20 on Sundays.", "$18"),
        ("The answer is 2 or 3.", "2 or 3"),
        ("There are 3 cars and 4.50 dollars.", "4.50"),
        ("Half: 1/2", "1/2"),
        ("It falls to -3", "-3"),
        ("I do not know.", None),
        ("", None),
    ],
)
def test_extract_finds_the_final_answer(reply, answer):
    assert answers.extract(reply) == answer


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("31/2", "3\\frac{1}{2}"), ("3", "3x"), ("5", "5\\pi"), ("2\\pi", "2"), ("(1,2)", "(2,1)"),
        ("[0,1)", "(0,1]"), ("12", "1,2"), ("-5", "5"), ("\\sqrt{2}", "2"), ("x^2", "x^3"),
        ("0.5", "5"), ("\\frac{1}{2}", "\\frac{2}{1}"), ("1/(2x)", "\\frac{1}{2}x"), ("E", "F"),
        ("2^{10}", "2^1"), ("10_3", "11_3"), ("\\text{even}", "\\text{odd}"), ("1:2", "2:1"),
        ("2\\sqrt{3}", "\\sqrt[3]{2}"), ("7", ""), ("100", "1"), ("18", "18 or 20"),
        ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix} 1 & 2 \\end{pmatrix}"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("math_verify", [True, False])
def test_different_answers_are_not_equal(a, b, math_verify):
    grader = Grader(math_verify)
    assert not grader.equal(a, b) and not grader.equal(b, a)


def test_math_verify_sees_what_strings_do_not():
    pytest.importorskip("math_verify")
    grader, strings = Grader(), Grader(use_math_verify=False)
    assert "math-verify" in grader.method and "strings only" in strings.method
    for a, b in (("1 + \\sqrt{2}", "\\sqrt{2} + 1"), ("(x - 1)(x + 1)", "x^2 - 1"),
                 ("\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt{2}}")):  # fmt: skip
        assert grader.equal(a, b) and not strings.equal(a, b)


def test_an_answer_that_math_verify_cannot_finish_is_wrong():
    pytest.importorskip("math_verify")
    grader = Grader()
    grader.seconds = 1
    assert not grader.equal("3x", "9^{9^{9^{9}}}x") and not grader.equal("3x", "(" * 150)
    assert not grader.equal("3x", "\\frac{" * 9) and not grader.equal("3x", "x" * 10_000)


WILD = "a|ab |\\frac|{|\\boxed{|9,| |answer is |1|x=|\\text{ |^{|\\sqrt{1".split("|")


@pytest.mark.parametrize("unit", WILD)
def test_replies_gone_wild_are_wrong_and_take_no_time(unit):
    # The time limit is not asserted: a pattern that backtracks would not end at all.
    for reply in (unit * 300, f"The answer is 5 {unit * 300}!", f"\\boxed{{5 {unit * 90}1}}",
                  unit * 9000):  # fmt: skip
        assert not any(Grader(use_math_verify=False).right(reply, a) for a in ("7", "7x"))


@pytest.mark.parametrize("file", FILES)
def test_every_reference_answer_is_recognised_in_other_spellings(asset, file):
    grader = Grader(use_math_verify=False)
    problems = answers.read_problems(asset(file))
    assert len(problems) == {"math": 1319, "scalebio": 5000}[file.partition("/")[0]]
    assert all(grader.right(p.solution, p.answer) for p in problems)
    for form, (right, n) in rates([p.answer for p in problems], grader).items():
        assert form in ALGEBRA or right == n, form
    # One pair of the 5000 really is the same: 1/2 and $0.50.
    assert len(mistaken([p.answer for p in problems], grader)) == (len(problems) == 5000)


def test_math_verify_recognises_what_needs_algebra(asset):
    pytest.importorskip("math_verify")
    problems = answers.read_problems(asset(FILES[1]))
    found = rates([p.answer for p in problems[::100]], Grader())
    assert all(right == n for form, (right, n) in found.items() if form not in ALGEBRA)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"question": "1 + 1?"}', "x.jsonl:1: lacks question and answer"),
        ('{"question": "1?", "answer": "none"}', "x.jsonl:1: lacks question and answer"),
        ('\n{"question', "x.jsonl:2: broken JSON"),
        ("", "x.jsonl: no rows"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, text, problem):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(ValueError, match="x.jsonl") as error:
        answers.read_problems(tmp_path / "x.jsonl")
    assert problem in str(error.value) and "\n" not in str(error.value)


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
