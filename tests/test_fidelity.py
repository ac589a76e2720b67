"""Problems whose right weights are known, through the same PenaltyStep that trains transformers."""

import contextlib
import io
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import fidelity
from bilevel import PenaltyStep, SourceWeights
from sources import tasks

F64 = torch.float64


class Vector(nn.Module):
    def __init__(self, n: int):
        super().__init__()
        self.x = nn.Parameter(torch.zeros(n, dtype=F64))


class Newton:
    """An optimiser that lands on the minimum of a quadratic of the given Hessian in one step."""

    def __init__(self, model, hessian):
        self.param_groups = [{"params": [model.x]}]
        self.x, self.hessian = model.x, hessian

    @torch.no_grad()
    def step(self):
        self.x -= torch.linalg.solve(self.hessian, self.x.grad)

    def zero_grad(self):
        self.x.grad = None


# Closed form: g_λ against the implicit function theorem, on quadratics

ALPHAS = np.geomspace(1e2, 1e4, 5)


def quadratics(seed: int):
    """ℓ_i(x) = ½ (x − c_i)ᵀ A_i (x − c_i), the last one L1; A_i has eigenvalues in [1, 10].

    Those of L1 are in [0.1, 1]: the law neglects what is of their order against α times L2's.
    """
    g = torch.Generator().manual_seed(seed)
    n, dim = 3 + seed % 4, 4 + seed % 5
    basis, _ = torch.linalg.qr(torch.randn(n + 1, dim, dim, generator=g, dtype=F64))
    spectrum = 1 + 9 * torch.rand(n + 1, dim, generator=g, dtype=F64)
    spectrum[-1] /= 10
    hessians = basis * spectrum[:, None] @ basis.mT  # (S + 1, D, D)
    centres = torch.randn(n + 1, dim, generator=g, dtype=F64)
    return hessians, centres, torch.randn(n, generator=g, dtype=F64)


def hypergradient(hessians, centres, lam):
    """dL1(w*(λ))/dλ = −Jᵀ [∇ℓ_i(w*)ᵀ H⁻¹ ∇L1(w*)]_i, H = Σ_i p_i A_i."""
    p = lam.softmax(0)
    H = (p[:, None, None] * hessians[:-1]).sum(0)
    target = (p[:, None, None] * hessians[:-1] @ centres[:-1, :, None]).sum(0)[:, 0]
    best = torch.linalg.solve(H, target)
    slopes = torch.einsum("sij,sj->si", hessians, best - centres)  # (S + 1, D)
    by_p = -slopes[:-1] @ torch.linalg.solve(H, slopes[-1])
    return p * (by_p - p @ by_p), H


@pytest.mark.parametrize("seed", range(20))
def test_gradient_of_lambda_matches_implicit_function_theorem(seed):
    hessians, centres, lam = quadratics(seed)
    exact, H = hypergradient(hessians, centres, lam)

    def losses(model, batch):
        away = model.x - centres[batch.group]  # (b, D)
        return 0.5 * torch.einsum("bi,bij,bj->b", away, hessians[batch.group], away)

    n, dim = len(lam), hessians.shape[-1]
    train = [SimpleNamespace(group=torch.arange(n))]
    val = [SimpleNamespace(group=torch.tensor([n]))]
    errors = []
    for alpha in ALPHAS:
        w, u, sources = Vector(dim), Vector(dim), SourceWeights(n, F64, lr=0.0)
        sources.lam.data.copy_(lam)
        opts = Newton(w, H + hessians[-1] / alpha), Newton(u, H)
        step = PenaltyStep(w, u, *opts, sources, alpha, losses)
        for _ in range(3):  # the gradient of a step is taken where the one before it has landed
            step.step(train, val, torch.ones(n + 1))
        errors.append(((sources.lam.grad - exact).norm() / exact.norm()).item())
    slope = np.polyfit(np.log(ALPHAS), np.log(errors), 1)[0]
    assert slope == pytest.approx(-1, abs=0.03)
    assert errors[-1] <= 1e-3


# Exact optimum: ridge regressions, against a search over the simplex

RIDGE = 0.05


def regressions(seed: int):
    """3 to 6 sources of different noise and shift, and a validation set: [(X, y)], float64."""
    rng = np.random.default_rng(seed)
    n, dim = rng.integers(3, 7), rng.integers(4, 9)
    truth = rng.normal(size=dim)
    sets = []
    for _ in range(n):
        X = rng.normal(size=(rng.integers(20, 60), dim)) * rng.uniform(0.7, 1.3, dim)
        shifted = truth + rng.uniform(0, 1) * rng.normal(size=dim)
        sets.append((X, X @ shifted + rng.uniform(0, 2) * rng.normal(size=len(X))))
    X = rng.normal(size=(200, dim))
    return [*sets, (X, X @ truth + 0.1 * rng.normal(size=len(X)))]


def upper_loss(sets):
    """p -> L1(w*(p)) of regressions, in closed form."""
    grams = np.stack([X.T @ X / len(X) for X, _ in sets[:-1]])
    moments = np.stack([X.T @ y / len(X) for X, y in sets[:-1]])
    X, y = sets[-1]

    def L1(p):
        H = np.tensordot(p, grams, 1) + RIDGE * np.eye(X.shape[1])
        return np.square(X @ np.linalg.solve(H, p @ moments) - y).mean()

    return L1


def searched(L1, n):
    """The weights of least L1: SLSQP on the simplex, from each corner and the middle."""
    from scipy.optimize import minimize

    rule = {"type": "eq", "fun": lambda p: p.sum() - 1}
    options = {"bounds": [(0, 1)] * n, "constraints": rule, "options": {"ftol": 1e-12}}
    starts = [np.full(n, 1 / n), *(0.8 * np.eye(n) + 0.2 / n)]
    return min((minimize(L1, p, **options) for p in starts), key=lambda found: found.fun).x


# (alpha, learning rate of λ, steps). λ waits until w and u have come from 0 to where they belong:
# gaps of the way there would send it astray. Its Adam is reset as α grows, as in train.py.
ROUNDS = ((1e3, 0.0, 100), (1e3, 0.1, 300), (1e4, 0.1, 300), (1e4, 0.03, 300), (1e5, 0.01, 300))


class SideBySide(SourceWeights):
    """The sources of several problems: the weights of each problem sum to 1."""

    def __init__(self, sizes: list[int]):
        super().__init__(sum(sizes), F64)
        self.sizes = sizes

    def probs(self):
        return torch.cat([lam.softmax(0) for lam in self.lam.split(self.sizes)])


def learned(problems):
    """p of each problem after the bilevel loop, full batches. They share the loop and nothing else:
    each has a row of x of its own."""
    sources = SideBySide([len(sets) - 1 for sets in problems])
    n, dim = len(sources.lam), max(sets[0][0].shape[1] for sets in problems)
    sets = [(k, *pair) for k, sets in enumerate(problems) for pair in sets[:-1]]
    sets += [(k, *sets[-1]) for k, sets in enumerate(problems)]  # validation: group n of them all
    counts = torch.tensor([len(y) for *_, y in sets])
    group = torch.arange(len(sets)).clamp(max=n).repeat_interleave(counts)
    problem = torch.tensor([k for k, *_ in sets]).repeat_interleave(counts)
    X = np.concatenate([np.pad(X, [(0, 0), (0, dim - X.shape[1])]) for _, X, _ in sets])
    X, y = torch.from_numpy(X), torch.from_numpy(np.concatenate([y for *_, y in sets]))

    def losses(model, batch):
        """L1 is the mean over the validation samples of all problems, of which each has as many."""
        x = model.x.view(-1, dim)
        squares = ((batch.X * x[batch.problem]).sum(1) - batch.y).square()
        ridge = RIDGE * x.square().sum(1)[batch.problem]  # in L2 alone
        return torch.where(batch.group < n, squares + ridge, len(problems) * squares)

    train, val = ([SimpleNamespace(X=X[at], y=y[at], group=group[at], problem=problem[at])]
                  for at in (group < n, group == n))  # fmt: skip
    w, u = (Vector(len(problems) * dim) for _ in "wu")
    opts = [torch.optim.SGD([m.x], 0.2) for m in (w, u)]
    counts = torch.cat([counts[:n], counts[n:].sum(0, keepdim=True)])
    step = PenaltyStep(w, u, *opts, sources, 1.0, losses)
    for step.alpha, step.sources.lr, steps in ROUNDS:
        step.sources.reset_optimizer()
        for _ in range(steps):
            step.step(train, val, counts)
    return [p.numpy() for p in sources.probs().detach().split(sources.sizes)]


def test_weights_match_the_optimum_found_by_search():
    problems = [regressions(seed) for seed in range(20)]
    for sets, p in zip(problems, learned(problems), strict=True):
        L1 = upper_loss(sets)
        best = searched(L1, len(sets) - 1)
        assert L1(p) <= 1.01 * L1(best)
        far = np.abs(p - best).max()
        if far > 0.02:  # permitted where L1 is flat: less than 0.1% over 0.02 of the way there
            assert L1(best + 0.02 / far * (p - best)) < 1.001 * L1(best)


# The experiments of fidelity.py, small

def test_weights_of_samples_find_the_wrong_labels():
    pytest.importorskip("sklearn")
    result = fidelity.digits(0)
    accuracy, learned, best = (result[key] for key in ("all samples", "learned weights",
                                                       "clean half alone"))  # fmt: skip
    assert result["area under the ROC curve"] > 0.9 and accuracy + 0.02 < learned < best


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """The directory of a cell of each task, and of short ones: one of each setting that is no flag
    of train.py, and two that fail, of which is told while the others go on."""
    out = tmp_path_factory.mktemp("fidelity")
    names = "graded", "instruction", "multilingual"
    graded, *others = (fidelity.learn(task, fidelity.COUPLED) for task in names)
    others = [replace(cell, flags=f"{cell.flags} --steps 60") for cell in others]  # enough
    short = [fidelity.learn("graded", setting) for setting in fidelity.REPLACED]
    short = [replace(cell, flags=f"{cell.flags} --steps 2") for cell in short]
    wrong = [replace(graded, task="a", flags="--steps nonsense"), replace(graded, task="b", flags=(
        f"{short[0].flags} --train x={out}/none --val y"))]  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert not fidelity.run([*wrong, graded, *others, *short], out, workers=1)
    failed = ["failed: see" in line for line in said.getvalue().splitlines()]
    assert failed == [True] * 2 + [False] * 6, said.getvalue()
    return out


def test_sources_that_help_have_the_weight(cells):
    """Of less noise; with good answers; in the languages of validation."""
    graded, good, languages = (fidelity.read(cells, task, fidelity.COUPLED)[0]
                               for task in ("graded", "instruction", "multilingual"))  # fmt: skip
    found = fidelity.of_run("graded", graded)
    assert found["Spearman, weight and noise"] < -0.8 and found["clean ranks first"]
    assert good["weights"]["good"] > 0.9
    assert languages["weights"]["aru"] + languages["weights"]["eli"] > 0.9


def test_tables_are_made_of_what_is_there(cells, capsys):
    fidelity.write_tables(cells, fidelity.tables(cells), "")
    assert capsys.readouterr().out.rstrip() == (cells / "tables.md").read_text().rstrip()
    tables = json.loads((cells / "tables.json").read_text())
    assert [row[0] for row in tables[f"graded: sources ({fidelity.COUPLED})"][1:]] == [*tasks.NOISE]
    settings = [row[:2] for row in tables["graded: settings"]]
    ran = fidelity.COUPLED, *fidelity.REPLACED
    assert settings == [["setting", "seeds"], *([setting, 1] for setting in ran)]


def test_learned_mixture_stands_beside_the_best_of_the_grid(tmp_path):
    """Seed 2 has no run on one of the grid's points."""
    grid = {f"best {share}": [1, 2, 3] for share in fidelity.SHARES} | {"best 0.7": [0.5, 1]}
    losses = {"learned": [0.5, 1.5, 9], "learned, again": [0.5, 1.5, 9], "uniform": [1, 1, 9]}
    for name, values in (losses | grid).items():
        for seed, loss in enumerate(values):
            folder = fidelity.Cell("graded", f"mixture {name}", seed).folder(tmp_path)
            (folder / "model").mkdir(parents=True)
            (folder / "metrics.jsonl").write_text(f'{{}}\n{{"test_loss": {loss}}}\n')
    rows = list(fidelity.mixture_rows("graded", tmp_path))
    assert [row["its share"] for row in rows] == [0.7, 0.7]
    assert [row["learned / best"] for row in rows] == [1, 1.5]
    assert [row["at most 1.05"] for row in rows] == [row["below uniform's"] for row in rows]
    header, line = fidelity.tables(tmp_path)["fine-tuning on a mixture"]
    assert dict(zip(header, line, strict=True))["at most 1.05"] == "1 of 2"


def test_spearman_shares_ranks():
    down = dict(zip(tasks.NOISE, [0.3, 0.2, 0.15, 0.1, 0.09, *[0.032] * 5], strict=True))
    assert fidelity.spearman(down, tasks.NOISE) == pytest.approx(-1)
    up = {name: -p for name, p in down.items()}
    assert fidelity.spearman(up, tasks.NOISE) == pytest.approx(1)
