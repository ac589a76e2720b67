"""Tokenise many records in many sources once, map them the second time, and measure both.

    python tests/cache_trial.py --records 200000 --sources 18

Prints wall-clock and processor seconds of each pass, and by how much anonymous memory grew.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import data
from tests.worker import AnonymousMemory


def write_records(path: Path, n: int, rng: random.Random) -> int:
    """Alpaca records of about 90 words; returns the bytes."""
    words = [f"{a}{b}" for a in ("re", "un", "de", "in") for b in ("port", "act", "form", "line")]
    with open(path, "w") as file:
        for _ in range(n):
            asked, answered = (" ".join(rng.choices(words, k=k)) for k in (30, 60))
            file.write(json.dumps({"instruction": asked, "output": answered}) + "\n")
    return path.stat().st_size


def passes(records: int, sources: int, folder: Path) -> None:
    rng = random.Random(0)
    paths = [folder / f"{i}.jsonl" for i in range(sources)]
    size = sum(write_records(path, records // sources, rng) for path in paths)
    print(f"{records} records, {sources} sources, {size / 1e6:.0f} MB of text")
    for what in ("built", "mapped"):
        memory, wall, cpu = AnonymousMemory(), time.perf_counter(), time.process_time()
        for path in paths:
            data.load_dataset(path, data.byte_tokenizer(), "alpaca", 512, folder / "cache")
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        grown = (memory.peak - memory.start_at) / 1e6
        print(f"{what} in {wall:.2f} s (processor {cpu:.2f} s); memory grew by {grown:.0f} MB")
    stored = sum(file.stat().st_size for file in (folder / "cache").rglob("*.bin"))
    print(f"cache: {stored / 1e6:.0f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=200_000)
    parser.add_argument("--sources", type=int, default=18)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        passes(args.records, args.sources, Path(name))
