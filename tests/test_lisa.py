"""LISA's draws, and what it keeps and frees."""

import copy

import pytest
import torch
from torch import nn

import lisa
from lisa import ENDS, Lisa, draw, round_stochastically
from model import ModelConfig, Transformer, build, random_weights
from tests.worker import FAMILIES, SGD

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


class Stack(nn.Module):
    """Blocks between two ends, as a transformer has them."""

    def __init__(self, n_blocks=6, width=8, tied=False):
        super().__init__()
        self.embed = nn.Linear(width, width, bias=False)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(n_blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, width, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x).tanh()
        return self.head(self.norm(x))


def make(dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    return Stack(**kwargs).to(dtype)


def equal(a, b):
    return all(map(torch.equal, a.parameters(), b.parameters()))


def train(model, opt, steps, first=0):
    g = torch.Generator().manual_seed(first)
    for step in range(first, first + steps):
        opt.switch(step)
        x = torch.randn(4, 8, generator=g).to(model.head.weight.dtype)
        (model(x) - x.flip(1)).square().mean().backward()
        opt.step()
        opt.zero_grad()


def test_draw_is_a_pure_function_that_covers_all_blocks_and_by_choice_the_ends():
    draws = [draw(3, period, 10, 2) for period in range(200)]
    assert draws == [draw(3, period, 10, 2) for period in reversed(range(200))][::-1]
    assert all(len(d) == 3 and 10 in d for d in draws)  # two blocks and the ends
    counts = [sum(i in d for d in draws) for i in range(10)]
    assert min(counts) > 20 and max(counts) < 65  # 40 ± 4 standard deviations
    assert draws != [draw(4, period, 10, 2) for period in range(200)]
    assert draws != [draw(3, period, 10, 2, copy=1) for period in range(200)]
    assert all(10 not in draw(0, period, 10, 2, "frozen") for period in range(50))
    sampled = [draw(0, period, 10, 2, "sampled") for period in range(200)]
    assert all(len(d) == 2 for d in sampled)
    assert 0 < sum(10 in d for d in sampled) < 100
    assert draw(0, 0, 10, 0) == set(range(11))
    assert draw(0, 0, 10, 0, "frozen") == set(range(10))


@DTYPES
def test_state_after_ten_switches_is_that_of_the_active_parameters(dtype):
    model = make(dtype)
    opt = Lisa(model, n_active=2, interval=3, lr=1e-2)
    train(model, opt, 33)  # eleven periods
    active = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert active == 2 * (8 * 8 + 8) + 8 * 8 * 2 + 8 * 2  # two blocks and the ends
    floats = 2 if dtype == torch.float32 else 3  # moments; in bf16 a master too
    assert sum(t.numel() * t.element_size() for t in opt.state_tensors()) == active * floats * 4
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert {p for p in model.parameters() if p.requires_grad} == set(opt.masters)
    for p, master in opt.masters.items():
        assert master.dtype == torch.float32 and torch.equal(p, master.to(dtype))
    opt.finish(33)
    assert not opt.masters and not opt.opt.state


@DTYPES
@pytest.mark.parametrize("ends", ENDS)
def test_what_is_inactive_does_not_change_by_a_bit_and_costs_no_gradient(ends, dtype):
    model = make(dtype)
    opt = Lisa(model, n_active=2, interval=5, ends=ends, lr=1e-2)
    for period in range(6):
        opt.switch(period * 5)
        before = {p: p.detach().clone() for p in model.parameters()}
        train(model, opt, 5, period * 5)
        for i, unit in enumerate(opt.units):
            assert all(torch.equal(p, before[p]) for p in unit) == (i not in opt.active), i
            assert {p.requires_grad for p in unit} == {i in opt.active}


@pytest.mark.parametrize("tied", [False, True])
def test_all_blocks_match_adamw(tied):
    model, reference = make(tied=tied), make(tied=tied)
    train(model, Lisa(model, n_active=6, interval=4, lr=1e-2, weight_decay=0.1), 20)
    adamw = torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=0.1)
    adamw.switch = lambda step: None
    train(reference, adamw, 20)
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_block_that_stays_keeps_its_state_and_one_that_returns_starts_afresh():
    model = make()
    opt = Lisa(model, n_active=3, interval=1, lr=1e-2)
    ages, seen, returned = {}, set(), set()
    for step in range(40):
        train(model, opt, 1, step)
        ages = {i: ages.get(i, 0) + 1 for i in opt.active}
        for i, age in ages.items():
            assert all(opt.opt.state[p]["step"] == age for p in opt.units[i])
            if age == 1 and i in seen:
                returned.add(i)
        seen |= opt.active
    assert returned == set(range(6)) and ages[6] == 40  # the ends stay


@DTYPES
@pytest.mark.parametrize("settings", [{}, {"optimizer": SGD}], ids=["AdamW", "SGD"])
def test_going_on_from_the_state_dict_changes_no_bit(settings, dtype):
    def start():
        model = make(dtype)
        return model, Lisa(model, n_active=2, interval=4, lr=1e-2, **settings)

    model, opt = start()
    train(model, opt, 6)
    saved, state = copy.deepcopy((model.state_dict(), opt.state_dict()))
    train(model, opt, 6, 6)
    resumed, opt = start()
    opt.switch(5)  # to the blocks that were active when it was saved
    resumed.load_state_dict(saved)
    for name, tensor in opt.state_dict().items():
        tensor.copy_(state.pop(name))
    assert not state
    train(resumed, opt, 6, 6)
    assert equal(resumed, model)


def test_gradients_of_many_micro_batches_are_summed_in_fp32():
    """256 gradients of 1 + 2^-7: summed in bf16 they would stick at a multiple of 2."""
    model = make(torch.bfloat16)
    opt = Lisa(model, n_active=0, interval=1)
    gradient = torch.tensor(1 + 2**-7, dtype=torch.bfloat16)
    for _ in range(256):
        (model.norm.bias * gradient).sum().backward()
    assert model.norm.bias.grad is None
    expected = torch.full((8,), 256 * (1 + 2**-7))
    assert torch.equal(opt.masters[model.norm.bias].grad, expected)


def test_stochastic_rounding_keeps_the_mean():
    """200 updates of 1e-4 of a bf16 step: their sum arrives on average, and rounds away else."""
    g, n, updates = torch.Generator().manual_seed(0), 40_000, 200
    x = start = torch.linspace(1.0, 1.99, n).bfloat16()
    step = 2.0**-7  # distance of bf16 numbers between 1 and 2
    assert torch.equal((start.float() + 1e-4 * step).bfloat16(), start)
    for _ in range(updates):
        x = round_stochastically(x.float() + 1e-4 * step, g)
    moved = (x.float() - start.float()) / step
    assert abs(moved.mean() - updates * 1e-4) < 3 * moved.std() / n**0.5
    x = torch.randn(1000).bfloat16()
    assert torch.equal(round_stochastically(x.float(), g), x)  # bf16 numbers stay


def held_out_fall(dtype: torch.dtype) -> float:
    """By how much 300 steps at lr 1e-6 with the ends frozen lower a held-out loss, on sequences
    that count in threes, from the same bf16 weights."""

    def sequences(seed: int, n: int) -> torch.Tensor:
        g = torch.Generator().manual_seed(seed)
        return (torch.randint(0, 250, (n, 1), generator=g) + 3 * torch.arange(16)) % 250

    def loss(model: Transformer) -> float:  # in fp64: the fall is a thousandth of the loss
        weights = ((name, p.detach()) for name, p in model.named_parameters())
        with torch.no_grad():
            return build(config, weights, torch.float64)(held_out, held_out).mean().item()

    config = ModelConfig.from_hf(FAMILIES["llama"] | {"initializer_range": 0.15})
    held_out = sequences(10_000, 64)
    start = ((name, t.bfloat16()) for name, t in random_weights(config, 0))
    model = build(config, start, dtype)
    before = loss(model)
    opt = Lisa(model, n_active=1, interval=20, ends="frozen", lr=1e-6)
    for step in range(300):
        opt.switch(step)
        x = sequences(step, 6)
        model(x, x).mean().backward()
        opt.step()
        opt.zero_grad()
    opt.finish(300)
    return before - loss(model)


def test_small_updates_reach_a_bf16_model_through_stochastic_rounding(monkeypatch):
    """At least 80% of what they do to an fp32 model; rounded to nearest, at most 20%."""
    full = held_out_fall(torch.float32)
    assert full > 1e-3
    assert held_out_fall(torch.bfloat16) > 0.8 * full
    monkeypatch.setattr(lisa, "round_stochastically", lambda x, _: x.bfloat16())
    assert held_out_fall(torch.bfloat16) < 0.2 * full


def test_bad_settings_are_named():
    for bad in {"n_active": 7}, {"n_active": 2, "ends": "some"}:
        with pytest.raises(ValueError, match="permitted are"):
            Lisa(make(), interval=1, **bad)
