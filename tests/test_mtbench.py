"""MT-Bench: questions, what the judge is asked, its failures, and the table.

The judge is an HTTP server on loopback that answers in the format of OpenAI's chat completions, and
fails in every way there is.
"""

import contextlib
import gc
import json
import re
import statistics
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import evaluate
from grading import mtbench
from grading.mtbench import Judge, Question
from grading.replies import read
from tests.forked import write_model
from tests.test_evaluate import on_two_ranks

QUESTIONS = [
    Question(n, category, (f"Q{n} first?", f"Q{n} second?"), reference)
    for n, category, reference in (
        (81, "writing", ()), (82, "writing", ()), (101, "reasoning", ("R one", "R two")),
        (111, "math", ("M one", "")), (121, "coding", ()), (151, "humanities", ()),
    )
]  # fmt: skip
ANSWERS = {q.id: (f"first of {q.id}", f"second of {q.id} [[10]]") for q in QUESTIONS}


def right_score(key: tuple[int, int]) -> int:
    return 1 + (key[0] + 3 * key[1]) % 10


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = body["messages"][-1]["content"]
        key = int(re.search(r"Q(\d+) first", content)[1]), 1 + ("<reply 2>" in content)
        server = self.server
        with server.lock:
            n = server.asked[key]
            server.asked[key] += 1
            server.log.append((key, time.monotonic(), self.path, body, dict(self.headers)))
            refused = [name for name in server.refuses if name in body]
            server.asked[key] -= bool(refused)
        fault = [*server.faults.get(key, []), *[server.fault] * (n + 1)][n]
        if fault == "late":
            time.sleep(2.5)  # longer than the client waits
        if refused:
            said = f"'{refused[0]}' is not supported with this model. {server.refuses[refused[0]]}"
            self.reply(400, {"error": {"message": said}})
        elif fault == "gone":
            self.connection.close()
            self.close_connection = True
        elif fault == "endless":
            self.reply(200, {}, {"Content-Length": str(10**12)})
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(b" " * 65536)
        elif fault == "hesitant":
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        elif fault == "elsewhere":
            self.reply(307, {}, {"Location": f"http://localhost:{server.server_port}/v1/x"})
        elif fault == "cut":
            self.reply(200, {}, {"Content-Length": "1000"})
            self.close_connection = True
        elif isinstance(fault, int):
            said = f"no, for max_tokens: {self.headers.get('Authorization', '')}"
            error = {"error": {"message": said}}
            self.reply(fault, error, {"Retry-After": "0.4"} if fault == 429 else {})  # seconds
        elif isinstance(fault, dict):
            self.reply(200, fault)
        else:
            graded = f"[[2]] was it at first. Grade: [[{right_score(key)}]]"
            self.reply(200, completion(graded if fault in (None, "late") else fault))

    def reply(self, status: int, body: dict, headers: dict | None = None) -> None:
        sent = json.dumps(body).encode()
        with contextlib.suppress(OSError):  # the client did not wait
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(sent))} | (headers or {})).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(sent)

    def log_message(self, *_):
        pass


def completion(text: str | list | None, end: str = "stop", **message) -> dict:
    message |= {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": end}
    return {"id": "x", "object": "chat.completion", "created": 1, "model": "m",
            "choices": [choice], "usage": {}}  # fmt: skip


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.lock, server.asked, server.log = threading.Lock(), Counter(), []
    server.faults, server.fault, server.refuses = {}, None, {}
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def ask(server, tmp_path, monkeypatch):
    """ask(**of the judge): grade all questions; returns why it ended early, and the rows."""
    monkeypatch.setenv("HF_TOKEN", "hf_not_for_judges")
    monkeypatch.setenv(mtbench.KEY, "sk-secret")

    def grade(answers=ANSWERS, model="the-judge", **options):
        options = {"timeout": 2, "first_wait": 0.01, "tries": 4, "concurrency": 3} | options
        file = tmp_path / "scores.jsonl"
        judge = grade.judge = Judge(server.url, model, **options)
        _, why = mtbench.grade(QUESTIONS, answers, judge, file)
        return why, read(file)

    return grade


EVERY = {(q.id, turn) for q in QUESTIONS for turn in (1, 2)}


def scored(rows: list[dict]) -> dict:
    """{(question, turn): score}; no pair may be scored twice."""
    pairs = [(row["question_id"], row["turn"]) for row in rows if row["score"] is not None]
    assert len(pairs) == len(set(pairs))
    return {(row["question_id"], row["turn"]): row["score"] for row in rows if row["score"]}


def test_no_failure_loses_a_score_or_doubles_it(server, ask):
    server.faults = {
        (81, 1): ["I cannot grade this.", "Grade: [[eleven]]"],
        (81, 2): ["Grade: [[11]]"],
        (82, 1): [429, 429],
        (82, 2): [500, 503, 502],
        (101, 1): ["late"],
        (101, 2): ["cut"],
        (111, 1): ["gone", "late", 429],
        (111, 2): [{"choices": []}, {"error": "busy"}],
        (121, 1): [{**completion(""), "choices": None}],
        (121, 2): ["", "no", 500],
        (151, 1): ["?"] * 3,  # then it is left for the next time
    }
    why, rows = ask()
    assert why is None and scored(rows).keys() == EVERY - {(151, 1)} and len(rows) == len(EVERY)
    assert [row["reply"] for row in rows if row["score"] is None] == ["?"]
    assert {row["asked"] for row in rows} == {1, 2, 3}
    before = {*threading.enumerate()}
    why, rows = ask()
    assert why is None and scored(rows) == {key: right_score(key) for key in EVERY}
    gc.collect()
    new = {*threading.enumerate()} - before  # no timer goes on that would cut a connection
    assert all(t.finished.wait(5) for t in new if isinstance(t, threading.Timer))
    assert server.asked == {key: 1 + len(server.faults.get(key, [])) for key in EVERY}
    # After a 429 it is not asked again before the time that it names.
    first, second, third = (at for key, at, *_ in server.log if key == (82, 1))
    assert second - first > 0.35 and third - second > 0.35


@pytest.mark.parametrize("fault", [401, 404, 500, "gone", {"html": "not a judge"}])
def test_a_judge_that_is_out_of_reach_ends_the_run_and_the_next_goes_on(server, ask, fault):
    graded = {(81, 1), (81, 2), (82, 1)}
    server.faults, server.fault = dict.fromkeys(graded, [None]), fault
    why, rows = ask(tries=2, concurrency=1)
    assert "\n" not in why and "sk-secret" not in why and server.url in why
    assert scored(rows).keys() == graded
    assert sum(server.asked.values()) == 3 + (1 if fault in (401, 404) else 2)
    before, server.fault = server.asked.copy(), None
    why, rows = ask()
    assert why is None and scored(rows) == {key: right_score(key) for key in EVERY}
    assert server.asked - before == Counter(EVERY - graded)


def test_a_question_that_the_judge_refuses_is_left_for_the_next_time_and_no_other(server, ask):
    """Whatever name is in the refusal: it goes without, too."""
    server.faults = {(81, 1): [413], (101, 2): [400, 400], (121, 1): [422, 422]}
    server.faults |= {(81, 2): [401]}
    why, rows = ask(concurrency=1)
    assert "401" in why and rows == []  # what ended it, not what it left
    del server.faults[81, 2]
    server.asked.clear()
    why, rows = ask(concurrency=1)
    assert "413" in why and scored(rows).keys() == EVERY - server.faults.keys()
    assert not ask.judge.notes and not ask.judge.refused
    why, rows = ask()
    assert why is None and scored(rows) == {key: right_score(key) for key in EVERY}
    server.fault = 400  # to all that it is asked
    before = sum(server.asked.values())
    assert "400" in ask(model="no such model", concurrency=1)[0]
    assert sum(server.asked.values()) - before == 2 * mtbench.HOPELESS


def test_a_judge_that_reasons_and_is_cut_scores_nothing_by_half(server, ask):
    server.faults = {
        (81, 1): [completion("<think>A rough start would be [[3]], but let me", "length")],
        (81, 2): [completion(None, "length"), completion("<think>no [[3]]", "length")],
        (82, 1): [completion("Clear so far. Grade: [[3]]", "length")] * 3,
        (82, 2): [completion(None)] * 3,
        (101, 1): [f"<think>perhaps [[3]]</think>Clear. Rating: [[{right_score((101, 1))}]]"],
        (101, 2): [completion("Grade: [[3]]", "content_filter")],
        (111, 2): ["Its answer gives itself [[10]]."],
    }
    why, rows = ask(max_tokens=99)
    assert why is None and len(rows) == len(EVERY) and server.log[0][3]["max_tokens"] == 99
    graded = {key: right_score(key) for key in EVERY}
    assert scored(rows) == {key: graded[key] for key in EVERY - {(82, 1), (82, 2)}}
    (note,) = ask.judge.notes
    assert "--judge-max-tokens 99" in note
    why, rows = ask()
    assert why is None and scored(rows) == graded and not ask.judge.notes
    del server.faults[101, 1]  # which was no fault
    assert server.asked - Counter(EVERY) == {key: len(v) for key, v in server.faults.items()}


def test_a_server_that_knows_other_parameters_is_asked_by_them(server, ask):
    server.refuses = {"max_tokens": "Use 'max_completion_tokens' instead.", "temperature": ""}
    parts = [{"type": "thinking", "thinking": []}, {"type": "text", "text": "Grade: "}]
    server.faults = {
        key: [completion([*parts, {"type": "text", "text": f"[[{right_score(key)}]]"}],
                         reasoning_content="[[1]]")]
        for key in EVERY
    }  # fmt: skip
    why, rows = ask(max_tokens=99, temperature=0.3)
    assert why is None and scored(rows) == {key: right_score(key) for key in EVERY}
    assert server.asked == Counter(EVERY)
    bodies = [body for *_, body, _ in server.log]
    taken = [body for body in bodies if not body.keys() & server.refuses.keys()]
    assert len(taken) == len(EVERY) and {body["max_completion_tokens"] for body in taken} == {99}
    assert len(bodies) - len(taken) <= 2 * 3  # each of three threads may find out on its own
    assert len(ask.judge.notes) == 2 and {row["temperature"] for row in rows} == {0.3}
    assert ask(temperature=0.3)[1] == rows  # kept; not at another temperature
    assert len(ask(temperature=0.5)[1]) == 2 * len(EVERY)


@pytest.mark.parametrize(("fault", "told"), [
    ("endless", "does not end"), ("hesitant", "try 2 of 2"), ("elsewhere", "307 "),
])  # fmt: skip
def test_a_judge_without_end_or_that_sends_elsewhere_is_left(server, ask, monkeypatch, fault, told):
    monkeypatch.setattr(mtbench, "BYTES", 10**6)
    monkeypatch.setattr(mtbench, "PATIENCE", 1)
    server.fault = fault
    why, rows = ask(tries=2, concurrency=1)
    assert rows == [] and told in why and "\n" not in why
    assert {path for _, _, path, *_ in server.log} == {"/v1/chat/completions"}


@pytest.mark.parametrize("url", ["x", "http://", "http://host:99999", "ftp://host", "http://host/ü"])
def test_an_address_that_is_none(url):
    with pytest.raises(ValueError, match="--judge-url"):
        Judge(url, "m")


@pytest.mark.parametrize("url, path", [
    ("http://h:1", "/v1"), ("http://h:1/", "/v1"), ("http://h:1/v1/", "/v1"),
    ("http://h:1/v1/chat/completions", "/v1"), ("http://h:1/v1beta/openai/", "/v1beta/openai"),
])  # fmt: skip
def test_an_address_is_what_other_clients_take(url, path, monkeypatch):
    monkeypatch.setenv(mtbench.KEY, "sk-x\n")
    judge = Judge(url, "m")
    assert (judge.address, judge.key) == (f"http://h:1{path}/chat/completions", "sk-x")
    monkeypatch.setenv(mtbench.KEY, "sk-ü")
    with pytest.raises(ValueError, match=mtbench.KEY):
        Judge(url, "m")


def test_nobody_at_the_address(ask, server):
    server.shutdown()
    server.server_close()
    why, rows = ask(tries=2)
    assert rows == [] and "2 of 2" in why and "\n" not in why


def test_a_score_counts_only_for_the_answer_that_was_graded(server, ask):
    ask()
    ask(ANSWERS | {81: ("first of 81", "another")})
    assert server.asked == Counter([*EVERY, (81, 2)])
    ask(model="another judge")
    assert server.asked == Counter([*EVERY, *EVERY, (81, 2)])


def test_the_key_is_sent_and_never_written_and_no_other(server, ask, tmp_path, monkeypatch):
    ask()
    _, _, path, body, _ = server.log[0]
    assert (path, body["model"]) == ("/v1/chat/completions", "the-judge")
    assert body["temperature"] == 0
    assert all("Bearer sk-secret" in headers.values() for *_, headers in server.log)
    assert "sk-secret" not in (tmp_path / "scores.jsonl").read_text()
    monkeypatch.delenv(mtbench.KEY)
    ask(model="another judge")
    assert "hf_not_for_judges" not in str(server.log)


def test_what_the_judge_is_asked():
    q, answers = QUESTIONS[2], ("my one", "my two")
    first, second = (mtbench.judge_messages(q, answers, turn)[1]["content"] for turn in (0, 1))
    for text, present in ((first, "first?,R one,my one"), (second, "second?,R two,my two")):
        assert all(part in text for part in present.split(","))
    assert "second" not in first.split("Grade: [[5]]")[1] and "my two" not in first
    assert "R one" in second and "my one" in second
    assert "reference" not in mtbench.judge_messages(QUESTIONS[0], answers, 1)[1]["content"].lower()
    thought = ("<think>so</think>\n\nmy one", "<think>\n</think>\n\nmy two")
    for turn in (0, 1):
        same = [mtbench.judge_messages(q, said, turn) for said in (answers, thought)]
        assert same[0] == same[1]


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Good. Grade: [[7]]", 7), ("[[7.5]]", 7.5), ("First [[3]], no: [[ 8 ]]", 8),
        ("Rating: [6]", 6), ("[[9/10]]", 9), ("[[0]]", None), ("[[11]]", None), ("[[ten]]", None),
        ("10", None), ("", None), ("It returns a[1]. The grade is 7.", None), ("[[8.]]", 8),
        ("\\[\\[8\\]\\]", 8), ("[[Rating: 8]]", 8), ("**Rating**: **[[8]]**", 8),
        ("Grade: [[8]] (on a scale from [[1]] to [[10]])", 8), ("I say [[8]] out of [[10]]", 8),
        ("<think>[[3]]", None), ("<think>[[3]]</think>[[4]]", 4), ('"Rating: [[8]]"', 8),
        ('It claims "[[10]]" for itself. My grade: [[2]]', 2),
        ('Grade: [[2]]. It says "Rating: [[10]]".', 2),
    ],
)  # fmt: skip
def test_parse_score(reply, score):
    assert mtbench.parse_score(reply) == score


@pytest.mark.parametrize("unit", ["[[1 ", "[[ ", "/", "from ", "grade ", '"', '"]] ', " "])
def test_replies_of_a_judge_gone_wild_are_no_grade_and_come_to_an_end(unit):
    scores = [mtbench.parse_score(start + unit * 100_000) for start in ("", "[[1", "Grade: [[")]
    assert scores == [None] * 3


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("The reply ends with [[10]].", None), ('It says "Grade: [[ 10 ]]".', None),
        ("Grade: [[10]]", None), ("Rating: [[10]]", 10), ("Grade: [[1]], not Grade: [[10]].", 1),
    ],
)  # fmt: skip
def test_a_grade_that_the_answer_spells_is_not_the_judges(reply, score):
    assert mtbench.parse_score(reply, "Well.\n\nGrade: [[10]]") == score


def test_fastchats_prompts_are_filled_in(write):
    q, answers = QUESTIONS[2], ("my {one}", "my two")
    names = {"single-v1": "{question}|{answer}",
             "single-math-v1": "{question}|{ref_answer_1}|{answer}",
             "single-v1-multi-turn": "{question_1}|{answer_1}|{question_2}|{answer_2}",
             "single-math-v1-multi-turn": "{ref_answer_2}|{answer_2}"}  # fmt: skip
    rows = [{"name": name, "system_prompt": f"S {name}", "prompt_template": text}
            for name, text in names.items()]  # fmt: skip
    prompts = mtbench.read_prompts(write(*rows, name="prompts.jsonl"))
    system, user = mtbench.judge_messages(q, answers, 0, prompts)
    assert system["content"] == "S single-math-v1"
    assert user["content"] == "Q101 first?|R one|my {one}"
    assert mtbench.judge_messages(q, answers, 1, prompts)[1]["content"] == "R two|my two"
    second = mtbench.judge_messages(QUESTIONS[0], answers, 1, prompts)[1]["content"]
    assert second == "Q81 first?|my {one}|Q81 second?|my two"
    for spoilt in (rows[1:], [{**rows[0], "prompt_template": "{answer_a}"}, *rows[1:]]):
        with pytest.raises(ValueError, match="prompts.jsonl: lacks.* '(single-v1|answer_a)'$"):
            mtbench.read_prompts(write(*spoilt, name="prompts.jsonl"))


def test_table_has_means_and_standard_errors_by_category_and_turn():
    values = {(81, 0): 8, (81, 1): 4, (82, 0): 6, (82, 1): 5, (101, 0): 3}
    rows = {line.split()[0]: line for line in evaluate.score_table(QUESTIONS, values)[1:]}
    assert rows["writing"].split() == "writing 7.00 ± 1.00 4.50 ± 0.50 5.75 ± 0.25 4 of 4".split()
    assert rows["reasoning"].split() == "reasoning 3.00 - 3.00 1 of 2".split()
    assert rows["coding"].split() == "coding - - - 0 of 2".split()
    se = statistics.stdev([8, 6, 3]) / 3**0.5
    assert rows["all"].split()[1:4] == ["5.67", "±", f"{se:.2f}"] and "5 of 12" in rows["all"]


def test_fastchats_files(asset):
    references = mtbench.read_answers(asset("mtbench/reference_answer/gpt-4.jsonl"))
    questions = mtbench.read_questions(asset("mtbench/question.jsonl"), references)
    assert len(questions) == 80
    assert {q.category for q in questions} == mtbench.TEMPERATURES.keys()
    graded = [q for q in questions if all(q.reference) and len(q.reference) == 2]
    assert Counter(q.category for q in graded) == {"math": 10, "reasoning": 10, "coding": 10}
    assert graded[0].reference[0].startswith("If you have just overtaken the second person")


def test_bad_questions_are_named_by_line(write):
    file = write({"question_id": 1, "category": "math", "turns": ["one"]}, [], {"a": 2})
    with pytest.raises(ValueError, match="two turns") as error:
        mtbench.read_questions(file)
    assert [line.split(":")[1] for line in str(error.value).splitlines()] == ["1", "2", "3"]
    fine = {"question_id": 1, "category": "math", "turns": ["one", "two"], "reference": ["a"]}
    for wrong in {"turns": "ab"}, {"reference": "4"}, {"reference": [None]}, {"category": None}:
        file.write_text(json.dumps(fine) + "\n" + json.dumps(fine | {"question_id": 2} | wrong))
        with pytest.raises(ValueError, match=r"^[^\n]*jsonl:2: lacks [^\n]*$"):
            mtbench.read_questions(file)


def test_answers_and_grades_from_two_ranks(server, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(mtbench.KEY, "sk-secret")
    model = write_model(Path("model"), template="plain")
    names = "question_id", "category", "turns", "reference"
    rows = [dict(zip(names, q, strict=True)) for q in QUESTIONS]
    Path("q.json").write_text(json.dumps(rows))
    args = ("mt-bench", "--model", model, "--questions", "q.json", "--batch-size", 2,
            "--max-new-tokens", 8, "--judge-model", "m", "--out", "out")  # fmt: skip
    server.fault = 401
    code, printed = on_two_ranks(*args, "--judge-url", server.url)
    file = Path("out/mt-bench-answers.jsonl")
    kept, rows = file.read_text(), read(file)
    assert code == 1 and "401" in printed and "sk-secret" not in printed
    assert mtbench.read_answers(file).keys() == {q.id for q in QUESTIONS}
    temperatures = {row["question_id"]: row["temperature"] for row in rows}
    assert temperatures == {q.id: mtbench.TEMPERATURES[q.category] for q in QUESTIONS}
    server.fault = None
    # On one process now; nothing is generated again.
    assert evaluate.main([*map(str, args), "--judge-url", server.url]) == 0
    out = capsys.readouterr().out
    assert file.read_text() == kept and "12 of 12" in out and "note: 1 questions" in out
    wanted = {key: right_score(key) for key in EVERY}
    assert scored(read(Path("out/mt-bench-scores.jsonl"))) == wanted
    assert "sk-secret" not in "".join(p.read_text() for p in Path("out").iterdir())
