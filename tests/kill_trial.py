"""Kill a run again and again, and see that it ends with the bits of one that was never stopped.

    python tests/kill_trial.py --kills 20 --ranks 2 --dtype bf16

Each kill is SIGKILL at a random one of the calls that Python makes in a forward or backward pass,
while a checkpoint or the model is saved, or while the cache of tokenised data is built; of one rank
or of all. The other ranks must end by themselves.
"""

import argparse
import random
import shutil
import signal
import sys
import tempfile
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {"kills": 20, "ranks": 1, "dtype": "fp32", "seed": 0}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        forked.enter(Path(folder), patch)
        phases = random.Random(args.seed).choices(list(forked.PHASES), k=args.kills)
        ended = trial(at_random(phases, args.ranks, args.seed), args.ranks, args.dtype)
        print(f"{sum(map(bool, ended))} of {args.kills} runs killed; equal to the last bit")
