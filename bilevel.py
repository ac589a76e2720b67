"""The ScaleBiO penalty step: learn source weights with first-order gradients only.

| paper       | code             | meaning                                                   |
|-------------|------------------|-----------------------------------------------------------|
| λ ∈ R^S     | `lam`            | logits of the S sources, replicated on every rank         |
| p           | `probs`          | softmax(λ): source weights, sum to 1                      |
| w, u        | `w`, `u`         | two copies of the model                                   |
| ℓ_i(w)      | `source_loss_w`  | (S,), mean loss over the samples of source i              |
| L1(w)       | `val_loss`       | mean validation loss                                      |
| L2(λ, w)    |                  | Σ_i p_i ℓ_i(w), the weighted training loss                |
| α           | `alpha`          | penalty multiplier                                        |

    upper:    min_λ L1(w*(λ))             lower:  w*(λ) = argmin_w L2(λ, w)
    penalty:  min_{λ,w} max_u  L1(w) + α [L2(λ, w) − L2(λ, u)]

The inner maximum over u is −α min_u L2(λ, u), so u tracks w*(λ), and one step is

    u ← AdamW(u, g_u)   g_u = ∇_u α L2(λ, u)
    w ← AdamW(w, g_w)   g_w = ∇_w [L1(w) + α L2(λ, w)]
    λ ← Adam (λ, g_λ)   g_λ = α ∇_λ [L2(λ, w) − L2(λ, u)] = α Jᵀ (ℓ(w) − ℓ(u)),   J = ∂p/∂λ

with all three gradients taken at the old (λ, w, u). Differs from the paper: AdamW and clipping get
g_u / α and g_w / α, so that neither the moments nor the clipping threshold depend on α; the gap
ℓ(w) − ℓ(u) may be had from gradients (Slopes); λ takes no step on noise (SourceWeights). Source:
Pan et al., ScaleBiO, ACL 2025, arXiv 2406.19976. PlainStep trains a single module on what the
weights have chosen.

This file knows nothing of language models, shards or LISA: w and u are any two modules, and a
micro-batch is any object with a field `group`.

Shapes: S sources, b samples of one micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor


class SourceWeights(nn.Module):
    """p = softmax(λ) and Adam on λ, which `z` keeps from walking on noise. Starts uniform.

    The error of every gap is known (see PenaltyStep.step), hence that of g_λ. With a memory of some
    100 steps, let A = Σ_s β^(t−s) g_s and B = Σ_s β^(2(t−s)) Var(g_s) for one λ_k. If source k were
    no different from the others, A would have mean 0 and variance B. So λ_k makes the share

        1 − z² B / A², or 0 where |A| < z √B,

    of Adam's step. For z = 1 this is the factor by which the squared error of A as an estimate of
    its mean is least, with A² − B for the square of that mean; z = 3 keeps a source that does not
    differ in place, as it passes 3 √B in three steps of a thousand.
    Differs from the paper: there Adam steps at full length whatever the error, as here with z = 0.

    Where sources differ, errors last: w − u, moved by chance, stays so for a while and favours one
    of them. What gaps differ by from their mean over the sources is summed over blocks of 50 steps,
    and compared from block to block: κ, at least 1, is the mean of (difference of two blocks)² over
    the variance that it would have were errors of one step gone in the next (the method of batch
    means). The weights' errors are √κ times what they would be then.

    To weight something else (groups of sources, single samples, up to some thousand), replace
    `probs` in a subclass: it may be any differentiable function of the parameter `lam`, also of
    `n_logits` where these are not as many as the sources.

    n_sources           S
    n_logits, dtype     of λ, which stays on the CPU; S logits unless stated
    lr                  Adam's rate for λ, which set_rate scales
    z                   standard errors from 0 below which a gradient moves nothing
    """

    memory = 0.99  # β
    block = 50  # steps; see κ
    warmup = 30  # steps after which the errors are known well enough for `snr`

    def __init__(
        self, n_sources: int, dtype: torch.dtype = torch.float32, lr: float = 1e-2, z: float = 0.0,
        n_logits: int | None = None,
    ):  # fmt: skip
        super().__init__()
        zeros = torch.zeros(n_sources if n_logits is None else n_logits, dtype=dtype)
        self.lam = nn.Parameter(zeros.clone())
        self.lr, self.z = lr, z
        self.register_buffer("evidence", torch.stack([zeros, zeros]))  # A and B
        # Covariance of λ's errors, by the noise of its steps so far.
        self.register_buffer("covariance", torch.diag(zeros))
        self.register_buffer("snr", zeros.clone())  # the largest |A| / √B so far
        # Sums of the gaps' differences and of their variances, of this block and of the last, each
        # (S,). Steps since alpha last changed; what κ is the mean of, and of how many.
        self.register_buffer("blocks", torch.zeros(2, 2, n_sources, dtype=dtype))
        self.register_buffer("kappa", torch.zeros(3, dtype=dtype))
        self.reset_optimizer()

    def reset_optimizer(self) -> None:
        """Forget Adam's moments, A, B and the blocks, as when alpha changes the scale of g_λ.

        Differs from the paper's code: no weight decay, which would pull p towards uniform.
        """
        self.opt = torch.optim.Adam([self.lam], lr=self.lr, betas=(0.9, 0.999), eps=1e-8)
        for state in self.evidence, self.blocks, self.kappa[:1]:
            state.zero_()

    def set_rate(self, factor: float) -> float:
        """Let Adam step with `factor` times the learning rate; returns that."""
        self.opt.param_groups[0]["lr"] = factor * self.lr
        return factor * self.lr

    def get_extra_state(self) -> Tensor:
        """Adam's step and moments, (3, n_logits), so that a run can be resumed."""
        zero = torch.zeros_like(self.lam)  # what Adam starts from
        state = self.opt.state.get(self.lam) or {}
        names = "step", "exp_avg", "exp_avg_sq"
        return torch.stack([zero + state.get(name, 0) for name in names]).detach()

    def set_extra_state(self, state: Tensor) -> None:
        step, mean, square = state.clone()
        self.opt.state[self.lam] = {"step": step[0].float(), "exp_avg": mean, "exp_avg_sq": square}

    def probs(self) -> Tensor:
        return self.lam.softmax(0)  # (S,)

    def jacobian(self) -> Tensor:
        """J = ∂p/∂λ, (S, n_logits)."""
        p = self.probs()
        eye = torch.eye(len(p), dtype=p.dtype)
        return torch.autograd.grad(p, self.lam, eye, is_grads_batched=True)[0]

    def update(self, gap: Tensor, variance: Tensor) -> None:
        """λ ← Adam(λ, Jᵀ gap), for gap = ∂(penalty)/∂p = α (ℓ(w) − ℓ(u)), (S,), of which errors of
        this variance are known, (S,)."""
        jac = self.jacobian()
        # No gap is known better than to a thousandth, not even that of a source of one record.
        variance = variance.maximum((1e-3 * gap).square())
        self.lam.grad, noise = gap @ jac, variance @ jac.square()
        fade = self.evidence.new_tensor([self.memory, self.memory**2])[:, None]
        self.evidence.mul_(fade).add_(torch.stack([self.lam.grad, noise]))
        a2, b = self.evidence[0].square(), self.evidence[1]
        sure = (1 - self.z**2 * b / a2).where(a2 > self.z**2 * b, 0)
        sure = sure if self.z else torch.ones_like(sure)
        before = self.lam.detach().clone()
        self.opt.step()
        adam, group = self.opt.state[self.lam], self.opt.param_groups[0]
        with torch.no_grad():
            self.lam.copy_(before.lerp(self.lam, sure))
            # In the long run a gradient moves λ by its rate over Adam's denominator, which in the
            # first steps may be small by chance.
            scale = adam["exp_avg_sq"] / (1 - group["betas"][1] ** adam["step"])
            moves = (sure * group["lr"] / (scale.maximum(noise).sqrt() + 1e-8))[:, None] * jac.T
            self.covariance += (moves * variance) @ moves.T
            self._compare_blocks(gap, variance)
            if adam["step"] > self.warmup:
                self.snr.copy_(self.snr.maximum((a2 / b).sqrt().nan_to_num(posinf=0)))

    def _compare_blocks(self, gap: Tensor, variance: Tensor) -> None:
        centre = torch.eye(len(gap), dtype=gap.dtype) - 1 / len(gap)
        self.blocks[0] += torch.stack([centre @ gap, centre.square() @ variance])
        self.kappa[0] += 1
        if self.kappa[0] % self.block == 0:
            (now, noise), (last, noise_of_last) = self.blocks
            if self.kappa[0] > self.block:
                ratio = (now - last).square() / (noise + noise_of_last)
                ratio = ratio.nan_to_num(posinf=0).mean()
                self.kappa[1:] += torch.stack([ratio, ratio.new_ones(())])
            self.blocks[1], self.blocks[0] = self.blocks[0].clone(), 0

    def row(self) -> dict[str, Tensor]:
        """What metrics.jsonl says of the sources after a step, (S,) each: the weights, their
        standard errors to first order, and by how many standard errors the gradient of its logit
        has differed from 0 at its clearest. Before two blocks are through κ is not known, and 1."""
        jac, (_, ratios, n) = self.jacobian(), self.kappa
        kappa = (ratios / n.clamp(min=1)).clamp(min=1)
        errors = ((jac @ (kappa * self.covariance)) * jac).sum(1).clamp(min=0).sqrt()
        snr = self.snr
        if len(snr) != len(errors):  # that of the logit which moves a source most
            snr = snr[jac.abs().argmax(1)]
        return {"weights": self.probs().detach(), "weights_se": errors, "snr": snr}


@dataclass
class StepStats:
    """What one step saw, all at the old (λ, w, u), over the global batch."""

    source_loss_w: Tensor  # (S,), NaN for a source that is absent from the batch
    grad_norm_w: float  # of g_w / alpha, before clipping
    finite: bool  # if not, nothing was updated
    stop: bool  # some rank asked to stop
    source_loss_u: Tensor | None = None  # like w's; of PenaltyStep, as what follows
    grad_norm_u: float | None = None
    val_loss: float | None = None
    gap: Tensor | None = None  # (S,), mean δ of each source's samples, NaN where absent
    gap_variance: Tensor | None = None  # (S,), of that mean


class Totals(NamedTuple):
    """Over all ranks, the same on each of them and on the host."""

    sums: Tensor  # of the losses, by group
    norms: list[float]  # of each optimiser's gradient
    finite: bool  # all of the above
    stop: bool  # some rank asked to stop


class Step:
    """The parts of a step: gradients from micro-batches, totals over the ranks, updates.

    copies: {name: (module, its optimiser)}
    """

    def __init__(self, copies: dict, losses: Callable, clip: float, on_micro: Callable):
        self.copies = copies
        self.losses, self.clip, self.on_micro = losses, clip, on_micro

    def set_rates(
        self, factor: float, of_lambda: float = 1.0, alpha: float | None = None
    ) -> dict[str, float]:
        """Scale the learning rates by `factor`, λ's by `of_lambda`, for the next step. Returns what
        is in force, by the names of metrics.jsonl. Only PenaltyStep looks at λ's and `alpha`."""
        for _, opt in self.copies.values():
            for group in opt.param_groups:
                # The name that torch's own schedulers give the rate to start from.
                group["lr"] = factor * group.setdefault("initial_lr", group["lr"])
        return {"lr": self.copies["w"][1].param_groups[0]["lr"]}

    def row(self) -> dict[str, Tensor]:
        """What metrics.jsonl says of the sources after a step, (S,) each."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """What a step remembers beside its modules and their optimisers."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` gave, of which `state` may hold more than that."""

    def _backward(
        self, model: nn.Module, train: list, val: list, coef: Tensor, slopes: Slopes | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Gradients of Σ_j coef[group_j] ℓ_j over all ranks. Returns the local Σ ℓ_j by group, and
        of each training micro-batch its samples' ℓ_j, or their slopes, (b,)."""
        world = dist.get_world_size() if dist.is_initialized() else 1
        sums, of_samples = None, []
        for i, batch in enumerate([*train, *val]):
            self.on_micro(model, i == len(train) + len(val) - 1)
            if slopes is not None:
                slopes.n_samples = len(batch.group) if i < len(train) else 0
            losses = self.losses(model, batch)  # (b,)
            group = batch.group.to(losses.device)
            if sums is None:
                # FSDP and DDP average gradients over the ranks; the objective is their sum.
                scale = (coef * world).to(losses.device, non_blocking=True)
                sums, tiny = torch.zeros_like(scale), torch.finfo(scale.dtype).tiny
            (scale[group] * losses).sum().backward()
            sums += by_group(losses.detach(), group, len(coef))  # (S + 1,)
            if slopes is None:
                of_samples.append(losses.detach())
            elif i < len(train):
                of_samples.append(slopes.take() / scale[group].clamp(min=tiny))
        if slopes is not None:
            slopes.n_samples = 0
        return sums, of_samples[: len(train)]

    def _update(self, sums: Tensor, opts: list, stop: bool = False) -> Totals:
        """Add up this rank's `sums`, (n,), its gradients' squares and its wish to stop with those
        of the others, in one all-reduce. If all is finite, each optimiser steps, on gradients
        scaled down to norm `clip`; then they are gone. Collective: every rank calls it."""
        norms = torch.stack([_local_square_norm(opt).to(sums) for opt in opts])
        total = torch.cat([sums, norms, sums.new_full((1,), float(stop))])
        if dist.is_initialized():
            dist.all_reduce(total)
        total = total.cpu()  # the step's one wait for the device
        sums, squares, asked = total.split([len(sums), len(opts), 1])
        norms, finite = squares.sqrt().tolist(), bool(total.isfinite().all())
        for opt, norm in zip(opts, norms, strict=True):
            if finite and self.clip and norm > self.clip:
                torch._foreach_mul_(_local_grads(opt), self.clip / norm)
            if finite:
                opt.step()
            opt.zero_grad()
        return Totals(sums, norms, finite, asked.item() > 0)


def by_group(values: Tensor, group: Tensor, n_groups: int) -> Tensor:
    """Sums of values (b,) over each group, (n_groups,)."""
    # A masked sum, not a scatter: the same bits each time on every device, so that the gap of two
    # equal copies is exactly zero.
    groups = torch.arange(n_groups, device=values.device)[:, None]
    return torch.where(groups == group, values, 0).sum(1)


def sample_losses(model: nn.Module, batch) -> Tensor:
    """The default `losses`, of a language model: (b,)."""
    return model(batch.tokens, batch.labels)


class PenaltyStep(Step):
    """One single-loop step of the penalty problem on any two modules.

    A toy problem: two sources that pull a scalar to 0 and to 1, validation at 0.8.

        class Point(nn.Module):
            def __init__(self): super().__init__(); self.x = nn.Parameter(torch.zeros(()))
        batch = lambda target, group: SimpleNamespace(
            target=torch.tensor(target), group=torch.tensor(group))
        w, u = Point(), Point()
        opts = [torch.optim.SGD(m.parameters(), 0.2) for m in (w, u)]
        step = PenaltyStep(w, u, *opts, SourceWeights(2, lr=0.02), alpha=10,
                           losses=lambda m, batch: (m.x - batch.target) ** 2)
        for _ in range(1000):
            step.step([batch([0.0, 1.0], [0, 1])], [batch([0.8], [2])], torch.tensor([1, 1, 1]))
        step.sources.probs()                                          # about [0.2, 0.8]

    w, u        modules of equal shape, under FSDP2 or on one process
    opt_w/u     objects with `param_groups`, `step()` and `zero_grad()`: a torch optimiser or Lisa
    sources     SourceWeights, or a module like it
    alpha       penalty multiplier; g_λ has a bias of O(1/alpha) once w and u have converged
    losses      (module, micro-batch) -> losses of its samples, (b,)
    clip        largest norm of g_w / alpha and of g_u / alpha; 0 = off
    gap         "difference": δ_j = ℓ_j(w) − ℓ_j(u), as in the paper; "gradient", see Slopes:
                δ_j = ½ ⟨∇ℓ_j(u) + ∇ℓ_j(w), w − u⟩
    direction   (parameter of w, that of u) -> w − u as exactly as it is known, over the probability
                that it trains
    hold        keep each `direction` that a step asks for to its end, so that none is made twice:
                takes as much memory as the layers that train
    on_micro    called with (module, is it the pass's last) before each micro-batch: a sharded
                module can put off its reduction of gradients
    """

    def __init__(
        self,
        w: nn.Module,
        u: nn.Module,
        opt_w,
        opt_u,
        sources: SourceWeights,
        alpha: float,
        losses: Callable[..., Tensor] = sample_losses,
        clip: float = 0.0,
        gap: str = "difference",
        direction: Callable[[Tensor, Tensor], Tensor] = lambda w, u: w.detach() - u.detach(),
        hold: bool = False,
        on_micro: Callable[[nn.Module, bool], None] = lambda model, last: None,
    ):
        super().__init__({"w": (w, opt_w), "u": (u, opt_u)}, losses, clip, on_micro)
        if gap not in ("difference", "gradient"):
            raise ValueError(f"gap={gap!r}: permitted are difference, gradient")
        self.slopes_u = self.slopes_w = None
        self.forget = lambda: None
        if gap == "gradient":
            pairs = list(zip(w.parameters(), u.parameters(), strict=True))
            both = {p: pair for pair in pairs for p in pair}
            find = lru_cache(len(pairs) * hold)(lambda pair: direction(*pair))
            self.forget = find.cache_clear
            self.slopes_u, self.slopes_w = (Slopes(m, lambda p: find(both[p])) for m in (u, w))
        self.w, self.u, self.opt_w, self.opt_u = w, u, opt_w, opt_u
        self.sources, self.alpha = sources, alpha

    def set_rates(
        self, factor: float, of_lambda: float = 1.0, alpha: float | None = None
    ) -> dict[str, float]:
        """As Step's. Where alpha changes λ's Adam starts afresh: its moments are of g_λ, which
        alpha scales."""
        if alpha not in (None, self.alpha):
            self.alpha = alpha
            self.sources.reset_optimizer()
        rates = super().set_rates(factor)
        return rates | {"alpha": self.alpha, "lr_lambda": self.sources.set_rate(of_lambda)}

    def row(self) -> dict[str, Tensor]:
        return self.sources.row()

    def state_dict(self) -> dict[str, Tensor]:
        alpha = torch.tensor(self.alpha, dtype=torch.float64)
        return {"alpha": alpha} | self.sources.state_dict(prefix="sources.")

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.alpha = state["alpha"].item()
        own = {k.removeprefix("sources."): t for k, t in state.items() if k.startswith("sources.")}
        self.sources.load_state_dict(own)

    def step(self, train: list, val: list, counts: Tensor, stop: bool = False) -> StepStats:
        """Update u, w and λ once. Collective: every rank calls it.

        train, val  this rank's micro-batches; `group` (b,) is the source's index, S for validation
        counts      (S + 1,) samples of each group in the global batch, known before any forward. It
                    has every source; or at most one sample of each where it has fewer samples than
                    there are sources, which then take turns, as in data.Batches
        stop        ask all ranks to stop; comes back in the stats of each
        """
        probs = self.sources.probs().detach()
        n_sources = len(probs)
        n = counts.to(probs)
        coverage = (n[:-1].sum() / n_sources).clamp(max=1)  # c_i: share of steps with source i
        present = n[:-1] > 0

        # What is back-propagated is Σ_j coef[group_j] ℓ_j = L2 + L1 / α, that is g / α.
        coef = torch.cat([probs / (coverage * n[:-1].clamp(min=1)), 1 / (self.alpha * n[-1:])])
        sum_u, of_u = self._backward(self.u, train, [], coef, self.slopes_u)
        sum_w, of_w = self._backward(self.w, train, val, coef, self.slopes_w)
        self.forget()
        gaps = sum(self._gap_sums(*x, n_sources) for x in zip(train, of_u, of_w, strict=True))

        sums = torch.cat([sum_u[:-1], sum_w, gaps.flatten().to(sum_w)])  # (4S + 1,)
        # w first: one move less where copies take turns.
        total = self._update(sums, [self.opt_w, self.opt_u], stop)
        sum_u, sum_w, gaps = total.sums.to(probs).split([n_sources, n_sources + 1, 2 * n_sources])
        norm_w, norm_u = total.norms

        loss_u, loss_w = sum_u / n[:-1], sum_w[:-1] / n[:-1]  # 0 / 0 = NaN where absent
        gap, variance = gaps_and_variances(*gaps.view(2, -1), n[:-1])
        if total.finite:
            scale = torch.where(present, self.alpha / coverage, 0)
            self.sources.update(*(torch.nan_to_num(x) for x in (scale * gap, scale**2 * variance)))
        return StepStats(
            loss_w, norm_w, total.finite, total.stop, loss_u, norm_u, (sum_w[-1] / n[-1]).item(),
            gap, variance,
        )  # fmt: skip

    def _gap_sums(self, batch, of_u: Tensor, of_w: Tensor, n_sources: int) -> Tensor:
        """Σ δ_j and Σ δ_j² over the samples of each source in a micro-batch, (2, S)."""
        delta = of_w - of_u if self.slopes_u is None else (of_u + of_w) / 2
        group = batch.group.to(delta.device)
        return torch.stack([by_group(x, group, n_sources) for x in (delta, delta.square())])


def gaps_and_variances(sums: Tensor, squares: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of each source's δ_j and the variance of that mean, of Σ δ_j, Σ δ_j² and counts, (S,).

    A source of one sample has no variance of its own: it gets the mean of δ² over the whole batch.
    """
    gap = sums / n
    within = (squares - n * gap.square()).clamp(min=0) / (n - 1).clamp(min=1)
    return gap, torch.where(n > 1, within, squares.sum() / n.sum()) / n


class PlainStep(Step):
    """Fine-tuning of one module: w ← AdamW(w, g_w), g_w = ∇_w of the global batch's mean loss.

    Sources have no weights here: the mixture holds as many samples of each as it should. Arguments
    as PenaltyStep's.
    """

    def __init__(
        self,
        w: nn.Module,
        opt_w,
        losses: Callable[..., Tensor] = sample_losses,
        clip: float = 0.0,
        on_micro: Callable[[nn.Module, bool], None] = lambda model, last: None,
    ):
        super().__init__({"w": (w, opt_w)}, losses, clip, on_micro)
        self.w, self.opt_w = w, opt_w

    def step(self, train: list, val: list, counts: Tensor, stop: bool = False) -> StepStats:
        """Update w once. Arguments as PenaltyStep's, with an empty `val`; samples of group -1 are
        fillers and count nothing. Collective: every rank calls it."""
        wide = torch.promote_types(next(self.w.parameters()).dtype, torch.float32)
        n = counts.to(wide)
        coef = torch.full_like(n, 1 / n.sum())  # (S + 1,)
        coef[-1] = 0  # where the fillers' group -1 points
        sums, _ = self._backward(self.w, train, [], coef)
        total = self._update(sums, [self.opt_w], stop)
        return StepStats(total.sums[:-1] / n[:-1], *total.norms, total.finite, total.stop)


class Slopes:
    """Each sample's slope ⟨∇ℓ_j(θ), d⟩ along d, had from a backward pass that is made anyway.

    With d = w − u, the mean of the slopes at u and at w is the gap ℓ_j(w) − ℓ_j(u) but for an error
    of third order in d (the trapezoidal rule). Differs from the paper, which subtracts the losses:
    in bf16 a loss is known to some 10⁻² only, and a gap is as small as 10⁻⁵, but a slope's error is
    a hundredth of itself.

    A layer y = f(x; θ) that is linear in its parameters would change by f(x; d) if they moved by d.
    So the derivative of sample j is the sum over the layers that train of ⟨∂ℓ_j/∂y, f(x; d)⟩ over
    those rows of y that are j's. It costs what the forward of these layers costs, and one layer's d
    of memory; a layer that trains must not be compiled, have running statistics (BatchNorm) or a
    part without its parameters (PReLU), nor come before an operation in place. What frozen layers
    differ by is left out.
    Where the layers that train are drawn, as under LISA, let `direction` divide d by the chance of
    its layer to be drawn: the mean over the draws is then the slope of all layers.

    module        row n of a layer's output belongs to sample n of the micro-batch, or to sample
                  module.row_samples[number of rows][n]
    direction     parameter -> d, of its shape and dtype
    """

    def __init__(self, module: nn.Module, direction: Callable[[Tensor], Tensor]):
        self.module, self.direction = module, direction
        self.n_samples = 0  # of the micro-batch at work; 0: nothing is watched
        self.total: Tensor | float = 0.0
        # The parameters as they are now: while a layer is at work, FSDP puts others in their place.
        self.own = {layer: dict(layer._parameters) for layer in module.modules()}
        self.own = {layer: own for layer, own in self.own.items() if own}
        for layer in self.own:
            if hasattr(layer, "slopes"):
                layer.slopes = self  # not linear in its parameters: it adds its rows by itself
            else:
                layer.register_forward_hook(self._watch)

    def trains(self, layer: nn.Module) -> bool:
        own = self.own[layer].values()
        return self.n_samples > 0 and any(p is not None and p.requires_grad for p in own)

    def of(self, layer: nn.Module) -> dict[str, Tensor | None]:
        """d of the layer's own parameters. Collective where they are sharded."""
        own = self.own[layer].items()
        return {name: None if p is None else self.direction(p) for name, p in own}

    def add(self, rows: Tensor) -> None:
        """Add what each row of a layer's output contributes, (n,)."""
        owner = getattr(self.module, "row_samples", {}).get(len(rows))
        if owner is not None:
            # A masked sum, not a scatter: the same bits each time on every device.
            mine = torch.arange(self.n_samples, device=rows.device)[:, None] == owner
            rows = torch.where(mine, rows, 0).sum(1)  # (b,)
        self.total = self.total + rows

    def take(self) -> Tensor:
        """The slopes of the micro-batch whose backward is through, (b,)."""
        total, self.total = self.total, 0.0
        if not isinstance(total, Tensor):
            raise ValueError("gap='gradient': the losses went through no layer that trains")
        return total

    def _watch(self, layer: nn.Module, x: tuple, y: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # a layer that trains must run as it is
            return y
        return Watched.apply(y, self, layer, *x) if self.trains(layer) else y


class Watched(torch.autograd.Function):
    """The identity on a layer's output y, (n, …), whose backward adds ⟨∂loss/∂y, f(x; d)⟩ of each
    row to `slopes`."""

    @staticmethod
    def forward(ctx, y: Tensor, slopes: Slopes, layer: nn.Module, *x: Tensor) -> Tensor:
        ctx.slopes, ctx.layer = slopes, layer
        ctx.save_for_backward(*x)
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, moved = ctx.saved_tensors, object.__new__(type(ctx.layer))
        moved.__dict__.update(ctx.layer.__dict__)  # all but what is replaced here
        moved._parameters = ctx.slopes.of(ctx.layer)
        moved._modules = dict.fromkeys(moved._modules)  # whose parameters are their own matter
        moved.offset = 0  # of a layer that adds a constant to its weight
        change = moved.forward(*x)
        wide = torch.promote_types(grad.dtype, torch.float32)
        ctx.slopes.add((grad * change).flatten(1).sum(1, dtype=wide))
        return grad, *[None] * (2 + len(x))


def _local_grads(opt) -> list[Tensor]:
    params: Iterable[Tensor] = (p for group in opt.param_groups for p in group["params"])
    grads = [p.grad for p in params if p.grad is not None]
    return [g.to_local() if isinstance(g, DTensor) else g for g in grads]


def _local_square_norm(opt) -> Tensor:
    """This rank's share of ‖gradient‖², in the gradients' dtype. Replicas of a shard split it."""
    first = opt.param_groups[0]["params"][0]
    replicas = math.prod(first.device_mesh.shape[:-1]) if isinstance(first, DTensor) else 1
    return torch.stack(torch._foreach_norm(_local_grads(opt))).square().sum() / replicas
