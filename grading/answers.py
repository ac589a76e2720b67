"""Word problems with one right answer (GSM8K, MATH): the questions, how they are put, and whether a
reply is right. Needs the package math-verify.

    problem = read_problems("test.jsonl")[0]
    equal(problem.answer, extract(reply, problem.answer))

The answer of a reply is what it boxes last; else the line after its last "####"; and of that line,
or else of the whole reply, the last number where the answer is a number, or what math-verify finds.
Two numbers are compared as such, all else by math-verify.
"""

from __future__ import annotations

import logging
import os
import re
from decimal import Decimal
from typing import NamedTuple

from latex2sympy2_extended.math_normalization import extract_boxed_content
from math_verify import LatexExtractionConfig, parse, verify

from grading.replies import convert_rows

logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it logs each timeout

EXEMPLARS = {
    "gsm8k": [
        ("A baker fills 4 trays with 12 rolls each and sells 29 rolls. How many rolls are left?",
         "The baker makes 4 * 12 = 48 rolls.\nAfter the sale 48 - 29 = 19 rolls are left.\n"
         "The answer is \\boxed{19}."),
        ("Lena reads 15 pages on Monday and twice as many on Tuesday. Her book has 120 pages. "
         "How many pages does she still have to read?",
         "On Tuesday Lena reads 2 * 15 = 30 pages.\nTogether she has read 15 + 30 = 45 pages.\n"
         "She still has to read 120 - 45 = 75 pages.\nThe answer is \\boxed{75}."),
        ("A taxi asks $3 to start and $2 for each kilometre. Omar pays with a $50 note and gets "
         "$25 back. How many kilometres did he ride?",
         "Omar paid 50 - 25 = 25 dollars.\nOf these 25 - 3 = 22 dollars were for the distance.\n"
         "He rode 22 / 2 = 11 kilometres.\nThe answer is \\boxed{11}."),
        ("A tank of 200 litres is 30% full. A pump adds 7 litres a minute. After how many minutes "
         "is it full?",
         "The tank holds 0.30 * 200 = 60 litres.\nIt lacks 200 - 60 = 140 litres.\n"
         "The pump needs 140 / 7 = 20 minutes.\nThe answer is \\boxed{20}."),
    ],
    "math": [
        ("What is the sum of all integers $n$ with $|2n - 3| \\le 5$?",
         "The condition says $-5 \\le 2n - 3 \\le 5$, so $-1 \\le n \\le 4$. The integers are "
         "$-1, 0, 1, 2, 3, 4$, and their sum is $9$. The answer is $\\boxed{9}$."),
        ("A fair die is thrown twice. What is the probability that the second number is greater "
         "than the first?",
         "Of the $36$ outcomes $6$ show equal numbers. By symmetry the second number is greater in "
         "half of the other $30$. The probability is $\\frac{15}{36} = \\frac{5}{12}$. The answer "
         "is $\\boxed{\\frac{5}{12}}$."),
        ("Simplify $\\sqrt{50} - \\sqrt{8}$.",
         "We have $\\sqrt{50} = 5\\sqrt{2}$ and $\\sqrt{8} = 2\\sqrt{2}$. The difference is "
         "$3\\sqrt{2}$. The answer is $\\boxed{3\\sqrt{2}}$."),
        ("Factor $x^3 - 4x$ completely.",
         "Take out $x$: $x^3 - 4x = x(x^2 - 4)$. The second factor is a difference of squares, so "
         "the answer is $\\boxed{x(x - 2)(x + 2)}$."),
    ],
}  # fmt: skip


class Problem(NamedTuple):
    question: str
    solution: str  # worked out, as the file has it
    answer: str  # the final answer in it


def read_problems(path: str | os.PathLike) -> list[Problem]:
    """The problems of a JSON or JSON Lines file with GSM8K's keys (question, answer) or MATH's
    (problem, solution). ValueError with a line "path:line: …" for each that is not one."""

    def problem(row: dict) -> Problem:
        if "problem" in row:
            question, solution = row["problem"], row["solution"]
        else:  # without GSM8K's notes for a calculator
            question, solution = row["question"], re.sub("<<.*?>>", "", row["answer"])
        if (answer := extract(solution, answer="0")) is None:
            raise ValueError
        return Problem(question + "", solution, answer)

    keys = "question and answer, or problem and solution, with a final answer"
    return convert_rows(path, problem, keys)


SECONDS = 5  # for one parse or comparison; math-verify keeps it by SIGALRM, in the main thread
LATEX = [LatexExtractionConfig(boxed_match_priority=0)]
NUMBER = re.compile(r"(?:(?<!\d)-)?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:e\d\d?)?"
                    r"|(?:(?<!\d)-)?\$?\.\d+")  # fmt: skip
NEXT_QUESTION = re.compile(r"\n\s*(?:#+ *)?(?:Question|Problem|Instruction|Q):")
# A box that only repeats the instruction: empty, or without braces.
NO_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:\{[\W_]*\}|(?!\s*\{))")


def extract(reply: str, answer: str) -> str | None:
    """The final answer of a reply as it is spelled, None if there is none. `answer`, the reference,
    tells whether it should be a number."""
    text = reply.rpartition("</think>")[2]
    if "<think>" in text:  # cut off before it answered
        return None
    text = NO_BOX.sub("", NEXT_QUESTION.split(text)[0])
    if re.search(r"\\(?:boxed|fbox)", text):
        return extract_boxed_content(text)
    if "####" in text:
        text = text.rpartition("####")[2].strip().partition("\n")[0]
    if number(answer) is not None:
        return (NUMBER.findall(text) or [None])[-1]
    found = parse(text, LATEX, parsing_timeout=SECONDS) or parse(text, parsing_timeout=SECONDS)
    return str(found[-1]) if found else None


def number(answer: str) -> Decimal | None:
    """The value of an answer that is a number and nothing else."""
    whole = NUMBER.fullmatch(re.sub(r"(?<=\d) (?=\d{3}\b)", "", answer.strip()))
    return Decimal(re.sub("[$,]", "", whole[0])) if whole else None


def equal(answer: str, found: str | None) -> bool:
    """Whether two final answers are the same; `answer` is the reference."""
    if found is None:
        return False
    a, b = number(answer), number(found)
    if a is not None and b is not None:
        return a == b
    gold, other = (
        parse(f"\\boxed{{{text}}}", LATEX, parsing_timeout=SECONDS) for text in (answer, found)
    )
    # With the default of 15 digits all numbers below 1e-15 would be the same.
    return verify(gold, other, numeric_precision=50, allow_set_relation_comp=True,
                  timeout_seconds=SECONDS)  # fmt: skip
