"""Several machines, each stood for by a folder that a rank works in: what is wrong on one is said
on all, and no rank waits for another that will not come."""

import gc
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import pytest

import evaluate
import shard
import train
from model import Transformer
from tests import forked
from tests.forked import FLAGS, done, finish, send, start, write_model

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("own_folder")


def machine(name: str, spoil: str) -> None:
    """Work in a copy of the records, with a cache of its own, and `spoil` it in a shell's words."""
    Path(name).mkdir()
    for file in Path().glob("*.jsonl"):
        shutil.copy(file, name)
    os.chdir(name)
    os.environ["XDG_CACHE_HOME"] = os.path.abspath("cache")
    subprocess.run(spoil, shell=True, check=True)


@pytest.mark.parametrize("spoil, problems", [
    ("true", ["--out out: not the directory that rank 0 writes to: it must be on a disk that all "
              "machines share"]),
    ("rm val.jsonl; (echo; echo {) >> train_b.jsonl",
     ["train_b.jsonl:41: ", "val.jsonl: No such file or directory"]),
    ("echo >> train_b.jsonl; cp train_b.jsonl train_d.jsonl",
     ["not as on rank 0: the data of train b", "not as on rank 0: the data of train d"]),
])  # fmt: skip
def test_what_is_wrong_on_one_machine_is_said_on_both(spoil, problems):
    code, said = finish(start(["--out", "out"], 2, {1: partial(machine, "other", spoil)}))
    lines = said.splitlines()
    assert code == 2 and lines == 2 * lines[: len(problems)], said  # the other one says it too
    for line, problem in zip(lines, problems, strict=False):
        assert line.startswith("rank 1 on ") and f": {problem}" in line
    assert not Path("out").exists() and not Path("other/out").exists()


def evaluates(machine: Callable[[], None] = lambda: None, more: str = "8") -> None:
    """It is evaluate.py that this rank runs, on a machine."""
    machine()
    train.main = lambda argv: evaluate.main([*argv, "--micro-batch-size", more])


def test_evaluation_says_it_too():
    model = write_model(Path("model")).absolute()
    flags = f"loss --model {model} --data val.jsonl --template plain --max-length 32".split()
    other = partial(evaluates, partial(machine, "other", "rm val.jsonl"))
    code, said = finish(start([], 2, {0: evaluates, 1: other}, flags))
    assert code == 2 and said.count("rank 1 on ") == said.count("No such file") == 2
    code, said = finish(start([], 2, {0: evaluates, 1: partial(evaluates, more="2")}, flags))
    assert code == 2 and said.count("not as on rank 0: --micro-batch-size") == 2
    assert finish(start([], 2, {0: evaluates, 1: evaluates}, flags))[0] == 0


def cache_elsewhere() -> None:
    os.environ["XDG_CACHE_HOME"] = os.path.abspath("other-cache")


def test_each_machine_may_have_its_own_cache():
    done("--out", "own", "--save-every", "6", ranks=2, fault=cache_elsewhere)
    done("--out", "shared", "--save-every", "6", ranks=2)
    forked.assert_same("own", "shared")
    assert len(list(Path("cache").rglob("*.bin"))) == len(list(Path("other-cache").rglob("*.bin")))


def be_impatient() -> None:
    shard.START_TIMEOUT = 3


@pytest.mark.parametrize("missing", [0, 1])
def test_ranks_wait_for_one_that_does_not_come_and_then_say_so(missing):
    """The first rank is where the others meet."""
    faults = {missing: partial(send, signal.SIGSTOP), 1 - missing: be_impatient}
    started = start(["--out", "out"], 2, faults)
    _, said = finish(started, frozen=missing)
    last = said.splitlines()[-1]
    gone = f"rank {1 - missing} ends: another rank is gone, or did not come in time ("
    assert last.startswith(gone) and "timed out" in last.lower()
    assert [process.exitcode for process in started][1 - missing] == 1


def test_ctrl_c_while_torch_is_imported_is_silent():
    # Where the tests run in the background it is ignored, and what is ignored is inherited.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *FLAGS], preexec_fn=heed,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    assert process.communicate() == (b"", None) and process.returncode == -signal.SIGINT


def as_in_a_notebook() -> None:
    """Its own handlers of signals are there again afterwards, a second Ctrl-C is its own. No copy
    is left in memory, and no lock while it keeps a traceback. Its output is no file."""
    inner, sys.stdout = train.main, io.StringIO()
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def main(argv):
        before = [signal.getsignal(number) for number in train.STOPPING]
        gc.disable()
        assert inner(argv) == 0 and "held-out test loss" in sys.stdout.getvalue()
        assert not [thing for thing in gc.get_objects() if isinstance(thing, Transformer)]
        assert [signal.getsignal(number) for number in train.STOPPING] == before
        train.catch_signals(received := [])
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert received == [signal.SIGINT]
        for number, handler in zip(train.STOPPING, before, strict=True):
            signal.signal(number, handler)
        argv = [*argv, "--out", "again"]
        stop = mock.patch.object(train, "train", side_effect=KeyboardInterrupt)
        with stop, pytest.raises(KeyboardInterrupt) as held:
            inner(argv)
        code = inner(argv)  # what the others took is free again
        assert held.tb
        return code

    train.main = main


def test_a_run_in_a_notebook_leaves_it_as_it_was():
    done("--out", "out", "--gap", "gradient", fault=as_in_a_notebook)
