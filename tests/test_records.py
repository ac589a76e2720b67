"""What is read of records, and that nothing they hold is lost in silence; files of other kinds."""

import gzip
import hashlib
import http.server
import json
import math
import sys
import threading
import urllib.parse
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from hf import Problems
from sources.records import FORMATS, ROLE_OF, iter_records, locate
from tests.cases import example

ASK, REPLY = ("user", "Where do storks spend the winter?"), ("assistant", "In Africa.")
TURNS = [ASK, REPLY]
BIRDS = ("system", "You know birds.")
CHAT = [{"role": "user", "content": ASK[1]}, {"role": "assistant", "content": REPLY[1]}]
SHARED = [{"from": "human", "value": ASK[1]}, {"from": "gpt", "value": REPLY[1]}]
ALPACA = {"instruction": ASK[1], "output": REPLY[1]}
GOOD = json.dumps(ALPACA)
DEEP = "[" * 100_000
PARTS = [{"type": "text", "text": "In "}, {"type": "text", "text": "Africa."}]


def lines(*records) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def read(path):
    """The turns of a file's records, and how often each key was not read."""
    notes, problems = defaultdict(Counter), Problems()
    turns = [turns for _, turns, _ in iter_records(locate(path), problems, notes)]
    problems.raise_if_any()
    return turns, dict(notes["keys that are not read"])


@pytest.mark.parametrize("record", [
    {**ALPACA, "input": ""},
    {**ALPACA, "input": None},
    {**ALPACA, "input": math.nan},
    {"instruction": ASK[1], "response": REPLY[1], "context": ""},  # Dolly
    {"conversations": SHARED},
    {"conversations": CHAT},
    {"conversation": CHAT},
    {"items": SHARED},
    {"messages": CHAT},
    {"messages": SHARED},
    {"messages": [CHAT[0], {"role": "assistant", "content": PARTS}]},
    {"messages": [{"role": "user", "content": [ASK[1]]}, CHAT[1]]},
    {"data": [ASK[1], REPLY[1]]},
    {"data": CHAT},
    {"prompt": ASK[1], "completion": REPLY[1]},
    {"prompt": ASK[1], "response": REPLY[1]},
    {"question": ASK[1], "answer": REPLY[1]},
    {"question": ASK[1], "response": REPLY[1]},
    {"query": ASK[1], "response": REPLY[1]},
    {"input": ASK[1], "output": REPLY[1]},
    {"type": "text2text", "instances": [{"input": ASK[1], "output": REPLY[1]}]},  # LMFlow
    {"type": "conversation", "instances": [{"messages": CHAT, "tools": []}]},
    {"data": [ALPACA]},
])  # fmt: skip
def test_each_format_gives_the_same_turns(record, write):
    for content in (lines(record), json.dumps(record, indent=1), json.dumps([record])):
        if not (content[0] == "[" and {"instances", "data"} & record.keys()):
            assert read(write(content)) == ([TURNS], {})


@pytest.mark.parametrize("record, turns", [
    ({"text": "Storks clatter."}, [("text", "Storks clatter.")]),
    ({"type": "text_only", "instances": [{"text": "Storks clatter."}]},
     [("text", "Storks clatter.")]),
    ({"instruction": ASK[1], "context": "They fly far.", "response": REPLY[1]},
     [ASK, ("input", "They fly far."), REPLY]),
    ({**ALPACA, "input": "They fly far."}, [ASK, ("input", "They fly far."), REPLY]),
    ({"instruction": ASK[1], "input": "They fly far.", "response": REPLY[1]},
     [ASK, ("input", "They fly far."), REPLY]),
    ({"prompt": [{"type": "text", "text": ASK[1], "id": 1}, {"text": "", "id": 2}],
      "completion": REPLY[1]}, TURNS),
    ({**ALPACA, "system": BIRDS[1]}, [BIRDS, *TURNS]),
    ({**ALPACA, "system": "", "history": None}, TURNS),
    ({**ALPACA, "system": BIRDS[1], "history": [["Do storks sing?", "No."]]},
     [BIRDS, ("user", "Do storks sing?"), ("assistant", "No."), *TURNS]),
    ({"system_prompt": BIRDS[1], "question": ASK[1], "response": REPLY[1]}, [BIRDS, *TURNS]),
    ({"conversations": SHARED, "system": BIRDS[1]}, [BIRDS, *TURNS]),
    ({"messages": [{"role": "developer", "content": BIRDS[1]}, *CHAT], "system": BIRDS[1]},
     [BIRDS, *TURNS]),
    ({"conversations": [SHARED[0], {"from": "function_call", "value": "map(stork)"},
                        {"from": "observation", "value": "Africa"},
                        {"from": "chatgpt", "value": REPLY[1]}]},
     [ASK, ("assistant", "map(stork)"), ("user", "Africa"), REPLY]),
    ({"messages": [*CHAT, {"role": "tool", "content": "ok"}]}, [*TURNS, ("user", "ok")]),
    ({"conversations": []}, []),
    ({"messages": None}, []),
    ({**ALPACA, "output": None}, [ASK, ("assistant", "")]),
    ({"messages": [CHAT[0], {"role": "assistant", "content": None}]}, [ASK, ("assistant", "")]),
    ({"tools": None, "images": [], "chosen": "", "messages": [
        CHAT[0], {**CHAT[1], "tool_calls": None, "reasoning_content": ""}]}, TURNS),
])  # fmt: skip
def test_what_stands_beside_a_turn_is_used(record, turns, write):
    assert read(write(record)) == ([turns], {})


@pytest.mark.parametrize("weights, role", [
    ({"weight": 0}, "given"), ({"train": False}, "given"), ({"loss_weight": 0.0}, "given"),
    ({"weight": 1, "train": False}, "given"), ({"weight": 1}, "assistant"),
    ({"train": True, "weight": None}, "assistant"),
])  # fmt: skip
def test_a_turn_of_weight_0_has_no_loss(weights, role, write):
    messages = [{**CHAT[0], "weight": 0, "train": False}, {**CHAT[1], **weights}]
    assert read(write({"messages": messages})) == ([[ASK, (role, REPLY[1])]], {})


def test_a_new_format_is_a_row(write, monkeypatch):
    rows = "talk", {"user": "asked", "assistant": "said"}
    monkeypatch.setattr("sources.records.FORMATS", FORMATS + rows)
    for record in ({"talk": CHAT}, {"asked": ASK[1], "said": REPLY[1]}):
        assert read(write(record)) == ([TURNS], {})


@pytest.mark.parametrize("content, second", [
    (f"{GOOD}\n\n{GOOD}", 3),
    (f"\ufeff{GOOD}\r\n\r\n{GOOD}\r\n", 3),
    (f"[{GOOD},\n\n{GOOD}]", 2),
    (f"\ufeff \n[{GOOD}\r\n,\r\n {GOOD}]\r\n\r\n", 2),
])  # fmt: skip
def test_arrays_and_lines_are_recognised_by_content(content, second, write, load):
    """A record goes by its line in JSON Lines, by its number in an array."""
    for path in (write(content), write(gzip.compress(content.encode()), name="packed")):
        assert read(path) == ([TURNS, TURNS], {})
        assert load(path).numbers.tolist() == [1, second]


LOST = " would be lost"


@pytest.mark.parametrize("content, place, problem", [
    # what is no JSON
    (f'{GOOD}\n{{"instruction": \n{GOOD}', ":2", "broken JSON"),
    (f'[{GOOD},\n{{"output": "cut', ":2", "broken JSON: Unterminated string"),
    (f'[{GOOD},\n{{"instruction": 1,,}}]', ":2", "broken JSON"),
    (f"[{GOOD},\n{GOOD}", ":2", "broken JSON: Expecting ',' delimiter"),
    (f"[{GOOD}\n{GOOD}]", ":2", "broken JSON: Expecting ',' delimiter"),
    (f"[{GOOD},]", ":1", "broken JSON"),
    (f"[{GOOD}]\n{GOOD}", ":2", "broken JSON: Extra data"),
    (f'{GOOD[:-1]},\n"id": 1}}\n{GOOD}', ":3", "broken JSON: Extra data"),
    (f'{GOOD}\n{{"text": {DEEP}}}', ":2", "nested too deep"),
    (f"[{GOOD},\n{DEEP}", ":1", "nested too deep"),
    (f'{GOOD}\n{{"text": {"1" * 5000}}}', ":2", "broken JSON: Exceeds the limit"),
    (f'[{GOOD},\n{{"text": {"1" * 5000}}}]', ":1", "broken JSON: Exceeds the limit"),
    ('{"text": "a"}\n{"text": "b", "text": "c"}', ":2", "broken JSON: the key 'text' comes twice"),
    (b'{"text": "a"}\n\0\0', ":2", "broken JSON"),
    (b'{"text": "a"}\n{"text": "\xff"}', ":2", "broken UTF-8"),
    ('{"text": "\\ud800"}', ":1", "lone surrogate"),
    # what is no record, or another than the first
    (f'[{GOOD}, {GOOD}, {{"instruction": "a"}}]', ": record 3", "lacks 'output'"),
    (f"{GOOD}\n17", ":2", "the record is int, not an object"),
    ("17\n", ":1", "the record is int, not an object"),
    ("{}", ":1", "unknown record, of keys none"),
    ('\n{"asked": "x", "said": "y"}', ":2", "unknown record, of keys 'asked', 'said'"),
    (f'{GOOD}\n{{"question": "x", "answer": "y"}}', ":2", "lacks 'instruction'"),
    (f'{GOOD}\n{{"instruction": 3, "output": "x"}}', ":2", "'instruction' is int, not a string"),
    (f'{GOOD}\n{{"instruction": "a", "output": true}}', ":2", "'output' is bool"),
    (f'{GOOD}\n{{"instruction": "a", "input": [7], "output": "b"}}', ":2", "'input' is int"),
    ({"messages": "Where?"}, ":1", "unknown record, of keys 'messages'"),
    ({"messages": {"role": 1}}, ":1", "unknown record, of keys 'messages'"),
    ({"messages": [7]}, ":1", "unknown record, of keys 'messages'"),
    ({"messages": [{"role": "user"}]}, ":1", "lacks 'messages[0].content'"),
    (lines({"messages": CHAT}, {"messages": "x"}), ":2", "'messages' is str, not a list"),
    (lines({"messages": CHAT}, {"messages": [7]}), ":2", "'messages[0]' is int, not a message"),
    ({"messages": [{"role": "user", "content": 5}]}, ":1", "'messages[0].content' is int, not a"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, ":1",
     "'messages[0].content' is image_url, not a string"),
    ({"items": [{"from": "bird", "value": "x"}]}, ":1", "'items[0].from' is 'bird', not one of"),
    # what has no place in a turn
    ({"messages": CHAT, "tools": [{"name": "map"}]}, ":1", f"'tools'{LOST}"),
    ({"messages": [CHAT[0], {**CHAT[1], "tool_calls": [{"id": 1}]}]}, ":1",
     f"'messages[1].tool_calls'{LOST}"),
    ({"messages": [CHAT[0], {**CHAT[1], "reasoning_content": "Birds."}]}, ":1",
     f"'messages[1].reasoning_content'{LOST}"),
    ({"conversations": [SHARED[0], {**SHARED[1], "thinking": "Birds."}]}, ":1",
     f"'conversations[1].thinking'{LOST}"),
    ({**ALPACA, "images": ["stork.png"]}, ":1", f"'images'{LOST}"),
    ({"prompt": ASK[1], "chosen": REPLY[1], "rejected": "No."}, ":1", LOST),
    ({"messages": CHAT, "label": False}, ":1", f"'label'{LOST}"),
    ({"prompt": ASK[1], "completion": REPLY[1], "label": False}, ":1", f"'label'{LOST}"),
    ({"text": "Storks clatter.", "role": "assistant"}, ":1", f"'role'{LOST}"),
    ({"messages": [CHAT[0], {**CHAT[1], "weight": 0.5}]}, ":1",
     "'messages[1].weight' is 0.5: permitted"),
    ({"messages": [{"role": "system", "content": "Other"}, *CHAT], "system": BIRDS[1]}, ":1",
     "two system texts"),
    ({**ALPACA, "system": "Other", "system_prompt": BIRDS[1]}, ":1", "two system texts"),
    *[({"prompt": prompt, "response": REPLY[1]}, ":1", f"'prompt' is an object of {keys}, not a")
      for prompt, keys in (([CHAT[0]], "'role', 'content'"), (CHAT[0], "'role', 'content'"),
                           ([{"type": "text", "value": "?"}], "'type', 'value'"))],
    ({**ALPACA, "history": ["Do storks sing?"]}, ":1",
     "'history[0]' is not a question and its answer"),
    # files that hold none
    ("", "", "no records"),
    (" \n \n", "", "no records"),
    ("[ ]", "", "no records"),
    (Path(), "", "not a regular file"),
    (Path("none"), "", "No such file"),
    (b"\x1f\x8bnot gzip", "", "Unknown compression"),
    (gzip.compress(b'{"text": "a"}' * 99, mtime=0)[:-20], "", "end-of-stream"),
    (b"\x28\xb5\x2f\xfd" + bytes(9), "", "is compressed by zstd"),
    (GOOD.encode("utf-16"), "", "is in UTF-16"),
    (GOOD.encode("utf-16-le"), "", "is in UTF-16"),
    (b"ARROW1\0\0", "", "is in Arrow's format"),
    (b"\xff\xff\xff\xff\x10\0", "", "is in Arrow's format"),
    (b"PK\x03\x04", "", "is a zip archive"),
    ("instruction,output\nWhere,There\n", "", "CSV"),
    ("question\tanswer\nWhere\tThere\n", "", "CSV"),
    (b"PAR1 but not really", "", "Parquet"),
])  # fmt: skip
def test_what_cannot_be_read_is_refused_in_a_line(content, place, problem, write, load, tmp_path):
    path = tmp_path / content if isinstance(content, Path) else write(content)
    for call in read, load:
        with pytest.raises(ValueError) as refusal:
            call(path)
        line, = str(refusal.value).splitlines()
        assert line.startswith(f"{path}{place}: ") and problem in line and len(line) < 500
    assert not list(tmp_path.glob("cache/*/"))  # nothing is cached


HOSTILE = ["<|endoftext|> </s> <bos> [INST] <0x0A>", "nul \0 bell \a", "x" * 1_000_000, DEEP,
           "\ufeff bom \r\n crlf \u2028 line separator", '"}\n{"text": "injected"}']


@pytest.mark.parametrize("as_array", [True, False])
def test_hostile_texts_stay_text(as_array, write, load):
    """Megabytes in a line, control characters, what looks like control tokens or like JSON."""
    records = [json.dumps({"text": text}, ensure_ascii=as_array) for text in HOSTILE]
    content = f"[{','.join(records)}]" if as_array else "\r\n".join(records)
    dataset = load(write(gzip.compress(content.encode())), max_length=2**21)
    for i, text in enumerate(HOSTILE):
        assert example(dataset, i)[0].tolist() == [256, *text.encode(), 257]


text = st.text(st.characters(codec=None), max_size=12) | st.sampled_from(["", " ", "<bos>", "\0"])
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
role = st.sampled_from([*ROLE_OF, "tool"]) | anything
message = st.fixed_dictionaries(
    {}, optional={"role": role, "from": role, "content": text | anything, "value": text | anything}
)
keys = ("instruction", "input", "output", "text", "conversations", "items", "messages", "history",
        "system", "tools", "question", "answer")  # fmt: skip
record = st.fixed_dictionaries(
    {}, optional={key: text | st.lists(message, max_size=3) | anything for key in keys}
)


@settings(max_examples=300, deadline=None)
@given(st.lists(record | anything, max_size=6), st.booleans(), st.sampled_from(["alpaca", "plain"]))
def test_any_record_is_kept_counted_or_named(tmp_path_factory, records, as_array, template):
    directory = tmp_path_factory.mktemp("fuzz")
    path = directory / "x.json"
    as_array = as_array or isinstance((records or [0])[0], list)  # "[" opens an array
    path.write_text(json.dumps(records) if as_array else "\n".join(map(json.dumps, records)))
    problems, again, dataset = Problems(), Problems(), None
    with problems.collecting():
        tokenizer = data.byte_tokenizer()
        dataset = data.load_dataset(path, tokenizer, template, 40, directory / "cache")
    assert all(line.startswith(str(path)) for line in problems.lines)
    read = len(list(iter_records(locate(path), again, defaultdict(Counter))))
    assert read + again.count == max(1, len(records))  # "no records" is a problem
    if dataset is not None:
        kept = len(set(dataset.numbers.tolist()))
        assert kept + sum(dataset.dropped.values()) == read == len(records)


def test_what_is_wrong_with_many_records_is_said_of_five_and_counted(write):
    path = write(*9 * [{**ALPACA, "tools": [1]}], {"instruction": "no answer"})
    with pytest.raises(ValueError) as refusal:
        read(path)
    said = str(refusal.value).splitlines()
    assert [line.partition(": ")[0] for line in said] == [
        *(f"{path}:{n}" for n in (1, 2, 3, 4, 5, 10)), str(path)
    ]  # fmt: skip
    assert said[-1].startswith(f"{path}: 4 more: 'tools' would be lost")


def test_other_keys_are_noted_once_a_file_with_their_count(write, load):
    records = [{**ALPACA, "id": n, "topic": "storks" if n else ""} for n in range(3)]
    path = write(*records, {**ALPACA, "text": "All of it."})
    assert read(path)[1] == {"id": 3, "topic": 2, "text": 1}
    for _ in range(2):  # built, and from the cache
        dataset = load(path)
        assert dataset.remarks() == [
            "keys that are not read: id (3 records), topic (2 records), text (1 records)",
            "3 records are repetitions",
        ]
    named = [{**CHAT[0], "name": "Eve", "train": True}, CHAT[1]]  # only answers can have loss
    assert read(write({"messages": named}, {"messages": CHAT}))[1] == {
        "messages[].name": 1, "messages[].train": 1
    }


def test_text_that_spells_control_tokens_is_noted(write, load):
    path = write({"text": "<bos>one<eos> and <eos>"}, {"text": "<eos>"}, {"text": "<bo s>"})
    dataset = load(path)
    assert dataset.remarks() == [
        "text that spells control tokens, taken as text: <eos> (2 records), <bos> (1 records)"
    ]


@pytest.mark.parametrize("max_length", [2, 3, 7, 29, 30, 31])
def test_long_text_is_cut_into_pieces_that_predict_every_token_once(max_length, write, load):
    text = "Storks return to their nest."
    path = write({"text": text}, {"text": "Or not."})
    dataset = load(path, max_length=max_length)
    whole = [[256, *t.encode(), 257] for t in (text, "Or not.")]
    predicted = {1: [], 2: []}
    for i, number in enumerate(dataset.numbers.tolist()):
        stored = dataset.stored(i)
        assert len(stored) <= max_length and stored[0] < 0 and (stored[1:] >= 0).all()
        predicted[number] += stored[1:].tolist()
    assert [predicted[1], predicted[2]] == [ids[1:] for ids in whole]
    n_cut = sum(len(ids) > max_length for ids in whole)
    cut = [f"longer than {max_length} tokens, cut to pieces: text ({n_cut} records)"]
    assert dataset.remarks() == cut * (n_cut > 0) and dataset.duplicates == 0


def test_conversations_that_are_cut_off_are_counted(write, load):
    """But for those of which no answer is left, which are dropped."""
    turns = [(role, content) for n in (3, 20) for role, content in (("user", "q"), ("a", "x" * n))]
    records = [
        {"messages": [{"role": "assistant" if role == "a" else role, "content": content}
                      for role, content in turns[:n]]} for n in (2, 4)
    ] + [{"messages": [{"role": "user", "content": "q" * 90}, CHAT[1]]}]  # fmt: skip
    dataset = load(write(*records), max_length=24)
    assert dataset.lengths.tolist() == [len(dataset.stored(0)), 24]
    assert dataset.remarks() == [
        "1 records dropped: no response token left after truncation",
        "longer than 24 tokens, cut off there: conversation (1 records)",
    ]  # fmt: skip


def test_any_two_keys_can_be_named(write, load):
    record = {"Q": ASK[1], "A": REPLY[1], "instruction": "x", "output": "y"}
    path = f"{write(record)}:prompt=Q,answer=A"
    assert read(path) == ([TURNS], {"instruction": 1, "output": 1})
    assert read(path.partition(":")[0])[0] == [[("user", "x"), ("assistant", "y")]]
    named, plain = map(load, (path, path.partition(":")[0]))
    assert named.path == path and named.sha256 != plain.sha256
    with pytest.raises(ValueError, match=":1: lacks 'B'"):
        read(f"{write(record)}:prompt=Q,answer=B")


# Files

@pytest.fixture
def parquet(tmp_path):
    """parquet(records, name) writes a file of several row groups, and is its path."""
    pa = pytest.importorskip("pyarrow", reason="needs pyarrow")
    from pyarrow import parquet

    def make(records, name="birds.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pa.Table.from_pylist(records), tmp_path / name, row_group_size=7)
        return tmp_path / name

    return make


def test_parquet_is_read_in_pieces_like_lines(parquet, write, load):
    records = [{"messages": CHAT, "tools": None, "id": n} for n in range(1100)]
    records[5] = {"messages": [], "tools": None, "id": 5}
    records[9] = {"messages": [CHAT[0], {**CHAT[1], "weight": 0}], "tools": None, "id": 9}
    datasets = [load(path) for path in (parquet(records), write(*records))]
    for name in ("tokens", "lengths", "hashes", "numbers", "dropped", "notes"):
        assert np.array_equal(*(getattr(dataset, name) for dataset in datasets)), name
    records[1099] = {"messages": CHAT, "tools": [{"name": "map"}], "id": 1099}
    with pytest.raises(ValueError, match="birds.parquet: record 1100: 'tools' would be lost"):
        read(parquet(records))


def test_without_pyarrow_a_line_says_what_to_install(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="birds.jsonl: Parquet needs pyarrow: pip install pyarrow"):
        read(write(b"PAR1"))


# The hub

class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as huggingface.co does to what huggingface_hub asks for data sets: files of
    {"owner/name": {revision: {file: content}, or a status}}."""

    repos = {}

    def do_GET(self):
        parts = urllib.parse.unquote(self.path.partition("?")[0]).strip("/").split("/")
        api = parts[:2] == ["api", "datasets"]
        name = "/".join(parts[2:4] if api else parts[1:3])
        revision = "/".join(parts[5:]) if api else parts[4] if len(parts) > 4 else ""
        repo = self.repos.get(name, {})
        commits = {hashlib.sha1(key.encode()).hexdigest(): key for key in repo}
        revision = revision if revision in repo else commits.get(revision)
        if revision is None:
            code = "RevisionNotFound" if name in self.repos else "RepoNotFound"
            return self.answer(404, b"", {"X-Error-Code": code})
        files = repo[revision]
        if isinstance(files, int):  # the hub is out of order
            return self.answer(files, b"", {})
        commit = hashlib.sha1(revision.encode()).hexdigest()
        if api and parts[4] == "revision":
            siblings = [{"rfilename": file} for file in files]
            return self.json({"id": name, "sha": commit, "siblings": siblings})
        if api:  # the tree of a revision
            return self.json([{"type": "file", "path": file, "size": len(content), "oid": commit}
                              for file, content in files.items()])  # fmt: skip
        content = files["/".join(parts[5:])]
        etag = hashlib.sha1(content).hexdigest()
        return self.answer(200, content, {"X-Repo-Commit": commit, "ETag": f'"{etag}"'})

    do_HEAD = do_GET

    def json(self, content):
        self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def answer(self, code, body, headers):
        self.send_response(code)
        for key, value in {**headers, "Content-Length": len(body)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """hub(path): the turns that a source has by a local server, and what was noted; or a refusal.
    """
    from huggingface_hub import constants

    server = http.server.ThreadingHTTPServer(("localhost", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://localhost:{server.server_port}"
    for name, value in {
        "ENDPOINT": address, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": False,
        "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
    }.items():  # fmt: skip
        monkeypatch.setattr(constants, name, value)

    def ask(path):
        notes, problems = defaultdict(Counter), Problems()
        with problems.collecting():
            found = [(n, turns) for n, turns, _ in iter_records(locate(path), problems, notes)]
        return (found, notes) if not problems.count else str(problems)

    yield ask
    server.shutdown()


def test_hub_data_sets_are_fetched_by_split_and_configuration(hub, parquet, monkeypatch):
    def rows(n, word):
        return parquet([{"question": word, "answer": str(i)} for i in range(n)]).read_bytes()

    jsonl = lines(ALPACA).encode()
    monkeypatch.setattr(Hub, "repos", {
        "birds/storks": {
            "main": {"README.md": b"Storks.", "data/train.json": jsonl},
            "refs/convert/parquet": {
                "default/train/0000.parquet": rows(3, "a"),
                "default/train/0001.parquet": rows(2, "b"),
                "default/test/0000.parquet": rows(1, "c"),
                "french/partial-train/0000.parquet": rows(1, "d"),
            },
        },
        "birds/raw": {"main": {"train.jsonl": jsonl, "old/train.jsonl.zip": b"PK", "x.py": b""}},
        "birds/sums": {"main": {"a/train-0-of-2-1f.json": jsonl, "a/train-1-of-2-2e.json": jsonl,
                                "b/train.json": jsonl, "bc/my_train_data.json": jsonl}},
        "birds/folders": {"main": {"train/en.json": jsonl, "train/fr-0_1.json": jsonl,
                                   "train/part-0-1c-ab.json": jsonl, "training.json": jsonl}},
        "birds/half": {"main": {"v1.0/train.json": jsonl, "v2.0/train.json": jsonl},
                       "refs/convert/parquet": 404},
        "birds/busy": {"main": {"train.json": jsonl}, "refs/convert/parquet": 403},
    })  # fmt: skip
    found, notes = hub("birds/storks")
    assert [(n, turns[0][1]) for n, turns in found] == list(enumerate("aaabb", start=1))
    files = {"default/train/0000.parquet": 3, "default/train/0001.parquet": 2}
    assert notes == {"read from": files}
    assert len(hub("birds/storks:test")[0]) == 1
    found, notes = hub("birds/storks:train[french]")
    assert found[0][1][0] == ("user", "d")
    assert notes == {"read from": {"french/partial-train/0000.parquet": 1}}
    found, notes = hub("birds/raw:train:prompt=instruction,answer=output")
    assert found == [(1, TURNS)] and "train.jsonl" in str(notes)
    sets = "a/train.json, b/train.json, bc/my_train_data.json fit split train: "
    assert f"birds/sums: {sets}" in hub("birds/sums") and "v1.0/train.json, v2" in hub("birds/half")
    for path, n in (
        ("sums:train[a]", 2), ("sums:train[b]", 1), ("sums:train[bc]", 1), ("half:train[v1.0]", 1),
        ("folders", 3), ("folders:train[fr]", 1),
    ):  # fmt: skip
        assert len(hub(f"birds/{path}")[0]) == n, path
    refused = "no file is named after split rain in configuration default: not train/en.json, "
    assert refused in hub("birds/folders:rain")
    assert "birds/busy: neither a file nor a dataset" in hub("birds/busy")
    assert "no file is named after split dev in configuration default" in hub("birds/storks:dev")
    assert "birds/gulls: neither a file nor a dataset that the hub gives out (Repo" in (
        hub("birds/gulls"))  # fmt: skip
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert len(hub("birds/storks")[0]) == 5  # cached
    assert "(LocalEntryNotFoundError)" in hub("birds/gulls")
