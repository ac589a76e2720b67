"""Kill a run again and again, and see that it ends with the bits of one that was never stopped.

    python tests/kill_trial.py --kills 20 --ranks 2 --dtype bf16

Each kill is SIGKILL at a random one of the calls that Python makes in a forward or backward pass,
while a checkpoint or the model is saved, or while the cache of tokenised data is built; of one rank
or of all. The other ranks must end by themselves.
"""

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests import forked


def trial(kills: int, ranks: int, dtype: str, seed: int) -> dict[str, int]:
    """Returns how many kills fell into each phase. Works in the folder entered."""
    rng, fallen = random.Random(seed), dict.fromkeys(forked.PHASES, 0)
    argv = ["--dtype", dtype, "--lisa-ends", "sampled", "--save-every", "2"]
    count = {rank: partial(forked.count_calls, f"calls.{rank}") for rank in range(ranks)}
    code, printed = forked.finish(forked.start([*argv, "--out", "whole"], ranks, count))
    assert code == 0, printed
    while sum(fallen.values()) < kills:
        phase, victim = rng.choice(list(fallen)), rng.randrange(ranks)
        if phase == "cache":
            shutil.rmtree("cache")
        # One rank builds the cache, whichever comes first.
        counts = [json.loads(Path(f"calls.{rank}").read_text())[phase] for rank in range(ranks)]
        calls = max(counts) if phase == "cache" else counts[victim]
        # Within a few steps, so that a run is killed several times before it is through.
        n = rng.randint(1, calls if phase in ("cache", "model") else calls // 3)
        everyone = phase == "cache" or rng.random() < 0.5
        victims = range(ranks) if everyone else [victim]
        fault = partial(forked.at, phase, n, partial(forked.send, signal.SIGKILL))
        started = forked.start([*argv, "--out", "killed"], ranks, dict.fromkeys(victims, fault))
        code, printed = forked.finish(started)
        died = [process.exitcode for process in started].count(-9)
        fallen[phase] += died > 0
        print(f"{phase}, call {n}: {died} of {ranks} killed", flush=True)
        if died == 0:  # it was nearly through, and got there
            assert code == 0, printed
            forked.assert_same("killed", "whole")
            shutil.rmtree("killed")
    forked.done(*argv, "--out", "killed", ranks=ranks)
    forked.assert_same("killed", "whole")
    return fallen


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        forked.enter(Path(folder), patch)
        fallen = trial(args.kills, args.ranks, args.dtype, args.seed)
        print(fallen, "killed; equal to the last bit")
