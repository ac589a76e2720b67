"""The ScaleBiO penalty step: learn source weights with first-order gradients only.

| paper       | code             | meaning                                                   |
|-------------|------------------|-----------------------------------------------------------|
| λ ∈ R^S     | `lam`            | logits of the S sources, replicated on every rank         |
| p           | `probs`          | softmax(λ): source weights, sum to 1                      |
| w, u        | `w`, `u`         | two copies of the model                                   |
| ℓ_i(w)      | `source_loss[i]` | mean loss over the samples of source i                    |
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
g_u / α and g_w / α, so that neither the moments nor the clipping threshold depend on α. Source:
Pan et al., ScaleBiO, ACL 2025, arXiv 2406.19976. PlainStep trains a single module on what the
weights have chosen.

This file knows nothing of language models, shards or LISA: w and u are any two modules, and a
micro-batch is any object with a field `group`.

Shapes: S sources, b samples of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class SourceWeights(nn.Module):
    """p = softmax(λ) and Adam on λ. Starts uniform.

    To weight something else (single samples, features of a sample), replace this class by any
    module with `probs() -> (S,)`, differentiable in its parameters, and `update`.
    """

    def __init__(self, n_sources: int, dtype: torch.dtype = torch.float32, lr: float = 1e-2):
        super().__init__()
        self.lam = nn.Parameter(torch.zeros(n_sources, dtype=dtype))
        self.lr = lr
        self.reset_optimizer()

    def reset_optimizer(self) -> None:
        """Forget Adam's moments, as when alpha changes the scale of g_λ.

        Differs from the paper's code: no weight decay, which would pull p towards uniform.
        """
        self.opt = torch.optim.Adam([self.lam], lr=self.lr, betas=(0.9, 0.999), eps=1e-8)

    def set_rate(self, factor: float) -> float:
        """Let Adam step with `factor` times the learning rate; returns that."""
        self.opt.param_groups[0]["lr"] = factor * self.lr
        return factor * self.lr

    def get_extra_state(self) -> dict:
        """Adam's part of `state_dict()`, so that a run can be resumed."""
        return self.opt.state_dict()

    def set_extra_state(self, state: dict) -> None:
        self.opt.load_state_dict(state)

    def probs(self) -> Tensor:
        return self.lam.softmax(0)  # (S,)

    def update(self, gap: Tensor) -> None:
        """λ ← Adam(λ, Jᵀ gap), for gap = ∂(penalty)/∂p = α (ℓ(w) − ℓ(u)), (S,)."""
        self.opt.zero_grad()
        self.probs().backward(gap)
        self.opt.step()


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
    weights: Tensor | None = None  # (S,), p after the step


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

    def set_rates(self, factor: float, alpha: float = 0.0) -> dict[str, float]:
        """Scale all learning rates by `factor` for the next step. Returns what is in force, by the
        names of metrics.jsonl; `alpha` means something to PenaltyStep alone."""
        for _, opt in self.copies.values():
            for group in opt.param_groups:
                # The name that torch's own schedulers give the rate to start from.
                group["lr"] = factor * group.setdefault("initial_lr", group["lr"])
        return {"lr": self.copies["w"][1].param_groups[0]["lr"]}

    def state_dict(self) -> dict:
        """What a step remembers beside its modules and their optimisers."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Take over what `state_dict` gave."""

    def _backward(self, model: nn.Module, batches: list, coef: Tensor) -> Tensor:
        """Gradients of Σ_j coef[group_j] ℓ_j over all ranks; returns the local Σ ℓ_j by group."""
        world = dist.get_world_size() if dist.is_initialized() else 1
        sums = None
        for i, batch in enumerate(batches):
            self.on_micro(model, i == len(batches) - 1)
            losses = self.losses(model, batch)  # (b,)
            group = batch.group.to(losses.device)
            if sums is None:
                # FSDP and DDP average gradients over the ranks; the objective is their sum.
                scale = (coef * world).to(losses.device, non_blocking=True)
                groups = torch.arange(len(coef), device=losses.device)[:, None]
                sums = torch.zeros_like(scale)
            (scale[group] * losses).sum().backward()
            # A masked sum, not a scatter: the same bits each time on every device, so that the gap
            # of two equal copies is exactly zero.
            sums += torch.where(groups == group, losses.detach(), 0).sum(1)  # (S + 1,)
        return sums

    def _over_all_ranks(self, sums: Tensor, opts: list, stop: bool) -> Totals:
        """Add up this rank's `sums`, (n,), its gradients' squares and its wish to stop with those
        of the others, in one all-reduce. Collective: every rank calls it."""
        norms = torch.stack([_local_square_norm(opt).to(sums) for opt in opts])
        total = torch.cat([sums, norms, sums.new_full((1,), float(stop))])
        if dist.is_initialized():
            dist.all_reduce(total)
        total = total.cpu()  # the step's one wait for the device
        sums, norms, asked = total.split([len(sums), len(opts), 1])
        return Totals(sums, norms.sqrt().tolist(), bool(total.isfinite().all()), asked.item() > 0)

    def _update(self, opt, norm: float) -> None:
        """One optimiser step on gradients scaled down to norm `clip`."""
        if self.clip and norm > self.clip:
            torch._foreach_mul_(_local_grads(opt), self.clip / norm)
        opt.step()


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
        on_micro: Callable[[nn.Module, bool], None] = lambda model, last: None,
    ):
        super().__init__({"w": (w, opt_w), "u": (u, opt_u)}, losses, clip, on_micro)
        self.w, self.u, self.opt_w, self.opt_u = w, u, opt_w, opt_u
        self.sources, self.alpha = sources, alpha

    def set_rates(self, factor: float, alpha: float) -> dict[str, float]:
        """As Step's, and λ's rate, and alpha: where it changes, λ's Adam starts afresh, for its
        moments are of g_λ, which alpha scales."""
        if alpha != self.alpha:
            self.alpha = alpha
            self.sources.reset_optimizer()
        rates = super().set_rates(factor)
        return rates | {"alpha": alpha, "lr_lambda": self.sources.set_rate(factor)}

    def state_dict(self) -> dict:
        return {"sources": self.sources.state_dict(), "alpha": self.alpha}

    def load_state_dict(self, state: dict) -> None:
        self.sources.load_state_dict(state["sources"])
        self.alpha = state["alpha"]

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
        sum_u = self._backward(self.u, train, coef)
        sum_w = self._backward(self.w, [*train, *val], coef)

        sums = torch.cat([sum_u[:-1], sum_w])  # (2S + 1,)
        total = self._over_all_ranks(sums, [self.opt_u, self.opt_w], stop)
        sum_u, sum_w = total.sums.to(probs).split([n_sources, n_sources + 1])
        norm_u, norm_w = total.norms

        loss_u, loss_w = sum_u / n[:-1], sum_w[:-1] / n[:-1]  # 0 / 0 = NaN where absent
        if total.finite:
            self._update(self.opt_w, norm_w)  # w first: one move less where copies take turns
            self._update(self.opt_u, norm_u)
            gap = torch.where(present, (loss_w - loss_u) / coverage, 0)
            self.sources.update(self.alpha * gap)
        self.opt_u.zero_grad()
        self.opt_w.zero_grad()
        val_loss = (sum_w[-1] / n[-1]).item()
        weights = self.sources.probs().detach()
        return StepStats(
            loss_w, norm_w, total.finite, total.stop, loss_u, norm_u, val_loss, weights
        )


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
        sums = self._backward(self.w, train, coef)
        total = self._over_all_ranks(sums, [self.opt_w], stop)
        (norm,) = total.norms
        if total.finite:
            self._update(self.opt_w, norm)
        self.opt_w.zero_grad()
        return StepStats(total.sums[:-1] / n[:-1], norm, total.finite, total.stop)


def _local_grads(opt) -> list[Tensor]:
    params: Iterable[Tensor] = (p for group in opt.param_groups for p in group["params"])
    grads = [p.grad for p in params if p.grad is not None]
    return [g.to_local() if isinstance(g, DTensor) else g for g in grads]


def _local_square_norm(opt) -> Tensor:
    """This rank's share of ‖gradient‖², in the gradients' dtype."""
    return torch.stack(torch._foreach_norm(_local_grads(opt))).square().sum()
