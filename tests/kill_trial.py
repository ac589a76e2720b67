"""Kill a run again and again, and see that it ends with the bits of one that was never stopped.

    python tests/kill_trial.py --kills 20 --ranks 2 --dtype bf16

Each kill is SIGKILL at a random one of the calls that Python makes in a forward or backward pass,
while a checkpoint or the model is saved, or while the cache of tokenised data is built; of one rank
or of all. The other ranks must end by themselves.

With --launcher it is SIGKILL to torchrun alone, at a random moment from the start of the ranks on.
The same command, given at once, must get to work, and all ranks of the first end; it prints after
how many seconds it did, beside those of a start that nothing came before.
"""

import argparse
import contextlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests import forked

Kill = tuple[str, int, list[int]]  # phase, call within it (see forked.at), ranks

# Python's calls within each phase, on one rank and on several: of all, or of a third of a run, so
# that it is killed several times before it is through.
CALLS = {
    "forward": (12_000, 70_000), "backward": (12_000, 160_000), "save": (90_000, 90_000),
    "cache": (3_500, 3_500), "model": (6_000, 17_000),
}  # fmt: skip


def trial(kills: Iterable[Kill], ranks: int, dtype: str) -> list[int]:
    """Returns how many processes each kill ended. Works in the folder entered."""
    argv = ["--dtype", dtype, "--lisa-ends", "sampled", "--save-every", "2"]
    forked.done(*argv, "--out", "whole", ranks=ranks)
    ended = []
    for phase, call, victims in kills:
        if phase == "cache":
            shutil.rmtree("cache")
        fault = partial(forked.at, phase, call, partial(forked.send, signal.SIGKILL))
        started = forked.start([*argv, "--out", "killed"], ranks, dict.fromkeys(victims, fault))
        code, printed = forked.finish(started)
        ended.append([process.exitcode for process in started].count(-signal.SIGKILL))
        print(f"{phase}, call {call}: {ended[-1]} of {ranks} killed", flush=True)
        if not ended[-1]:  # it was nearly through, and got there
            assert code == 0, printed
            forked.assert_same("killed", "whole")
            shutil.rmtree("killed")
    forked.done(*argv, "--out", "killed", ranks=ranks)
    forked.assert_same("killed", "whole")
    return ended


def at_random(phases: Iterable[str], ranks: int, seed: int) -> Iterator[Kill]:
    """A kill in each of the phases, of one rank or of all."""
    rng = random.Random(seed)
    for phase in phases:
        one = phase != "cache" and rng.random() < 0.5  # the cache is built by whoever comes first
        victims = [rng.randrange(ranks)] if one else list(range(ranks))
        yield phase, rng.randint(1, CALLS[phase][ranks > 1]), victims


def launcher_trial(n: int, ranks: int, dtype: str, seed: int) -> None:
    """Works in the folder entered."""
    rng = random.Random(seed)
    argv = ["--dtype", dtype, "--lisa-ends", "sampled", "--steps", "60", "--save-every", "20"]
    whole, took = at_work([*argv, "--out", "whole"], ranks)
    began = time.time()
    assert whole.wait() == 0
    lasts, argv = took + time.time() - began, [*argv, "--out", "killed"]
    print(f"at work after {took:.1f} s, through after {lasts:.1f} s")
    while n:
        moment = rng.uniform(0, lasts)
        orphans = kill_launcher(forked.launch(argv, ranks), ranks, moment)
        n -= bool(orphans)
        again, seconds = at_work(argv, ranks)
        what = "killed" if orphans else "it was through"
        print(f"{what} after {moment:.1f} s; at work again after {seconds:.1f} s", flush=True)
        forked.wait_for_end([*orphans, *kill_launcher(again, ranks, 0)])
        if Path("killed/model").is_dir():
            forked.assert_same("killed", "whole")
            shutil.rmtree("killed")
    last = forked.launch(argv, ranks)
    assert last.wait() == 0, last.log.read_text()
    forked.assert_same("killed", "whole")


def at_work(argv: list[str], ranks: int) -> tuple[subprocess.Popen, float]:
    """A launcher, and the seconds after which its ranks had read and checked everything."""
    began, process = time.time(), forked.launch(argv, ranks)
    forked.wait_until_it_says(process, "ScaleBiO: ", "is a finished run")
    return process, time.time() - began


def kill_launcher(process: subprocess.Popen, ranks: int, moment: float) -> list[int]:
    """Kill a launcher so many seconds after it started its ranks, which are returned. If it is
    through before, there are none."""
    orphans = forked.ranks_of(process, ranks)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(moment)
    process.kill()
    assert process.wait() in (0, -signal.SIGKILL), process.log.read_text()
    return orphans if process.returncode else []


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {"kills": 20, "ranks": 1, "dtype": "fp32", "seed": 0}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--launcher", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        forked.enter(Path(folder), patch)
        if args.launcher:
            launcher_trial(args.kills, args.ranks, args.dtype, args.seed)
            print("equal to the last bit")
            sys.exit()
        phases = random.Random(args.seed).choices(list(forked.PHASES), k=args.kills)
        ended = trial(at_random(phases, args.ranks, args.seed), args.ranks, args.dtype)
        print(f"{sum(map(bool, ended))} of {args.kills} runs killed; equal to the last bit")
