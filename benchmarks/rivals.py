"""Other ways to weight sources, in the loop of train.py and at the price of ScaleBiO.

Each takes the place of bilevel.PenaltyStep, with the same two copies of the model, optimisers and
stratified batches, on one process. What a step costs is counted in samples that go forward and
backward; forward alone is a third of one. For b training samples, v of validation and S sources:

    method               cost of a step   what it goes by
    ScaleBiO             2b + v           the gap between w and u
    DoReMi               7b/6             excess loss over a model that was trained on all alike
    gradient alignment   b + v            angle between the gradients of a source and of validation
    bandit               b/S + 2v/3       fall of the validation loss by a step on one source
    random search        b + v/12         validation loss after short runs on random mixtures
    RegMix               b + v/12         a regression on such losses, and its least

`steps_for` gives each as many more steps as it is cheaper. (In bf16 ScaleBiO's gap from gradients
costs it some more, which is not counted.)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

import shard
from bilevel import PenaltyStep, StepStats, Totals, by_group


class Rival(PenaltyStep):
    """What the rivals share. Their weights are the mean of `seen`, uniform while that is empty.

    Learning rates stay as given: a schedule over the whole run would favour some short run in it.

    total   steps of the run
    """

    def __init__(self, *args, total: int, **rest):
        super().__init__(*args, **rest | {"gap": "difference"})
        self.total, self.t, self.seen, self.falls = total, 0, [], []
        self.n_sources = len(self.sources.lam)
        self.rng = np.random.default_rng(self.opt_w.seed)

    def set_rates(self, factor: float, *rest: float) -> dict[str, float]:
        return super().set_rates(1.0, *rest)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        raise ValueError("the run of a rival does not go on: delete its directory")

    def row(self) -> dict[str, Tensor]:
        uniform = self.sources.probs().detach() * 0 + 1 / self.n_sources
        weights = torch.stack(self.seen).mean(0) if self.seen else uniform
        return {"weights": weights, "weights_se": 0 * uniform, "snr": 0 * uniform}

    def policy(self, explore: float) -> Tensor:
        """Softmax of λ, mixed with uniform weights."""
        return (1 - explore) * self.sources.probs().detach() + explore / self.n_sources

    def train_on(self, copy: str, probs: Tensor, train: list, counts: Tensor) -> Totals:
        """One step of a copy on Σ p_i ℓ_i; `sums` are then the sources' mean losses, NaN where
        p_i = 0."""
        model, opt = self.copies[copy]
        coef = torch.cat([probs, probs.new_zeros(1)]) / counts
        sums, _ = self._backward(model, train, [], coef)
        total = self._update(sums, [opt])
        return total._replace(sums=(total.sums / counts)[:-1].where(probs > 0, math.nan))

    @torch.no_grad()
    def losses_of(self, copy: str, batches: list, counts: Tensor) -> Tensor:
        """The mean loss of each group, without a backward pass, (S + 1,)."""
        model, _ = self.copies[copy]
        sums = sum(by_group(self.losses(model, b), b.group, len(counts)) for b in batches)
        return sums.cpu() / counts

    def stats(self, total: Totals, stop: bool, val_loss: float = math.nan) -> StepStats:
        """Counts the step, too."""
        self.t += 1
        none = torch.full_like(total.sums, math.nan)
        return StepStats(total.sums, total.norms[0], total.finite, stop, none, math.nan, val_loss,
                         none, none)  # fmt: skip


class DoReMi(Rival):
    """p_i grows by the excess of w's loss on source i over that of a reference, where it is above
    0; w trains by p. The reference is u, which the first half of the steps train on all sources
    alike. The result is the mean p of the other half. Xie et al., DoReMi, NeurIPS 2023, arXiv
    2305.10429, with its η = 1 and 10⁻³ of uniform weights. Knows nothing of validation."""

    def step(self, train: list, val: list, counts: Tensor, stop: bool = False) -> StepStats:
        p = self.policy(1e-3)
        if self.t < self.total // 2:
            total = self.train_on("u", torch.full_like(p, 1 / self.n_sources), train, counts)
            return self.stats(total, stop)
        reference = self.losses_of("u", train, counts)[:-1]
        total = self.train_on("w", p, train, counts)
        self.sources.lam.data += (total.sums - reference).clamp(min=0)
        self.seen.append(self.policy(1e-3))
        return self.stats(total, stop)


class Alignment(Rival):
    """λ ← Adam(λ, −Jᵀ cos(∇ℓ_i(w), ∇L1(w))), at ScaleBiO's rate; w ← AdamW(w, ∇L2(λ, w)). As in
    DoGE (Fan et al., ICML 2024) with the cosine of LESS (Xia et al., ICML 2024): bare products
    prefer the source of the largest gradients, which is often the one that fits least."""

    def step(self, train: list, val: list, counts: Tensor, stop: bool = False) -> StepStats:
        p, masters = self.sources.probs().detach(), [*self.opt_w.masters.values()]
        losses, gradients = [], []
        for group, coef in enumerate(torch.eye(len(counts)).to(p) / counts):
            part = [*rows_of(train + val, group)]
            losses.append(self._backward(self.w, part, [], coef)[0][group] / counts[group])
            gradients.append([master.grad for master in masters])
            self.opt_w.zero_grad()
        *of_sources, ahead = gradients
        cosines = torch.stack([cosine(g, ahead) for g in of_sources]).to(p)
        for master, parts in zip(masters, zip(*of_sources, strict=True), strict=True):
            master.grad = sum(x * g for x, g in zip(p.tolist(), parts, strict=True))
        total = self._update(torch.stack(losses), [self.opt_w])
        if total.finite:
            self.sources.update(-cosines, torch.zeros_like(p))  # their errors are not known
        self.seen = [self.sources.probs().detach()]
        return self.stats(total._replace(sums=total.sums[:-1]), stop, total.sums[-1].item())


def cosine(one: list[Tensor], other: list[Tensor]) -> Tensor:
    """Of two gradients, each a list of tensors; on the CPU."""
    dot, a, b = (sum((x * y).sum() for x, y in zip(*pair, strict=True))
                 for pair in ((one, other), (one, one), (other, other)))  # fmt: skip
    return (dot / (a * b).sqrt()).cpu()


def rows_of(batches: list, group: int) -> Iterator:
    """The samples of a group in data.MicroBatches."""
    for batch in batches:
        if (rows := batch.group == group).any():
            tokens, labels = batch.tokens[rows], batch.labels[rows.to(batch.labels.device)]
            yield dataclasses.replace(batch, tokens=tokens, labels=labels, group=batch.group[rows])


class Bandit(Rival):
    """EXP3 (Auer et al., 2002): a step of w on one source that is drawn; its reward is the fall of
    the loss on the step's validation samples, scaled so that the 20% and 80% quantiles so far are 0
    and 1 (Graves et al., ICML 2017). The result is the mean policy of the second half."""

    def step(self, train: list, val: list, counts: Tensor, stop: bool = False) -> StepStats:
        S = self.n_sources
        explore = min(1.0, math.sqrt(S * math.log(S) / ((math.e - 1) * self.total)))
        policy = self.policy(explore)
        i = int(self.rng.choice(S, p=policy.double().numpy() / policy.double().sum().item()))
        before = self.losses_of("w", val, counts)[-1].item()
        drawn = torch.zeros_like(policy).index_fill(0, torch.tensor([i]), 1)
        total = self.train_on("w", drawn, [*rows_of(train, i)], counts)
        self.falls.append(before - self.losses_of("w", val, counts)[-1].item())
        low, high = np.quantile(self.falls, [0.2, 0.8])
        reward = float(np.clip((self.falls[-1] - low) / max(high - low, 1e-12), 0, 1))
        self.sources.lam.data[i] += explore * reward / (S * policy[i])
        if self.t >= self.total // 2:
            self.seen.append(policy)
        return self.stats(total, stop, before)


class Search(Rival):
    """Short runs from the same start, on uniform weights and on random mixtures. Validation losses,
    after each on the same samples, choose among them."""

    runs = staticmethod(lambda s: 8)

    def __init__(self, *args, **rest):
        super().__init__(*args, **rest)
        uniform = np.full((1, self.n_sources), 1 / self.n_sources)
        n = self.runs(self.n_sources)
        self.tried = np.concatenate([uniform, self.mixtures(n - 1)])
        self.starts = [k * self.total // n for k in range(n + 1)]
        self.val, self.found = [], []  # as many validation batches as a quarter of a run; losses

    def mixtures(self, n: int) -> np.ndarray:
        """Random ones from lopsided to even, as RegMix draws them: Dirichlet's of concentrations
        0.1 to 5, (n, S)."""
        shape = np.geomspace(0.1, 5, n)[:, None] + np.zeros(self.n_sources)
        parts = self.rng.gamma(shape) + 1e-9
        return parts / parts.sum(1, keepdims=True)

    def step(self, train: list, val: list, counts: Tensor, stop: bool = False) -> StepStats:
        k = len(self.found)
        if self.t == self.starts[k]:
            self.opt_w.finish(self.t)
            shard.copy_shards(self.w, self.u)  # u never moves
            self.opt_w.switch(self.t)
        if self.t < max(1, self.starts[1] // 4):
            self.val += val
        p = torch.from_numpy(self.tried[k]).to(self.sources.lam)
        total, loss = self.train_on("w", p, train, counts), math.nan
        if self.t + 1 == self.starts[k + 1]:
            all_val = counts * max(1, self.starts[1] // 4)
            loss = self.losses_of("w", self.val, all_val)[-1].item()
            self.found.append(loss)
            self.seen = [torch.from_numpy(self.choose(np.array(self.found))).to(p)]
        return self.stats(total, stop, loss)

    def choose(self, losses: np.ndarray) -> np.ndarray:
        """The best mixture, after the runs that gave these losses, (S,)."""
        return self.tried[np.argmin(losses)]


class RegMix(Search):
    """A ridge regression of such losses on the mixtures, and of 100,000 random ones the mean of the
    hundred that it finds best. Liu et al., RegMix, ICLR 2025, arXiv 2407.01492."""

    runs = staticmethod(lambda s: 2 * s + 2)

    def choose(self, losses: np.ndarray) -> np.ndarray:
        x = self.tried[: len(losses)]
        x, y = x - x.mean(0), losses - losses.mean()
        slope = np.linalg.solve(x.T @ x + 1e-2 * np.eye(self.n_sources), x.T @ y)
        simulated = self.mixtures(100_000)
        return simulated[np.argsort(simulated @ slope)[:100]].mean(0)


METHODS = {"DoReMi": DoReMi, "gradient alignment": Alignment, "bandit": Bandit,
           "random search": Search, "RegMix": RegMix}  # fmt: skip


def passes(method: str, b: int, v: int, s: int) -> float:
    """What a step costs, see above."""
    return {"ScaleBiO": 2 * b + v, "DoReMi": (b + 4 * b / 3) / 2, "gradient alignment": b + v,
            "bandit": b / s + 2 * v / 3}.get(method, b + v / 12)  # fmt: skip


def steps_for(method: str, steps: int, *sizes: int) -> int:
    """The steps that cost a rival what so many cost ScaleBiO, for b, v and S."""
    return round(steps * passes("ScaleBiO", *sizes) / passes(method, *sizes))
