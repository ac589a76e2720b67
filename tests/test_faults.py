"""What can go wrong around a run: it ends with a clear line, or goes on, and never hangs."""

import json
import os
import resource
import shutil
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest
import torch

import shard
import train
from model import from_pretrained
from tests import forked
from tests.forked import at, done, rows, run, saved, send


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    forked.enter(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was killed after its checkpoints step-2 and step-4."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        forked.enter(folder, patch)
        kill_in_third_save = partial(at, "save", 50, partial(send, signal.SIGKILL), entry=3)
        run("--out", "out", "--save-every", "2", fault=kill_in_third_save)
    assert [n for n in saved(folder / "out") if not n.startswith(".")] == ["step-2", "step-4"]
    return folder / "out"


@pytest.fixture
def out(stopped):
    """A copy of its own of that run."""
    shutil.copytree(stopped, "out")
    return Path("out")


def fails(*argv: str, **kwargs) -> str:
    """A run that must end with 1 and one line of each rank that says why; returns what it says."""
    code, said = run("--out", "out", *argv, **kwargs)
    assert code == 1 and "Traceback" not in said, said
    return said


# ---------------------------------------------------------------------------------------------
# Ranks


def test_when_a_rank_dies_the_others_end():
    said = fails(ranks=2, fault=partial(at, "backward", 20, partial(send, signal.SIGKILL), entry=5))
    assert "rank 0 ends: another rank is gone, or did not come within the --timeout" in said


def test_when_a_rank_hangs_the_others_end_after_the_timeout():
    fault = partial(at, "forward", 20, partial(send, signal.SIGSTOP), entry=9)
    started = forked.start(["--out", "out", "--timeout", "4"], 2, {1: fault})
    code, said = forked.finish(started, frozen=1)
    assert code == 1 and "did not come within the --timeout of 4 s" in said


def test_saving_and_tokenising_may_take_longer_than_a_step():
    fault = partial(at, "save", 20, partial(time.sleep, 6))
    code, said = run("--out", "out", "--save-every", "6", "--timeout", "3", ranks=2, fault=fault)
    assert code == 0, said


def test_when_a_rank_is_out_of_memory_all_end():
    code, said = run("--out", "out", ranks=2,
                     fault=partial(at, "forward", 20, forked.run_out_of_memory, entry=9))
    assert code == 1 and "rank 0 ends: another rank is gone" in said
    assert "rank 1 ends: " in said and "out of memory" in said


# ---------------------------------------------------------------------------------------------
# Disks


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))


def test_a_file_that_cannot_be_written_ends_the_run(out, stopped):
    """The limit on the size of files stands for a full disk, where no small one can be mounted."""
    said = fails("--save-every", "2", fault=limit_file_size)
    assert "File too large" in said or "could not be written: is the disk full?" in said
    assert saved("out") == ["step-2", "step-4"]
    done("--out", "out", "--save-every", "2")


def test_a_full_disk_ends_the_run_and_the_last_checkpoint_stays(stopped):
    os.mkdir("disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", "disk"]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small tmpfs cannot be mounted here")
    try:
        shutil.copytree(stopped, "disk/out")
        room = shutil.disk_usage("disk").free
        Path("disk/ballast").write_bytes(b"x" * (room - 5_000_000))
        code, said = run("--out", "disk/out", "--save-every", "2")
        assert code == 1 and "Traceback" not in said
        assert "No space left on device" in said or "is the disk full?" in said
        assert saved("disk/out") == ["step-2", "step-4"]
        with open("disk/ballast", "ab") as file:
            file.write(b"x" * (shutil.disk_usage("disk").free - 1_000_000))
        code, said = run("--out", "disk/out", "--save-every", "2")
        assert code == 2 and "GB are free, and the model takes 0.00" in said
        Path("disk/ballast").unlink()
        assert "goes on from disk/out/checkpoints/step-4" in done("--out", "disk/out")
    finally:
        subprocess.run(["umount", "-l", "disk"], check=True)


def test_an_out_that_cannot_be_written_is_refused():
    os.mkdir("disk")
    mounted = not subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", "disk"]).returncode
    if not mounted:
        os.chmod("disk", 0o555)
        if os.access("disk", os.W_OK):
            pytest.skip("nothing can be made read-only here")
    try:
        for path in ("disk", "disk/out"):
            code, said = run("--out", path)
            assert code == 2
            assert said.startswith(f"--out {path}: ")
            assert said.endswith("disk is not a directory that can be written to\n")
    finally:
        if mounted:
            subprocess.run(["umount", "-l", "disk"], check=True)


# ---------------------------------------------------------------------------------------------
# Checkpoints


def damage(kind: str, file: Path) -> None:
    content = bytearray(file.read_bytes())
    if kind == "flip":
        content[len(content) // 2] ^= 1
    elif kind == "cut":
        del content[-1:]
    elif kind == "empty":
        content.clear()
    if kind == "gone":
        file.unlink()
    else:
        file.write_bytes(content)


def look_at_every_damage(checkpoint: Path) -> None:
    """In a process with a process group: each damage to each file is seen, and named."""
    shard.start(60)
    assert shard.damaged_files(checkpoint) == []
    for file in sorted(checkpoint.iterdir()):
        content = file.read_bytes()
        for kind in ("flip", "cut", "empty", "gone"):
            damage(kind, file)
            bad = shard.damaged_files(checkpoint)
            # A flip within the list of checksums may spoil the name or the sum of another file.
            named = bad and (bad == [file.name] or file.name == shard.CHECKSUMS)
            assert named, (file, kind, bad)
            file.write_bytes(content)
    for content in ("[]", "{}", "7", "null"):
        (checkpoint / shard.CHECKSUMS).write_text(content)
        assert shard.damaged_files(checkpoint)
    shard.exit_now(0)


def test_every_damage_to_a_checkpoint_is_seen(out):
    process = forked.CONTEXT.Process(
        target=look_at_every_damage, args=(out.absolute() / "checkpoints/step-4",)
    )
    process.start()
    process.join()
    assert process.exitcode == 0


def test_a_damaged_checkpoint_is_passed_over_and_never_counts(out):
    """With --keep 1 the good checkpoint stays, and not the newer one that is damaged."""
    file = next((out / "checkpoints/step-4").glob("*.distcp"))
    damage("flip", file)
    (out / "checkpoints/step-4").rename(out / "checkpoints/step-9")
    said = done("--out", "out", "--save-every", "7", "--keep", "1")
    assert f"out/checkpoints/step-9 is damaged ({file.name}): passed over" in said
    assert "goes on from out/checkpoints/step-2" in said
    assert saved("out") == ["step-7"]


def test_a_run_whose_checkpoints_are_all_damaged_is_left_alone(out):
    before = (out / "metrics.jsonl").read_bytes()
    for checkpoint in (out / "checkpoints").glob("step-*"):
        damage("cut", checkpoint / shard.CHECKSUMS)
    said = fails()
    assert "no checkpoint is whole" in said and "step-2 is damaged" in said
    assert (out / "metrics.jsonl").read_bytes() == before


def test_a_checkpoint_holds_flags_and_fingerprints(out):
    held = json.loads((out / "checkpoints/step-4/config.json").read_text())
    assert held["flags"]["steps"] == 12 and held["data"]["train a"]["sha256"]


# ---------------------------------------------------------------------------------------------
# The run itself


def test_a_second_run_on_the_same_out_is_refused(out):
    fault = partial(at, "forward", 20, partial(send, signal.SIGSTOP), entry=2)
    first = forked.start(["--out", "out"], faults={0: fault})
    while "goes on" not in (printed := first[0].log.read_text() if first[0].log.exists() else ""):
        assert first[0].is_alive(), printed
        time.sleep(0.05)
    code, said = run("--out", "out")
    assert (code, said) == (2, "--out out: another run is writing to it\n")
    first[0].kill()
    first[0].join()
    done("--out", "out")


def become_infinite(step: int) -> None:
    """Have the losses of a step be infinite."""
    inner = train.PenaltyStep.step
    steps = []

    def poisoned(self, *args, **kwargs):
        steps.append(1)
        losses = self.losses
        self.losses = lambda *a: losses(*a) * (torch.inf if len(steps) == step else 1)
        try:
            return inner(self, *args, **kwargs)
        finally:
            self.losses = losses

    train.PenaltyStep.step = poisoned


def test_a_loss_that_is_not_finite_stops_the_run_and_the_checkpoint_stays(out):
    fault = partial(become_infinite, 4)  # that is step 7, with step-4 resumed
    said = fails("--save-every", "2", fault=fault)
    assert "step 7: not finite: the loss of source a under w" in said
    assert saved("out") == ["step-4", "step-6"] and len(rows("out")) == 7
    code, said = run("--out", "out", "--skip-nonfinite", fault=partial(become_infinite, 2))
    assert code == 0 and "steps passed over because something was not finite: 1" in said
    assert [row["step"] for row in rows("out") if not row["finite"]] == [7]


def close_output() -> None:
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 1)
    os.dup2(write, 2)


def test_it_outlives_what_reads_its_output(out):
    code, said = run("--out", "out", fault=close_output)
    assert code == 0 and said == ""
    assert len(rows("out")) == 12 and from_pretrained("out/model")


def test_a_data_file_that_changed_is_refused(out):
    with open("train_b.jsonl", "a") as file:
        file.write('\n{"text": "one more"}')
    code, said = run("--out", "out")
    assert code == 2
    assert said == "--out out holds another run: the records of train b are not the same\n"


def test_dropped_records_are_in_the_report():
    records = [{"text": text} for text in ("fine", "", "fine too", "held out")]
    Path("a.jsonl").write_text("\n".join(map(json.dumps, records)))
    Path("v.jsonl").write_text('{"text": "held out"}')
    said = done("--train", "a=a.jsonl", "--val", "v.jsonl", "--drop-overlap", "--out", "out")
    assert "records left out: 1 of train a: empty answer; 1 of train a: a val record too" in said
    source = json.loads(Path("out/weights.json").read_text())["sources"]["a"]
    assert source["samples"] == 2 and sum(source["dropped"].values()) == 2


def test_problems_of_many_files_are_sixty_lines_and_a_count():
    for name in "abv":
        Path(f"{name}.jsonl").write_text(f"{{{name}\n" * 50)
    code, said = run("--train", "a=a.jsonl", "b=b.jsonl", "--val", "v.jsonl", "--alpha", "-1")
    lines = said.splitlines()
    assert code == 2 and len(lines) == 61 and lines[-1] == "… and 91 more"
    assert lines[0].startswith("--alpha -1.0: ") and lines[1].startswith("a.jsonl:1: ")


def test_no_secret_is_written(monkeypatch):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, "s3cr3t-value")
    told = partial(at, "backward", 20, partial(send, signal.SIGTERM), entry=5)
    code, said = run("--out", "out", fault=told)
    assert code == 143 and "s3cr3t" not in said
    files = [p for p in Path("out").rglob("*") if p.is_file()]
    assert len(files) >= 7 and not any(b"s3cr3t" in p.read_bytes() for p in files)


def test_what_is_left_of_an_interrupted_start_is_nothing():
    """Ctrl-C while records are tokenised."""
    Path("a.jsonl").write_text("\n".join(json.dumps({"text": f"{i}"}) for i in range(900)))
    Path("v.jsonl").write_text('{"text": "v"}')
    flags = ["--train", "a=a.jsonl", "--val", "v.jsonl", "--out", "out"]
    code, said = run(*flags, fault=partial(at, "cache", 3000, partial(send, signal.SIGINT)))
    assert (code, said) == (130, "") and not Path("out").exists()

