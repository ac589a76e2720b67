"""Word problems with one right answer (GSM8K, MATH): the questions, how they are put, and whether a
reply is right. Needs the package math-verify.

    problem = read_problems("test.jsonl")[0]
    equal(problem.answer, extract(reply, problem.answer))

A reply is what follows its last </think>, up to the next question that the model asks itself. Its
answer is what it boxes last; else what it says to be the answer, or has after ####; else what it
ends with: its last number where the reference is one, or what math-verify finds. Two numbers are
compared as such, all else by math-verify, but for what it is too generous with.
"""

from __future__ import annotations

import logging
import os
import re
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from latex2sympy2_extended.math_normalization import extract_boxed_content, normalize_latex
from math_verify import LatexExtractionConfig, StringExtractionConfig, parse, verify

from grading.replies import convert_rows

logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it logs each timeout

EXEMPLARS = Path(__file__).parent / "exemplars"  # our own: NAME.jsonl for each command


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
        if (answer := extract(solution, answer="0, 0")) is None:  # all that it boxes
            raise ValueError
        return Problem(question + "", solution, answer)

    keys = "question and answer, or problem and solution, with a final answer"
    return convert_rows(path, problem, keys)


SECONDS = 5  # for one parse or comparison; math-verify keeps it by SIGALRM, in the main thread
DIGITS = 10_000  # that equal expressions share: by math-verify's 15, all below 1e-15 are the same
LATEX = [LatexExtractionConfig(boxed_match_priority=0)]
CHOICE = re.compile(r"\W*(?:(?:text|math)[a-z]*\W+)?[A-HJ-Z]\W*")  # a reference, of several
LETTERS = [StringExtractionConfig(tuple("ABCDEFGHJKLMNOPQRSTUVWXYZ"), lowercase=False)]

# Numbers as `plain` leaves them, and the words around them: prose before, units after.
NUMBER = (r"(?:(?<!\d)-)?(?:\d{1,3}(?:[, ]\d{3}){1,99}(?!\d)(?:\.\d{1,99})?"
          r"|\d{1,999}/[1-9]\d{0,99}(?![.\d])"
          r"|(?:\d{1,999}(?:\.\d{1,99})?|\.\d{1,99})(?:e-?\d\d?(?!\d))?)")  # fmt: skip
WORD = (r"(?:(?!(?:and|or|to|not|minus|negative|less|more|than|half|pi|sqrt|sin|cos|tan|log|ln"
        r"|times)\b)[A-Za-z]{2,}|[㐀-鿿¢]+)")  # fmt: skip
WHOLE = re.compile(rf"({NUMBER})\s*%?\s*{WORD}?(?:\s+{WORD})*(?:\^?[23])?")
# A clause that is a number, or one for so many.
OPENS = re.compile(rf"{WHOLE.pattern}\s*(?:[.,:](?!\d)|[;(，。；：（]|\b(?:for|per|each)\b|\Z)")
LAST = re.compile(rf"(?<!\d)(?<!\d\.)(?<![A-Za-qt-z]){NUMBER}")  # in "Rs18", not in "m2"
PROSE = re.compile(rf"\A\s*(?:(?:\\text\{{[^{{}}]*\}}\s*)+(?=\S)"
                   rf"|(?:{WORD}[\s:]+)+(?![A-Za-z]{{2}}))")  # fmt: skip

# Where a model goes on with a question of its own, or with the next turn of its template.
GOES_ON = re.compile(r"\n[\s#*]{0,9}(?:Question|Problem|Exercise|Instruction|Human|User|Q"
                     r"|问题|题目)\s*\d*(?:[\s*]*[:：]|(?<=\d)\**\s*\n)"
                     r"|<\|\w+\|>|</?s>|\[/?INST\]")  # fmt: skip
# A box that only repeats the instruction: without braces, or with nothing in them.
BLANK = r"(?:[^\w∞∅{}]|_|\b(?:text|[lc]?dots|q?quad|your|the|final|answer|here)\b)"
NO_BOX = re.compile(
    rf"\\(?:boxed|fbox)(?:\s*\{{(?:{BLANK}|\{{{BLANK}*\}})*\}}|(?!\s*\{{))", re.I
)  # fmt: skip
# What an answer follows; #### may also open a heading. What reasons for it, or what it is not,
# follow; and what takes it back.
SAID = re.compile(
    r"(?:\b(?:answer|réponse|respuesta|antwort)\b[^.\n]{0,40}?"
    r"(?:\b(?:is|are|be|est|es|ist|lautet)\b|[:=])|答案[是为]?)[\s*:：]*"
    r"|####\s*(?=[^\n]*\s*\Z|\W*\d(?:[\d,.]*\d)?[A-Za-z ]*$)", re.I | re.M
)  # fmt: skip
REASON = re.compile(r"\b(?:because|since|explanation|check|verif\w+|proof|not|rather than)\b"
                    r"|因为|解释|验证", re.I)  # fmt: skip
REVISED = re.compile(rf"\A(?:(?!{REASON.pattern})[^.!?\n])*\bbut\b"
                     r"|[.!?\n]\s*(?:But|However|Wait|Actually|Oops)\b|但是?|不过")
ASKS = re.compile(r"[^.!?。？\n]{0,300}[?？][\s*]{0,9}\Z")  # what comes last is a question
ENDS = re.compile(r"[.!?](?:\s|$)|[。！？\n]")  # of sentences


def extract(reply: str, answer: str) -> str | None:
    """The final answer of a reply as it is spelled, None if there is none. `answer`, the reference,
    tells whether it should be a number, a list, a letter, or something else."""
    text = re.split("</think(?:ing)?>", reply)[-1]
    if re.search("<think(?:ing)?>", text):  # cut off before it answered
        return None
    parts = (NO_BOX.sub("", part) for part in GOES_ON.split(text))  # the first may be a preface
    asked = (ASKS.sub("", part) or part for part in parts)
    return next(filter(None, (final(part, answer) for part in asked)), None)


def final(text: str, answer: str) -> str | None:
    """What a text boxes last, or says to be its answer, or else ends with."""
    boxed = last_box(text, answer)
    if CHOICE.fullmatch(answer):  # a formula in a box is none
        formula = boxed is None or re.search(r"[=+^]|\\(?!text|math)[a-z]", boxed)
        return letter(text if formula else boxed)
    if boxed:
        return boxed
    *_, said = [None, *SAID.finditer(text)]
    told, revised = text[said.end() :] if said else text, False
    if said and said[0][0] == "#":
        told = told.partition("\n")[0].strip()
    elif said:
        *before, told = REVISED.split(told)
        revised, told = bool(before), REASON.split(told)[0]
    if number(answer) is not None:
        first = ENDS.split(told)[0] if said and not revised else ""
        if opened := OPENS.match(plain(first)):
            return opened[1]
        bare = re.sub(r"(?<!\\)\([^()]*\)", "", first)
        return last_number(bare) or last_number(told) or last_number(text)
    if said and not re.search(r"\$|\\[(\[]", told):
        words = ENDS.split(told)[0].strip(" *")
        if words and not re.match(rf"\D*\d.*(?<![\\A-Za-z]){WORD}", PROSE.sub("", words)):
            return words
    return expression(f"answer: {told}") or expression(text)


SEVERAL = re.compile(r"[,;]|\\pm|\b(?:and|or)\b")


def last_box(text: str, answer: str) -> str | None:
    """The content of the last box; of the last few where the reference is a list."""
    starts = [box.start() for box in re.finditer(r"\\(?:boxed|fbox)", text)]
    if not starts:
        return None
    items = re.sub(r"\(.*?\)|\[.*?\]", "", answer)
    several = number(answer) is None and SEVERAL.search(items)
    found = extract_boxed_content(text if several else text[starts[-1] :])
    if several and not SEVERAL.search(found):
        found = extract_boxed_content(text, "all")
    return found.lstrip("{") if found.count("{") > found.count("}") else found


def last_number(text: str) -> str | None:
    """The last number; where LaTeX holds it, what math-verify makes of that."""
    spelt = plain(text)
    *_, last = [None, *LAST.finditer(spelt)]
    within = last and spelt[: last.start()].endswith(("{", "^", "_"))
    return (within and expression(text)) or (last and last[0])


def expression(text: str) -> str | None:
    """What math-verify extracts."""
    found = parse(text, LATEX, parsing_timeout=SECONDS) or parse(text, parsing_timeout=SECONDS)
    return str(found[-1]) if found else None


def letter(text: str) -> str | None:
    """Which of several choices a text names."""
    words = re.sub(r"\\[a-z]+|[^A-Za-z0-9.:,\n]", " ", text).strip()
    return (parse(words, LETTERS, parsing_timeout=SECONDS) or [None])[0]


def plain(text: str) -> str:
    """A text with its numbers as Python has them but for separators, and without currencies."""
    text = re.sub(r"(\s)\s+", r"\1", text.translate(SIGNS))
    text = re.sub(r"\\(?:text|mbox|math)[a-z]*\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"(?<=\d)\{,\}(?=\d\d?(?!\d))", ".", text)
    text = re.sub(r"(?<=\d)(?:\{,\}|,?\\!\s*|\\[,;: ]|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))", ",",
                  text)  # fmt: skip
    text = re.sub(r"(?<=\d)\s*(?:\\times|\\cdot|×|\*|x)\s*10\s*\^\s*\{?\s*(-?\d+)\}?", r"e\1", text)
    text = re.sub(r"((?<!\d)-)?\\?[$£€¥₹]\s*", r" \1", text)
    text = re.sub(r"(?i)(?<![\d)] )\b(?:minus|negative)\s+(?=[\d.])", "-", text)
    text = re.sub(r"(?<![\d.,/^_])(\d{1,9})\s+(\d{1,9})/([1-9]\d{0,8})(?![.\d])",
                  lambda m: f"{int(m[1]) * int(m[3]) + int(m[2])}/{m[3]}", text)  # fmt: skip
    text = re.sub(r"\A\s*(?:\\(?:approx|simeq|sim)\b|[~=])\s*", "", text)
    return re.sub(r"\\[!,;: ()]|\\(?=%)|\*\*", " ", text).strip().rstrip(" .")


def number(text: str) -> Fraction | None:
    """The value of a text that is a number, perhaps with a unit, and nothing else."""
    whole = WHOLE.fullmatch(plain(text))
    return Fraction(re.sub("[, ]", "", whole[1])) if whole else None


# What is also written without LaTeX.
SIGNS = str.maketrans({"√": "\\sqrt", "∞": "\\infty ", "·": "\\cdot ", "°": "^\\circ ", "²": "^2",
                       "³": "^3", "±": "\\pm ", "−": "-", "≈": "\\approx ", "½": " 1/2",
                       "¼": " 1/4", "¾": " 3/4"})  # fmt: skip
NAMES = re.compile(r"(?<![A-Za-z\\])(?=(?:pi|sqrt(?! ?\()|ln|log|sin|cos|tan)(?![A-Za-z]))")
# What math-verify does not weigh: a number's base, a unit's power; and in `equal` some brackets.
UNWEIGHED = re.compile(r"\d\w*\s*_\s*\{?\s*(\d+)|\\(?:text|mbox)\s*\{[^{}]*\}\s*\^\s*\{?(\d)")
DOTS = re.compile(r"\\[lc]?dots|…|\.\.\.")


def equal(answer: str, found: str | None) -> bool:
    """Whether two final answers are the same; `answer` is the reference."""
    if found is None:
        return False
    if CHOICE.fullmatch(answer):
        return letter(answer) == letter(found)
    answer, found = answer.rstrip(" ."), extract_boxed_content(found).rstrip(" .").translate(SIGNS)
    a, b = plain(answer), plain(found)
    if a == b or a.lower() == b.lower() and "\\text" in answer:
        return True
    found = PROSE.sub("", NAMES.sub(r"\\", found))
    a, b = (sorted(UNWEIGHED.findall(text)) for text in (answer, found))
    open_ends = {text.count("[") - text.count("]") for text in (answer, found) if "," in text}
    if a and b and a != b or len(open_ends) > 1:
        return False
    a, b = number(answer), number(found)
    if a is not None and b is not None:
        shares = ("%" in found) - ("%" in answer)  # 45% is 45, as of units, and 0.45
        return a == b or shares != 0 and a == b / Fraction(100) ** shares
    other = [plain(text) for text, x in ((answer, a), (found, b)) if x is None]
    if len(other) == 1 and re.search(r"\d\D{0,99}\b(?:and|or)\b\D{0,99}\d", other[0]):
        return False  # several numbers are not one
    if a is not None and "," in found:  # 100,200 may be a number, and a list
        answer = answer.replace(",", ", ")
    if DOTS.search(answer + found):
        a, b = (normalize_latex(DOTS.sub(" ... ", text), LATEX[0].normalization_config).split()
                for text in (answer, found))  # fmt: skip
        return "".join(a) == "".join(b)
    found = re.sub(r"\\\\\[\w+\]", r"\\\\", found)  # [2pt] after the row of a matrix
    gold, other = (parse(f"\\boxed{{{text}}}", LATEX, parsing_timeout=SECONDS)
                   for text in (answer, found))  # fmt: skip
    return verify(gold, other, numeric_precision=DIGITS, allow_set_relation_comp=True,
                  timeout_seconds=SECONDS)  # fmt: skip
