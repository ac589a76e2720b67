"""What λ learns from: each sample's gap between w and u, its error, and the step that is made of
both."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import shard
from benchmarks import fidelity
from bilevel import Slopes, SourceWeights, Step, gaps_and_variances, sample_losses
from cli.flags import parse
from lisa import Lisa
from model import from_pretrained
from tests import cases
from tests.worker import small


def moved(model, scale=1e-3):
    """A copy of a model at another point."""
    other, g = copy.deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(scale * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return other


def slopes_of(model, other, batch, direction=lambda w, u: (w - u).detach()):
    """Each sample's slope at `model` towards `other`, by the way of a backward pass."""
    pairs = dict(zip(model.parameters(), other.parameters(), strict=True))
    slopes = Slopes(model, lambda p: direction(pairs[p], p))
    step = Step({}, sample_losses, 0, lambda model, last: None)
    coef = torch.tensor([0.3, 0.7, 1], dtype=torch.float64)
    _, (found,) = step._backward(model, [batch], [], coef, slopes)
    return found


def batch_of(n=4):
    tokens, _, labels = cases.batch()
    group = torch.tensor([0, 1, 0, 1])
    return SimpleNamespace(tokens=tokens[:n], labels=labels[:n], group=group[:n])


@pytest.mark.parametrize("case", cases.CASES)
def test_slopes_match_autograd_in_every_family(case, checkpoint):
    _, directory = checkpoint(case)
    u = from_pretrained(directory, torch.float64)
    w, batch = moved(u), batch_of()
    found = slopes_of(u, w, batch)
    losses = u(batch.tokens, batch.labels)
    for loss, slope in zip(losses, found, strict=True):
        grads = torch.autograd.grad(loss, list(u.parameters()), retain_graph=True)
        d = ((b - a).detach() for a, b in zip(u.parameters(), w.parameters(), strict=True))
        expected = sum((g * x).sum() for g, x in zip(grads, d, strict=True))
        torch.testing.assert_close(slope, expected)


@pytest.mark.parametrize("recompute, logits_bytes", [(False, 2e9), (True, 2e9), (False, 4000)])
def test_slopes_of_what_trains_alone(recompute, logits_bytes):
    """Under LISA, with activation checkpointing, and with logits in chunks."""
    u = small(dtype=torch.float64)
    w, batch = moved(u, 1e-2), batch_of()
    Lisa(u, n_active=1, interval=1, ends="sampled")
    u.recompute, u.head.logits_bytes = recompute, logits_bytes
    found = slopes_of(u, w, batch)
    trained = [p for p in u.parameters() if p.requires_grad]
    d = {p: (q - p).detach() for p, q in zip(u.parameters(), w.parameters(), strict=True)}
    for loss, slope in zip(u(batch.tokens, batch.labels), found, strict=True):
        grads = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
        pairs = zip(grads, trained, strict=True)
        expected = sum((g * d[p]).sum() for g, p in pairs if g is not None)
        torch.testing.assert_close(slope, expected)


@pytest.mark.parametrize("ends", ["always", "sampled"])
def test_mean_over_lisas_draws_is_the_slope_of_everything(ends):
    u = small(dtype=torch.float64)
    w, batch, of_draw = moved(u), batch_of(), {}
    everything = slopes_of(u, w, batch)
    u.offload = w.offload = None
    opts = [Lisa(model, n_active=1, interval=1, ends=ends) for model in (w, u)]
    for period in range(30):
        for opt in opts:
            opt.switch(period)
        direction = shard.differences(w, u, *opts)
        of_draw[frozenset(opts[1].active)] = slopes_of(u, w, batch, direction)
    assert len(of_draw) == len(u.blocks) + (ends == "sampled")
    torch.testing.assert_close(torch.stack([*of_draw.values()]).mean(0), everything)


KINDS = "gradient", "difference"


def gaps(w, u, *how):
    """The two sources' gaps, by dtype and kind."""
    batch = batch_of()
    val = SimpleNamespace(tokens=batch.tokens[:1], labels=batch.labels[:1], group=torch.tensor([2]))
    return fidelity.gap_of(w, u, ([batch], [val], torch.tensor([2, 2, 1])), *how)


def test_gap_from_gradients_is_the_difference_to_third_order():
    """Half as far apart, the two differ by an eighth."""
    u, errors = small(dtype=torch.float64), []
    for scale in (2e-3, 1e-3):
        w = moved(u, scale)
        gradient, difference = (gaps(w, u, torch.float64, gap) for gap in KINDS)
        errors.append((gradient - difference).norm())
    assert errors[0] < 1e-4 and errors[0] / errors[1] == pytest.approx(8, abs=1)


def test_bf16_leaves_the_gradient_its_gap():
    """w and u are ten steps of 1e-5 apart, as in fine-tuning."""
    u = small()
    w = copy.deepcopy(u)
    with torch.no_grad():
        for p in w.parameters():
            p.add_(1e-4 * torch.randn(p.shape, generator=torch.manual_seed(1)).sign())
    true = gaps(w, u, torch.float32, "difference")
    found, plain = (gaps(w, u, torch.bfloat16, gap) for gap in KINDS)
    error, plain_error = ((x - true).norm() / true.norm() for x in (found, plain))
    assert error < 0.1 and plain_error > 5 * error


def test_gaps_and_variances_match_numpy():
    rng = np.random.default_rng(0)
    delta = [rng.normal(size=n) for n in (5, 2, 1)]
    sums, squares = (torch.tensor([f(d).sum() for d in delta]) for f in (np.copy, np.square))
    gap, variance = gaps_and_variances(sums, squares, torch.tensor([5.0, 2, 1]).double())
    np.testing.assert_allclose(gap, [d.mean() for d in delta])
    expected = [d.var(ddof=1) / len(d) for d in delta[:2]]
    np.testing.assert_allclose(variance, [*expected, np.square(np.concatenate(delta)).mean()])


# --------------------------------------------------------------------------------------------------
# λ's step


class SideBySide(SourceWeights):
    """Runs of so many sources each."""

    def __init__(self, sources, runs, **settings):
        super().__init__(sources * runs, **settings)
        self.sources = sources

    def probs(self):
        return self.lam.view(-1, self.sources).softmax(1).flatten()


def walk(z, means, runs=1, steps=150, samples=10):
    """Weights after steps on gaps of these means, whose samples have a standard deviation of 1."""
    rng, sources = np.random.default_rng(0), SideBySide(3, runs, lr=0.05, z=z)
    for _ in range(steps):
        delta = rng.normal(means * runs, size=(samples, 3 * runs))
        gap, variance = delta.mean(0), delta.var(0, ddof=1) / samples
        sources.update(*(torch.tensor(x, dtype=torch.float32) for x in (gap, variance)))
    return sources


def test_sources_that_do_not_differ_stay_where_they_began():
    kept, adam = (walk(z, [0.5] * 3, runs=100) for z in (3.0, 0))
    off, of_adam = ((x.probs() - 1 / 3).abs().view(-1, 3).amax(1) for x in (kept, adam))
    assert (off < 0.05).sum() >= 98 and of_adam.median() > 0.05
    assert (kept.snr.view(-1, 3) > 4).any(1).sum() <= 2


def test_a_source_that_differs_gets_the_weight():
    sources = walk(3.0, [0.0, 0.5, 0.5])
    assert sources.probs()[0] > 0.95 and sources.snr[0] > 4
    assert 0 < sources.row()["weights_se"][0] < 0.1


def test_gaps_without_spread_are_sure_and_the_same_ones_say_nothing():
    """As of sources of one record each."""
    apart, same = SourceWeights(2, lr=0.1, z=3.0), SourceWeights(2, lr=0.1, z=3.0)
    for _ in range(40):
        apart.update(torch.tensor([1.0, 0.0]), torch.zeros(2))
        same.update(torch.tensor([1.0, 1.0 + 1e-6]), torch.zeros(2))
    assert apart.probs()[1] > 0.9 and (apart.snr > 100).all() and apart.snr.isfinite().all()
    assert (same.probs() == 0.5).all() and (same.snr < 1).all()


def test_a_source_keeps_its_own_standard_errors_where_the_weights_have_collapsed():
    sources = SourceWeights(3)  # one weight is 1, and no logit moves it any more
    sources.lam.data.copy_(torch.tensor([10.0, -8.0, -9.0]))
    sources.snr.copy_(torch.tensor([90.0, 2.0, 1.0]))
    assert sources.row()["snr"].tolist() == [90, 2, 1]


@pytest.mark.parametrize("persistence", [0.0, 0.9])
def test_stated_errors_are_what_runs_scatter_by(persistence):
    """Two sources differ in their errors alone. A share of these lasts from step to step, which
    samples of one step do not show: it is in the stated errors."""
    rng, sources, state = np.random.default_rng(0), SideBySide(2, runs=100, lr=0.002), 0.0
    for _ in range(300):
        lasting, fresh = rng.normal(size=(2, 200))
        state = persistence * state + lasting * (1 - persistence**2) ** 0.5
        sources.update(torch.tensor(state + fresh).float(), torch.ones(200))
    row = sources.row()
    ratio = row["weights"][::2].std() / row["weights_se"].square().mean().sqrt()
    assert 0.8 < ratio < 1.25, ratio


def test_z_of_zero_is_adam():
    ours, theirs = SourceWeights(3, lr=0.1), nn.Parameter(torch.zeros(3))
    adam, rng = torch.optim.Adam([theirs], lr=0.1), np.random.default_rng(0)
    for _ in range(20):
        gap = torch.tensor(rng.normal(size=3), dtype=torch.float32)
        ours.update(gap, torch.ones(3))
        adam.zero_grad()
        theirs.softmax(0).backward(gap)
        adam.step()
    torch.testing.assert_close(ours.lam.detach(), theirs.detach())


def test_how_far_weights_can_move_is_said_whatever_the_length_of_the_run():
    auto, given = parse([]), parse(["--lr-lambda", "0.1"])
    can = "one of 2 sources can go from 0.500 to 1.00000 (its logit by"
    assert [auto.reach(n, 2).split(",")[0] for n in (50, None)] == [
        f"in 50 steps {can} 8.0", f"in the run {can} 8.0"]  # fmt: skip
    assert given.reach(None, 2).startswith(f"in 100 steps {can} 9.8")
