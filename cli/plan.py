"""How much memory a run needs, and how long it takes, before any GPU is rented.

    peak  = state + the worst moment of a backward pass
    state = the stored parameters of w and u; and the fp32 masters, AdamW moments and gradients of
            what LISA trains at a time; all of it sharded over the ranks

Reads a ModelConfig and the run's flags, no weights. No byte is fitted. What is sharded, gathered or
reduced follows from shapes and from the groups that shard.shard makes. What a block and the head
allocate is counted by running them forward and backward on the meta device, following each storage
from its creation to its release (`Live`).
Every sample has `max_length` tokens, all with loss: prompts and padding need less.
The time is that of the products at a share of a card's rate, of the bytes that other operations
read and write at a share of its memory's, and of what outlasts both, gathered over its links.
Left out, and the reason why RESERVED bytes of each GPU are kept back: kernels' workspaces, the
CUDA context, NCCL, and the allocator's rounding and fragmentation.

B batch, T time, D width, N heads; 1 GB = 10⁹ bytes.
"""

from __future__ import annotations

import bisect
import json
import math
import resource
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import shard
from bilevel import Slopes
from cli.flags import CARDS, GB, RESERVED, Card, as_flags
from hf import say
from hf.families import ModelConfig
from model import Context, Rows, Transformer, causal_mask, dtype_of, rope_tables, wide

STATE = "parameters", "masters", "AdamW moments", "gradients"
# Shares of a card's rates that were reached on an H200, see docs/speed.md; a link's is not known.
PRODUCTS, MOVES = 0.67, 0.5
KEPT = "; a copy at work is gathered once a pass"
COMPUTING, GATHERING = ("products", "other operations"), "gathering beside these"
FLOPS = flop_registry | {torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm]}


# What a block and the head allocate

class Live(TorchDispatchMode):
    """Counts the bytes of the meta tensors' storages that are alive, and their peak, leaving out
    those of the tensors `given`; and what is done: products' FLOPs, the bytes that they read and
    write, and those of all other operations."""

    def __init__(self, given: list[Tensor]):
        super().__init__()
        self.seen = {t.untyped_storage()._cdata for t in given}
        self.bytes = self.peak = 0
        self.work = np.zeros(3)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for storage in (t.untyped_storage() for t in tensors(out) if t.is_meta):
            key, n_bytes = storage._cdata, storage.nbytes()
            if key not in self.seen:
                self.seen.add(key)
                self.bytes += n_bytes
                self.peak = max(self.peak, self.bytes)
                weakref.finalize(storage, self.release, key, n_bytes)
        if func.is_view:
            return out
        moved = sum(t.nbytes for t in {id(t): t for t in tensors([args, kwargs, out])}.values())
        if flops := FLOPS.get(func._overloadpacket):
            self.work += flops(*args, **(kwargs or {}), out_val=out), moved, 0
        else:
            self.work[2] += moved
        return out

    def release(self, key: int, n_bytes: int) -> None:
        self.seen.discard(key)
        self.bytes -= n_bytes


def tensors(tree) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


class Fused(torch.autograd.Function):
    """What a GPU's kernels keep: flash and memory-efficient attention q, k, v, y and a statistic of
    each row; RMSNorm its input, its weight and a statistic of each row."""

    @staticmethod
    def forward(ctx, keeps_output: bool, *inputs: Tensor) -> Tensor:
        x = inputs[0]
        y, statistic = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=wide(x.dtype))
        ctx.n_inputs = len(inputs)
        ctx.save_for_backward(*inputs, statistic, *[y] * keeps_output)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        return None, *map(torch.empty_like, ctx.saved_tensors[: ctx.n_inputs])


class FusedKernels(TorchFunctionMode):
    """On the meta device torch spells out attention and RMSNorm; on a GPU it runs one kernel."""

    flops = 0  # of attention, forward, as if it were not causal

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.flops += 4 * args[0].numel() * args[1].shape[-2]
            return Fused.apply(True, *args[:3])
        if func is F.rms_norm:
            return Fused.apply(False, args[0], (*args, *(kwargs or {}).values())[2])
        return func(*args, **(kwargs or {}))


def meta_model(config: ModelConfig, dtype: torch.dtype) -> Transformer:
    """The ends and one block, which stands for all, without memory."""
    one = {"n_layers": 1, "windows": config.windows[:1], "ropes": config.ropes[:1]}
    with torch.device("meta"):
        return Transformer(replace(config, **one)).to(dtype)


class Cost(NamedTuple):
    """Bytes that a module allocates beside its input and parameters, and its work (see Live)."""

    saved: int  # alive between forward and backward, its output included
    forward: int  # peak of forward
    backward: int  # peak of backward, with the gradients of input and parameters
    ahead: np.ndarray  # work of forward
    back: np.ndarray  # work of backward


def cost(module, c: ModelConfig, dtype: torch.dtype, n: int, given: list[Tensor], *args) -> Cost:
    """Of forward and backward of `module(x, *args)`, x of n rows."""
    x = torch.empty(n, c.width, dtype=dtype, device="meta", requires_grad=True)
    with Live([x, *given]) as live, FusedKernels() as kernels:
        y = module(x, *args)
        saved, forward, ahead = live.bytes, live.peak, live.work.copy()
        live.peak = 0
        y.backward(y.detach())  # the gradient takes the place of the output
    attention = np.array([kernels.flops, 0, 0])
    return Cost(saved, forward, live.peak, ahead + attention, live.work - ahead + 2 * attention)


def watch(module: nn.Module, B: int, T: int, hold: bool) -> list[Tensor]:
    """Have the slopes of B samples taken in the module's backward, as bilevel.PenaltyStep does.
    Returns the directions that it holds: these are there before."""
    rows = B * T, B * (T - 1)
    module.row_samples = {n: torch.empty(n, dtype=torch.long, device="meta") for n in rows}
    held = {p: torch.empty_like(p) for p in module.parameters()} if hold else {}
    Slopes(module, held.get if hold else torch.empty_like).n_samples = B
    return [*held.values()]


@lru_cache(maxsize=256)
def block_pass(
    c: ModelConfig, dtype: torch.dtype, B: int, T: int, active: bool, slopes: bool, hold: bool,
    alone: bool, last: bool,
) -> Cost:  # fmt: skip
    """Of one block, with its parameters trained or frozen.

    slopes  taken of each sample, where the block trains; `hold`: along directions that are held
    alone   on one rank, where a parameter's gradient is added to the sum, and gone, as soon as it
            is there
    last    the last block: goes on with the positions that predict, all but each sample's last
    """
    block = meta_model(c, dtype).blocks[0].requires_grad_(active)
    if active and alone:
        for p in block.parameters():
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    given = watch(block, B, T, hold) if slopes else []
    at, _ = shared_by_blocks(c, dtype, B, T)
    if last:
        keep = torch.arange(B * (T - 1), device="meta")
        at = at._replace(out=Rows((B, T), keep), keep=keep)
    return cost(block, c, dtype, B * T, [*block.parameters(), *given, *tensors(at)], at)


def shared_by_blocks(c: ModelConfig, dtype: torch.dtype, B: int, T: int) -> tuple[Context, int]:
    """What the first block is told, see Transformer.forward; and the bytes of all RoPE tables and
    masks."""
    positions = torch.arange(T, device="meta")[None]
    tables = [rope_tables(c, rope, positions, wide(dtype)) for rope in set(c.ropes) - {None}]
    masks = [causal_mask(positions, T, window) for window in set(c.windows)
             if c.score_cap is not None or window is not None and window < T]  # fmt: skip
    first = [next(iter(of_kinds), None) for of_kinds in (tables, masks)]
    at = Context(Rows((B, T)), Rows((B, T)), rope=first[0], mask=first[1])
    return at, sum(t.nbytes for t in tensors([tables, masks]))


@lru_cache(maxsize=256)
def head_pass(
    c: ModelConfig, dtype: torch.dtype, B: int, T: int, active: bool, slopes: bool, hold: bool
) -> Cost:
    """Of the final norm and the losses at all positions but each sample's last."""
    n, model = B * (T - 1), meta_model(c, dtype).requires_grad_(active)
    given = watch(model, B, T, hold) if slopes else []
    targets = torch.empty(n, dtype=torch.long, device="meta")
    given += model.parameters()
    return cost(lambda x: model.head(model.norm(x), targets), c, dtype, n, given)


Shapes = list[torch.Size]


@lru_cache(maxsize=256)
def sizes(config: ModelConfig) -> tuple[Shapes, Shapes, Shapes, Shapes]:
    """Of the parameters of one block, the embedding, the head with the final norm, and both of
    these, in which a tied weight counts once."""
    model = meta_model(config, torch.bfloat16)
    embed, head = [model.embed], [model.norm, model.head]
    parts = [*model.blocks], embed, head, [*embed, *head]
    return tuple([p.shape for p in nn.ModuleList(part).parameters()] for part in parts)


def held(shapes: Shapes, ranks: int, rank: int = 0) -> int:
    """Elements that a rank holds: of each parameter ⌈n / ranks⌉ rows, or what is left of them."""
    total = 0
    for n, *rest in shapes:
        rows = -(-n // ranks)
        total += max(0, min(rows, n - rank * rows)) * math.prod(rest)
    return total


def state(
    config: ModelConfig, ranks: int, dtype: torch.dtype, n_active: int, ends: bool, rank: int = 0
) -> dict[str, int]:
    """Bytes of one copy on a rank that last: gradients from its pass to the update, the rest from
    step to step. `n_active` blocks train, and so do the ends if `ends`."""
    full = wide(dtype).itemsize
    block, _, _, both_ends = (held(shapes, ranks, rank) for shapes in sizes(config))
    trained = n_active * block + ends * both_ends
    masters = trained if dtype.itemsize < 4 else 0  # fp32 is its own master, see lisa.py
    stored = (config.n_layers * block + both_ends) * dtype.itemsize
    values = stored, masters * full, 2 * trained * full, trained * full
    return dict(zip(STATE, values, strict=True))


# The plan

def draws(config: ModelConfig, lisa_layers: int, lisa_ends: str) -> list[tuple[int, bool, float]]:
    """What LISA may draw: how many blocks, whether the ends, and how often."""
    n = lisa_layers or config.n_layers
    share = n / (config.n_layers + 1)
    return {"always": [(n, True, 1)], "frozen": [(n, False, 1)],
            "sampled": [(n, False, 1 - share), (n - 1, True, share)]}[lisa_ends]  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """Bytes per rank: the components at the peak, and what the host holds for an idle copy."""

    components: dict[str, int]
    host: int = 0

    @property
    def persistent(self) -> int:
        return sum(self.components[name] for name in STATE)

    @property
    def peak(self) -> int:
        return sum(self.components.values())


def plan(
    config: ModelConfig, *, ranks: int, dtype: torch.dtype, micro_batch_size: int, max_length: int,
    lisa_layers: int, lisa_ends: str, activation_checkpointing: bool, cpu_offload: bool,
    copies: int, batch_size: int, val_batch_size: int, slopes: bool, shard_size: int,
    keep_gathered: bool,
) -> Plan:  # fmt: skip
    """The peak of w's pass, while u's gradients wait for the update, in the worst of LISA's draws.

    copies            of the model: 2 learn weights, 1 is fine-tuned
    cpu_offload       one copy waits on the host while the other is at work
    batch_size, val_batch_size    samples of a step over all ranks. "validation pass" is what
                      validation's need beyond training's
    slopes            the gap is had from gradients of the training samples: bilevel.Slopes
    shard_size        ranks that a model is cut over, with replicas on the rest; 0 = all
    keep_gathered     a copy at work is gathered once a pass, as small ones always are
    """
    shards, directions = shard_size or ranks, slopes

    def worst(batch: int, slopes: bool) -> Plan:
        B = min(micro_batch_size, max(1, batch // ranks))
        plans = []
        for *draw, _ in draws(config, lisa_layers, lisa_ends):
            one = state(config, shards, dtype, *draw)
            waiting = (copies - 1) * one["gradients"]  # u's stay on the device: see shard.Offload
            host = sum(one.values()) - one["gradients"] if cpu_offload else 0
            here = {name: (copies - bool(cpu_offload)) * n_bytes for name, n_bytes in one.items()}
            of = config, dtype, shards, B, max_length, *draw, slopes, activation_checkpointing
            for moment in Pass(*of, keep_gathered, directions, shards < ranks):
                gradients = waiting + moment.get("gradients", one["gradients"])
                plans.append(Plan(here | moment | {"gradients": gradients}, host))
        return max(plans, key=lambda p: p.peak)

    train, val = worst(batch_size, slopes), worst(val_batch_size, False)
    extra = {"validation pass": max(0, val.peak - train.peak)}
    return replace(train, components=train.components | extra)


def settings(flags, ranks: int, dtype: torch.dtype) -> dict:
    """What `plan` takes, from the flags of a run."""
    names = (
        "micro_batch_size", "max_length", "lisa_layers", "lisa_ends", "activation_checkpointing",
        "cpu_offload", "batch_size", "shard_size",
    )  # fmt: skip
    return {name: getattr(flags, name) for name in names} | {
        "val_batch_size": flags.val_batch_size or flags.batch_size,  # not in a step of fine-tuning
        "copies": 1 if flags.mode == "finetune" else 2, "slopes": flags.slopes(dtype),
        "ranks": ranks, "dtype": dtype, "keep_gathered": False,
    }  # fmt: skip


def gathering(config: ModelConfig, memory: float | None, settings: dict) -> dict:
    """These settings of `plan`, with copies gathered once a pass where GPUs of `memory` bytes have
    room, and a tenth to spare for what a plan may miss."""
    kept = settings | {"keep_gathered": True}
    if memory is None or settings["ranks"] == 1:
        return settings
    return kept if plan(config, **kept).peak <= 0.9 * room(memory / GB) else settings


class Pass:
    """Iterates over the moments at which the memory of a pass can peak: bytes by component.

    A walk over the groups of shard.shard in its last micro-batch, from the head's forward back to
    the embedding's gradient. On several ranks each group is gathered, used, resharded, and its
    gradients are reduced. FSDP2 gathers a group into a flat buffer and copies it out from there;
    while one is at work the next is in its buffer. One rank has the whole, and adds what a
    parameter gets to its gradient at once.

    n_active blocks train, and the ends if `ends`. Which blocks those are is up to the draw; the
    plan is for the worst. The last block trains, as all others' activations are there while it is
    at work, and so does any block that is at work after it.

    whole       all groups stay gathered from a pass's first micro-batch to its last
    directions  of slopes, w − u of all that trains, are held then: in validation, too
    replicas    the shards have some: FSDP2 then keeps two more sets of a group's fp32 gradients,
                those of earlier micro-batches until the last one's are added, and what was added up
                over the replicas until backward ends
    """

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, ranks: int, B: int, T: int, n_active: int,
        ends: bool, slopes: bool, checkpointing: bool, whole: bool = False,
        directions: bool = False, replicas: bool = False,
    ):  # fmt: skip
        of, shapes = (config, dtype, B, T), sizes(config)
        self.config, self.ranks, self.n_active, self.ends = config, ranks, n_active, ends
        self.size, self.full = dtype.itemsize, wide(dtype).itemsize
        # Elements, padded to equal shards.
        self.block, self.embed, self.head, self.both = (held(s, ranks) * ranks for s in shapes)
        block, _, _, both = (held(s, 1) for s in shapes)
        self.alone, self.checkpointing, self.slopes = ranks == 1, checkpointing, slopes
        self.once = (config.n_layers * block + both) * self.size <= shard.GATHER_ONCE_BYTES
        self.whole = whole = not self.alone and (self.once or whole)
        # Where all stays gathered, the peak is in a micro-batch before the last.
        self.replicas = replicas and self.size < self.full and (self.once or not whole)
        self.directions = whole and directions and n_active * block + ends * both  # elements
        largest = max(map(math.prod, shapes[1]))  # one rank adds one to the sum at a time
        self.embed_grads = self.size * (largest if self.alone else self.embed)
        _, self.context = shared_by_blocks(*of)
        self.x = B * T * config.width * self.size
        trained, frozen = (block_pass(*of, active, slopes, whole, self.alone, False)
                           for active in (True, False))  # fmt: skip
        self.below_last, self.frozen = trained if n_active else frozen, frozen
        self.last = block_pass(*of, n_active > 0, slopes, whole, self.alone, True)
        self.loss = head_pass(*of, ends, slopes, whole)
        # d of the embedding's largest parameter, by which its output would change, and a product.
        self.embed_slopes = slopes * ((not whole) * largest * self.size + 2 * self.x)
        # What the blocks keep for their backward, from the last down.
        kept = [self.last, *[trained] * max(0, n_active - 1)]
        kept += [frozen] * (config.n_layers - len(kept))
        self.kept = [self.x if checkpointing else block.saved for block in kept]

    def seconds(self, card: Card, n_micro: int = 1, first: bool = True) -> np.ndarray:
        """Of micro-batches, the `first` of a pass or others, on the average of LISA's draws: the
        products, other operations, and beside these the gathering of parameters and reduction of
        gradients, (3,)."""
        N, n = self.config.n_layers, self.n_active
        reached = N if self.ends else N - (N - n) / (n + 1)  # blocks from the lowest that trains up
        flops, read, moved = (
            (N + reached * self.checkpointing) * self.frozen.ahead + n * self.below_last.back
            + (reached - n) * self.frozen.back + self.loss.ahead + self.loss.back
        )  # fmt: skip
        trained = n * self.block + self.ends * self.both
        moved += trained / self.ranks * (self.size + 2 * self.full)  # gradients are summed up
        ahead, directions = N * self.block + self.both, self.slopes * trained
        back = reached * self.block + self.ends * (not self.config.tied) * self.embed
        gathered = n_micro * (ahead + back + directions)
        if self.whole:
            gathered = first * (ahead + directions / 2)  # u's pass holds them for w's
        reduced = (first if self.once else n_micro) * trained
        sent = (gathered * self.size + reduced * self.full) * (1 - 1 / self.ranks)
        products = max(flops / (PRODUCTS * card.products), read / (MOVES * card.moves))
        computed = np.array([products, moved / (MOVES * card.moves)]) * n_micro
        return np.array([*computed, sent / card.link]) / GB

    def __iter__(self) -> Iterator[dict[str, int]]:
        self.resharded = self.reduced = 0  # elements of groups that backward is through with
        self.input = 0  # bytes of the last reduction's input, kept until the next one's
        self.added_up = 0  # bytes of gradients that were, over replicas
        tied, buffered = self.config.tied, not self.whole
        # A tied group stays gathered, and the head's gradient waits for the embedding's.
        head, first = (self.both, self.both) if tied else (self.head, self.embed)
        head_grads = self.ends * self.head * self.size
        still, waiting = (self.both, head_grads) if tied else (0, 0)
        ahead = buffered * self.block
        saved = self.x + sum(self.kept)

        # The buffer is that of the group that was gathered last.
        gathered = head + buffered * (self.block if tied else head)
        yield self.at(gathered, saved, self.loss.forward)
        if self.once and self.ends:  # in a micro-batch before the last nothing has been reduced
            yield self.at(0, self.x, 0, self.embed_grads + waiting)
        yield self.at(head + ahead, saved, self.loss.backward - head_grads, head_grads)
        if not tied:
            held_on = buffered * head_grads  # the head's gradients are, until it has been reduced
            yield from self.leave(head, self.ends, ahead, saved + self.x, 0, held_on)

        grads = 0 if self.alone or not self.n_active else self.block * self.size
        for i, kept in enumerate(self.kept):
            saved -= kept
            if i == self.config.n_layers - 1 and not tied:  # the next group is the embedding's
                ahead = buffered * max(self.block, self.embed)
            at_work = (self.below_last if i else self.last).backward - grads
            gathered = self.block + ahead + still
            yield self.at(gathered, saved + at_work, 0, grads + waiting, self.input)
            rest = ahead + still, saved + self.x, waiting, waiting
            yield from self.leave(self.block, i < self.n_active, *rest)

        if self.ends:
            yield self.at(first, self.x + self.embed_slopes, 0, waiting, self.input)
            yield self.at(first, self.x, 0, self.embed_grads + waiting, self.input)
            yield from self.leave(first, True, 0, 0, 0, 0)

    def leave(
        self, n: int, trained: bool, gathered: int, activations: int, before: int, after: int
    ) -> Iterator[dict[str, int]]:
        """A group of n elements is resharded. If it was trained, its gradients are copied into a
        buffer; then the buffer is reduced in fp32, and cast to the stored dtype. Other unsharded
        gradients take `before` and `after` bytes meanwhile."""
        self.resharded += n
        if not trained or self.alone:
            return
        self.input = n * self.full
        grads = 0 if self.once else n * self.size  # `at` counts them where they were summed in fp32
        yield self.at(gathered, activations, 0, grads + before, self.input)
        self.reduced += n
        cast = self.size if self.size < self.full else 0
        output = n * ((1 + self.replicas) * self.full + cast) // self.ranks
        yield self.at(gathered, activations, 0, after, self.input + output)
        self.added_up += self.replicas * n * self.full // self.ranks

    def at(
        self, gathered: int, activations: int, logits: int = 0, grads: int = 0, buffers: int = 0
    ) -> dict[str, int]:
        """A moment, from the elements that are gathered and bytes of the rest. A small model (see
        shard.once_per_pass) keeps parameters and unsharded fp32 sums of gradients of all groups
        that backward is not through with; of the others w's gradients are in shards."""
        moment = {}
        if self.alone:
            gathered = 0
        elif self.whole:
            gathered = self.config.n_layers * self.block + self.both - self.once * self.resharded
        if self.once and not self.alone:
            summed = self.n_active * self.block + self.ends * self.both - self.reduced
            grads += summed * self.full
            moment["gradients"] = self.reduced * self.full // self.ranks
        return moment | {
            "gathered parameters": (gathered + self.directions) * self.size,
            "unsharded gradients": grads,
            "reduction buffers": buffers + self.added_up,
            "activations": activations + self.context,
            "logits": logits,
        }


def times(config: ModelConfig, card: Card, **settings) -> tuple[dict[str, float], str, float]:
    """Seconds of a step and of its parts, from what `plan` takes; the part that bounds it; and the
    bytes of gradients that a rank sends to the replicas of its shard in a step, once a pass."""
    s, parts, trained = SimpleNamespace(**settings), np.zeros(5), 0.0
    shards = s.shard_size or s.ranks
    passes = [(s.batch_size, s.copies, s.slopes), (s.val_batch_size, s.copies - 1, False)]
    for *draw, share in draws(config, s.lisa_layers, s.lisa_ends):
        trained += share * s.copies * state(config, shards, s.dtype, *draw)["gradients"]
        for batch, copies, slopes in passes:
            mine = max(1, batch // s.ranks)
            n, B = math.ceil(mine / s.micro_batch_size), min(s.micro_batch_size, mine)
            of = shards, B, s.max_length, *draw, slopes, s.activation_checkpointing
            one = Pass(config, s.dtype, *of, s.keep_gathered, s.slopes)
            took = one.seconds(card, n, first=copies == s.copies)  # validation ends w's
            took[:2] *= mine / (n * B)  # the last may have fewer samples
            parts += share * copies * np.array([*took, 0, max(took[0] + took[1], took[2])])
    exchanged = 2 * (1 - shards / s.ranks) * trained
    # AdamW reads four numbers and writes three; a copy that waits on the host goes and comes.
    host = 4 * plan(config, **settings).host / card.host
    parts[3] = (7 * trained / (MOVES * card.moves) + host) / GB
    parts[2] += exchanged / card.link / GB
    parts[4] += parts[3] + exchanged / card.link / GB
    seconds = dict(zip((*COMPUTING, GATHERING, "update", "step"), parts.tolist(), strict=True))
    longest = GATHERING if parts[2] > parts[0] + parts[1] else max(COMPUTING, key=seconds.get)
    return seconds, longest, exchanged


def hidden_from(config: ModelConfig, card: Card, **settings) -> int | None:
    """The micro-batch size from which on computing takes longer than gathering; None if the ranks
    have not so many samples."""

    def hides(B: int) -> bool:
        return times(config, card, **settings | {"micro_batch_size": B})[1] != GATHERING

    sizes = range(1, settings["batch_size"] // settings["ranks"] + 1)
    n = bisect.bisect_left(sizes, True, key=hides)
    return sizes[n] if n < len(sizes) else None


def largest(config: ModelConfig, gpu_memory: float, **settings) -> int:
    """The largest micro-batch that fits, of as many samples as a rank has in a step; 0 if none."""
    settings |= {"keep_gathered": False}
    most = max(settings["batch_size"], settings["val_batch_size"]) // settings["ranks"]

    def too_large(B: int) -> bool:
        return plan(config, **settings | {"micro_batch_size": B}).peak > room(gpu_memory)

    return bisect.bisect_left(range(1, most + 1), True, key=too_large)


def room(gpu_memory: float) -> float:
    """Bytes that a run may use of a GPU of `gpu_memory` GB."""
    return gpu_memory * GB - RESERVED


def remedies(settings: dict) -> list[tuple[str, Sequence]]:
    """Changes that save memory and leave alone what a run computes: settings and their values, the
    mildest first."""
    ranks, batches = settings["ranks"], (settings["batch_size"], settings["val_batch_size"])
    # What one rank has of a batch may be less than a micro-batch.
    B = min(settings["micro_batch_size"], max(1, max(batches) // ranks))
    switches = ["activation_checkpointing"] + ["cpu_offload"] * (settings["copies"] == 2)
    more = [ranks * 2**i for i in range(1, 8)]
    kinds = [
        ("micro_batch_size", range(B - 1, 0, -1)),
        *((name, [True]) for name in switches if not settings[name]),
        ("shard_size", [0] * bool(settings["shard_size"])),
        ("ranks", [n for n in more if all(batch % n == 0 for batch in batches)]),
    ]
    return [(name, values) for name, values in kinds if values]


def first_fix(config: ModelConfig, gpu_memory: float, **settings) -> str | None:
    """Flags that make a run fit, given as `plan` takes it: the first change that does so alone;
    else the fewest kinds of change together, from the start of that order; None if no number of
    GPUs helps."""
    alone, together, base = [], [], {}
    for name, values in remedies(settings):
        alone.append(({}, name, values))
        together.append((base, name, values))
        base = base | {name: values[-1]}
    for base, name, values in alone + together:

        def fits(value: int, base=base, name=name) -> bool:
            return plan(config, **settings | base | {name: value}).peak <= room(gpu_memory)

        mildest = bisect.bisect_left(values, True, key=fits)  # the more of a kind the less memory
        if mildest < len(values):
            return as_flags(base | {name: values[mildest]}, ranks="gpus")
    return None


def most_helpful(config: ModelConfig, device_type: str, **settings) -> list[str]:
    """The two flags of a run that take most off the peak, each alone; for a kind that has degrees,
    the middle one."""
    changes = [{name: values[(len(values) - 1) // 2]} for name, values in remedies(settings)]
    if device_type == "cpu":  # its memory is the host's
        changes = [change for change in changes if "cpu_offload" not in change]
    changes.sort(key=lambda change: plan(config, **settings | change).peak)
    return [as_flags(change, ranks="nproc_per_node") for change in changes[:2]]


def peak_memory() -> int:
    """Bytes: allocated on this rank's GPU, or else resident in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Memory:
    """The planned peak of a run, with the `settings` that plan takes; and, on this rank's GPU, the
    measured one. On a CPU what a process holds is mostly Python's: it says nothing."""

    def __init__(self, config, device_type: str, settings: dict):
        self.config, self.device_type, self.settings = config, device_type, settings
        self.planned = f"planned peak {plan(config, **settings).peak / GB:.2f} GB a rank"

    def measured(self) -> str:
        return f", measured {peak_memory() / GB:.2f} GB" * (self.device_type == "cuda")


def command(flags, config: ModelConfig, total: int | None, n_sources: int) -> int:
    """Print the plan of a model by these flags, as JSON or as an aligned table of bytes; of a card
    also what `total` steps take. Returns 1 if a GPU's memory is known and does not do, else 0."""
    card = CARDS.get(flags.card)
    memory = flags.gpu_memory or card and card.memory
    of = settings(flags, flags.gpus, dtype_of(flags.dtype, "cuda"))
    of = gathering(config, memory and memory * GB, of)
    p, spare, fix = plan(config, **of), 0, None
    answer = {"components": p.components, "persistent": p.persistent, "peak": p.peak,
              "keep_gathered": of["keep_gathered"]}  # fmt: skip
    if memory is not None:
        spare = room(memory) - p.peak
        answer |= {"fits": spare >= 0, "room": room(memory)}
        answer["largest_micro_batch"] = largest(config, memory, **of)
    if spare < 0:
        fix = first_fix(config, memory, **of)
    if card:
        seconds, answer["bound"], answer["exchanged"] = times(config, card, **of)
        hours = total and total * seconds["step"] / 3600
        dollars = hours and flags.price and hours * flags.gpus * flags.price
        answer |= {"seconds": seconds, "steps": total, "hours": hours, "dollars": dollars}
    if answer.get("bound") == GATHERING:
        n = answer["hidden_from"] = hidden_from(config, card, **of)
        of["micro_batch_size"] = n or of["micro_batch_size"]
        answer["hidden_fits"] = plan(config, **of).peak <= room(memory)
    if flags.json:
        say(json.dumps(answer | {"host": p.host, "fix": fix}))
        return int(spare < 0)
    say(f"{flags.model} on {flags.gpus} GPUs, bytes per GPU:")
    rows = {"persistent": p.persistent, "peak": p.peak, "in host memory": p.host}
    for name, n in (p.components | rows).items():
        say(f"{name:<22}{n:>18,} {n / GB:>9.2f} GB")
    if memory is not None:
        verdict = "does not fit, {:.2f} GB too much" if spare < 0 else "fits, {:.2f} GB to spare"
        say(f"{memory:g} GB GPU, {RESERVED / GB:g} GB kept back: "
            + verdict.format(abs(spare) / GB) + KEPT * of["keep_gathered"])  # fmt: skip
        if spare >= 0:
            say(f"the largest --micro-batch-size that fits: {answer['largest_micro_batch']}")
    if spare < 0:
        say(f"would fit with: {fix}" if fix else "no flag makes it fit")
    if card:
        say(*flags.cost_in_words(answer))
    if flags.mode == "bilevel":
        say(f"weights: {flags.reach(total, n_sources)}")
    return int(spare < 0)
