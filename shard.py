"""Sharding with FSDP2: the process group, a model cut over the ranks, its way to files and back.
The same code runs on CPU with gloo and on CUDA with nccl, on one process or many.

`fully_shard` cuts each parameter along its first dimension: of D ranks, rank r holds the rows
[r ⌈n/D⌉, (r+1) ⌈n/D⌉). A model is built on the meta device, cut, and filled tensor by tensor, so
that no rank ever holds more than one full tensor beside its shards. A single rank cuts nothing.
With --shard-size D every D ranks in a row hold a model, and the others replicas of it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import re
import shutil
import socket
import sys
import threading
import time
import traceback
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from hf import Problems, open_regular, pretrained, read_json, refuse, say, say_why
from hf.families import ModelConfig
from hf.pretrained import CONFIG
from lisa import local
from model import Transformer

# A model of at most this many bytes is gathered once a pass, and its gradients are reduced once; of
# a larger one each block is gathered each time it is used, unless there is room for all.
GATHER_ONCE_BYTES = 1_000_000_000
# There it is one group: each of several would have processes wait for one another, and nothing is
# computed meanwhile.
ONE_GROUP_ON = ("cpu",)
# Seconds that ranks wait for one another while a disk is read or written.
FILES_TIMEOUT = 4 * 3600.0
FILE_BYTES = 1_000_000_000  # of a checkpoint's files, but for one tensor
RETRY_AFTER = 10.0  # seconds after which a full disk is tried again
START_TIMEOUT = 300.0  # seconds that ranks wait for one another to start
CHECKSUMS = "checksums.json"
T = TypeVar("T")


# The process group, and how its ranks agree

def start(timeout: float) -> torch.device:
    """Join torchrun's process group, or make one of a single process. Returns this rank's device.
    Ranks that do not come in START_TIMEOUT, or a collective that then takes longer than `timeout`
    seconds, end the run."""
    limit = timedelta(seconds=START_TIMEOUT)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun's first process has it
        where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            socket.create_connection(where, timeout=60).close()
        except OSError as error:  # which TCPStore would try again and again
            raise dist.DistNetworkError(f"torchrun is gone: {error}") from None
    if "RANK" in os.environ:
        # TCPStore may wait for ever, where something else listens that says nothing.
        why = f"timed out after {2 * START_TIMEOUT:g} s"
        guard = threading.Timer(2 * START_TIMEOUT, end_alone, [why])
        guard.daemon = True
        guard.start()
        try:
            store, rank, world = next(dist.rendezvous("env://", timeout=limit))
        finally:
            guard.cancel()
        # After a restart the store may still hold the addresses of ranks that are gone.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"attempt {attempt}", store)
    else:
        store, rank, world = dist.HashStore(), 0, 1
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=limit, store=store, rank=rank, world_size=world)
    set_timeout(timeout)
    check_same({"whether there is a GPU": torch.cuda.is_available()})
    return jointly(own_device)


def own_device() -> torch.device:
    """This rank's GPU, or the CPU. ValueError if there are GPUs, but fewer than ranks."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    ranks, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if ranks > gpus:
        raise ValueError(f"{ranks} ranks on a machine of {gpus} GPUs: take as many as there are "
                         "GPUs, or hide them with CUDA_VISIBLE_DEVICES=")  # fmt: skip
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def command(work: Callable[[torch.device | None], int], group: bool = True) -> int:
    """The exit code of `work`, which runs in a process group; 2 for bad input, a ValueError or
    OSError, which the first rank of each node prints; 1 on a rank that lost another. Of several
    ranks one that fails ends here, as NCCL would have it wait for the others."""
    code = 1
    try:
        code = work(start(FILES_TIMEOUT) if group else None)
    except (ValueError, OSError) as error:
        code = refuse(*Problems.of(error))
    except MemoryError:
        say_why("out of memory")
    except Exception as error:
        if lost_peer(error):
            end_alone(error)
        if not (dist.is_initialized() and dist.get_world_size() > 1):
            raise
        say(*traceback.format_exc().splitlines(), file=sys.stderr)
        say_why(f"rank {dist.get_rank()} ends{what_it_said(error)}")
    finally:
        if dist.is_initialized():
            if code and dist.get_world_size() > 1:
                exit_now(code)
            dist.destroy_process_group()
    return code


def set_timeout(seconds: float) -> None:
    """From here on, a collective that takes longer ends the run. Collective."""
    dist.barrier()  # none may be short of time because another still had more of it
    public = hasattr(dist, "set_timeout")  # from torch 2.14 on
    set_it = dist.set_timeout if public else dist.distributed_c10d._set_pg_timeout
    for group in [*dist.distributed_c10d._world.pg_map]:  # with --shard-size several
        set_it(timedelta(seconds=seconds), group)


def jointly(work: Callable[[], T]) -> T:
    """What `work` gives on this rank, once it is through on all of them. If it raises a ValueError
    or OSError on some, all ranks raise one with the lines of all. Collective.

    Ranks agree by this and what is built on it alone: none decides from its own disk, clock or
    environment what it does in a collective.
    """
    mine, own, problems, heard = None, Problems(), Problems(), set()
    try:
        mine = work()
    except (ValueError, OSError) as error:
        own = Problems.of(error)
    said = [None] * dist.get_world_size()
    dist.all_gather_object(said, (platform.node(), own.lines, own.count))
    for rank, (node, lines, _) in enumerate(said):
        for line in lines:
            if line not in heard:
                problems.add(f"rank {rank} on {node}: {line}" if rank else line)
        heard.update(lines)
    problems.count = max(problems.count, *(count for *_, count in said))
    problems.raise_if_any()
    return mine


def broadcast_from_rank0(make: Callable[[], T]) -> T:
    """What rank 0 makes, on all ranks; or its ValueError or OSError. Collective."""
    box = [jointly(lambda: make() if dist.get_rank() == 0 else None)]
    dist.broadcast_object_list(box)
    return box[0]


def check_same(own: dict[str, object]) -> None:
    """ValueError on all ranks if something that they must have in common, by name, is not the same
    as on rank 0. Collective."""
    first = broadcast_from_rank0(lambda: own)
    other = [name for name in sorted(own.keys() | first.keys()) if own.get(name) != first.get(name)]
    jointly(Problems(f"not as on rank 0: {name}" for name in other).raise_if_any)


def lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone, or did not come in time."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def end_alone(error: Exception | str = "") -> None:
    """End a rank without taking the process group down, which would wait for the others."""
    say_why(f"rank {os.environ['RANK']} ends: another rank is gone, or did not come in "
            f"time{what_it_said(error)}")  # fmt: skip
    exit_now(1)


def what_it_said(error: Exception | str) -> str:
    """In brackets, the last line of a collective's error: NCCL's own reason is there."""
    lines = str(error).split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f" ({last[:300]})" if last else ""


def exit_now(code: int) -> None:
    """End the process without the interpreter's teardown, in which threads of torch that are still
    alive now and then abort it ("terminate called without an active exception")."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# A model over the ranks

def make_mesh(device_type: str, shard_size: int = 0) -> DeviceMesh:
    """All ranks, (D,); or (replicas, D) for D = `shard_size` that is less. Collective."""
    world = dist.get_world_size()
    n = shard_size or world
    shape = (world // n, n) if n < world else (world,)
    names = ("replicas", "shards")[-len(shape) :]
    return init_device_mesh(device_type, shape, mesh_dim_names=names)


def shard(model: Transformer, mesh: DeviceMesh, keep_gathered: bool) -> None:
    """Cut `model` over the mesh's last dimension, in place, and replicate it over the first of two:
    each block is gathered on its own when it is used, or a small model as a whole.

    keep_gathered: keep what was gathered until the end of backward (see `once_per_pass`).
    """
    dtype = model.norm.weight.dtype
    low = {"param_dtype": dtype, "reduce_dtype": torch.float32}
    mixed = MixedPrecisionPolicy(
        **low if torch.finfo(dtype).bits < 32 else {},
        cast_forward_inputs=False,  # a block's RoPE tables stay fp32
    )
    rules = {"mesh": mesh, "mp_policy": mixed, "reshard_after_forward": not keep_gathered}
    if model.reduce_once and mesh.device_type in ONE_GROUP_ON:
        fully_shard(model, **rules)
        return
    for block in model.blocks:
        fully_shard(block, **rules)
    last = [model.norm, model.head]
    if model.config.tied:
        last = [model.embed, *last]
    else:
        fully_shard(model.embed, **rules)
    # The head is the first to be needed again in backward: it is not cut in between.
    fully_shard(last, **rules | {"reshard_after_forward": False})
    fully_shard(model, **rules)


def differences(w: nn.Module, u: nn.Module, opt_w, opt_u) -> Callable[[Tensor, Tensor], Tensor]:
    """(parameter of w, that of u) -> w − u of their masters over the probability that LISA draws
    them, see bilevel.Slopes; whole, in the parameters' dtype.

    Collective: every rank calls it, for the same parameters in the same order.
    """

    def difference(p_w: Tensor, p_u: Tensor) -> Tensor:
        a = current_values(w, opt_w.masters.get(p_w, p_w))
        b = current_values(u, opt_u.masters.get(p_u, p_u))
        here = p_w.device  # a copy that waits is on the host
        d = torch.empty_like(local(p_w))
        a, b = (local(t).to(here, non_blocking=True) for t in (a, b))
        torch.sub(a, b, out=d).div_(opt_w.chance(p_w))
        if not isinstance(p_w, DTensor):
            return d
        like = {"shape": p_w.shape, "stride": p_w.stride()}
        mesh, cut = p_w.device_mesh, p_w.placements
        return DTensor.from_local(d, mesh, cut, run_check=False, **like).full_tensor()

    return difference


def build(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, offload: Offload | None = None,
    mesh: DeviceMesh | None = None, keep_gathered: bool = False,
) -> Transformer:  # fmt: skip
    """A model, sharded if there are several ranks, not filled yet. Copies share a `mesh` if it is
    not that of all ranks, and if they take turns on the device an `offload`. Collective.

    keep_gathered: gather it once a pass, whatever its size; changes no bit
    """
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    several = dist.get_world_size() > 1
    n_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    model.reduce_once = several and n_bytes <= GATHER_ONCE_BYTES
    model.gather_once = model.reduce_once or several and keep_gathered
    if several:
        mesh = mesh or make_mesh(device.type)
        shard(model, mesh, keep_gathered=model.gather_once)
    model.offload = offload
    if offload is not None:
        offload.follow(model)
    model.to_empty(device=device)
    if several:
        # FSDP notes in which dtype gradients are reduced when it is first used, and only for
        # parameters that train then: let it do so now, before LISA freezes any.
        model._get_fsdp_state()._lazy_init()
    else:
        model.tie()
    return model


def compile_blocks(model: Transformer, watched: bool, backend: str = "inductor") -> None:
    """Fuse what each block does, for all widths that the data have. FSDP's hooks stay outside.

    watched: blocks that train run as they are, for bilevel.Slopes
    """
    # Lengths that happen to be equal the first time (time and head size, say) are not one length.
    torch.fx.experimental._config.use_duck_shape = False
    # Blocks that train or not, the last one, with padding, gradients, a window or without: more
    # cases than the usual 8, past which a block would silently run uncompiled.
    torch._dynamo.config.recompile_limit = 64
    for block in model.blocks:
        compiled = torch.compile(block.forward, dynamic=True, backend=backend)
        choose = partial(_forward, next(block.parameters()), block.forward, compiled)
        block.forward = choose if watched else compiled


def _forward(p: Tensor, as_it_is: Callable, compiled: Callable, *args) -> Tensor:
    return (as_it_is if p.requires_grad else compiled)(*args)


@torch.no_grad()
def fill(model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Copy this rank's rows of each full tensor into its shard."""
    missing = dict(model.named_parameters())
    for name, full in tensors:
        p, cut, place = missing.pop(name), 1, 0
        if isinstance(p, DTensor):
            cut, place = p.device_mesh.shape[-1], p.device_mesh.get_coordinate()[-1]
        rows = -(-full.shape[0] // cut)
        local(p).copy_(full[place * rows : (place + 1) * rows])
    assert not missing, f"no tensor for {sorted(missing)}"


@torch.no_grad()
def copy_shards(target: nn.Module, source: nn.Module) -> None:
    """Make `target` equal to `source`, shard by shard, without communication."""
    move_to_device(target)
    for a, b in zip(target.parameters(), source.parameters(), strict=True):
        local(a).copy_(local(current_values(source, b)))


def once_per_pass(model: Transformer, last: bool) -> None:
    """For PenaltyStep.on_micro: gather parameters with the first micro-batch of a pass, and reduce
    gradients with the last, each where `build` found room for it; over replicas always with the
    last."""
    move_to_device(model)
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last or not model.reduce_once)
        model.set_requires_all_reduce(last)
        model.set_reshard_after_backward(last or not model.gather_once)


def release(model: nn.Module) -> None:
    """Drop gathered copies, which after a forward without backward would stay and go stale."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def full_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, full tensor), one at a time; on one rank they are the parameters' own. Collective:
    every rank takes all of it."""
    return ((name, full(p)) for name, p in model.named_parameters())


def full(t: Tensor) -> Tensor:
    """All of a DTensor, or the tensor itself; without autograd. Collective."""
    t = t.detach()
    return t.full_tensor() if isinstance(t, DTensor) else t


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on every rank's GPU; None on a CPU. Collective."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    return None if free is None else min(gathered({dist.get_rank(): free}).values())


# Copies that take turns on the device

class Offload:
    """Copies of a model that take turns on the device (--cpu-offload): while one is at work the
    others' shards, masters and moments wait in host memory; gradients stay on the device.

    A tensor that waits stays the same object but has no storage, so that using it out of turn
    fails. On a CPU both memories are one, but the moves are made all the same.
    """

    def __init__(self, device: torch.device, shard_size: int = 0):
        """Collective: every rank calls it."""
        self.pinned = device.type == "cuda"
        self.mesh = make_mesh("cpu", shard_size)
        self.state: dict[nn.Module, Callable[[], Iterable[Tensor]]] = {}
        self.here: nn.Module | None = None
        self.waiting: dict[nn.Module, dict[int, tuple[Tensor, Tensor]]] = {}
        self.spare: dict[tuple, list[Tensor]] = defaultdict(list)  # host memory, by dtype and size
        self.settled = True  # what was last moved to the host is there

    def follow(self, model: nn.Module, state: Callable[[], Iterable[Tensor]] = tuple) -> None:
        """Take `model` in, or from now on move what `state` lists along with its parameters."""
        self.state[model] = state
        self.switch(model)

    def switch(self, model: nn.Module) -> None:
        """Make `model` the one on the device, in the order of the current stream."""
        if self.here is model:
            return
        coming, gone = defaultdict(list), {}
        for whole, host in self.waiting.pop(model, {}).values():
            coming[host.dtype, len(host)].append((whole, host))

        def arrive(size: tuple) -> None:
            whole, host = coming[size].pop()
            whole.untyped_storage().resize_(host.nbytes)
            whole.copy_(host, non_blocking=True)
            self.spare[size].append(host)  # the stream reads it before anything is written there

        # One by one, so that neither memory holds both copies in between.
        here = self.here
        for old in () if here is None else (*here.parameters(), *self.state[here]()):
            part = local(old)
            # All elements of the storage that the part lies in, FSDP's padding included.
            whole = part.new_empty(0).set_(part.untyped_storage())
            size = whole.dtype, len(whole)
            if coming[size]:
                arrive(size)
            host = (self.spare[size].pop() if self.spare[size] else
                    torch.empty_like(whole, device="cpu", pin_memory=self.pinned))  # fmt: skip
            gone[storage_key(old)] = whole, host.copy_(whole, non_blocking=True)
            whole.untyped_storage().resize_(0)
        for size, tensors in coming.items():
            for _ in range(len(tensors)):
                arrive(size)
        if here is not None:
            self.waiting[here] = gone
        self.here, self.settled = model, False

    def current_values(self, model: nn.Module, t: Tensor) -> Tensor:
        """`t`, or while it waits its values on the host, likewise sharded."""
        if storage_key(t) not in self.waiting.get(model, {}):
            return t
        part, (_, host) = local(t), self.waiting[model][storage_key(t)]
        if self.pinned and not self.settled:
            torch.cuda.synchronize()
        self.settled = True
        host = host.as_strided(part.shape, part.stride(), part.storage_offset())
        if not isinstance(t, DTensor):
            return host
        like = {"shape": t.shape, "stride": t.stride()}
        return DTensor.from_local(host, self.mesh, t.placements, run_check=False, **like)


def storage_key(t: Tensor) -> int:
    return local(t).untyped_storage()._cdata


def move_to_device(model: nn.Module) -> None:
    """See to it that a model's shards are on the device."""
    if model.offload is not None:
        model.offload.switch(model)


def current_values(model: nn.Module, t: Tensor) -> Tensor:
    """A parameter or a piece of optimiser state of `model`, wherever it is now."""
    return t if model.offload is None else model.offload.current_values(model, t)


# To files and back. A checkpoint is a directory step-N, of JSON and safetensors, in which each rank
# put its rows. It has its name only once it is whole.

def save(model: nn.Module, target: Path, finish: Callable[[Path], None]) -> None:
    """Write `model` in Hugging Face format to the directory `target`, whole or not at all. `finish`
    adds the tokenizer, on rank 0. Collective."""
    move_to_device(model)
    release(model)
    tensors = full_tensors(model)
    on_host = ((name, tensor.cpu()) for name, tensor in tensors)
    like = ((name, torch.empty(p.shape, dtype=p.dtype, device="meta"))
            for name, p in model.named_parameters())  # fmt: skip

    def take_part() -> None:
        try:
            if dist.get_rank() == 0:
                with pretrained.written_whole(target) as directory:
                    pretrained.write_tensors(directory, model.config, on_host, like)
                    finish(directory)
                    sync(*directory.iterdir())
                sync(target.parent)
        finally:  # where rank 0 fails, too, the others are still gathering
            for _ in tensors:
                pass

    jointly(take_part)


def save_checkpoint(
    folder: Path, step: int, tensors: dict[str, Tensor], about: dict, keep: int
) -> None:
    """Write `folder`/step-N, whole or not at all; the `keep` newest up to it stay. Collective.

    tensors: DTensors and replicated tensors; about: what the run is made of, as its config.json
    """
    main, target = dist.get_rank() == 0, folder / f"step-{step}"
    with contextlib.ExitStack() as stack:

        def begin() -> Path:
            delete(folder, [target] * target.exists())  # it is there only if it was found damaged
            return stack.enter_context(pretrained.written_whole(target))

        temporary = broadcast_from_rank0(begin)
        files = {"save_distributed": True, "fqn_to_index_mapping": in_files(tensors)}
        with one_error():
            dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(temporary, **files))
        own = [*temporary.glob(f"shard-{dist.get_rank() + 1:05d}-*")]

        def finish_own() -> None:
            if main:
                own.append(temporary / CONFIG)
                own[-1].write_text(json.dumps(about | {"done": step}, indent=1) + "\n")
            sync(*own)

        jointly(finish_own)
        sums = gathered({file.name: crc32(file) for file in own})

        def complete() -> None:
            (temporary / CHECKSUMS).write_text(json.dumps(sums, indent=1))
            sync(temporary / CHECKSUMS, temporary)
            stack.close()
            sync(folder, folder.parent)
            # One of a later step was passed over when the run was resumed: it must not count.
            found = whole_checkpoints(folder)
            kept = [checkpoint for checkpoint in found if step_of(checkpoint) <= step][:keep]
            delete(folder, set(found) - set(kept))

        jointly(lambda: complete() if main else None)


def once_there_is_room(work: Callable[[], T], give_up: Callable[[], bool]) -> T:
    """What `work` gives, which fails on all ranks or none; while a disk is full it is tried again,
    so that nothing is lost, until a rank gives up. Collective."""
    waits = False
    while True:
        try:
            return work()
        except (OSError, ValueError) as error:
            if not no_room(error) or any(gathered({dist.get_rank(): give_up()}).values()):
                raise
            if not waits and dist.get_rank() == 0:
                say(f"{error}: nothing is lost, the run waits for room there, and tries again "
                    f"every {RETRY_AFTER:g} s", file=sys.stderr)  # fmt: skip
        waits = True
        time.sleep(RETRY_AFTER)


def no_room(error: Exception) -> bool:
    return any(words in str(error) for words in ("No space left", "Disk quota exceeded"))


def in_files(tensors: dict[str, Tensor]) -> dict[str, int]:
    """The number of the file, of each rank's, that a tensor is put into: a file is made in memory
    before it is written."""
    ends = itertools.accumulate(t.numel() * t.element_size() for t in tensors.values())
    size = FILE_BYTES * dist.get_world_size()
    return {name: 1 + end // size for name, end in zip(tensors, ends, strict=True)}


def load_checkpoint(
    checkpoint: Path, tensors_for: Callable[[list[str]], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The tensors made for the names in a checkpoint, filled, whatever number of ranks wrote it.
    ValueError if it has others. Collective."""
    reader = HuggingFaceStorageReader(checkpoint)

    @contextlib.contextmanager
    def one_line() -> Iterator[None]:
        try:
            yield
        except (LookupError, ValueError, RuntimeError, AssertionError, SafetensorError) as error:
            if lost_peer(error):
                raise
            why = f"{type(error).__name__}: {error}"
            raise ValueError(f"{checkpoint}: is of another run, or no checkpoint ({why})") from None

    # Looked at first, as dcp.load prints what it trips over there.
    metadata = jointly(one_line()(reader.read_metadata))
    tensors = tensors_for(list(metadata.state_dict_metadata))
    with one_line(), one_error():
        dcp.load(tensors, storage_reader=reader)
    return tensors


@contextlib.contextmanager
def one_error() -> Iterator[None]:
    """Of the ranks that failed, raise one's error: CheckpointException is no Exception."""
    try:
        yield
    except dcp.CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


def delete(folder: Path, checkpoints: Iterable[Path]) -> None:
    """Delete these, so that at no moment a part of one has its name; and what was left behind."""
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover)
    for checkpoint in checkpoints:
        hidden = checkpoint.with_name(f".{checkpoint.name}.old")
        os.replace(checkpoint, hidden)
        shutil.rmtree(hidden)


def whole_checkpoints(folder: Path) -> list[Path]:
    """Those that got their name, the newest first; whether they are damaged is not looked at."""
    found = [p for p in folder.glob("step-*") if re.fullmatch("step-[0-9]{1,12}", p.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def damaged_files(checkpoint: Path) -> list[str]:
    """Names of the files that are not what was written, or not among what was. Collective: the
    ranks share the reading."""

    def listed() -> dict[str, int]:
        try:
            sums = read_json(checkpoint / CHECKSUMS)
        except ValueError:
            return {CHECKSUMS: -1}
        return dict.fromkeys({CONFIG, *os.listdir(checkpoint)} - {CHECKSUMS}, -1) | sums

    sums = broadcast_from_rank0(listed)
    own = sorted(sums)[dist.get_rank() :: dist.get_world_size()]
    bad = [name for name in own if crc32(checkpoint / name) != sums[name]]
    return sorted(gathered(dict.fromkeys(bad)))


def newest_checkpoint(candidates: list[Path]) -> tuple[Path | None, list[str]]:
    """The first that is not damaged, and a line on each before it that is. Collective."""
    complaints = []
    for checkpoint in candidates:
        if not (bad := damaged_files(checkpoint)):
            return checkpoint, complaints
        complaints.append(f"{checkpoint} is damaged ({', '.join(bad)}): passed over")
    return None, complaints


def steps_done(checkpoint: Path) -> int:
    """Steps after which a checkpoint was written. ValueError if it does not say."""
    done = read_json(checkpoint / CONFIG).get("done")
    if type(done) is not int or done < 1:
        raise ValueError(f"{checkpoint / CONFIG}: says not after how many steps it was written")
    return done


def gathered(own: dict) -> dict:
    """The union of all ranks' dicts. Collective."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return {key: value for part in parts for key, value in part.items()}


def crc32(path: Path) -> int | None:
    """Of a file; None if there is none to read."""
    value = 0
    with contextlib.suppress(OSError), open_regular(path) as file:
        while block := file.read(1 << 24):
            value = zlib.crc32(block, value)
        return value


def sync(*paths: Path) -> None:
    """Make files, or the names given in directories, survive a power cut."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
