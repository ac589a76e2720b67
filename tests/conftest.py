"""Fixtures shared by all tests."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Tests run side by side, and so do the ranks that they start: a thread each. Set before torch is
# imported; the processes that tests start inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

# What is compared to the last bits, or on several ranks, is compared on the CPU; test_gpu.py alone
# uses a GPU. (xdist's workers, which read this file again, inherit both variables.)
os.environ.setdefault("TEST_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""

BESIDE = Path(__file__).resolve().parents[2] / "shared" / "assets"
ASSETS = Path(os.environ.get("SCALEBIO_ASSETS", BESIDE))

# The files that take longest go first, so that no process is left with one at the end.
LONG = ("test_shard", "test_resume", "test_plan", "test_fidelity", "test_train", "test_faults")


def pytest_xdist_auto_num_workers():
    """One more than cores, up to four: tests often wait for the processes that they start."""
    return min(4, (os.cpu_count() or 1) + 1)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(scope="session")
def asset():
    """asset("path") is the path of a real data file, or skips the test where it is missing."""

    def find(path):
        if not (ASSETS / path).exists():
            pytest.skip(f"needs the data file {path}, which is not on this machine")
        return ASSETS / path

    return find


@pytest.fixture
def write(tmp_path):
    """write(content) is the path of a file with it: bytes, text, or records as JSON Lines."""

    def make(*content, name="birds.jsonl"):
        text, *_ = content
        if not isinstance(text, (str, bytes)):
            text = "".join(json.dumps(record) + "\n" for record in content)
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return tmp_path / name

    return make


@pytest.fixture
def load(tmp_path):
    """load(path) is the dataset there, tokenised by bytes or from the test's own cache."""
    import data

    def make(path, template="plain", max_length=64, cache=tmp_path / "cache"):
        return data.load_dataset(path, data.byte_tokenizer(), template, max_length, cache)

    return make


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """The test runs in a folder with small records, and a cache of its own."""
    from tests import forked

    forked.enter(tmp_path, monkeypatch)


@pytest.fixture
def refusal(capsys, monkeypatch):
    """refusal(argv): the problems that train.py prints. It must leave with 2 and write nothing."""
    import train

    def refuse(argv, world=1):
        monkeypatch.setenv("WORLD_SIZE", str(world))
        before = set(Path().rglob("*"))
        assert train.main(argv) == 2
        monkeypatch.delenv("WORLD_SIZE")
        out, err = capsys.readouterr()
        assert out == "" and "Traceback" not in err
        assert all(path.parts[0] == "cache" for path in {*Path().rglob("*")} - before)
        return err.splitlines()

    return refuse


@pytest.fixture(scope="session")
def gpu():
    """The environment of a process that sees the GPUs; skips the test where there is none."""
    env = os.environ | {"CUDA_VISIBLE_DEVICES": os.environ["TEST_GPUS"]}
    if env["CUDA_VISIBLE_DEVICES"] == "all":
        del env["CUDA_VISIBLE_DEVICES"]
    there = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    if subprocess.run([sys.executable, "-c", there], env=env).returncode:
        pytest.skip("needs a GPU")
    return env


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """checkpoint(case): transformers' model of a case of tests/cases.py, and its directory."""
    pytest.importorskip("transformers")
    from tests import cases

    made = {}

    def make(case):
        if case not in made:
            directory = tmp_path_factory.mktemp(case)
            made[case] = cases.make(case, directory), directory
        return made[case]

    return make
