"""MT-Bench (Zheng et al., arXiv 2306.05685): 80 two-turn questions, and a judge that grades each of
the two answers from 1 to 10.

    questions = read_questions("question.jsonl", read_answers("gpt-4.jsonl"))
    judge = Judge("http://localhost:8000/v1", "some-model")
    scores, failure = grade(questions, answers, judge, Path("scores.jsonl"))

The judge is any endpoint that speaks OpenAI's chat completions. A score is kept with the messages
that it was asked by, and counts only while the same would be asked: a new answer is graded anew.
"""

from __future__ import annotations

import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlparse

from tqdm import tqdm

from grading.replies import Journal, Reply, convert_rows

TEMPERATURES = {  # of the answers, by category: FastChat's
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0,
    "reasoning": 0.0, "stem": 0.1, "humanities": 0.1,
}  # fmt: skip
WITH_REFERENCE = ("math", "reasoning", "coding")  # graded with a reference answer at hand
KEY = "JUDGE_API_KEY"  # the environment variable

SYSTEM = (
    "You grade replies of an AI assistant. Weigh how well a reply does what the user asked for: "
    "whether it is correct, helpful, relevant, deep enough, creative where that is wanted, and as "
    "detailed as it should be. Its length alone counts for nothing. Be impartial and strict."
)
FORMAT = (
    "Explain your judgement in a few sentences first. Then end with the grade, a number from 1 "
    "(useless) to 10 (could not be better), in double square brackets and exactly in this form: "
    "Grade: [[5]]"
)


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
        wanted = row["category"] in WITH_REFERENCE
        return Question(row["question_id"], row["category"], (first + "", second + ""),
                        tuple(own) if wanted else ())  # fmt: skip

    found = convert_rows(path, question, "question_id, category and two turns")
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


def judge_messages(q: Question, answers: tuple[str, str], turn: int) -> list[dict]:
    """What the judge is asked about the answer to turn 0 or 1."""
    parts = []
    for n in range(turn + 1):
        reference = "".join(q.reference[n : n + 1])
        told = {"question": q.turns[n], "reference answer": reference, "reply": answers[n]}
        parts += [f"<{title} {n + 1}>\n{text}\n</{title} {n + 1}>"
                  for title, text in told.items() if text or title == "reply"]  # fmt: skip
    task = ("Grade the assistant's reply to the question below." if turn == 0 else
            "Grade the assistant's second reply in the conversation below. The first is shown for "
            "context only.")  # fmt: skip
    if q.reference:
        task += (" The reference answer is by an expert: compare the reply with it, and find the "
                 "mistakes.")  # fmt: skip
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": "\n\n".join([f"{task} {FORMAT}", *parts])},
    ]


def parse_score(reply: str) -> float | None:
    """The last [[grade]] of a reply, or "Grade: [grade]"; None if there is none from 1 to 10."""
    found = re.findall(r"\[\[\s*(\d+(?:\.\d+)?)\s*(?:/\s*10)?\s*\]\]", reply)
    found = found or re.findall(r"(?i)\b(?:grade|rating|score)\W*\[(\d+(?:\.\d+)?)\]", reply)
    return float(found[-1]) if found and 1 <= float(found[-1]) <= 10 else None


class Unreachable(Exception):
    """The endpoint does not answer, or refuses: no use in going on."""


PASSING = {408, 409, 425, 429}  # statuses after which it is asked again; and 500 and above
READINGS = 3  # replies without a grade, after which a question is left for another time


@dataclass
class Judge:
    """An OpenAI-compatible endpoint, asked again after what may pass. Threads may share it."""

    url: str
    model: str
    timeout: float = 120.0  # seconds without a byte of the reply
    tries: int = 8  # of a request that the endpoint fails
    concurrency: int = 4
    first_wait: float = 1.0  # seconds, doubled from try to try, at most a minute
    stop: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self):
        """Raises ValueError for an address that is none."""
        from huggingface_hub import InferenceClient

        try:
            parts = urlparse(self.url)
            fine = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # of the port
            fine = False
        if not fine:
            raise ValueError(f"--judge-url {self.url}: expected the like of http://host:8000/v1")
        # Without a key the client would send the user's Hugging Face token to the endpoint.
        self.key = os.environ.get(KEY) or "no-key"
        self.client = InferenceClient(base_url=self.url, api_key=self.key, timeout=self.timeout)

    def ask(self, messages: list[dict], temperature: float) -> str:
        """The judge's reply. Raises Unreachable."""
        from huggingface_hub import errors

        reason, wait = "not asked any more", 0.0
        for attempt in range(self.tries):
            if self.stop.wait(wait):
                break
            wait = min(60, self.first_wait * 2**attempt)
            try:
                reply = self.client.chat_completion(
                    messages, model=self.model, max_tokens=2048, temperature=temperature
                )
                return reply.choices[0].message.content + ""
            except errors.HfHubHTTPError as error:
                status = error.response.status_code
                reason = f"{status} {error.response.reason_phrase} {error.server_message or ''}"
                if status not in PASSING and status < 500:
                    break
                asked = error.response.headers.get("retry-after", "")
                if re.fullmatch(r"\d+(\.\d+)?", asked):  # seconds
                    wait = min(float(asked), 3600)
            except (errors.HTTPError, OSError) as error:  # no connection, cut off, timed out
                reason = type(error).__name__
            except (KeyError, TypeError, AttributeError, IndexError, ValueError):
                reason = "its reply is not a chat completion"
        told = f"judge {self.url}: {reason} (try {attempt + 1} of {self.tries})"
        raise Unreachable(" ".join(told.replace(self.key, "***").split()))

    def score(self, messages: list[dict]) -> dict:
        """{score, reply, asked}; the score is None if no reply has a grade."""
        for asked in range(1, READINGS + 1):
            # A judge that is deterministic would repeat what could not be read.
            reply = self.ask(messages, temperature=0.7 if asked > 1 else 0.0)
            if (score := parse_score(reply)) is not None:
                break
        return {"score": score, "reply": reply, "asked": asked}


def grade(
    questions: list[Question], answers: dict[int | str, tuple[str, str]], judge: Judge, file: Path
) -> tuple[dict[tuple[int | str, int], float], str | None]:
    """Ask for every score that the file lacks, and append each as it comes. Returns all scores of
    these questions by (id, turn 0 or 1), and why it ended early, None if it did not."""
    asked = {(q.id, turn): judge_messages(q, answers[q.id], turn)
             for q in questions for turn in (0, 1)}  # fmt: skip
    failures = []

    def scores() -> dict[tuple[int | str, int], float]:
        """Of the rows that grade these answers as would be asked today."""
        keys = [(row["question_id"], row["turn"] - 1) for row in journal.rows]
        return {key: row["score"] for key, row in zip(keys, journal.rows, strict=True)
                if row["judge"] == judge.model and row["messages"] == asked.get(key)
                and row["score"] is not None}  # fmt: skip

    def one(key: tuple[int | str, int]) -> None:
        try:
            row = {"question_id": key[0], "turn": key[1] + 1, "judge": judge.model}
            journal.append({**row, **judge.score(asked[key]), "messages": asked[key]})
        except Unreachable as error:
            failures.append(str(error))
            judge.stop.set()

    with Journal(file) as journal, ThreadPoolExecutor(judge.concurrency) as pool:
        done = scores()
        try:
            waiting = [pool.submit(one, key) for key in asked if key not in done]
            for future in tqdm(waiting, disable=not waiting, mininterval=5):
                future.result()
        finally:  # after Ctrl-C what is being asked is still kept, what waits is not asked
            judge.stop.set()
        return scores(), (failures or [None])[0]
