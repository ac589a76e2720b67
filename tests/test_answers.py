"""Final answers: found in replies, and recognised however they are spelled."""

import re

import pytest

pytest.importorskip("math_verify")

from grading import answers  # noqa: E402
from grading.answers import equal, extract, read_problems  # noqa: E402

FRAC = r"\\[dt]?frac\{(\d+)\}\{(\d+)\}"
WHOLE = r"^(-?\d+)$"
SPELLINGS = {  # what to change of a reference answer, and into what
    "itself": ("$", ""),
    "18.00": (WHOLE, r"\1.00"),
    "1,234": (r"^(-?\d{1,3})(\d{3})$", r"\1,\2"),
    "\\$18": (WHOLE, r"\\$\1"),
    "degrees": (WHOLE, r"\1^\\circ"),
    "x = 18": (WHOLE, r"x = \1"),
    "a/b for \\frac": (f"^{FRAC}$", r"\1/\2"),
    "\\dfrac": (r"\\[dt]?frac", r"\\dfrac"),
    "\\frac not in lowest terms": (
        f"^{FRAC}$", lambda m: f"\\frac{{{2 * int(m[1])}}}{{{2 * int(m[2])}}}"),
    "terms in another order": (r"^([\w\\{}]+) \+ ([\w\\{}^]+)$", r"\2 + \1"),
    "spaces after commas": (r"(?<=[\w}]),(?!\d{3})\s*(?!\\)", ",  "),
    "a box in the box": ("^(.*)$", r"\\boxed{\1}"),
}  # fmt: skip
REPLIES = (  # around the answer, in whole replies
    "We add both.\nSo the answer is $\\boxed{@}$.",
    "We add 1 and 2. The answer is $@$.",
)


@pytest.mark.parametrize(
    ("reply", "reference", "answer"),
    [
        ("So 3 + 4 = \\boxed{7}. Check: 7 - 4 = 3.", "7", "7"),
        ("It is \\boxed{2} or \\boxed{3}.", "2,3", "2,3"),
        ("It is \\boxed 5", "5", "5"),
        ("Put it in \\boxed{}: \\boxed{5}. I put it in \\boxed{}, as \\boxed asks.", "5", "5"),
        ("I should write \\boxed{}. 6*7 = 42.\nThe answer is 42.", "42", "42"),
        ("We add.\n#### 1,234\n\nQuestion: 99?", "1234", "1,234"),
        ("The answer is 66.\n\nQuestion: of 30 students?\nAnswer: 120", "66", "66"),
        ("<think>\\boxed{20}? no.</think> The answer is 18.", "18", "18"),
        ("<think>Perhaps \\boxed{18}, but", "18", None),
        ("There are 3 cars and 4.50 dollars.", "1", "4.50"),
        ("The answer is 20, but that forgets the tip. Adding 9 gives 29 in total.", "29", "29"),
        ("The answer is $\\frac{1}{2}$, for there are 8.", "\\frac12", "\\frac{1}{2}"),
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
    ],
)  # fmt: skip
def test_equal_answers_are_seen_whatever_their_spelling(a, b):
    assert equal(a, b)


WILD = "\\frac|{|\\boxed{|9,|answer is |1|x=|\\text{ |^{|$1$ ".split("|")


@pytest.mark.parametrize("unit", [*WILD, "9^{9^{9^{9}}}x"])
def test_replies_gone_wild_are_wrong_and_come_to_an_end(unit, monkeypatch):
    monkeypatch.setattr(answers, "SECONDS", 1)
    for reply in (unit * 300, f"\\boxed{{5 {unit * 90}1}}", unit * 9000):
        assert not equal("7x", extract(reply, "7x"))
    assert not equal("7x", unit) and not equal("7x", unit * 150)


@pytest.mark.parametrize("file", ["math/gsm8k/test.jsonl", "scalebio/eval_math/math_test.jsonl"])
def test_real_references_are_recognised_in_other_spellings(asset, file):
    problems = read_problems(asset(file))
    assert len(problems) == {"math": 1319, "scalebio": 5000}[file.partition("/")[0]]
    some = problems[::100]
    assert all(equal(p.answer, extract(p.solution, p.answer)) for p in some)
    references = [p.answer for p in some]
    for form, (pattern, new) in SPELLINGS.items():
        pairs = [(a, re.sub(pattern, new, a)) for a in references if re.search(pattern, a)]
        right = sum(equal(a, b) for a, b in pairs)
        assert right >= 0.97 * len(pairs) and (right == len(pairs) or form != "itself"), form
    for reply in REPLIES:
        right = sum(equal(a, extract(reply.replace("@", a), a)) for a in references)
        assert right >= 0.97 * len(references), reply
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
def test_a_bad_file_is_named_with_its_line(tmp_path, text, problem):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(ValueError, match=f"x.jsonl{problem}[^\n]*$"):
        read_problems(tmp_path / "x.jsonl")
