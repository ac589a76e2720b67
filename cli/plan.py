"""How much memory a run needs: bytes per rank by component, before any GPU is rented.

    peak  = state + the worst moment of a backward pass
    state = the stored parameters of w and u; and the fp32 masters, AdamW moments and gradients of
            what LISA trains at a time; all of it sharded over the ranks

Reads a ModelConfig and the run's flags, no weights. Nothing is fitted. What is sharded, gathered or
reduced follows from shapes and from the groups that shard.shard makes. What a block and the head
allocate is counted by running them forward and backward on the meta device, following each storage
from its creation to its release (`Live`).
Every sample has `max_length` tokens, all with loss: prompts and padding need less.
Left out, and the reason why RESERVED bytes of each GPU are kept back: kernels' workspaces, the
CUDA context, NCCL, and the allocator's rounding and fragmentation.

B batch, T time, D width, N heads; 1 GB = 10⁹ bytes.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import shard
from hf.families import ModelConfig
from model import Context, Rows, Transformer, causal_mask, rope_tables, wide

GB = 1_000_000_000
RESERVED = 2 * GB
CARDS = 24, 48, 80, 141  # GB of the GPUs that `markdown` asks about
STATE = "parameters", "masters", "AdamW moments", "gradients"

# From the public config.json files: what decides about sizes and kernels.
LLAMA = {"model_type": "llama", "num_key_value_heads": 8, "rms_norm_eps": 1e-5}
LLAMA3 = LLAMA | {"vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0}
MODELS = {
    "GPT-2": {
        "model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12,
        "n_positions": 1024},
    "LLaMA-3-8B": LLAMA3 | {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "intermediate_size": 14336},
    "Gemma-2-9B": {
        "model_type": "gemma2", "vocab_size": 256000, "hidden_size": 3584, "num_hidden_layers": 42,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256,
        "intermediate_size": 14336, "max_position_embeddings": 8192, "sliding_window": 4096,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6},
    "GPT-NeoX-20B": {
        "model_type": "gpt_neox", "vocab_size": 50432, "hidden_size": 6144, "rotary_pct": 0.25,
        "num_hidden_layers": 44, "num_attention_heads": 64, "intermediate_size": 24576,
        "max_position_embeddings": 2048, "hidden_act": "gelu_fast"},
    "Qwen-2.5-32B": {
        "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 5120, "num_hidden_layers": 64,
        "num_attention_heads": 40, "num_key_value_heads": 8, "intermediate_size": 27648,
        "max_position_embeddings": 131072, "rope_theta": 1000000.0, "rms_norm_eps": 1e-5},
    "Yi-34B": LLAMA | {
        "vocab_size": 64000, "hidden_size": 7168, "num_hidden_layers": 60,
        "num_attention_heads": 56, "intermediate_size": 20480, "max_position_embeddings": 4096,
        "rope_theta": 5000000.0},
    "LLaMA-3-70B": LLAMA3 | {
        "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64,
        "intermediate_size": 28672},
}  # fmt: skip


# --------------------------------------------------------------------------------------------------
# What a block and the head allocate


class Live(TorchDispatchMode):
    """Counts the bytes of the meta tensors' storages that are alive, and their peak, leaving out
    those of the tensors `given`."""

    def __init__(self, given: list[Tensor]):
        super().__init__()
        self.seen = {t.untyped_storage()._cdata for t in given}
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.is_meta:
                self.follow(t.untyped_storage())
        return out

    def follow(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.bytes += storage.nbytes()
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self.release, storage._cdata, storage.nbytes())

    def release(self, key: int, n_bytes: int) -> None:
        self.seen.discard(key)
        self.bytes -= n_bytes


class FusedAttention(torch.autograd.Function):
    """What the flash and memory-efficient kernels keep: q, k, v, y and a statistic of each row."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = torch.empty_like(q)  # (B, N, T, H)
        ctx.save_for_backward(q, k, v, y, q.new_empty(q.shape[:-1], dtype=wide(q.dtype)))
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class FusedNorm(torch.autograd.Function):
    """What the fused RMSNorm keeps: its input and a statistic of each row."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=wide(x.dtype)))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class FusedKernels(TorchFunctionMode):
    """On the meta device torch spells out attention and RMSNorm; on a GPU it runs one kernel."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return FusedAttention.apply(*args[:3])
        if func is F.rms_norm:
            return FusedNorm.apply(args[0], (*args, *(kwargs or {}).values())[2])
        return func(*args, **(kwargs or {}))


def meta_model(config: ModelConfig, dtype: torch.dtype) -> Transformer:
    """The ends and one block, which stands for all, without memory."""
    with torch.device("meta"):
        return Transformer(replace(config, n_layers=1, windows=config.windows[:1])).to(dtype)


class Pass(NamedTuple):
    """Bytes that a module allocates beside its input and parameters."""

    saved: int  # alive between forward and backward, its output included
    forward: int  # peak of forward
    backward: int  # peak of backward, with the gradients of input and parameters


def run(module, x: Tensor, given: list[Tensor], *args) -> Pass:
    """Forward and backward of `module(x, *args)`, counted."""
    with Live([x, *given]) as live, FusedKernels():
        y = module(x, *args)
        saved, forward = live.bytes, live.peak
        live.peak = 0
        y.backward(y.detach())  # the gradient takes the place of the output
    return Pass(saved, forward, live.peak)


@lru_cache(maxsize=256)
def block_pass(
    c: ModelConfig, dtype: torch.dtype, B: int, T: int, active: bool, alone: bool, last: bool
) -> Pass:
    """Of one block, with its parameters trained or frozen.

    alone   on one rank, where a parameter's gradient is added to the sum, and gone, as soon as it
            is there
    last    the last block: goes on with the positions that predict, all but each sample's last
    """
    block = meta_model(c, dtype).blocks[0].requires_grad_(active)
    if active and alone:
        for p in block.parameters():
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    at = shared_by_blocks(c, dtype, B, T)
    x = torch.empty(B * T, c.width, dtype=dtype, device="meta", requires_grad=True)
    if last:
        keep = torch.arange(B * (T - 1), device="meta")
        at = at._replace(out=Rows((B, T), keep), keep=keep)
    return run(block, x, [*block.parameters(), *tensors(at)], at)


def shared_by_blocks(c: ModelConfig, dtype: torch.dtype, B: int, T: int) -> Context:
    """RoPE tables, and the mask where one is needed; see Transformer.forward."""
    positions = torch.arange(T, device="meta")[None]
    tables = rope_tables(c, positions, wide(dtype)) if c.rotary else None
    short = [window for window in set(c.windows) if window is not None and window < T]
    masked = short or c.score_cap is not None
    mask = causal_mask(positions, T, min(short, default=None)) if masked else None
    return Context(Rows((B, T)), Rows((B, T)), rope=tables, mask=mask)


def tensors(at: Context) -> list[Tensor]:
    """What of it takes memory."""
    return [t for t in tree_leaves(at) if isinstance(t, Tensor)]


@lru_cache(maxsize=256)
def head_pass(c: ModelConfig, dtype: torch.dtype, n: int, active: bool) -> Pass:
    """Of the final norm and the losses at n positions."""
    model = meta_model(c, dtype).requires_grad_(active)
    x = torch.empty(n, c.width, dtype=dtype, device="meta", requires_grad=True)
    targets = torch.empty(n, dtype=torch.long, device="meta")
    return run(lambda x: model.head(model.norm(x), targets), x, [*model.parameters()])


# --------------------------------------------------------------------------------------------------
# State


class Sizes(NamedTuple):
    """Shapes of the parameters of one block, the embedding, the head with the final norm, and both
    of these, in which a tied weight counts once."""

    block: list[torch.Size]
    embed: list[torch.Size]
    head: list[torch.Size]
    ends: list[torch.Size]


@lru_cache(maxsize=256)
def sizes(config: ModelConfig) -> Sizes:
    model = meta_model(config, torch.bfloat16)
    parts = [*model.blocks], [model.embed], [model.norm, model.head]
    parts = *parts, [*parts[1], *parts[2]]
    return Sizes(*([p.shape for p in nn.ModuleList(part).parameters()] for part in parts))


def held(shapes: list[torch.Size], ranks: int, rank: int = 0) -> int:
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
    s, full = sizes(config), wide(dtype).itemsize
    block, both_ends = held(s.block, ranks, rank), held(s.ends, ranks, rank)
    trained = n_active * block + ends * both_ends
    masters = trained if dtype.itemsize < 4 else 0  # fp32 is its own master, see lisa.py
    stored = (config.n_layers * block + both_ends) * dtype.itemsize
    values = stored, masters * full, 2 * trained * full, trained * full
    return dict(zip(STATE, values, strict=True))


# --------------------------------------------------------------------------------------------------
# The plan


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
    config: ModelConfig,
    *,
    ranks: int,
    dtype: torch.dtype,
    micro_batch_size: int,
    max_length: int,
    lisa_layers: int,
    lisa_ends: str,
    activation_checkpointing: bool,
    cpu_offload: bool,
    copies: int = 2,
    batch_size: int | None = None,
    val_batch_size: int | None = None,
    lisa: bool = True,
    rank: int = 0,
) -> Plan:
    """The peak of w's pass, while u's gradients wait for the update, in the worst of LISA's draws.

    copies            of the model: 2 learn weights, 1 is fine-tuned
    cpu_offload       one copy waits on the host while the other is at work
    batch_size, val_batch_size    samples of a step over all ranks; None: as many as fill up
                      micro-batches. "validation pass" is what validation's, if they are larger
                      than training's, need beyond those
    lisa              False: everything trains, as with lisa_layers = 0 and lisa_ends = "always"
    """
    n = lisa_layers if lisa and lisa_layers else config.n_layers
    draws = {"always": [(n, True)], "frozen": [(n, False)], "sampled": [(n, False), (n - 1, True)]}
    if not (lisa and lisa_layers):  # there is nothing to draw
        draws["sampled"] = draws["always"]

    def worst(batch: int | None) -> Plan:
        B = min(micro_batch_size, max(1, batch // ranks)) if batch else micro_batch_size
        plans = []
        for draw in draws[lisa_ends if lisa else "always"]:
            one = state(config, ranks, dtype, *draw, rank)
            here = copies - bool(cpu_offload)
            all_copies = {name: here * n_bytes for name, n_bytes in one.items()}
            all_copies["gradients"] = copies * one["gradients"]  # see shard.Offload
            host = sum(one.values()) - one["gradients"]
            step = Step(config, dtype, ranks, B, max_length, *draw, activation_checkpointing)
            for moment in step.moments():
                if "w's gradients" in moment:
                    u = all_copies["gradients"] - one["gradients"]
                    moment["gradients"] = u + moment.pop("w's gradients")
                plans.append(Plan(all_copies | moment, host if cpu_offload else 0))
        return max(plans, key=lambda p: p.peak)

    train = worst(batch_size)
    val = worst(val_batch_size) if copies == 2 else train
    extra = {"validation pass": max(0, val.peak - train.peak)}
    return replace(train, components=train.components | extra)


def settings(args, ranks: int, dtype: torch.dtype) -> dict:
    """What `plan` takes, from the flags of a run."""
    names = (
        "micro_batch_size", "max_length", "lisa_layers", "lisa_ends", "activation_checkpointing",
        "cpu_offload", "batch_size", "val_batch_size",
    )  # fmt: skip
    given = {name: getattr(args, name) for name in names}
    copies = 1 if args.mode == "finetune" else 2
    return given | {"ranks": ranks, "dtype": dtype, "copies": copies}


class Done(NamedTuple):
    """Elements of groups that backward is through with."""

    resharded: int
    reduced: int

    def plus(self, n: int) -> Done:
        return Done(self.resharded + n, self.reduced + n)


NOTHING = Done(0, 0)


@dataclass
class Step:
    """The last micro-batch of a pass: where memory can peak, as the groups of shard.shard are
    gathered, used and reduced. FSDP2 gathers a group into a flat buffer and copies it out from
    there. While a block is at work the next one is in its buffer. On one rank nothing is gathered.
    """

    config: ModelConfig
    dtype: torch.dtype
    ranks: int
    B: int
    T: int
    n_active: int  # blocks that train
    ends: bool  # whether the ends train
    checkpointing: bool

    def __post_init__(self):
        s, c, of = sizes(self.config), self.config, (self.config, self.dtype, self.B, self.T)
        self.block, self.embed, self.head, self.both = (
            held(shapes, self.ranks) * self.ranks for shapes in s
        )  # elements, padded to equal shards
        self.blocks = c.n_layers * self.block
        self.whole = (
            (c.n_layers * sum(map(math.prod, s.block)) + sum(map(math.prod, s.ends)))
            * self.dtype.itemsize <= shard.GATHER_ONCE_BYTES
        )
        self.buffered = not self.whole
        alone = self.ranks == 1
        trained, frozen = (block_pass(*of, active, alone, False) for active in (True, False))
        # The last block is at work while all others' activations wait: plan for it to train.
        self.top = block_pass(*of, self.n_active > 0, alone, True)
        self.second = trained if self.n_active else frozen
        self.x = self.B * self.T * c.width * self.dtype.itemsize
        shared = shared_by_blocks(c, self.dtype, self.B, self.T)
        self.context = sum(t.nbytes for t in tensors(shared))
        n_trained = max(0, self.n_active - 1)  # of the blocks below the last
        if self.checkpointing:
            self.below = c.n_layers * self.x
            self.top_saved = self.x
            self.below_second = self.below - self.x
        else:
            n_frozen = c.n_layers - 1 - n_trained
            self.below = self.x + n_trained * trained.saved + n_frozen * frozen.saved
            self.top_saved = self.top.saved
            self.below_second = self.below - (trained if n_trained else frozen).saved
        self.saved = self.below + self.top_saved
        self.loss = head_pass(c, self.dtype, self.B * (self.T - 1), self.ends)

    def moments(self) -> Iterator[dict[str, int]]:
        """Bytes by component, from the head's forward down to the embedding's gradient."""
        if self.ranks == 1:
            yield from self.moments_alone()
            return
        size, full, tied = self.dtype.itemsize, wide(self.dtype).itemsize, self.config.tied
        group = self.both if tied else self.head  # what is gathered for the head
        next_block = self.buffered * self.block
        head_grads = self.ends * self.head * size
        kept = tied * self.both  # a tied group stays gathered from the embedding to its gradient
        waiting = tied * head_grads  # and the head's gradient waits for the embedding's

        yield self.at((1 + self.buffered) * group, self.saved, self.loss.forward)
        logits = self.loss.backward - head_grads
        yield self.at(group + next_block, self.saved, logits, head_grads)
        if self.ends and not tied:
            yield from self.reduction(next_block, self.head, self.saved + self.x)
        done = NOTHING if tied else Done(self.head, self.ends * self.head)

        gathered = self.block + next_block + kept
        grads = self.block * size if self.n_active else 0
        top, second = self.top.backward - grads, self.second.backward - grads
        # The input of a reduction is kept until the next group's: of the head, then of a block.
        buffers = done.reduced * full
        yield self.at(gathered, self.below + top, 0, grads + waiting, buffers, done)
        if self.n_active:
            under = self.below + self.x
            yield from self.reduction(next_block + kept, self.block, under, waiting, done)
            done, buffers = done.plus(self.block), self.block * full
        else:
            done = Done(done.resharded + self.block, done.reduced)
        if self.config.n_layers > 1:
            yield self.at(gathered, self.below_second + second, 0, grads + waiting, buffers, done)
        if not tied:  # while the first block is at work, the embedding is gathered
            gathered = self.block + self.buffered * self.embed
            yield self.at(gathered, self.x + second, 0, grads, buffers, done)
        if self.ends:
            group = self.both if tied else self.embed
            grads = self.embed * size + waiting
            if self.whole:  # in a micro-batch before the last, nothing has been reduced yet
                yield self.at(0, self.x, 0, grads)
            rest = self.both - group
            done = Done(self.blocks + rest, self.n_active * self.block + rest)
            yield self.at(group, self.x, 0, grads, buffers, done)
            yield from self.reduction(0, group, 0, 0, done)

    def moments_alone(self) -> Iterator[dict[str, int]]:
        """As `moments`, on one rank: what a parameter gets is added to its gradient at once."""
        s, size, tied = sizes(self.config), self.dtype.itemsize, self.config.tied
        in_embed = size * max(map(math.prod, s.embed))
        head_grads = self.ends * self.head * size
        waiting = tied * head_grads  # a tied head's gradient waits for the embedding's
        sums = (self.n_active * self.block + self.ends * self.both) * wide(self.dtype).itemsize

        def at(activations: int, logits: int = 0, grads: int = 0) -> dict[str, int]:
            return {
                "w's gradients": sums, "gathered parameters": 0, "unsharded gradients": grads,
                "reduction buffers": 0, "activations": activations + self.context, "logits": logits,
            }  # fmt: skip

        yield at(self.saved, self.loss.forward)
        yield at(self.saved, self.loss.backward - head_grads, head_grads)
        yield at(self.below + self.top.backward, grads=waiting)
        if self.config.n_layers > 1:
            yield at(self.below_second + self.second.backward, grads=waiting)
        if self.ends:
            yield at(self.x, grads=in_embed + waiting)

    def reduction(
        self, gathered: int, n: int, activations: int, waiting: int = 0, done: Done = NOTHING
    ) -> Iterator[dict[str, int]]:
        """The n gradients of a group, whose parameters are no longer gathered, are copied into a
        buffer; then the buffer is reduced in fp32, and cast to the stored dtype."""
        size, full = self.dtype.itemsize, wide(self.dtype).itemsize
        cast = size if size < full else 0
        grads = 0 if self.whole else n * size  # `at` counts them where they were summed in fp32
        resharded, reduced = Done(done.resharded + n, done.reduced), done.plus(n)
        yield self.at(gathered, activations, 0, grads + waiting, n * full, resharded)
        buffers = n * full + n * (full + cast) // self.ranks
        # The head's gradients are still held at this point.
        of_head = self.buffered and not self.config.tied and not done.resharded
        yield self.at(gathered, activations, 0, waiting + of_head * grads, buffers, reduced)

    def at(
        self, gathered: int, activations: int, logits: int = 0, grads: int = 0, buffers: int = 0,
        done: Done = NOTHING,
    ) -> dict[str, int]:  # fmt: skip
        """A moment, from the elements that are gathered and bytes of the rest. A model that is
        gathered once a pass (see shard.once_per_pass) keeps parameters and unsharded fp32 sums of
        gradients of all groups that are not `done`; the others have w's gradients in shards."""
        full, moment = wide(self.dtype).itemsize, {}
        if self.whole:
            trained = self.n_active * self.block
            gathered = self.blocks + self.both - done.resharded
            grads += (trained + self.ends * self.both - done.reduced) * full
            moment["w's gradients"] = done.reduced * full // self.ranks
        return moment | {
            "gathered parameters": gathered * self.dtype.itemsize,
            "unsharded gradients": grads,
            "reduction buffers": buffers,
            "activations": activations + self.context,
            "logits": logits,
        }


# --------------------------------------------------------------------------------------------------
# Answers


def room(gpu_memory: float) -> float:
    """Bytes that a run may use of a GPU of `gpu_memory` GB."""
    return gpu_memory * GB - RESERVED


def fits(p: Plan, gpu_memory: float) -> bool:
    return p.peak <= room(gpu_memory)


def remedies(settings: dict) -> list[list[dict]]:
    """Changes that save memory and leave alone what a run computes: of each kind, mildest first."""
    B, ranks = settings["micro_batch_size"], settings["ranks"]
    batches = [n for n in (settings.get("batch_size"), settings.get("val_batch_size")) if n]
    if len(batches) == 2:  # what one rank has of them may be less than a micro-batch
        B = min(B, max(1, max(batches) // ranks))
    switches = ["activation_checkpointing"] + ["cpu_offload"] * (settings.get("copies") != 1)
    switches = [name for name in switches if not settings[name]]
    more = [ranks * 2**i for i in range(1, 8)]
    return [
        [{"micro_batch_size": b} for b in range(B - 1, 0, -1)],
        *([{name: True}] for name in switches),
        [{"ranks": n} for n in more if all(batch % n == 0 for batch in batches)],
    ]


def first_fix(config: ModelConfig, gpu_memory: float, **settings) -> str | None:
    """Flags that make a run fit, given as `plan` takes it: the first one that does so alone; else
    the shortest row of them from the start of that order; None if no number of GPUs helps."""
    rows, together = remedies(settings), [{}]
    for row in rows:
        together.append(together[-1] | (row[-1] if row else {}))
    alone = [change for row in rows for change in row]
    joint = [
        base | change for base, row in zip(together, rows, strict=False) for change in row
    ]
    for change in alone + joint:
        if fits(plan(config, **settings | change), gpu_memory):
            return as_flags(change)
    return None


def most_helpful(config: ModelConfig, device_type: str, **settings) -> list[str]:
    """The two flags of a run that take most off the peak, each alone; for a kind that has degrees,
    the middle one."""
    changes = [row[(len(row) - 1) // 2] for row in remedies(settings) if row]
    if device_type == "cpu":  # its memory is the host's
        changes = [change for change in changes if "cpu_offload" not in change]
    changes.sort(key=lambda change: plan(config, **settings | change).peak)
    return [as_flags(change, ranks="nproc_per_node") for change in changes[:2]]


def as_flags(change: dict, ranks: str = "gpus") -> str:
    names = {"ranks": ranks}
    return " ".join(
        f"--{names.get(k, k.replace('_', '-'))}" + ("" if v is True else f" {v}")
        for k, v in change.items()
    )


def as_dict(p: Plan, gpu_memory: float | None = None) -> dict:
    """For JSON; bytes."""
    answer = {"components": p.components, "persistent": p.persistent, "peak": p.peak}
    if gpu_memory is not None:
        answer |= {"fits": fits(p, gpu_memory), "room": room(gpu_memory)}
    return answer | {"host": p.host}


def render(p: Plan, gpu_memory: float | None = None) -> str:
    """An aligned table of bytes per rank, and whether they fit."""
    rows = [*p.components.items(), ("persistent", p.persistent), ("peak", p.peak)]
    rows += [("in host memory", p.host)] if p.host else []
    lines = [f"{name:<22}{n:>18,} {n / GB:>9.2f} GB" for name, n in rows]
    if gpu_memory is not None:
        left = room(gpu_memory) - p.peak
        verdict = f"fits, {left / GB:.2f} GB to spare" if left >= 0 else (
            f"does not fit: {-left / GB:.2f} GB too much")
        lines.append(f"{gpu_memory:g} GB GPU, {RESERVED / GB:g} GB kept back: {verdict}")
    return "\n".join(lines)


def markdown(max_length: int = 1024, **settings) -> str:
    """The README's table: bf16, ScaleBiO with LISA beside AdamW on everything, GB per GPU."""
    lines = [
        "| model | size | GPUs | LISA: state | peak | fits in | AdamW: state | peak | fits in |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    base = {
        "dtype": torch.bfloat16, "micro_batch_size": 1, "lisa_layers": 2, "lisa_ends": "always",
        "activation_checkpointing": True, "cpu_offload": False, "max_length": max_length,
    } | settings  # fmt: skip
    for name, raw in MODELS.items():
        config = ModelConfig.from_hf(raw)
        billions = f"{n_parameters(config) / 1e9:.3g} B"
        for ranks in (1, 8, 16):
            cells = [name, billions, str(ranks)]
            for lisa in (True, False):
                p = plan(config, ranks=ranks, lisa=lisa, **base)
                card = next((f"{card} GB" for card in CARDS if fits(p, card)), "–")
                cells += [f"{p.persistent / GB:.1f}", f"{p.peak / GB:.1f}", card]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def n_parameters(config: ModelConfig) -> int:
    s = sizes(config)
    return config.n_layers * held(s.block, 1) + held(s.ends, 1)
