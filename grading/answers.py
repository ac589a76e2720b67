"""Word problems with one right answer (GSM8K, MATH): the questions, how they are put, and whether a
reply is right.

    problem = read_problems("test.jsonl")[0]
    chat = as_conversation(problem.question, EXEMPLARS["gsm8k"])
    Grader().right(reply, problem.answer)

The final answer of a reply is what it puts in its last box, or after "####", or after "the answer
is", or its last number. Two answers are the same if they are once spelled alike (`normalise`) or
are the same number; if not, and the package math-verify is installed, if it finds them equal.
"""

from __future__ import annotations

import functools
import logging
import os
import re
from fractions import Fraction
from importlib.metadata import version
from typing import NamedTuple

from grading.journal import convert_rows
from hf.tokenizer import Turns

# What ScaleBiO's evaluation puts after a question.
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."

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


# ---------------------------------------------------------------------------------------------
# Questions


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
        else:
            question, solution = row["question"], CALCULATOR.sub("", row["answer"])
        if (answer := extract(solution)) is None:
            raise ValueError
        return Problem(question + "", solution, answer)

    keys = "question and answer, or problem and solution, with a final answer"
    return convert_rows(path, problem, keys)


CALCULATOR = re.compile(r"<<.*?>>")  # GSM8K's notes for a calculator, within its solutions


def as_conversation(
    question: str, exemplars: list[tuple[str, str]], instruction: str = INSTRUCTION
) -> Turns:
    """The conversation that ends in the question, after exemplars as turns of their own."""
    turns = []
    for asked, solution in exemplars:
        turns += [("user", f"{asked}\n{instruction}"), ("assistant", solution)]
    return [*turns, ("user", f"{question}\n{instruction}")]


# ---------------------------------------------------------------------------------------------
# The final answer of a reply

BOX = re.compile(r"\\(?:boxed|fbox)\s*")
SAID = re.compile(r"answer\**(?:\s+is|\s*[:=])\s*:?\**\s*([^\n]+)", re.I)
SENTENCE_END = re.compile(r"\.(?:\s|$)")
NUMBER = re.compile(r"-?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+)?|-?\.\d+")

# A number that opens a phrase: "$18 per day and …"
AMOUNT = re.compile(rf"(?:{NUMBER.pattern})(?=\s+(?!or\b|and\b|sqrt|pi\b)[A-Za-z]{{2,}})")


def extract(text: str) -> str | None:
    """The final answer as it is spelled, None if there is none."""
    if (answer := last_box(text)) is not None:
        return answer
    if "####" in text and (tail := text.rsplit("####", 1)[1].strip()):
        return tail.splitlines()[0]
    if said := SAID.findall(text):
        if amount := AMOUNT.match(said[-1]):
            return amount[0]
        return in_dollars(SENTENCE_END.split(said[-1])[0]).strip()
    numbers = NUMBER.findall(text)
    return numbers[-1] if numbers else None


def last_box(text: str) -> str | None:
    """The contents of the last \\boxed{…} that is closed; or of \\boxed 5, which has no braces."""
    starts, opened, end_of = [m.end() for m in BOX.finditer(text)], [], {}
    for i, char in enumerate(text if starts else ""):
        if char == "{":
            opened.append(i)
        elif char == "}" and opened:
            end_of[opened.pop()] = i
    for start in reversed(starts):
        if start in end_of:
            return text[start + 1 : end_of[start]]
        if bare := re.match(r"[^\s{}$]+", text[start:]):
            return bare[0]
    return None


def in_dollars(text: str) -> str:
    """The first formula of a sentence, if it has one; else the sentence."""
    text = text.replace("\\$", "")
    found = re.search(r"\$+([^$]+)\$+|\\\((.+?)\\\)|\\\[(.+?)\\\]", text)
    return next(filter(None, found.groups())) if found else text


# ---------------------------------------------------------------------------------------------
# One spelling for every answer

# Taken away, wherever they are.
NOTHING = re.compile(
    r"\\(?:left|right|displaystyle|textstyle|limits|bigl?|bigr?|Bigl?|Bigr?)(?![A-Za-z])"
    r"|\\[!,;:> $%]|\\q?quad(?![A-Za-z])|[$%~]|\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree|°|\*\*"
)
# What stands for something else: one name for each.
NAMES = [
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:text|textbf|textit|textrm|mbox|mathrm|mathbf|mathit|bm|operatorname)\s*"
                r"\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\\(?:cdot|times)(?![A-Za-z])|\*"), "*"),
    (re.compile(r"\\(?:le|leq|leqslant)(?![A-Za-z])|≤"), "<="),
    (re.compile(r"\\(?:ge|geq|geqslant)(?![A-Za-z])|≥"), ">="),
    (re.compile(r"\\(?:ne|neq)(?![A-Za-z])"), "!="),
    (re.compile(r"−|–"), "-"),
    (re.compile(r"√"), r"\\sqrt"),
    (re.compile(r"π|(?<![A-Za-z\\])pi(?![A-Za-z])"), r"\\pi"),
    (re.compile(r"∞|\\infinity"), r"\\infty"),
    (re.compile(r"(?<![A-Za-z\\])sqrt(?![A-Za-z])"), r"\\sqrt"),
    (re.compile(r"\\sqrt\s*([A-Za-z\d])"), r"\\sqrt{\1}"),
    (re.compile(r"\\sqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"\\frac\s*(\w)\s*(\w)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\s*(\w)\s*\{"), r"\\frac{\1}{"),
    (re.compile(r"(\\frac\s*\{[^{}]*\})\s*(\w)"), r"\1{\2}"),
]  # fmt: skip
UNIT = re.compile(  # words after a number; a power or a second unit may follow
    r"(?<=[\d)}])\s*(?:\s[A-Za-z]{2,}|\s(?:[mghls]|kg|cm|mm|km)\b|(?:cm|mm|km|kg|ft|mph|lbs?)\b)"
    r"(?:[A-Za-z\s./{}-]|\^\{?\d)*$"
)
LONGEST = 1000  # characters of an answer whose spelling is looked at
NAMED = re.compile(r"^[A-Za-z](?:_\{?\w+\}?|\([a-z]\))?\s*=\s*(?=[^=]+$)|^[a-z]\s*\\in\s*")
THOUSANDS = re.compile(r"^-?\d{1,3}(?:,\d{3})+(?:\.\d+)?$")
INNERMOST = re.compile(r"\\frac\{([^{}]*)\}\{([^{}]*)\}|\\sqrt\{([^{}]*)\}|([\^_])\{([^{}]*)\}")


@functools.lru_cache(maxsize=8192)
def normalise(answer: str) -> str:
    """An answer without what does not change it: spaces, delimiters, units, spellings of \\frac."""
    a = answer.strip()
    if len(a) > LONGEST:
        return "".join(a.split())
    if (boxed := last_box(a)) is not None:
        a = boxed
    a = re.sub(r"^\\[(\[]|\\[)\]]$", "", a.replace("\\\\", ";")).strip()
    a = re.sub(r"(?<=\d)(?:\{,\}|,\\!)(?=\d{3})", "", a)
    a = NOTHING.sub("", a)
    for pattern, name in NAMES:
        a = pattern.sub(name, a)
    a = a.strip().rstrip(" .,;:")
    a = NAMED.sub("", a.strip())
    a = UNIT.sub("", a.strip()).strip()
    a = re.sub(r"(\d)\s+(?=\d+/\d+$)", r"\1&", a)  # a mixed number
    while (simpler := INNERMOST.sub(_flat, a)) != a:
        a = simpler
    a = "".join(a.split()).rstrip(".")
    if THOUSANDS.match(a):
        a = a.replace(",", "")
    if re.fullmatch(r"\([A-Za-z]\)", a):  # a choice
        a = a[1]
    if re.fullmatch(r"[A-Za-z]{2,}", a):
        a = a.lower()
    if "," in a and not re.search(r"[()\[\]{}|]", a):  # a list without brackets has no order
        a = ",".join(sorted(a.split(",")))
    return re.sub(r"(?<!\d)\.(?=\d)", "0.", a)


def _flat(m: re.Match) -> str:
    """A command whose arguments hold no braces, written without its own."""
    top, bottom, root, mark, script = m.groups()
    if root is not None:
        return f"√({root})"
    if mark:
        return mark + (script if re.fullmatch(r"\w|-?\d+|\\\w+", script) else f"({script})")
    top = f"({top})" if re.search(r"(?<=.)[+-]|/", top) else top
    bottom = bottom if re.fullmatch(r"[\d.]+|\\?\w+|√\([^()]*\)", bottom) else f"({bottom})"
    mixed = "&" * bool(re.search(r"\d\s*$", m.string[: m.start()]) and re.match(r"\d", top))
    return f"{mixed}{top}/{bottom}"  # the sign & keeps 3 1/2 apart from 31/2


def number(a: str) -> Fraction | None:
    """The value of a normalised answer that is a number, a fraction or a mixed number."""
    if len(a) > LONGEST:
        return None
    m = re.fullmatch(r"([+-]?)\(?(?:(\d+)&)?([+-]?\d*\.?\d+|\d+\.)\)?(?:/(-?\d*\.?\d+))?", a)
    if not m or (m[4] and Fraction(m[4]) == 0):
        return None
    value = Fraction(m[2] or 0) + Fraction(m[3]) / Fraction(m[4] or 1)
    return -value if m[1] == "-" else value


def same(a: str, b: str) -> bool:
    """Whether two answers are spelled alike once normalised, or are the same number."""
    a, b = normalise(a), normalise(b)
    return a == b or (number(a) is not None and number(a) == number(b))


class Grader:
    """Compares answers, with math-verify where it is installed."""

    seconds = 2  # math-verify's time for one parse or comparison; it works by SIGALRM, which needs
    longest = 300  # the main thread. Characters of an answer that it is asked about

    def __init__(self, use_math_verify: bool = True):
        self.math_verify = None
        if use_math_verify:
            try:
                import math_verify
            except ImportError:
                return
            self.math_verify = math_verify
            logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it logs each timeout

    @property
    def method(self) -> str:
        """How answers are compared, in words."""
        if self.math_verify:
            return f"normalised strings, and math-verify {version('math-verify')} where they differ"
        return "normalised strings only (pip install math-verify to compare LaTeX by value)"

    def right(self, reply: str, answer: str) -> bool:
        """Whether the final answer of a reply is `answer`."""
        found = extract(reply)
        return found is not None and self.equal(answer, found)

    def equal(self, answer: str, found: str) -> bool:
        """Whether two final answers are the same; `answer` is the reference."""
        if same(answer, found):
            return True
        plain = number(normalise(answer)) is not None and number(normalise(found)) is not None
        if self.math_verify is None or plain or len(found) > self.longest:
            return False
        try:
            parsed = [
                self.math_verify.parse(f"${x.strip('$ ')}$", parsing_timeout=self.seconds)
                for x in (answer, found)
            ]
            return self.math_verify.verify(*parsed, timeout_seconds=self.seconds)
        except Exception:  # of sympy, on what is not mathematics: any kind
            return False
