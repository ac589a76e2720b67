"""Fixtures shared by all tests."""

from pathlib import Path

import pytest

ASSETS = Path(__file__).resolve().parents[2] / "shared" / "assets"


@pytest.fixture
def asset():
    """asset("path") is the path of a real data file, or skips the test where it is missing."""

    def find(path):
        if not (ASSETS / path).exists():
            pytest.skip(f"needs the data file {path}, which is not on this machine")
        return ASSETS / path

    return find
