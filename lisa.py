"""LISA: train a few blocks at a time, and hold optimiser state for those alone.

Every `interval` steps `n_active` of the N blocks are drawn uniformly without replacement and only
they train; the ends (embedding, final norm, head) train always, or take part in the draw, or never.
Source: Pan et al., LISA, NeurIPS 2024, arXiv 2403.17919, algorithm 1.

Differs from the paper's code: that code only flips `requires_grad`, so that AdamW's moments stay
for every block that ever trained and memory grows to that of full training. Here a block that
leaves the active set gives back its master, its moments and its gradient; one that stays keeps
them; one that returns starts afresh.

An active parameter stored in bf16 has an fp32 *master*, on which the optimiser works and in
which gradients are summed. Its bf16 copy, which the model computes with, is the master rounded to
nearest after each step and rounded stochastically on leaving, so that updates below a bf16 step
survive in expectation. A parameter stored in fp32 or fp64 is its own master.

Works on plain parameters and on FSDP2's sharded ones (DTensors), on each rank's shard alone:
nothing here communicates. All ranks must use the same seed, or backward hangs.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

ENDS = ("always", "sampled", "frozen")
ADAMW = functools.partial(torch.optim.AdamW, fused=True)


def draw(
    seed: int, period: int, n_blocks: int, n_active: int, ends: str = "always", copy: int = 0
) -> set[int]:
    """The units that train in a period: block indices, and `n_blocks` itself for the ends.

    A pure function of its arguments, equal on all ranks and in model copies of the same `copy`.
    `n_active` = 0 trains everything.
    """
    if n_active == 0:
        return set(range(n_blocks + (ends != "frozen")))
    units = n_blocks + (ends == "sampled")
    active = random.Random(f"lisa {seed} {copy} {period}").sample(range(units), n_active)
    return set(active) | ({n_blocks} if ends == "always" else set())


class Lisa:
    """AdamW on the active parameters of `model`, which has `.blocks`, an nn.ModuleList.

    Offers what PenaltyStep and a learning-rate schedule need of an optimiser: `param_groups`,
    `step()`, `zero_grad()`. Call `switch(step)` before each step. Build it after sharding.

    model           nn.Module; the ends are all its parameters outside `blocks`
    n_active        blocks that train at a time; 0 = all
    interval        steps between two draws
    ends            "always" | "sampled" | "frozen"
    copy            draws differ between copies of different number
    move_to_device  called before the parameters or their state are touched: a copy that waits in
                    host memory then comes to the device
    optimizer       called with (masters, lr=, weight_decay=), makes a torch optimiser. What it
                    keeps of a parameter has the parameter's shape but for "step", a number, and
                    starts from zeros

    Raises ValueError for `n_active` or `ends` that are not among these.
    """

    def __init__(
        self,
        model: nn.Module,
        n_active: int,
        interval: int,
        seed: int = 0,
        ends: str = "always",
        copy: int = 0,
        lr: float = 1e-5,
        weight_decay: float = 0.0,
        move_to_device: Callable[[], None] = lambda: None,
        optimizer: Callable[..., torch.optim.Optimizer] = ADAMW,
    ):
        self.units = [list(block.parameters()) for block in model.blocks]
        in_blocks = {id(p) for unit in self.units for p in unit}
        self.units.append([p for p in model.parameters() if id(p) not in in_blocks])
        self.index = {p: i for i, p in enumerate(p for unit in self.units for p in unit)}
        self.first_of_ends = len(self.index) - len(self.units[-1])
        self.move_to_device = move_to_device
        self.active: set[int] = set()
        if ends not in ENDS:
            raise ValueError(f"ends={ends!r}: permitted are {', '.join(ENDS)}")
        n_blocks = len(self.units) - 1
        if not 0 <= n_active <= n_blocks:
            raise ValueError(f"n_active={n_active}: permitted are 0 to {n_blocks}, the blocks")
        self.n_active, self.interval, self.seed = n_active, interval, seed
        self.ends, self.copy, self.period = ends, copy, -1
        self.masters: dict[Tensor, Tensor] = {}  # active parameter -> its master
        self.hooks = {}
        for p in self.index:
            p.requires_grad_(False)
        self.make = functools.partial(optimizer, lr=lr, weight_decay=weight_decay)
        trial = torch.zeros(1, requires_grad=True)
        trial.grad = torch.zeros(1)
        opt = self.make([trial])
        opt.step()
        self.state_names = tuple(opt.state[trial])  # of what it keeps of a parameter
        self.opt = None  # made by the first switch
        self.switch(0)

    @property
    def param_groups(self) -> list[dict]:
        return self.opt.param_groups

    def switch(self, step: int) -> None:
        """Draw anew if `step` opens another period."""
        period = step // self.interval
        if period != self.period:
            rules = len(self.units) - 1, self.n_active, self.ends, self.copy
            self._activate(draw(self.seed, period, *rules), step)
            self.period = period

    def activate(self, state: Iterable[str]) -> None:
        """Have those units train that a `state_dict` of these names is of, until the next switch,
        whatever they were drawn by."""
        numbers = (name.partition(".")[0] for name in state)
        held = {int(number) for number in numbers if number.isdecimal()}
        units = {i for i, unit in enumerate(self.units) if held & {self.index[p] for p in unit}}
        self._activate(units, 0)
        self.period = -1

    def _activate(self, units: set[int], step: int) -> None:
        """Release the units that leave, admit others."""
        self.move_to_device()
        for i in sorted(self.active - units):
            self._release(i, step)
        for i in sorted(units - self.active):
            self._admit(i)
        self.active = units
        masters = [self.masters[p] for i in sorted(units) for p in self.units[i]]
        if self.opt is None:
            self.opt = self.make(masters)
        self.opt.param_groups[0]["params"] = masters

    def chance(self, p: Tensor) -> float:
        """The probability that a parameter is among those that train in a period."""
        if self.n_active == 0 or (self.ends == "always" and self.index[p] >= self.first_of_ends):
            return 1.0
        return self.n_active / (len(self.units) - (self.ends != "sampled"))

    def step(self) -> None:
        """Update the masters; a bf16 copy becomes its master rounded to nearest."""
        self.move_to_device()
        self.opt.step()
        for p, master in self.masters.items():
            if master is not p:
                local(p).copy_(local(master))

    def zero_grad(self) -> None:
        self.opt.zero_grad()

    def finish(self, step: int) -> None:
        """Release everything, as at the end of training: the model then holds what it learned."""
        self.move_to_device()
        for i in sorted(self.active):
            self._release(i, step)
        self.active, self.period = set(), -1

    def state_dict(self) -> dict[str, Tensor]:
        """The active set's masters and optimiser state, to be saved, or to be loaded into in place:
        zero where the optimiser has not stepped yet, as it starts itself."""
        tensors = {}
        for p, master in self.masters.items():
            state, i = self.opt.state[master], self.index[p]
            for name in self.state_names:
                if name not in state:
                    like = torch.zeros((), device=p.device) if name == "step" else master.detach()
                    state[name] = torch.zeros_like(like)
                tensors[f"{i}.{name}"] = state[name]
            if master is not p:
                tensors[f"{i}.master"] = master.detach()
        return tensors

    def state_tensors(self) -> Iterator[Tensor]:
        """The persistent tensors of the active set on this rank: masters apart from their
        parameter, and the optimiser's state, but for single numbers."""
        yield from (local(master) for p, master in self.masters.items() if master is not p)
        for state in self.opt.state.values():
            yield from (local(t) for t in state.values() if isinstance(t, Tensor) and t.dim())

    def _admit(self, unit: int) -> None:
        for p in self.units[unit]:
            p.requires_grad_(True)
            self.masters[p] = p
            if torch.finfo(p.dtype).bits < 32:
                master = self.masters[p] = p.detach().float().requires_grad_(True)
                self.hooks[p] = p.register_post_accumulate_grad_hook(_gradient_to(master))

    def _release(self, unit: int, step: int) -> None:
        for p in self.units[unit]:
            p.requires_grad_(False)
            master = self.masters.pop(p)
            self.opt.state.pop(master, None)
            p.grad = master.grad = None
            if master is not p:
                self.hooks.pop(p).remove()
                generator = _generator(p, self.seed, step, self.index[p])
                local(p).copy_(round_stochastically(local(master), generator))


def _gradient_to(master: Tensor) -> Callable[[Tensor], None]:
    """A hook that adds the gradient of a bf16 parameter to its master's: summing many micro-batches
    in bf16 would lose bits."""

    def hook(p: Tensor) -> None:
        master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
        p.grad = None

    return hook


def local(t: Tensor) -> Tensor:
    """This rank's shard of a DTensor, or the tensor itself; shares memory, without autograd."""
    t = t.detach()
    return t.to_local() if isinstance(t, DTensor) else t


def round_stochastically(x: Tensor, generator: torch.Generator) -> Tensor:
    """fp32 -> bf16, up or down with probabilities that keep the mean: E[result] = x.

    bf16 is the upper half of fp32: add a random lower half, then cut it off.
    """
    options = {"generator": generator, "device": x.device, "dtype": torch.int32}
    noise = torch.randint(0, 1 << 16, x.shape, **options)
    return ((x.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).bfloat16()


def _generator(p: Tensor, seed: int, step: int, index: int) -> torch.Generator:
    """Noise of one shard at one step: the same for the copies w and u, so that it cancels in the
    gap between their losses."""
    shard = p.device_mesh.get_coordinate()[-1] if isinstance(p, DTensor) else 0
    digest = hashlib.sha256(f"{seed} {step} {index} {shard}".encode()).digest()
    return torch.Generator(p.device).manual_seed(int.from_bytes(digest[:7], "big"))
