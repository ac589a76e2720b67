"""The README's programs, as a user would paste them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
STEPS = 5
# After the loop, the same interpreter saves w, and then runs train.py on the same task, without the
# picture.
AFTER_LOOP = f"""
import sys
from pathlib import Path
import train
shard.save(w, Path("minimal"), finish=lambda folder: None)
dist.destroy_process_group()
sys.modules["matplotlib"] = None
sys.exit(train.main(["--steps", "{STEPS}", "--out", "out"]))
"""


def program(section: str) -> str:
    """The only block of Python in a section of the README."""
    _, _, rest = (ROOT / "README.md").read_text().partition(f"\n## {section}\n")
    (code,) = re.findall(r"```python\n(.*?)```", rest.partition("\n## ")[0], re.S)
    return code


def printed(code: str, folder: Path) -> str:
    """What a program prints, run in a folder that is not the repository's."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_minimal_loop_matches_train_to_the_last_bit(tmp_path):
    code = program("The maths").replace("steps, seed = 200,", f"steps, seed = {STEPS},")
    lines = printed(code + AFTER_LOOP, tmp_path).splitlines()
    loop = [list(map(float, line.split())) for line in lines[:STEPS]]
    rows = map(json.loads, (tmp_path / "out/metrics.jsonl").read_text().splitlines())
    assert loop == [[row["step"], row["val_loss"], *row["weights"].values()] for row in rows]
    saved = (tmp_path / name / "model.safetensors" for name in ("minimal", "out/model"))
    ours, theirs = map(load_file, saved)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_fork_finds_the_wrong_labels(tmp_path):
    pytest.importorskip("sklearn")
    code = "import torch\ntorch.manual_seed(0)\n" + program("Fork it")
    code = code.replace("range(400)", "range(120)")  # which are enough
    assert float(printed(code, tmp_path).split()[-1]) > 0.9


def test_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    lines = text.splitlines()
    assert len(lines) <= 220 and max(map(len, lines)) <= 100
    for page in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
