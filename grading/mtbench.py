"""MT-Bench (Zheng et al., arXiv 2306.05685): 80 two-turn questions, and a judge that grades each of
the two answers from 1 to 10.

    questions = read_questions("question.jsonl", read_answers("gpt-4.jsonl"))
    judge = Judge("http://localhost:8000/v1", "some-model")
    scores, failure = grade(questions, answers, judge, Path("scores.jsonl"))

The judge is any endpoint that speaks OpenAI's chat completions. A score is kept with the messages
that it was asked by, and counts only while the same would be asked: a new answer is graded anew.
Nothing is scored from a reply that was cut.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import AbstractHTTPHandler, HTTPRedirectHandler, Request, build_opener

from tqdm import tqdm

from grading.replies import Journal, Reply, convert_rows
from hf import parse_json

TEMPERATURES = {  # of the answers, by category: FastChat's
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0,
    "reasoning": 0.0, "stem": 0.1, "humanities": 0.1,
}  # fmt: skip
WITH_REFERENCE = ("math", "reasoning", "coding")  # graded with a reference answer at hand
KEY = "JUDGE_API_KEY"  # the environment variable

PROMPTS = Path(__file__).with_name("judge_prompts.jsonl")  # our own


class Question(NamedTuple):
    id: int | str
    category: str
    turns: tuple[str, str]
    reference: tuple[str, ...]  # a reference answer to each turn, or nothing


def read_questions(path: str | os.PathLike, references: dict | None = None) -> list[Question]:
    """Rows {question_id, category, turns, reference?}; the hub's copies say `prompt` for turns.

    references: from `read_answers`, instead of those beside the questions. ValueError with a line
    "path:line: …" per problem.
    """

    def question(row: dict) -> Question:
        first, second = row["turns"] if "turns" in row else row["prompt"]
        own = (references or {}).get(row["question_id"], row.get("reference")) or ()
        if isinstance(own, str) or isinstance(row.get("turns", row.get("prompt")), str):
            raise ValueError("a text where there should be one for each turn")
        wanted = row["category"] in WITH_REFERENCE
        return Question(row["question_id"], row["category"] + "", (first + "", second + ""),
                        tuple(text + "" for text in own) if wanted else ())  # fmt: skip

    found = convert_rows(path, question, "question_id, category and two turns, or has a reference "
                         "that is no list of texts")  # fmt: skip
    if len({q.id for q in found}) < len(found):
        raise ValueError(f"{path}: a question_id is used twice")
    return found


def read_answers(path: str | os.PathLike) -> dict[int | str, tuple[str, str]]:
    """{question_id: both answers} from rows {question_id, choices: [{turns}]}."""

    def answer(row: dict) -> tuple:
        first, second = row["choices"][0]["turns"]
        return row["question_id"], (first + "", second + "")

    return dict(convert_rows(path, answer, "question_id and choices[0].turns"))


def as_row(replies: list[Reply]) -> dict:
    """Replies to the turns of a question as `read_answers` reads them."""
    turns, _, ends = zip(*replies, strict=True)
    return {"choices": [{"index": 0, "turns": turns}], "ends": ends}


def read_prompts(path: str | os.PathLike) -> dict[str, tuple[str, str]]:
    """{name: (system prompt, template)} of a file like FastChat's judge_prompts.jsonl. ValueError
    with a line "path:line: …" per problem."""

    def prompt(row: dict) -> tuple:
        return row["name"], (row["system_prompt"] + "", row["prompt_template"] + "")

    prompts = dict(convert_rows(path, prompt, "name, system_prompt and prompt_template"))
    try:
        for reference in ((), ("", "")):
            for turn in (0, 1):
                judge_messages(Question(0, "", ("", ""), reference), ("", ""), turn, prompts)
    except KeyError as error:
        raise ValueError(f"{path}: lacks, or does not know, {error}") from None
    return prompts


@lru_cache
def own_prompts() -> dict[str, tuple[str, str]]:
    return read_prompts(PROMPTS)


def judge_messages(
    q: Question, answers: tuple[str, str], turn: int, prompts: dict | None = None
) -> list[dict]:
    """What the judge is asked about the answer to turn 0 or 1, by prompts of `read_prompts`, ours
    unless given. KeyError for a prompt that is missing, or a field of it that is unknown."""
    prompts = prompts or own_prompts()
    answers = [a.rpartition("</think>")[2].strip() for a in answers]  # not what a model thinks
    system, user = prompts[f"single{'-math' * bool(q.reference)}-v1{'-multi-turn' * turn}"]
    told = {"question": q.turns, "answer": answers, "ref_answer": (*q.reference, "", "")}
    told = {f"{name}_{n + 1}": texts[n] for name, texts in told.items() for n in (0, 1)}
    told |= {"question": q.turns[0], "answer": answers[0]}
    user = re.sub(r"\{(\w+)\}", lambda field: told[field[1]], user)
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


NAMED, VALUE = r"(?:grade|rating|score)\W{0,9}?", r"(\d+(?:\.\d*)?)\s{0,9}(?:/\s{0,9}10)?\s{0,9}"
GRADES = (  # the first that a reply has: named so, bare, named so in single brackets
    rf"\b{NAMED}\[\[\s{{0,9}}{VALUE}\]\]|\[\[\s{{0,9}}{NAMED}{VALUE}\]\]",
    rf"\[\[\s{{0,9}}{VALUE}\]\]()",
    rf"\b{NAMED}\[\s{{0,9}}{VALUE}\]()",
)
SCALE = (r"(?i)\b(?:from|between)\W{0,9}\[\[\d+\]\]\W{0,9}(?:to|and)\W{0,9}\[\[\d+\]\]"
         r"|(?:\bout of|/)\W{0,9}\[\[\d+\]\]")  # fmt: skip
QUOTE = r"""["“”'‘’`«»]"""
QUOTED = rf"{QUOTE}[^\n\"“”'‘’`«»]*\]\]\W{{0,3}}?{QUOTE}"


def parse_score(reply: str, judged: str = "") -> float | None:
    """The grade that a judge's reply gives last, None if there is none from 1 to 10. What the text
    that is judged spells itself is not the judge's, nor is what is quoted beside a grade."""
    text, own = reply.rpartition("</think>")[2].replace("\\", ""), squeezed(judged)
    if "<think>" in text:  # cut off before it graded
        return None
    whole = re.sub(SCALE, "…", text)
    for part in (re.sub(QUOTED, "…", whole), whole):
        for form in GRADES:
            found = [m for m in re.finditer(form, part, re.I) if squeezed(m[0]) not in own]
            if found:
                value = float(found[-1][1] or found[-1][2])
                return value if 1 <= value <= 10 else None
    return None


def squeezed(text: str) -> str:
    return "".join(text.replace("\\", "").lower().split())


class Unreachable(Exception):
    """The endpoint does not answer, or refuses: no use in going on."""


class Refused(Unreachable):
    """It does not answer this question, but may answer others."""


class NoRedirects(HTTPRedirectHandler):
    """The key goes to the address that the user named, and to no other."""

    def redirect_request(self, *_):
        return None


def limited(do_open: Callable, kind: type, request: Request, **rest) -> HTTPResponse:
    """urllib's `do_open` by a connection that is cut after PATIENCE timeouts, whatever still comes:
    headers, or answers before the answer, may be endless."""

    cuts = []

    class Connection(kind):
        def connect(self):
            super().connect()
            cuts.append(cut := threading.Timer(PATIENCE * self.timeout, shut, [self.sock]))
            cut.daemon = True
            cut.start()

    reply = do_open(Connection, request, **rest)
    for cut in cuts:
        weakref.finalize(reply, cut.cancel)
    return reply


def shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it is closed
        connection.shutdown(socket.SHUT_RDWR)


OF_QUESTION = {400, 413, 422}  # statuses of one that is too long, or against a filter
HOPELESS = 5  # refusals of the first questions, after which no other is asked
PASSING = {408, 409, 425, 429}  # statuses after which it is asked again; and 500 and above
READINGS = 3  # replies without a grade, after which a question is left for another time
BYTES = 16_000_000  # of a reply
PATIENCE = 10  # so many timeouts may all of a reply take
INSTEAD = {"max_tokens": "with max_completion_tokens", "temperature": "without"}
CUT = ("length", "content_filter")  # why it ended, where it did not come to its end


@dataclass
class Judge:
    """An OpenAI-compatible endpoint, asked again after what may pass. Threads may share it."""

    url: str
    model: str
    timeout: float = 120.0  # seconds without a byte of the reply; all of it may take PATIENCE times
    tries: int = 8  # of a request that the endpoint fails
    concurrency: int = 4
    max_tokens: int = 2048
    temperature: float = 0.0
    prompts: dict | None = None  # from `read_prompts`, instead of our own
    first_wait: float = 1.0  # seconds, doubled from try to try, at most a minute
    stop: threading.Event = field(default_factory=threading.Event)
    refused: set[str] = field(default_factory=set)  # parameters that this endpoint does not take
    notes: set[str] = field(default_factory=set)  # what the user should know of how it was asked

    def __post_init__(self):
        """Raises ValueError for an address that is none."""
        try:
            parts = urlsplit(self.url)
            fine = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # of the port
            fine = False
        if not fine:
            raise ValueError(f"--judge-url {self.url}: expected the like of http://host:8000/v1")
        path = parts.path.rstrip("/")
        if not path.endswith("/chat/completions"):
            path = (path or "/v1") + "/chat/completions"
        self.address = parts._replace(path=path).geturl()
        self.key = os.environ.get(KEY, "").strip() or "no-key"
        for what, text in ("--judge-url", self.address), (KEY, self.key):
            if not (text.isascii() and text.isprintable()):
                raise ValueError(f"{what}: has characters that are not printable ASCII")
        self.opener = build_opener(NoRedirects)
        for handler in self.opener.handlers:
            if isinstance(handler, AbstractHTTPHandler):
                handler.do_open = partial(limited, handler.do_open)

    def post(
        self, messages: list[dict], temperature: float, without: frozenset[str] = frozenset()
    ) -> tuple[str, str]:
        """(reply, why it ended). Asks again without a parameter that is refused by its name."""
        without |= self.refused
        limit = "max_completion_tokens" if "max_tokens" in without else "max_tokens"
        body = {"model": self.model, "messages": messages, limit: self.max_tokens}
        if "temperature" not in without:
            body["temperature"] = temperature
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json",
                   "User-Agent": "ScaleBiO"}  # fmt: skip
        request = Request(self.address, json.dumps(body).encode(), headers)
        try:
            with self.opener.open(request, timeout=self.timeout) as reply:
                text = reply.read(BYTES)
            choice = parse_json(text)["choices"][0]
        except HTTPError as error:
            error.said = error.fp.read1(10_000).decode(errors="replace")
            new = {name for name in INSTEAD.keys() & body.keys()
                   if re.search(rf"\b{name}\b", error.said)}  # fmt: skip
            if error.code not in (400, 422) or not new:
                raise
            answer = self.post(messages, temperature, without | new)  # it was this, if that is
            self.refused |= new
            self.notes |= {f"the judge refuses {n}: it was asked {INSTEAD[n]}" for n in new}
            return answer
        said = choice["message"].get("content") or ""  # null where nothing came of it
        if isinstance(said, list):
            said = "".join(part.get("text", "") for part in said)
        return said + "", choice.get("finish_reason")

    def ask(self, messages: list[dict], temperature: float) -> tuple[str, str]:
        """The judge's reply, "" for none, and why it ended. Raises Unreachable, or Refused."""
        reason, wait, kind = "not asked any more", 0.0, Unreachable
        for attempt in range(self.tries):
            if self.stop.wait(wait):
                break
            wait = min(60, self.first_wait * 2**attempt)
            try:
                return self.post(messages, temperature)
            except HTTPError as error:
                reason = f"{error.code} {error.reason} {error.headers.get('location', error.said)}"
                if error.code not in PASSING and error.code < 500:
                    kind = Refused if error.code in OF_QUESTION else Unreachable
                    break
                asked = error.headers.get("retry-after", "")
                if re.fullmatch(r"\d+(\.\d+)?", asked):  # seconds
                    wait = min(float(asked), 3600)
            except (OSError, HTTPException) as error:  # no connection, cut off, timed out
                reason = str(getattr(error, "reason", None) or error) or type(error).__name__
            except (KeyError, TypeError, AttributeError, IndexError, ValueError):
                reason = "its reply is not a chat completion, or does not end"
        told = f"judge {self.url}: {reason[:300]} (try {attempt + 1} of {self.tries})"
        raise kind(" ".join(told.replace(self.key, "***").split()))

    def score(self, messages: list[dict], judged: str) -> dict:
        """{score, reply, end, asked}; the score is None if no reply has a grade."""
        for asked in range(1, READINGS + 1):
            # A judge that is deterministic would repeat what could not be read.
            warm = self.temperature or 0.7
            reply, end = self.ask(messages, warm if asked > 1 else self.temperature)
            score = None if end in CUT else parse_score(reply, judged)
            if score is not None:
                break
            if end in CUT:
                self.notes.add("of replies of the judge that were cut, by a filter or at "
                               f"--judge-max-tokens {self.max_tokens}, none counts")  # fmt: skip
        return {"score": score, "reply": reply, "end": end, "asked": asked}


def grade(
    questions: list[Question], answers: dict[int | str, tuple[str, str]], judge: Judge, file: Path
) -> tuple[dict[tuple[int | str, int], float], str | None]:
    """Ask for every score that the file lacks, and append each as it comes. Returns all scores of
    these questions by (id, turn 0 or 1), and why it ended early, None if it did not."""
    asked = {(q.id, turn): judge_messages(q, answers[q.id], turn, judge.prompts)
             for q in questions for turn in (0, 1)}  # fmt: skip
    failures = []

    def scores() -> dict[tuple[int | str, int], float]:
        """Of the rows that grade these answers as would be asked today."""
        keys = [(row["question_id"], row["turn"] - 1) for row in journal.rows]
        return {key: row["score"] for key, row in zip(keys, journal.rows, strict=True)
                if row["judge"] == judge.model and row["messages"] == asked.get(key)
                and row.get("temperature", 0) == judge.temperature
                and row["score"] is not None}  # fmt: skip

    def one(key: tuple[int | str, int]) -> None:
        try:
            row = {"question_id": key[0], "turn": key[1] + 1, "judge": judge.model,
                   "temperature": judge.temperature}  # fmt: skip
            judged = " ".join(answers[key[0]][: key[1] + 1])
            journal.append({**row, **judge.score(asked[key], judged), "messages": asked[key]})
        except Unreachable as error:
            if judge.stop.is_set():
                return
            refused = isinstance(error, Refused)
            failures.append((refused, str(error)))
            if not refused or len(failures) == HOPELESS and len(journal.rows) == before:
                judge.stop.set()

    with Journal(file) as journal, ThreadPoolExecutor(judge.concurrency) as pool:
        done, before = scores(), len(journal.rows)
        try:
            waiting = [pool.submit(one, key) for key in asked if key not in done]
            for future in tqdm(waiting, disable=not waiting, mininterval=5):
                future.result()
        finally:  # after Ctrl-C what is being asked is still kept, what waits is not asked
            judge.stop.set()
        _, why = min(failures, key=lambda failure: failure[0], default=(False, None))
        return scores(), why
