"""The penalty step against autograd, and its batching against the definition of a source loss."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bilevel import PenaltyStep, SourceWeights
from tests.worker import VOCAB, small

S, ALPHA = 3, 7.0


class Recorder(torch.optim.Optimizer):
    """Keeps the gradients that it is given and changes nothing."""

    def __init__(self, model):
        super().__init__(model.parameters(), {})

    def step(self):
        self.grads = [p.grad.clone() for p in self.param_groups[0]["params"]]


def micro_batch(group, seed, length=12):
    """Random samples; the prompt is a third of each, and some end in padding."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (len(group), length), generator=g)
    labels = tokens.clone()
    labels[:, : length // 3] = -100
    for i in range(len(group)):
        labels[i, length - i % 4 :] = -100
    return SimpleNamespace(tokens=tokens, labels=labels, group=torch.as_tensor(group))


def two_models(dtype=torch.float64):
    """w and u that differ, as they do in the middle of a run."""
    return [small(seed=seed, dtype=dtype) for seed in range(2)]


def mean_over(model, batches, group):
    """Of the mean cross-entropy over each sample's response tokens, from full logits."""
    losses = [
        F.cross_entropy(model(t[None])[0, :-1], y[1:], ignore_index=-100)
        for b in batches
        for t, y, g in zip(b.tokens, b.labels, b.group, strict=True)
        if g == group
    ]
    return torch.stack(losses).mean()


def relative_error(a, b):
    a, b = (torch.cat([t.flatten() for t in x]) for x in (a, b))
    return ((a - b).norm() / b.norm()).item()


def test_gradients_match_autograd_of_the_penalty():
    w, u = two_models()
    train = [micro_batch([0, 1, 2, 0], 1), micro_batch([0, 2, 0], 2, length=15)]
    val = [micro_batch([S] * 3, 3), micro_batch([S] * 2, 4)]
    counts = torch.tensor([4, 1, 2, 5])
    lam = torch.tensor([0.3, -0.8, 0.1], dtype=torch.float64, requires_grad=True)

    def weighted(model):  # L2
        return sum(p * mean_over(model, train, i) for i, p in enumerate(lam.softmax(0)))

    penalty = mean_over(w, val, S) + ALPHA * (weighted(w) - weighted(u))
    g_lam, *g_w = torch.autograd.grad(penalty, [lam, *w.parameters()])
    g_u = torch.autograd.grad(ALPHA * weighted(u), list(u.parameters()))

    sources = SourceWeights(S, torch.float64)
    sources.lam.data.copy_(lam.detach())
    opt_w, opt_u = Recorder(w), Recorder(u)
    stats = PenaltyStep(w, u, opt_w, opt_u, sources, ALPHA).step(train, val, counts)

    assert relative_error([ALPHA * g for g in opt_w.grads], g_w) <= 1e-10
    assert relative_error([ALPHA * g for g in opt_u.grads], g_u) <= 1e-10
    assert relative_error([sources.lam.grad], [g_lam]) <= 1e-10
    for model, found in (w, stats.source_loss_w), (u, stats.source_loss_u):
        expected = torch.stack([mean_over(model, train, i) for i in range(S)])
        torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=0)
    assert stats.val_loss == pytest.approx(mean_over(w, val, S).item(), 1e-12)
    norm = torch.cat([g.flatten() for g in g_w]).norm().item() / ALPHA
    assert stats.grad_norm_w == pytest.approx(norm, 1e-10)


class PerSource(nn.Module):
    """The loss of a sample is x[its source], so the gradient is the effective source weight."""

    def __init__(self, n):
        super().__init__()
        self.x = nn.Parameter(torch.ones(n + 1, dtype=torch.float64))


def per_source_step(n_sources, **kwargs):
    w, u = PerSource(n_sources), PerSource(n_sources)
    sources = SourceWeights(n_sources, torch.float64)
    return PenaltyStep(
        w, u, Recorder(w), Recorder(u), sources, ALPHA,
        losses=lambda model, batch: model.x[batch.group], **kwargs,
    )  # fmt: skip


def group_batches(groups, micro):
    return [SimpleNamespace(group=g) for g in torch.as_tensor(groups).split(micro)]


@pytest.mark.parametrize("micro", [1, 2, 3, 10])
def test_imbalanced_sources_keep_their_weights_whatever_the_micro_batch(micro):
    step = per_source_step(2)
    train = group_batches([0] * 9 + [1], micro)
    step.step(train, group_batches([2] * 4, micro), torch.tensor([9, 1, 4]))
    for opt, validation in (step.opt_u, 0), (step.opt_w, 1 / ALPHA):
        expected = torch.tensor([0.5, 0.5, validation], dtype=torch.float64)
        torch.testing.assert_close(opt.grads[0], expected, rtol=0, atol=1e-15)


def test_absent_sources_are_made_up_for_by_coverage():
    """Two samples a step from three sources: over a full rotation the weights are p again."""
    step = per_source_step(3)
    step.w.x.data[:] += 0.5  # a gap of 0.5 for each source
    total, gaps = torch.zeros(4, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for present in [(0, 1), (2, 0), (1, 2)]:
        counts = torch.zeros(4, dtype=torch.long)
        counts[list(present)], counts[3] = 1, 1
        step.sources.lam.data.copy_(torch.tensor([0.2, -0.4, 0.0]))
        probs = step.sources.probs().detach()
        stats = step.step(group_batches(present, 2), group_batches([3], 1), counts)
        absent = ({0, 1, 2} - set(present)).pop()
        assert stats.source_loss_w.isnan().tolist() == [i == absent for i in range(3)]
        total += step.opt_u.grads[0]
        gap = torch.zeros(3, dtype=torch.float64)
        gap[list(present)] = 0.5 * 3 / 2  # divided by c = 2/3
        jacobian = torch.diag(probs) - probs[:, None] * probs
        torch.testing.assert_close(step.sources.lam.grad, ALPHA * jacobian @ gap)
        gaps += gap
    torch.testing.assert_close(total[:3] / 3, probs)
    torch.testing.assert_close(gaps / 3, torch.full((3,), 0.5, dtype=torch.float64))


def test_nonfinite_step_touches_nothing():
    w, u = two_models()
    sources = SourceWeights(S, torch.float64)
    opts = [torch.optim.AdamW(m.parameters(), lr=0.1) for m in (w, u)]
    step = PenaltyStep(w, u, *opts, sources, ALPHA)
    train, val = [micro_batch([0, 1, 2], 1)], [micro_batch([S] * 2, 2)]
    counts = torch.tensor([1, 1, 1, 2])
    assert step.step(train, val, counts).finite
    bad = copy.deepcopy(step)
    bad.losses = lambda model, batch: model(batch.tokens, batch.labels) * (
        torch.where(batch.group == 1, torch.nan, 1.0) if model is bad.w else 1.0
    )
    stats = bad.step(train, val, counts)
    assert not stats.finite
    assert stats.source_loss_w.isnan().tolist() == [False, True, False]
    for a, b in zip([*bad.w.parameters(), *bad.u.parameters(), bad.sources.lam],
                    [*w.parameters(), *u.parameters(), sources.lam], strict=True):  # fmt: skip
        assert torch.equal(a, b)
    assert bad.opt_w.state_dict()["state"][0]["step"] == 1


def test_clip_scales_to_the_norm():
    step = per_source_step(2, clip=0.01)
    stats = step.step(group_batches([0, 1], 1), group_batches([2], 1), torch.tensor([1, 1, 1]))
    assert stats.grad_norm_u == pytest.approx(0.5**0.5)
    assert step.opt_u.grads[0].norm().item() == pytest.approx(0.01)
    assert step.opt_w.grads[0].norm().item() == pytest.approx(0.01)


class Pairs(SourceWeights):
    """Four sources in two groups, which share what a group gets."""

    def probs(self):
        return self.lam.softmax(0).repeat_interleave(2) / 2


@pytest.mark.parametrize("sources, targets, expected", [
    (SourceWeights(2, lr=0.02), [0.0, 1.0, 0.8], [0.2, 0.8]),
    (Pairs(4, lr=0.02, n_logits=2), [0.0, 0.0, 1.0, 1.0, 0.8], [0.1, 0.1, 0.4, 0.4]),
])  # fmt: skip
def test_toy_problem_reaches_its_optimum(sources, targets, expected):
    """Sources that pull a scalar to 0 and to 1, validation at 0.8; also where a logit is of a group
    of them."""
    w, u = (nn.Module() for _ in "wu")
    for model in (w, u):
        model.x = nn.Parameter(torch.zeros(()))
    opts = [torch.optim.SGD(model.parameters(), 0.2) for model in (w, u)]
    targets, n = torch.tensor(targets), len(expected)
    step = PenaltyStep(w, u, *opts, sources, alpha=10,
                       losses=lambda model, batch: (model.x - targets[batch.group]) ** 2)
    for _ in range(300):
        step.step(group_batches(range(n), n), group_batches([n], 1), torch.ones(n + 1))
    torch.testing.assert_close(sources.probs().detach(), torch.tensor(expected), rtol=0, atol=0.01)
    assert {len(values) for values in step.row().values()} == {n}
    again = type(sources)(n, n_logits=len(sources.lam))
    again.load_state_dict(sources.state_dict())
    assert torch.equal(again.probs(), sources.probs())
