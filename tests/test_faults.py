"""What can go wrong around a run: it ends with a clear line, or goes on, and never hangs."""

import contextlib
import errno
import fcntl
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import shard
import train
from model import from_pretrained
from tests import forked
from tests.forked import FLAGS, at, done, rows, run, saved, send

SECRET = "s3cr3t-value"
pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that knew secrets, and was killed after its checkpoints step-2 and step-4."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        forked.enter(folder, patch)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY"):
            patch.setenv(name, SECRET)
        kill_in_third_save = partial(at, "save", 50, partial(send, signal.SIGKILL), entry=3)
        _, said = run("--out", "out", "--save-every", "2", fault=kill_in_third_save)
    assert SECRET not in said
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


@pytest.mark.parametrize("ranks, shard_size", [(2, "0"), (4, "2")])
def test_when_a_rank_hangs_the_others_end_after_the_timeout(ranks, shard_size):
    fault = partial(at, "forward", 20, partial(send, signal.SIGSTOP), entry=9)
    flags = ["--out", "out", "--timeout", "3", "--shard-size", shard_size]
    started = forked.start(flags, ranks, {1: fault})
    code, said = forked.finish(started, frozen=1)
    assert code == 1 and "did not come within the --timeout of 3 s" in said


def test_saving_may_take_longer_than_the_timeout_of_a_step():
    fault = partial(at, "save", 20, partial(time.sleep, 4))
    done("--out", "out", "--save-every", "6", "--timeout", "3", ranks=2, fault=fault)


def run_out_of_memory() -> None:
    raise torch.OutOfMemoryError("out of memory: tried to allocate 34 GB")


def test_when_a_rank_runs_out_of_memory_the_others_end():
    """As when one is killed, see test_resume.py."""
    said = fails(ranks=2, fault=partial(at, "backward", 20, run_out_of_memory, entry=5))
    assert "rank 0 ends: another rank is gone" in said and "rank 1 ends: out of memory" in said


def fail_alone() -> None:
    raise RuntimeError("of this rank")


def as_with_nccl(act: Callable[[], object]) -> None:
    """What takes the process group down waits for the other ranks."""
    dist.destroy_process_group = partial(time.sleep, 1000)
    train.run = lambda *_: act()


def test_an_error_that_one_rank_does_not_expect_ends_it_and_the_others():
    acts = [partial(as_with_nccl, act) for act in (dist.barrier, fail_alone)]
    code, said = forked.finish(forked.start([], 2, dict(enumerate(acts))))
    assert code == 1 and "RuntimeError: of this rank\n" in said
    assert "rank 0 ends: another rank is gone, or did not come in time (" in said


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))


def test_a_file_that_cannot_be_written_ends_the_run(out):
    """The limit on the size of files stands for a full disk where none can be mounted."""
    said = fails("--save-every", "2", fault=limit_file_size)
    assert "File too large" in said or "could not be written: is the disk full?" in said
    assert saved("out") == ["step-2", "step-4"]
    done("--out", "out", "--save-every", "2")


@contextlib.contextmanager
def disk(options: str):
    """A disk in memory, mounted at "disk"."""
    Path("disk").mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", "disk"]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", "disk"], check=True)


def leave_free(n_bytes: int) -> None:
    with open("disk/ballast", "ab") as file:
        file.write(bytes(shutil.disk_usage("disk").free - n_bytes))


def retry_soon() -> None:
    shard.RETRY_AFTER = 0.1


def fill_the_disk() -> None:
    retry_soon()
    at("forward", 1, partial(leave_free, 0), entry=3)


@pytest.mark.parametrize("flags", [[], ["--save-every", "2"], ["--keep", "0"]])
def test_a_run_waits_for_room_on_a_full_disk_and_loses_nothing(stopped, refusal, flags):
    """For a checkpoint; and without any, for the model."""
    with disk("size=60m"):
        shutil.copytree(stopped, "disk/out")
        leave_free(10_000)
        (line,) = refusal([*FLAGS, "--out", "disk/out"])
        assert line.startswith("--out disk/out: 0.000 GB are free, and the model and the last ")
        Path("disk/ballast").unlink()
        ranks = 1 + ("--save-every" in flags)
        runs = forked.start(["--out", "disk/out", *flags], ranks, {0: fill_the_disk, 1: retry_soon})
        log = runs[0].log
        while not (log.exists() and "nothing is lost" in log.read_text()):
            assert runs[0].is_alive() or not log.exists(), log.read_text()
            time.sleep(0.05)
        Path("disk/ballast").unlink()
        code, said = forked.finish(runs)
        assert code == 0, said
        assert "goes on from disk/out/checkpoints/step-4" in said
        kept = "--keep" not in flags
        assert ("step-12" in saved("disk/out")) == kept and len(forked.rows("disk/out")) == 12
        if ranks == 1:
            done("--out", "whole")
            forked.assert_same("disk/out", "whole", checkpoints=kept)


def find_no_room_twice() -> None:
    """Before and after a checkpoint is written, where rank 0 works alone."""
    inner, calls = shard.delete, iter([True, False, True])
    retry_soon()

    def delete(*args):
        if next(calls, False):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        inner(*args)

    shard.delete = delete


def test_what_rank_0_alone_finds_on_the_disk_concerns_all_ranks():
    faults = {0: find_no_room_twice, 1: retry_soon}
    runs = forked.start(["--out", "out", "--save-every", "6"], 2, faults)
    code, said = forked.finish(runs)
    assert code == 0 and "nothing is lost" in said and saved("out") == ["step-12", "step-6"], said


def test_an_out_that_cannot_be_written_is_refused(refusal):
    Path("disk").mkdir(0o555)
    may = os.access("disk", os.W_OK)  # as root may, but not on a disk that is read only
    with disk("ro") if may else contextlib.nullcontext():
        for path in ("disk", "disk/out", "val.jsonl/out"):
            (line,) = refusal([*FLAGS, "--out", path])
            why = f"{path.removesuffix('/out')} is not a directory that can be written to"
            assert line.startswith(f"--out {path}: ") and line.endswith(why)


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def look_at_every_damage(checkpoint: Path) -> None:
    """Each damage to each file is seen, and named."""
    assert shard.damaged_files(checkpoint) == []
    for file in sorted(checkpoint.iterdir()):
        content = file.read_bytes()
        for damaged in (flipped(content), content[:-1], b"", None):
            file.unlink()
            if damaged is not None:
                file.write_bytes(damaged)
            bad = shard.damaged_files(checkpoint)
            # A flip within the list of checksums may spoil the name or the sum of another file.
            named = bad and (bad == [file.name] or file.name == shard.CHECKSUMS)
            assert named, (file, damaged, bad)
            file.write_bytes(content)
    for content in ("[]", "{}", "7", "null"):
        (checkpoint / shard.CHECKSUMS).write_text(content)
        assert shard.damaged_files(checkpoint)


def test_every_damage_to_a_checkpoint_is_seen(out):
    forked.call(1, partial(look_at_every_damage, out / "checkpoints/step-4"))


def test_a_damaged_checkpoint_is_passed_over_and_never_counts(out):
    """With --keep 1 the good checkpoint stays, and not the newer one that is damaged."""
    file = next((out / "checkpoints/step-4").glob("shard-*"))
    file.write_bytes(flipped(file.read_bytes()))
    (out / "checkpoints/step-4").rename(out / "checkpoints/step-9")
    said = done("--out", "out", "--save-every", "7", "--keep", "1")
    assert f"out/checkpoints/step-9 is damaged ({file.name}): passed over" in said
    assert "goes on from out/checkpoints/step-2" in said
    assert saved("out") == ["step-12"]


def test_a_run_whose_checkpoints_are_all_damaged_is_left_alone(out):
    before = (out / "metrics.jsonl").read_bytes()
    for checkpoint in (out / "checkpoints").glob("step-*"):
        (checkpoint / shard.CHECKSUMS).write_text("{")
    said = fails()
    assert "no checkpoint is whole" in said and "step-2 is damaged" in said
    assert (out / "metrics.jsonl").read_bytes() == before


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


def test_a_run_that_lost_its_launcher_is_waited_for(out):
    with open(out / ".lock", "w") as lock:  # for the run: its launcher is no process of today
        fcntl.flock(lock, fcntl.LOCK_EX)
        print(f"{platform.node()}:{2**22 + 1} token", file=lock, flush=True)
        (process,) = started = forked.start(["--out", "out"])
        while not (process.log.exists() and "waits for the run in out" in process.log.read_text()):
            assert process.is_alive()
            time.sleep(0.05)
    code, said = forked.finish(started)
    assert code == 0 and "goes on from out/checkpoints/step-4" in said


def close_output() -> None:
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 1)
    os.dup2(write, 2)


def test_it_outlives_what_reads_its_output(out):
    code, said = run("--out", "out", fault=close_output)
    assert code == 0 and said == ""
    assert len(rows("out")) == 12 and from_pretrained("out/model")


def test_other_records_are_another_run(out, refusal):
    for held in (out, out / "checkpoints/step-4"):
        config = json.loads((held / "config.json").read_text())
        assert config["flags"]["steps"] == 12 and config["data"]["train a"]["sha256"]
    shutil.copy("train_a.jsonl", "train_d.jsonl")
    shutil.move("train_c.jsonl", "c.jsonl")
    with open("train_b.jsonl", "a") as file:
        file.write('\n{"text": "one more"}')
    lines = refusal([*FLAGS, "--out", "out"])
    assert [line.split("--out out holds another run: the data of ")[1] for line in lines] == [
        "train b has changed", "train c is gone", "train d was not there",
    ]  # fmt: skip


def test_weights_and_batches_go_by_the_places_of_the_sources(out, refusal):
    swapped = ["--train", "c=train_c.jsonl", "a=train_a.jsonl", "b=train_b.jsonl", *FLAGS[2:]]
    for more in (["--out", "out"], ["--out", "other", "--resume", "out", "--steps", "14"]):
        (line,) = refusal([*swapped, *more])
        assert line.endswith(" out holds another run: the sources' order was a, b, c")


def test_dropped_records_are_in_the_report():
    records = [{"text": text} for text in ("fine", "", "fine too", "held out")]
    Path("a.jsonl").write_text("\n".join(map(json.dumps, records)))
    Path("v.jsonl").write_text('{"text": "held out"}')
    flags = "--train a=a.jsonl --val v.jsonl --drop-overlap --steps 2 --out out".split()
    said = done(flags=flags)
    left_out = "left out:\n  empty answer: 1 of train a\n  with a prompt of val: 1 of train a\n"
    assert left_out in said
    source = json.loads(Path("out/weights.json").read_text())["sources"]["a"]
    assert source["samples"] == 2 and sum(source["dropped"].values()) == 2


def test_problems_of_many_files_are_sixty_lines_and_a_count(refusal):
    for name in "abv":
        Path(f"{name}.jsonl").write_text(f"{{{name}\n" * 50)
    lines = refusal("--train a=a.jsonl b=b.jsonl --val v.jsonl --alpha -1".split())
    assert len(lines) == 61 and lines[-1] == "… and 91 more"
    assert lines[0].startswith("--alpha -1.0: ") and lines[1].startswith("a.jsonl:1: ")


def test_no_secret_is_written(out):
    files = [path for path in out.rglob("*") if path.is_file()]
    assert len(files) >= 7 and not any(SECRET.encode() in path.read_bytes() for path in files)


def test_what_is_left_of_an_interrupted_start_is_nothing():
    """Ctrl-C while records are tokenised."""
    fault = partial(at, "cache", 200, partial(send, signal.SIGINT), entry=3)
    assert run("--out", "out", fault=fault) == (-signal.SIGINT, "") and not Path("out").exists()
