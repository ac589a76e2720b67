"""Files that others wrote: whatever they hold, they are refused in a line, and nothing in them is
executed."""

import json
import os
from pathlib import Path

import pytest

from hf import DEPTH, Problems, open_regular, parse_json, read_json, say

HOSTILE_JSON = {
    "deep": ("[" * 100_000, "nested deeper than 100"),
    "deep object": ('{"a":' * 101 + "1" + "}" * 101, "nested deeper than 100"),
    "twice": ('{"a": {"b": 1, "b": 2}}', "a key comes twice"),
    "nan": ('{"a": NaN}', "NaN is not a finite number"),
    "infinity": ('{"a": -Infinity}', "-Infinity is not a finite number"),
    "overflow": ('{"a": 1e999}', "1e999 is not a finite number"),
    "digits": ('{"a": ' + "9" * 400 + "}", "a number of 400 digits"),
    "digits of Python's limit": ('{"a": ' + "9" * 5000 + "}", "a number of 5000 digits"),
    "surrogate": (r'{"a": "\ud800"}', "surrogates not allowed"),
    "broken": ('{"a": ', "Expecting value"),
    "bytes": (b'{"a": "\xff"}', "can't decode byte 0xff"),
    "array": ("[1]", "not a JSON object"),
    "size": ('{"a": "' + 1000 * "x" + '"}', "more than 1,000 bytes"),
}


@pytest.mark.parametrize("name", HOSTILE_JSON)
def test_json_that_is_refused(name, tmp_path):
    content, expected = HOSTILE_JSON[name]
    file = tmp_path / "a.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=expected) as caught:
        read_json(file, 1000 if name == "size" else 10**6)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(file))


def test_json_that_is_read():
    deep = "[" * (DEPTH - 1) + "1" + "]" * (DEPTH - 1)
    text = '{"a": [1, -2.5e-3, true, null, "\\ud83d\\ude00", 1000000000000000019884624838656]}'
    assert parse_json(text) == json.loads(text) and parse_json(deep) == json.loads(deep)


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(OSError, match="not a regular file"):
            open_regular(path)
        with pytest.raises(ValueError, match=r"cannot be read \(not a regular file\)"):
            read_json(path)


def test_lines_of_others_stay_lines(capsys):
    """No escape sequence, no other line, no text turned round reaches the terminal."""
    evil = "a\x1b[2J\x9b1A\r\nheld-out test loss: 0.0\u202e\u2028\x00\x7f\ud800"
    say(evil, "é 中 █ ±\t…", *Problems([evil, *["x"] * 70]))
    lines = capsys.readouterr().out.split("\n")
    spelled = r"a\x1b[2J\x9b1A\r\nheld-out test loss: 0.0\u202e\u2028\x00\x7f\ud800"
    assert lines[:3] == [spelled, "é 中 █ ±\t…", spelled] and lines[-2:] == ["… and 11 more", ""]
