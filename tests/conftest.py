"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

# Tests run side by side, and so do the ranks that they start: a thread each. Set before torch is
# imported; the processes that tests start inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

BESIDE = Path(__file__).resolve().parents[2] / "shared" / "assets"
ASSETS = Path(os.environ.get("SCALEBIO_ASSETS", BESIDE))


@pytest.fixture
def asset():
    """asset("path") is the path of a real data file, or skips the test where it is missing."""

    def find(path):
        if not (ASSETS / path).exists():
            pytest.skip(f"needs the data file {path}, which is not on this machine")
        return ASSETS / path

    return find


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
