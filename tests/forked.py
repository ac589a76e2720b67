"""Runs of train.py in processes forked off one that has torch loaded, so that they start at once,
and faults that happen to them at a chosen point.

    runs = start(["--out", "out"], ranks=2, faults={1: functools.partial(at, "backward", 100, act)})
    code, printed = finish(runs)

They draw no picture, unless `draw` is among the faults.
"""

import gc
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch._dynamo  # else each run would load it in its first step
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

import data
import shard
import train
from bilevel import Step
from hf import templates
from model import Transformer, save_pretrained
from tests.worker import small

# The server does not take over sys.path, and without its modules each child would load torch anew.
paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
os.environ["PYTHONPATH"] = os.pathsep.join(paths)
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.forked"])

FLAGS = ("--train . --val val.jsonl --test test.jsonl --steps 12 --lisa-interval 2 "
         "--lisa-layers 1 --batch-size 8 --val-batch-size 8 --micro-batch-size 8").split()

Fault = Callable[[], None]
Runs = list[multiprocessing.Process]

# What a fault can happen in the midst of: where the function is found, and its name.
PHASES = {
    "forward": (Transformer, "forward"),
    "backward": (Step, "_backward"),  # a copy's gradients in a step
    "save": (shard, "save_checkpoint"),
    "cache": (data, "_build_entry"),
    "model": (shard, "save"),
}


def enter(folder: Path, patch) -> None:
    """Work in a folder with a cache of its own, and in it what FLAGS name: three small sources and
    held-out records. patch: a MonkeyPatch."""
    patch.chdir(folder)
    patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    rng = random.Random(0)
    for name in ("train_a", "train_b", "train_c", "val", "test"):
        words = [name, "one", "two", "three", "four"]
        lines = [json.dumps({"text": " ".join(rng.choices(words, k=8))}) for _ in range(40)]
        Path(f"{name}.jsonl").write_text("\n".join(lines))


def write_model(folder: Path, family: str = "llama", template: str = "alpaca", **about) -> Path:
    """A small random checkpoint with the byte tokenizer; `about` it as worker.small takes."""
    save_pretrained(small(family, **about), folder)
    templates.save_tokenizer(data.byte_tokenizer(), folder, template)
    return folder


def start(
    argv: list[str], ranks: int = 1, faults: dict[int, Fault] | None = None,
    flags: list[str] = FLAGS,
) -> Runs:  # fmt: skip
    """One process a rank, without a launcher. faults: rank -> what to call before the run."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = str(s.getsockname()[1])
    world, started = {"MASTER_ADDR": "localhost", "MASTER_PORT": port}, []
    for rank in range(ranks):
        env = dict(os.environ)
        if ranks > 1:
            env |= world | {"WORLD_SIZE": str(ranks), "RANK": str(rank)}
        log = Path(tempfile.mktemp(prefix="log", dir=os.getcwd()))
        fault = (faults or {}).get(rank)
        process = CONTEXT.Process(target=_run, args=([*flags, *argv], env, log, fault))
        process.log = log
        process.start()
        started.append(process)
    return started


def _run(argv: list[str], env: dict, log: Path, fault: Fault | None) -> None:
    gc.freeze()  # else every collection looks through all that was loaded, and copies its pages
    sys.modules["matplotlib"] = None
    os.chdir(log.parent)
    os.environ.clear()
    os.environ.update(env)
    file = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    # In the background or under nohup these are ignored, and what is ignored is inherited.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if fault:
        fault()
    shard.exit_now(train.main(argv))


def call(ranks: int, *work: Callable[[], object]) -> list[dict]:
    """On each of so many ranks of a process group: {name of a function: what it gives}."""
    out = tempfile.mktemp(dir=os.getcwd())
    runs = start([], ranks, dict.fromkeys(range(ranks), partial(_answer, out, work)), flags=[])
    code, printed = finish(runs)
    assert code == 0, printed
    return [torch.load(f"{out}.{rank}") for rank in range(ranks)]


def _answer(out: str, work: tuple) -> None:
    shard.start(timeout=120)
    found = {getattr(f, "func", f).__name__: f() for f in work}
    torch.save(found, f"{out}.{dist.get_rank()}")
    dist.destroy_process_group()
    shard.exit_now(0)


def launch(argv: list[str], ranks: int, *options: str) -> subprocess.Popen:
    """torchrun and the ranks that it starts, as from a shell. What they print goes to a file."""
    torchrun = f"-m torch.distributed.run --standalone --nproc_per_node={ranks}".split()
    program = str(Path(__file__).parents[1] / "train.py")
    with open(tempfile.mktemp(prefix="log", dir=os.getcwd()), "w") as log:
        process = subprocess.Popen([sys.executable, *torchrun, *options, program, *FLAGS, *argv],
                                   stdout=log, stderr=subprocess.STDOUT)  # fmt: skip
    process.log = Path(log.name)
    return process


def wait_until(reached: Callable[[], object], process: subprocess.Popen) -> object:
    """What `reached` gives, once it is true of a process that goes on until then."""
    end = time.time() + 240
    while not (found := reached()):
        assert process.poll() is None and time.time() < end, process.log.read_text()
        time.sleep(0.005)
    return found


def wait_until_it_says(process: subprocess.Popen, *lines: str) -> None:
    """Until one of these is in what a process printed."""
    wait_until(lambda: any(line in process.log.read_text() for line in lines), process)


def ranks_of(process: subprocess.Popen, ranks: int) -> list[int]:
    """The processes that a launcher has started, once there are so many."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    found = wait_until(lambda: len(ids := children.read_text().split()) == ranks and ids, process)
    return [int(child) for child in found]


def wait_for_end(processes: list[int]) -> None:
    """Until none of these is there any more: they were children of one that is gone."""
    end = time.time() + 60
    while any(os.path.exists(f"/proc/{process}/exe") for process in processes):  # not of zombies
        assert time.time() < end, "a rank lives on without its launcher"
        time.sleep(0.01)


def finish(processes: Runs, frozen: int | None = None) -> tuple[int, str]:
    """(exit code of rank 0, what all ranks printed). All must end by themselves, but one that a
    fault froze."""
    end = time.time() + 600
    for n, process in enumerate(processes):
        if n != frozen:
            process.join(end - time.time())
    hanging = [n for n, process in enumerate(processes) if process.exitcode is None]
    for process in processes:
        process.kill()
        process.join()
    printed = "".join(process.log.read_text() for process in processes)
    assert hanging == ([] if frozen is None else [frozen]), printed
    return processes[0].exitcode, printed


def run(
    *argv: str, ranks: int = 1, fault: Fault | None = None, flags: list[str] = FLAGS
) -> tuple[int, str]:
    """Start and wait for the end; the fault happens to the last rank."""
    return finish(start(list(argv), ranks, {ranks - 1: fault}, flags))


def done(*argv: str, **kwargs) -> str:
    """A run that must succeed; returns what it printed."""
    code, printed = run(*argv, **kwargs)
    assert code == 0, printed
    return printed


def at(phase: str, n: int, act: Fault, entry: int = 1) -> None:
    """Have this process `act` at the nth call that Python makes within a phase, counted from the
    time that the phase is entered for the `entry`th time. at("save", 4, act, entry=2):

        the run   ─── steps ──┬─ save ──┬── steps ──┬─ save ──┬── steps ──┬─ save ──┬──▶
        entries               1                     2                     3
        calls                   · · · ·               · · · ·
        counted                                       1 2 3 4
                                                            ▲ act

    Calls of a phase that ends before the nth are followed by those of its next entry.
    """
    owner, name = PHASES[phase]
    inner, entries, calls = getattr(owner, name), 0, 0

    def count(frame, event, _):
        nonlocal calls
        calls += event in ("call", "c_call") and entries >= entry
        if calls == n:
            calls += 1
            act()

    def counted(*args, **kwargs):
        nonlocal entries
        entries += 1
        sys.setprofile(count)
        try:
            return inner(*args, **kwargs)
        finally:
            sys.setprofile(None)

    setattr(owner, name, counted)


def send(number: int) -> None:
    """A signal to this process: SIGKILL ends it, SIGSTOP freezes it."""
    os.kill(os.getpid(), number)


def draw() -> None:
    """No fault, but a wish: to have the picture, which takes longer than all steps."""
    del sys.modules["matplotlib"]


def rows(out: str) -> list[dict]:
    """metrics.jsonl but for times and memory."""
    lines = (Path(out) / "metrics.jsonl").read_text().splitlines()
    drop = {"seconds", "tokens_per_s", "peak_memory"}
    return [{k: v for k, v in json.loads(line).items() if k not in drop} for line in lines]


def state(checkpoint: str | Path) -> dict[str, torch.Tensor]:
    """Everything in a checkpoint, unsharded: w, u, masters, moments, λ."""
    reader = dcp.HuggingFaceStorageReader(checkpoint)
    stored = reader.read_metadata().state_dict_metadata
    tensors = {name: torch.empty(m.size, dtype=m.properties.dtype) for name, m in stored.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def saved(out: str) -> list[str]:
    return sorted(p.name for p in (Path(out) / "checkpoints").iterdir())


def assert_same(a: str, b: str, checkpoints: bool = True) -> None:
    """Equal to the last bit: the steps, the weights, the model, and the newest checkpoint."""
    assert rows(a) == rows(b)
    for name in ("weights", "gap", "test_loss", "step"):
        old, new = (json.loads((Path(out) / "weights.json").read_text()) for out in (a, b))
        assert old[name] == new[name]
    old, new = ((Path(out) / "model/model.safetensors").read_bytes() for out in (a, b))
    assert old == new
    if not checkpoints:
        return
    newest = [shard.whole_checkpoints(Path(out) / "checkpoints")[0] for out in (a, b)]
    assert newest[0].name == newest[1].name
    old, new = map(state, newest)
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in old)
