"""Losses against the formulas of their papers in numpy, limits known by hand, and defects of others."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

import lightning_accel.distillation.losses as losses
from lightning_accel.distillation.losses import (
    attention_transfer,
    bce,
    crd,
    dist,
    dkd,
    fitnet,
    jsd,
    kd,
    logit_standardized_kd,
    mse,
    relations,
    rkd,
    similarity_preserving,
)
from lightning_accel.distillation.losses.full_precision import (
    average,
    blank,
    full_precision,
    unit,
    valid_positions,
)

Array = np.ndarray[Any, Any]
Loss = Callable[..., Tensor]


# --- the papers' formulas, in float64, sample by sample ---------------------------------------


def softmax(z: Array, temperature: float = 1.0) -> Array:
    e = np.exp(z / temperature - np.max(z / temperature))
    return e / e.sum()


def divergence(p: Array, q: Array) -> float:
    """KL(p || q) with 0 log 0 = 0."""
    return float(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))


def rows_of(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


def paper_kd(s: Array, t: Array, temperature: float = 4.0) -> float:
    pairs = zip(rows_of(s), rows_of(t), strict=True)
    each = [divergence(softmax(b, temperature), softmax(a, temperature)) for a, b in pairs]
    return temperature**2 * float(np.mean(each))


def paper_logit_standardized_kd(s: Array, t: Array, temperature: float = 2.0) -> float:
    def z_score(rows: Array) -> Array:
        return np.stack([(r - r.mean()) / np.std(r, ddof=1) for r in rows])

    return paper_kd(z_score(rows_of(s)), z_score(rows_of(t)), temperature)


def paper_dkd(
    s: Array,
    t: Array,
    target: Array,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> float:
    """Equations 5 to 7: b is (p_target, p_others), p-hat the softmax without the target."""
    each = []
    for a, b, k in zip(rows_of(s), rows_of(t), target.ravel(), strict=True):
        q, p = softmax(a, temperature), softmax(b, temperature)
        others = [c for c in range(len(a)) if c != k]
        tckd = divergence(np.array([p[k], p[others].sum()]), np.array([q[k], q[others].sum()]))
        nckd = divergence(softmax(b[others], temperature), softmax(a[others], temperature))
        each.append(alpha * tckd + beta * nckd)
    return temperature**2 * float(np.mean(each))


def paper_dist(
    s: Array, t: Array, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0
) -> float:
    q = np.stack([softmax(r, temperature) for r in rows_of(s)])
    p = np.stack([softmax(r, temperature) for r in rows_of(t)])
    inter = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q, p, strict=True)])
    intra = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(q.T, p.T, strict=True)])
    return temperature**2 * float(beta * inter + gamma * intra)


def paper_jsd(s: Array, t: Array, beta: float = 0.5, temperature: float = 1.0) -> float:
    each = []
    for a, b in zip(rows_of(s), rows_of(t), strict=True):
        q, p = softmax(a, temperature), softmax(b, temperature)
        m = beta * p + (1 - beta) * q
        mixed = beta * divergence(p, m) + (1 - beta) * divergence(q, m)
        each.append({0: divergence(p, q), 1: divergence(q, p)}.get(beta, mixed))  # type: ignore[call-overload]
    return float(np.mean(each))


def paper_attention_transfer(s: Array, t: Array, form: str = "code") -> float:
    def attention(sample: Array, size: tuple[int, ...]) -> Array:
        m = adaptive_mean((sample**2).sum(0), size).ravel()
        return m / math.sqrt((m**2).sum())

    size = tuple(min(pair) for pair in zip(s.shape[2:], t.shape[2:], strict=True))
    gaps = [attention(a, size) - attention(b, size) for a, b in zip(s, t, strict=True)]
    if form == "paper":
        return float(np.mean([math.sqrt((g**2).sum()) for g in gaps]))
    return float(np.mean([g**2 for g in gaps]))


def adaptive_mean(x: Array, size: tuple[int, ...]) -> Array:
    """Cell i of n takes elements floor(i m / n) up to ceil((i + 1) m / n)."""
    out = np.zeros(size)
    for cell in np.ndindex(*size):
        window = tuple(
            slice(i * m // n, -(-(i + 1) * m // n))
            for i, m, n in zip(cell, x.shape, size, strict=True)
        )
        out[cell] = x[window].mean()
    return out


def huber(x: float) -> float:
    return 0.5 * x * x if abs(x) <= 1 else abs(x) - 0.5


def paper_rkd(s: Array, t: Array, alpha: float = 25.0, beta: float = 50.0) -> float:
    s, t = (x.reshape(len(x), -1) for x in (s, t))
    pairs = [(i, j) for i in range(len(s)) for j in range(len(s))]

    def distance(x: Array) -> dict[tuple[int, int], float]:
        raw = {(i, j): float(np.linalg.norm(x[i] - x[j])) for i, j in pairs}
        mu = float(np.mean([d for d in raw.values() if d > 0]))
        return {pair: d / mu for pair, d in raw.items()}

    def angle(x: Array, i: int, j: int, k: int) -> float:
        a, b = x[i] - x[j], x[k] - x[j]
        lengths = math.sqrt((a**2).sum()) * math.sqrt((b**2).sum())
        return float((a * b).sum() / lengths) if lengths else 0.0

    ds, dt = distance(s), distance(t)
    by_distance = np.mean([huber(ds[pair] - dt[pair]) for pair in pairs])
    triples = itertools.product(range(len(s)), repeat=3)
    by_angle = np.mean([huber(angle(s, i, j, k) - angle(t, i, j, k)) for i, j, k in triples])
    return float(alpha * by_distance + beta * by_angle)


def paper_similarity_preserving(s: Array, t: Array) -> float:
    def gram(x: Array) -> Array:
        q = x.reshape(len(x), -1)
        g = np.array([[np.dot(a, b) for b in q] for a in q])
        return np.stack([row / math.sqrt((row**2).sum()) for row in g])

    return float(((gram(s) - gram(t)) ** 2).sum() / len(s) ** 2)


def paper_crd(
    s: Array,
    t: Array,
    temperature: float = 0.07,
    target: list[int] | None = None,
    bank: Array | None = None,
    bank_target: list[int] | None = None,
    num_data: int | None = None,
) -> float:
    """Equation 17 and 18: E_pairs log h + N E_negatives log(1 - h), h = e^x / (e^x + N / M)."""

    def score(a: Array, b: Array) -> float:
        return float(a @ b / math.sqrt(a @ a) / math.sqrt(b @ b) / temperature)

    def one_sample(anchor: Array, own: Array, negatives: list[Array]) -> float:
        n = len(negatives)
        if not n:
            return 0.0
        prior = n / (num_data if num_data is not None else n + 1)

        def h(other: Array) -> float:
            return 1 / (1 + prior * math.exp(-score(anchor, other)))

        expected = np.mean([math.log(1 - h(x)) for x in negatives])
        return -(math.log(h(own)) + n * float(expected))

    def label(labels: list[int] | None, i: int, default: Any) -> Any:
        return default if labels is None else labels[i]

    batch = range(len(s))
    if bank is not None:
        return float(
            np.mean(
                [
                    one_sample(
                        s[i],
                        t[i],
                        [b for j, b in enumerate(bank) if label(bank_target, j, 0) != label(target, i, 1)],
                    )
                    for i in batch
                ]
            )
        )  # fmt: skip
    negatives = {
        i: [j for j in batch if j != i and label(target, i, i) != label(target, j, j)]
        for i in batch
    }
    from_student = [one_sample(s[i], t[i], [t[j] for j in negatives[i]]) for i in batch]
    from_teacher = [one_sample(t[i], s[i], [s[j] for j in negatives[i]]) for i in batch]
    return float((np.mean(from_student) + np.mean(from_teacher)) / 2)


# --- what to try ------------------------------------------------------------------------------


def draw(*shape: int, seed: int = 0, scale: float = 2.0) -> Array:
    return np.random.default_rng(seed).normal(size=shape) * scale


def tensor(x: Array, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x)).to(dtype)


def labels(*shape: int, classes: int = 7) -> Tensor:
    return torch.from_numpy(np.random.default_rng(9).integers(0, classes, shape))


def formula_of_bce(s: Array, t: Array, temperature: float = 1.0) -> float:
    """KL of yes and no, label by label."""
    each = []
    for a, b in zip(s.ravel(), t.ravel(), strict=True):
        q, p = (1 / (1 + math.exp(-x / temperature)) for x in (a, b))
        each.append(divergence(np.array([p, 1 - p]), np.array([q, 1 - q])))
    return temperature**2 * float(np.mean(each))


def formula_of_mse(s: Array, t: Array) -> float:
    return float(np.mean((s - t) ** 2))


def dkd_7(s: Tensor, t: Tensor, **settings: Any) -> Tensor:
    return dkd(s, t, target=labels(*s.shape[:-1], classes=s.shape[-1]), **settings)


def paper_dkd_7(s: Array, t: Array, **settings: Any) -> float:
    return paper_dkd(s, t, labels(*s.shape[:-1], classes=s.shape[-1]).numpy(), **settings)


LOGITS: dict[str, tuple[Loss, Callable[..., float], list[dict[str, Any]]]] = {
    "kd": (kd, paper_kd, [{}, {"temperature": 1.5}]),
    "logit_standardized_kd": (
        logit_standardized_kd,
        paper_logit_standardized_kd,
        [{}, {"temperature": 5.0}],
    ),
    "dkd": (dkd_7, paper_dkd_7, [{}, {"alpha": 3.0, "beta": 0.5, "temperature": 2.0}]),
    "dist": (dist, paper_dist, [{}, {"beta": 2.0, "gamma": 3.0, "temperature": 4.0}]),
    "jsd": (
        jsd,
        paper_jsd,
        [{}, {"beta": 0}, {"beta": 1}, {"beta": 0.1}, {"beta": 0.9, "temperature": 3.0}],
    ),
    "bce": (bce, formula_of_bce, [{}, {"temperature": 3.0}]),
    "mse": (mse, formula_of_mse, [{}]),
}
LOGIT_CASES = [
    pytest.param(loss, paper, settings, id=f"{name}-{settings}")
    for name, (loss, paper, many) in LOGITS.items()
    for settings in many
]
LOGIT_LOSSES = [pytest.param(loss, id=name) for name, (loss, _, _) in LOGITS.items()]

FEATURES: dict[str, tuple[Loss, tuple[int, ...], tuple[int, ...]]] = {
    "fitnet": (fitnet, (4, 6), (4, 6)),
    "attention_transfer": (attention_transfer, (2, 3, 4, 5), (2, 2, 3, 6)),
    "attention_transfer_paper": (
        lambda s, t: attention_transfer(s, t, form="paper"),
        (2, 3, 5),
        (2, 2, 4),
    ),
    "rkd": (rkd, (5, 4), (5, 3)),
    "similarity_preserving": (similarity_preserving, (4, 3, 2), (4, 5)),
    "crd": (crd, (4, 6), (4, 6)),
}
EVERY = [
    *[pytest.param(loss, (5, 7), (5, 7), id=name) for name, (loss, _, _) in LOGITS.items()],
    *[pytest.param(*case, id=name) for name, case in FEATURES.items()],
]


def value_and_gradient(loss: Loss, s: Tensor, t: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    s = s.detach().clone().requires_grad_()
    value = loss(s, t, **settings)
    (gradient,) = torch.autograd.grad(value, s)
    return value.detach(), gradient


def test_every_public_loss_is_tried_here() -> None:
    tried = {name.removesuffix("_paper") for name in (*LOGITS, *FEATURES)}
    assert tried == set(losses.__all__)


# --- values -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7), (2, 2, 2, 3)])
@pytest.mark.parametrize(("loss", "paper", "settings"), LOGIT_CASES)
def test_losses_on_logits_are_the_papers_formulas(
    loss: Loss, paper: Callable[..., float], settings: dict[str, Any], shape: tuple[int, ...]
) -> None:
    s, t = draw(*shape, seed=1), draw(*shape, seed=2)
    want = paper(s, t, **settings)
    assert float(loss(tensor(s), tensor(t), **settings)) == pytest.approx(want, rel=1e-6)
    single = loss(tensor(s, torch.float32), tensor(t, torch.float32), **settings)
    assert float(single) == pytest.approx(want, rel=1e-4)
    assert single.dtype == torch.float32 and single.shape == ()


def test_fitnet_is_the_mean_over_all_elements() -> None:
    s, t = draw(3, 4, 5, seed=1), draw(3, 4, 5, seed=2)
    assert float(fitnet(tensor(s), tensor(t))) == pytest.approx(((s - t) ** 2).mean())


@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize(
    ("shape", "other"),
    [
        ((3, 4, 6, 6), (3, 4, 6, 6)),
        ((3, 4, 6, 6), (3, 8, 3, 3)),
        ((3, 4, 5, 7), (3, 2, 8, 3)),
        ((3, 4, 9), (3, 5, 4)),
        ((2, 3, 4, 4, 2), (2, 2, 3, 4, 5)),
    ],
)
def test_attention_transfer_is_the_papers_formula(
    shape: tuple[int, ...], other: tuple[int, ...], form: Any
) -> None:
    s, t = draw(*shape, seed=1), draw(*other, seed=2)
    got = attention_transfer(tensor(s), tensor(t), form=form)
    assert float(got) == pytest.approx(paper_attention_transfer(s, t, form), rel=1e-9)


@pytest.mark.parametrize("weights", [{}, {"alpha": 1.0, "beta": 0.0}, {"alpha": 0.0, "beta": 1.0}])
@pytest.mark.parametrize(("shape", "other"), [((6, 4), (6, 3)), ((5, 2, 3), (5, 7))])
def test_rkd_is_the_papers_formula(
    shape: tuple[int, ...], other: tuple[int, ...], weights: dict[str, float]
) -> None:
    s, t = draw(*shape, seed=1) ** 3, draw(*other, seed=2)
    s[2] = s[0]  # equal samples have no angle
    want = paper_rkd(s, t, **weights)
    assert float(rkd(tensor(s), tensor(t), **weights)) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize(("shape", "other"), [((6, 4), (6, 3)), ((5, 2, 3, 3), (5, 7, 2))])
def test_similarity_preserving_is_the_papers_formula(
    shape: tuple[int, ...], other: tuple[int, ...]
) -> None:
    s, t = draw(*shape, seed=1), draw(*other, seed=2)
    want = paper_similarity_preserving(s, t)
    assert float(similarity_preserving(tensor(s), tensor(t))) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("num_data", [None, 50])
@pytest.mark.parametrize("target", [None, [0, 1, 0, 2, 1], [3, 3, 3, 3, 0], [1] * 5])
@pytest.mark.parametrize("with_bank", [False, True])
def test_crd_is_the_papers_formula(
    with_bank: bool, target: list[int] | None, num_data: int | None
) -> None:
    s, t, bank = draw(5, 4, seed=1), draw(5, 4, seed=2), draw(9, 4, seed=3)
    ours: dict[str, Any] = {"temperature": 0.5, "num_data": num_data}
    theirs = dict(ours)
    if target is not None:
        ours["target"], theirs["target"] = torch.tensor(target), target
    if with_bank:
        ours["negatives"] = tensor(bank)
        theirs["bank"] = bank
        if target is not None:
            theirs["bank_target"] = [0, 1, 2, 3, 0, 1, 1, 1, 1]
            ours["negatives_target"] = torch.tensor(theirs["bank_target"])
    want = paper_crd(s, t, **theirs)
    assert float(crd(tensor(s), tensor(t), **ours)) == pytest.approx(want, rel=1e-9, abs=1e-12)


def test_kd_of_a_row_is_its_decoupled_parts_recoupled() -> None:
    """Equation 8 of the DKD paper: KD = TCKD + (1 - p_target) NCKD."""
    s, t, k = tensor(draw(1, 9, seed=1)), tensor(draw(1, 9, seed=2)), torch.tensor([4])
    rest = 1 - float((t / 4).softmax(-1)[0, 4])
    assert float(dkd(s, t, target=k, alpha=1.0, beta=rest)) == pytest.approx(float(kd(s, t)))


def test_jsd_has_the_ends_and_the_bound_of_its_paper() -> None:
    s, t = tensor(draw(5, 7, seed=1)), tensor(draw(5, 7, seed=2))
    assert float(jsd(s, t, beta=0)) == pytest.approx(float(kd(s, t, temperature=1)))
    assert float(jsd(s, t, beta=1)) == pytest.approx(float(kd(t, s, temperature=1)))
    assert float(jsd(s, t)) == pytest.approx(float(jsd(t, s)))
    apart = torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]])
    for beta in (0.1, 0.5, 0.8):
        entropy = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
        assert float(jsd(*apart, beta=beta)) == pytest.approx(entropy, rel=1e-5)


# --- gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "shape", "other"), EVERY)
def test_gradients_are_those_of_differences(
    loss: Loss, shape: tuple[int, ...], other: tuple[int, ...]
) -> None:
    s, t = tensor(draw(*shape, seed=1)).requires_grad_(), tensor(draw(*other, seed=2))
    assert torch.autograd.gradcheck(lambda x: loss(x, t), (s,))


@pytest.mark.parametrize("beta", [0, 0.3, 1])
def test_gradients_of_jsd_are_those_of_differences_for_every_beta(beta: float) -> None:
    s, t = tensor(draw(3, 4, seed=1)).requires_grad_(), tensor(draw(3, 4, seed=2))
    assert torch.autograd.gradcheck(lambda x: jsd(x, t, beta=beta, temperature=2.0), (s,))


def test_gradients_with_a_mask_and_a_memory_are_those_of_differences() -> None:
    s, t = tensor(draw(4, 5, seed=1)).requires_grad_(), tensor(draw(4, 5, seed=2))
    mask, k = torch.tensor([1, 0, 1, 1]), torch.tensor([0, 1, 2, 4])
    for loss in (kd, logit_standardized_kd, dist, jsd, fitnet):
        assert torch.autograd.gradcheck(lambda x, f=loss: f(x, t, mask=mask), (s,))
    assert torch.autograd.gradcheck(lambda x: dkd(x, t, target=k, mask=mask), (s,))
    memory = tensor(draw(3, 5, seed=3))
    both = s, t.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: crd(x, y, negatives=memory, target=None), both)
    assert torch.autograd.gradcheck(lambda x, y: crd(x, y, target=torch.tensor([0, 1, 1, 0])), both)


@pytest.mark.parametrize(("loss", "shape", "other"), EVERY)
def test_only_the_embedding_of_crd_lets_a_teacher_learn(
    loss: Loss, shape: tuple[int, ...], other: tuple[int, ...]
) -> None:
    s = tensor(draw(*shape, seed=1)).requires_grad_()
    t = tensor(draw(*other, seed=2)).requires_grad_()
    loss(s, t).backward()
    assert s.grad is not None and s.grad.abs().sum() > 0
    assert (t.grad is not None) == (loss is crd)


def test_t_squared_keeps_the_gradient_of_kd_at_the_limit_that_hinton_gives() -> None:
    """Equation 4 of the paper: for logits of mean zero, (z - v) / (N T^2), here times T^2."""
    s, t = draw(3, 6, seed=1), draw(3, 6, seed=2)
    s, t = s - s.mean(1, keepdims=True), t - t.mean(1, keepdims=True)
    for temperature in (1e3, 1e4):
        _, gradient = value_and_gradient(kd, tensor(s), tensor(t), temperature=temperature)
        np.testing.assert_allclose(gradient.numpy(), (s - t) / 6 / 3, rtol=20 / temperature)
    single = tensor(s, torch.float32), tensor(t, torch.float32)
    _, gradient = value_and_gradient(kd, *single, temperature=100.0)
    np.testing.assert_allclose(gradient.numpy(), (s - t) / 6 / 3, atol=0.02)


@pytest.mark.parametrize("loss", [kd, logit_standardized_kd, dkd_7, dist])
def test_gradients_have_one_size_at_any_high_temperature(loss: Loss) -> None:
    s, t = tensor(draw(5, 7, seed=1)), tensor(draw(5, 7, seed=2))
    power = (
        2 if loss is dist else 1
    )  # a correlation has no T in it: its gradient alone grows by T^2
    _, low = value_and_gradient(loss, s, t, temperature=1e3)
    _, high = value_and_gradient(loss, s, t, temperature=2e3)
    ratio = float(high.norm() / low.norm())
    assert ratio == pytest.approx(4.0 if power == 2 else 1.0, rel=0.01)


# --- least where both agree -------------------------------------------------------------------


AGREE = [pytest.param(*c.values, id=c.id) for c in EVERY if c.id != "crd"]


@pytest.mark.parametrize(("loss", "shape", "other"), AGREE)
def test_a_student_that_equals_its_teacher_has_nothing_to_learn(
    loss: Loss, shape: tuple[int, ...], other: tuple[int, ...]
) -> None:
    t = tensor(draw(*shape, seed=1))
    value, gradient = value_and_gradient(loss, t, t)
    assert abs(float(value)) < 1e-9 and gradient.abs().max() < 1e-6
    for seed in range(10, 15):
        assert float(loss(t + tensor(draw(*shape, seed=seed, scale=0.1)), t)) > 1e-6


def test_crd_is_lower_for_matching_than_for_swapped_pairs() -> None:
    t = torch.eye(4)
    assert crd(t, t) < crd(t.flip(0), t)
    aligned = value_and_gradient(crd, t + 0.1, t)[1]
    assert crd(t + 0.1 - 0.1 * aligned, t) < crd(t + 0.1, t)


@given(st.floats(0.1, 50), st.floats(-20, 20))
@settings(max_examples=20, deadline=None)
def test_standardized_logits_know_no_scale_and_no_shift(scale: float, shift: float) -> None:
    s, t = tensor(draw(4, 6, seed=1)), tensor(draw(4, 6, seed=2))
    want = float(logit_standardized_kd(s, t))
    assert float(logit_standardized_kd(scale * s + shift, t)) == pytest.approx(want, rel=1e-5)
    assert float(logit_standardized_kd(s, scale * t + shift)) == pytest.approx(want, rel=1e-5)


@given(st.floats(1e-3, 1e3), st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_relations_know_no_scale_no_rotation_and_rkd_no_shift(scale: float, seed: int) -> None:
    s, t = draw(5, 4, seed=1), tensor(draw(5, 3, seed=2))
    rotation = np.linalg.qr(draw(4, 4, seed=seed))[0]
    moved = tensor(scale * s @ rotation)
    same = similarity_preserving(tensor(s), t)
    assert float(similarity_preserving(moved, t)) == pytest.approx(float(same), rel=1e-9)
    assert float(rkd(moved + 3, t)) == pytest.approx(float(rkd(tensor(s), t)), rel=1e-6)


def test_relations_of_tiny_and_huge_features_are_those_of_ordinary_ones() -> None:
    s, t = draw(5, 4, seed=1), tensor(draw(5, 3, seed=2), torch.float32)
    for loss in (similarity_preserving, rkd, crd):
        t = t if loss is not crd else tensor(draw(5, 4, seed=2), torch.float32)
        want = float(loss(tensor(s, torch.float32), t))
        for scale in (1e-15, 1e15):
            got = loss(tensor(scale * s, torch.float32), t)
            assert float(got) == pytest.approx(want, rel=1e-4)


def test_attention_knows_no_scale_and_no_order_of_channels() -> None:
    s, t = tensor(draw(2, 5, 4, 4, seed=1)), tensor(draw(2, 3, 4, 4, seed=2))
    want = float(attention_transfer(s, t))
    assert float(attention_transfer(1e-6 * s.flip(1), t)) == pytest.approx(want)
    for scale in (1e-15, 1e15):  # whose squares, and theirs, float32 cannot hold
        single = attention_transfer((scale * s).float(), t.float())
        assert float(single) == pytest.approx(want, rel=1e-4)


# --- extremes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("loss", "shape", "other"), EVERY)
def test_values_and_gradients_are_finite_at_ten_thousand(
    loss: Loss, shape: tuple[int, ...], other: tuple[int, ...], dtype: torch.dtype
) -> None:
    signs, opposite = np.sign(draw(*shape, seed=1)), np.sign(draw(*other, seed=2))
    for s, t in ((signs, opposite), (signs, 1e-4 * opposite), (1e-8 * signs, opposite)):
        sides = tensor(1e4 * s, dtype), tensor(1e4 * t, dtype)
        value, gradient = value_and_gradient(loss, *sides)
        assert value.isfinite() and gradient.isfinite().all()
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert gradient.dtype == dtype


@pytest.mark.parametrize("loss", LOGIT_LOSSES)
def test_a_head_that_starts_at_zero_gets_gradients_of_ordinary_size(loss: Loss) -> None:
    for start in (torch.zeros(4, 7), torch.full((4, 7), 0.1)):
        value, gradient = value_and_gradient(loss, start, tensor(draw(4, 7), torch.float32))
        assert value.isfinite() and gradient.abs().max() < 20
        back, _ = value_and_gradient(loss, tensor(draw(4, 7), torch.float32), start)
        assert back.isfinite()


@pytest.mark.parametrize(("loss", "shape", "other"), EVERY)
def test_dead_features_get_gradients_of_ordinary_size(
    loss: Loss, shape: tuple[int, ...], other: tuple[int, ...]
) -> None:
    s = tensor(draw(*shape, seed=1), torch.float32)
    s[0] = 0
    value, gradient = value_and_gradient(loss, s, tensor(draw(*other, seed=2), torch.float32))
    assert value.isfinite() and gradient.abs().max() < 1e3
    value, gradient = value_and_gradient(loss, 0 * s, torch.zeros(other))
    assert value.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize(("loss", "shape", "other"), EVERY)
def test_a_nan_of_the_student_or_the_teacher_is_not_hidden(
    loss: Loss, shape: tuple[int, ...], other: tuple[int, ...]
) -> None:
    s, t = torch.rand(shape), torch.rand(other)
    bad_s, bad_t = s.clone(), t.clone()
    bad_s[-1].view(-1)[0] = torch.nan
    bad_t[-1].view(-1)[0] = torch.nan
    assert loss(bad_s, t).isnan() and loss(s, bad_t).isnan()


@pytest.mark.parametrize("loss", [kd, jsd, lambda s, t: jsd(s, t, beta=1), dkd_7])
def test_classes_that_both_rule_out_cost_nothing(loss: Loss) -> None:
    s, t = tensor(draw(3, 6, seed=1)), tensor(draw(3, 6, seed=2))
    s[:, 5] = t[:, 5] = -math.inf
    value, gradient = value_and_gradient(loss, s, t)
    assert value.isfinite() and gradient.isfinite().all() and not gradient[:, 5].any()
    if loss is not dkd_7:  # whose labels here depend on the number of classes
        assert float(value) == pytest.approx(float(loss(s[:, :5], t[:, :5])))


def test_a_class_that_only_the_teacher_allows_costs_infinitely_and_trains_on() -> None:
    s, t = torch.tensor([[1.0, 2.0, -math.inf]]), torch.tensor([[1.0, 2.0, 0.0]])
    value, gradient = value_and_gradient(kd, s, t)
    assert value == math.inf and gradient.isfinite().all()
    value, gradient = value_and_gradient(jsd, s, t)
    assert value.isfinite() and gradient.isfinite().all()


def test_rare_classes_count_in_full_in_dist() -> None:
    """Correlation knows no scale; a constant of 1e-8 beside the norms would call this class unrelated."""
    s, t = draw(6, 4, seed=1), draw(6, 4, seed=2)
    s[:, 3] -= 40
    t[:, 3] -= 40
    for dtype, rel in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        got = dist(tensor(s, dtype), tensor(t, dtype), beta=0.0)
        assert float(got) == pytest.approx(paper_dist(s, t, beta=0.0), rel=rel)


def test_equal_samples_give_rkd_gradients_of_ordinary_size() -> None:
    s, t = tensor(draw(6, 4, seed=1), torch.float32), tensor(draw(6, 4, seed=2), torch.float32)
    s[3] = s[1]
    value, gradient = value_and_gradient(rkd, s, t)
    assert value.isfinite() and gradient.abs().max() < 100
    many = torch.randn(40, 1001).repeat(2, 1)  # whose inner products are rounded differently
    value, gradient = value_and_gradient(rkd, many, torch.randn(80, 9))
    assert value.isfinite() and gradient.abs().max() < 1
    value, gradient = value_and_gradient(rkd, torch.ones(4, 3), t[:4])
    assert value.isfinite() and not gradient.any()


@pytest.mark.parametrize("most", [1, 72, 150])
def test_anchors_in_parts_give_what_they_give_at_once(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    s, t = tensor(draw(6, 4, seed=1)), tensor(draw(6, 3, seed=2))
    value, gradient = value_and_gradient(rkd, s, t)
    monkeypatch.setattr(relations, "_MOST_ELEMENTS", most)
    in_parts = value_and_gradient(rkd, s, t)
    torch.testing.assert_close(in_parts, (value, gradient), rtol=1e-12, atol=1e-12)


def test_samples_far_from_the_origin_keep_their_distances_and_angles() -> None:
    """From inner products in float32 of rows as they are, nothing would be left of the differences."""
    s, t = draw(6, 4, seed=1), draw(6, 3, seed=2)
    got = rkd(tensor(s + 4096, torch.float32), tensor(t - 4096, torch.float32))
    assert float(got) == pytest.approx(paper_rkd(s, t), rel=1e-2)
    far = rkd(tensor(s + 1e7), tensor(t - 1e7))
    assert float(far) == pytest.approx(paper_rkd(s, t), rel=1e-6)


@pytest.mark.parametrize("loss", [rkd, similarity_preserving, crd])
def test_a_last_batch_of_one_sample_has_no_relations(loss: Loss) -> None:
    value, gradient = value_and_gradient(loss, torch.rand(1, 4), torch.rand(1, 4))
    assert float(value) == pytest.approx(0, abs=1e-7) and gradient.abs().max() < 1e-6


# --- masks ------------------------------------------------------------------------------------


MASKED = [*LOGIT_LOSSES, pytest.param(fitnet, id="fitnet")]


def masked_dkd(s: Tensor, t: Tensor, mask: Tensor | None) -> Tensor:
    return dkd(s, t, target=labels(3, 4), mask=mask)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize("loss", MASKED)
def test_a_mask_is_the_same_as_dropping_positions(loss: Loss, dtype: torch.dtype) -> None:
    s, t = tensor(draw(3, 4, 7, seed=1)), tensor(draw(3, 4, 7, seed=2))
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 1]]).to(dtype)
    keep = mask.bool()
    if loss is dkd_7:
        want = dkd(s[keep], t[keep], target=labels(3, 4)[keep])
    else:
        want = loss(s[keep], t[keep])
    value, gradient = value_and_gradient(loss, s, t, mask=mask)
    assert float(value) == pytest.approx(float(want), rel=1e-12)
    assert not gradient[~keep].any() and gradient[keep].all()


@pytest.mark.parametrize("loss", MASKED)
def test_nothing_at_masked_positions_is_read(loss: Loss) -> None:
    s, t = tensor(draw(3, 4, 7, seed=1)), tensor(draw(3, 4, 7, seed=2))
    mask = torch.rand(3, 4) > 0.5
    clean = value_and_gradient(loss, s, t, mask=mask)
    s[~mask], t[~mask] = torch.nan, -math.inf
    torch.testing.assert_close(value_and_gradient(loss, s, t, mask=mask), clean)


@pytest.mark.parametrize("loss", MASKED)
def test_nothing_valid_gives_zero_and_no_gradient(loss: Loss) -> None:
    s, t = torch.rand(3, 4, 7), torch.rand(3, 4, 7)
    value, gradient = value_and_gradient(loss, s, t, mask=torch.zeros(3, 4, dtype=torch.bool))
    assert value == 0 and not gradient.any()


def test_dist_of_one_valid_row_is_its_correlation_between_classes_alone() -> None:
    s, t = draw(3, 5, seed=1), draw(3, 5, seed=2)
    got = dist(tensor(s), tensor(t), mask=torch.tensor([0, 1, 0]))
    want = 1 - np.corrcoef(softmax(s[1]), softmax(t[1]))[0, 1]
    assert float(got) == pytest.approx(want)


def test_labels_at_masked_positions_may_be_anything() -> None:
    s, t = tensor(draw(3, 5, seed=1)), tensor(draw(3, 5, seed=2))
    target, mask = torch.tensor([2, -100, 4]), torch.tensor([True, False, True])
    want = dkd(s[mask], t[mask], target=target[mask])
    torch.testing.assert_close(dkd(s, t, target=target, mask=mask), want)


@pytest.mark.parametrize("loss", [kd, logit_standardized_kd, dkd_7, jsd, fitnet])
def test_an_empty_batch_gives_zero(loss: Loss) -> None:
    value, gradient = value_and_gradient(loss, torch.rand(0, 7), torch.rand(0, 7))
    assert value == 0 and gradient.shape == (0, 7)


# --- the island -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("loss", "shape", "other"), EVERY)
def test_under_autocast_a_loss_is_the_float32_loss_of_the_same_values(
    loss: Loss, shape: tuple[int, ...], other: tuple[int, ...], dtype: torch.dtype
) -> None:
    s, t = tensor(draw(*shape, seed=1), dtype), tensor(draw(*other, seed=2), dtype)
    want, gradient = value_and_gradient(loss, s.float(), t.float())
    with torch.autocast("cpu", dtype=dtype):  # backward inside of it, as manual_backward does
        got, narrow = value_and_gradient(loss, s, t)
        wide, _ = value_and_gradient(loss, s.float(), t.float())
    assert got.dtype == torch.float32
    assert torch.equal(got, want) and torch.equal(wide, want)
    assert torch.equal(narrow, gradient.to(dtype))


def test_the_island_is_out_of_autocast() -> None:
    @full_precision()
    def products(student: Tensor, teacher: Tensor, /) -> Tensor:
        return student @ teacher.T

    s, t = torch.rand(3, 4), torch.rand(3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (s @ t.T).dtype == torch.bfloat16
        inside = products(s, t)
    assert inside.dtype == torch.float32 and torch.equal(inside, s @ t.T)


def test_a_memory_in_half_precision_is_read_in_32_bits() -> None:
    s, t, memory = torch.rand(3, 4), torch.rand(3, 4), torch.rand(5, 4).bfloat16()
    want = crd(s, t, negatives=memory.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(crd(s, t, negatives=memory), want)


def test_half_precision_students_meet_wider_teachers() -> None:
    s, t = torch.rand(3, 4), torch.rand(3, 4)
    assert kd(s.half(), t).dtype == torch.float32
    assert kd(s.half(), t.double()).dtype == torch.float64


def test_average_blank_and_unit_do_what_they_say() -> None:
    valid = valid_positions(torch.rand(3, 2), torch.tensor([1, 0, 2]))
    assert valid is not None and valid.tolist() == [True, False, True]
    assert average(torch.tensor([1.0, torch.nan, 5.0]), valid) == 3
    assert blank(torch.full((3, 1), 2.0), valid).ravel().tolist() == [2, 0, 2]
    v = torch.zeros(1, 3, requires_grad=True)
    (unit(v) * 7).sum().backward()
    assert v.grad is not None and not v.grad.any()


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "shape", "other"), EVERY)
@pytest.mark.usefixtures("clean_dynamo")
def test_a_loss_is_one_graph_for_the_compiler(
    loss: Loss, shape: tuple[int, ...], other: tuple[int, ...]
) -> None:
    s, t = tensor(draw(*shape, seed=1)), tensor(draw(*other, seed=2))
    if loss is dkd_7:
        target = labels(*shape[:-1])
        loss = lambda s, t: dkd(s, t, target=target)  # noqa: E731
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(value_and_gradient(compiled, s, t), value_and_gradient(loss, s, t))


# --- defects of others ------------------------------------------------------------------------


def test_the_log_of_a_softmax_is_infinite_where_kd_is_finite() -> None:
    s, t = torch.tensor([[200.0, 0.0, -200.0]]), torch.tensor([[-200.0, 0.0, 200.0]])
    naive = (t.softmax(-1) * (t.softmax(-1).log() - s.softmax(-1).log())).sum()
    assert not naive.isfinite()
    value, gradient = value_and_gradient(kd, s, t, temperature=1.0)
    assert float(value) == pytest.approx(400) and gradient.isfinite().all()


def test_the_sum_of_softmaxes_is_infinite_where_dkd_is_finite() -> None:
    """mdistiller sums probabilities and takes the logarithm after; at logits of 500 over T = 4."""
    s, t = torch.tensor([[500.0, 0.0, -9.0]]), torch.tensor([[0.0, 500.0, 3.0]])
    q = (s / 4).softmax(-1)
    assert (q[0, 1:].sum()).log() == -math.inf
    value, gradient = value_and_gradient(dkd, s, t, target=torch.tensor([0]), beta=0.0)
    assert (
        float(value) == pytest.approx(16 * (125 - math.log1p(math.exp(-9 / 4))))
        and gradient.isfinite().all()
    )


def test_a_large_negative_mask_is_no_mask_for_large_logits() -> None:
    """mdistiller subtracts 1000 from the target, which leaves it the largest at logits of 1e4."""
    s = torch.tensor([[1e4, 2.0, 3.0]])
    t = torch.tensor([[1e4, 3.0, 2.0]])
    k = torch.tensor([0])
    minus = torch.tensor([[1000.0, 0.0, 0.0]])
    theirs = F.kl_div((s - minus).log_softmax(-1), (t - minus).softmax(-1), reduction="sum")
    got = float(dkd(s, t, target=k, alpha=0.0, beta=1.0, temperature=1.0))
    assert theirs == 0
    assert got == pytest.approx(paper_kd(draw(1, 2) * 0 + [2, 3], draw(1, 2) * 0 + [3, 2], 1.0))


def test_a_target_is_left_out_even_where_the_others_lie_far_below_any_constant() -> None:
    s, t = torch.tensor([[0.0, -9e4, -9e4 - 4]]), torch.tensor([[0.0, -9e4 - 4, -9e4]])
    got = float(dkd(s, t, target=torch.tensor([0]), alpha=0.0, beta=1.0))
    assert got == pytest.approx(paper_kd(np.array([[4.0, 0.0]]), np.array([[0.0, 4.0]])), rel=1e-4)


def test_reverse_kl_keeps_its_gradient_at_low_temperatures() -> None:
    """A KL of the student's softmax has a finite value and gradients that are NaN."""
    s, t = torch.tensor([[9.0, 0.0, -9.0]]), torch.tensor([[0.0, 1.0, 2.0]])
    x = s.clone().requires_grad_()
    q = (x / 0.05).softmax(-1)
    (q * (q.log() - (t / 0.05).log_softmax(-1))).sum().backward()
    assert x.grad is not None and x.grad.isnan().any()
    value, gradient = value_and_gradient(jsd, s, t, beta=1, temperature=0.05)
    assert float(value) == pytest.approx(40, rel=1e-5) and gradient.isfinite().all()


def test_gradients_of_half_precision_logits_do_not_round_to_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    s, t = (10 * torch.randn(32, 1000, generator=generator) for _ in range(2))
    x = s.half().requires_grad_()
    naive = F.kl_div(x.log_softmax(-1), t.half().softmax(-1), reduction="batchmean")
    naive.backward()
    assert x.grad is not None and (x.grad == 0).float().mean() > 0.9
    wide = s.half().float()  # the cast back to half is the user's: the loss works on these
    _, gradient = value_and_gradient(kd, wide, t.half(), temperature=1.0)
    assert (gradient == 0).float().mean() < 0.01


def test_kd_does_not_shrink_with_the_number_of_classes() -> None:
    """Averaged over classes as well, as somewhere by default, it would be C times weaker."""
    few, many = (
        float(kd(torch.eye(1, c) * 100, torch.eye(1, c).flip(-1) * 100, temperature=1.0))
        for c in (10, 1000)
    )
    assert few == pytest.approx(100) and many == pytest.approx(100)


def test_the_guard_of_standardized_logits_survives_half_precision() -> None:
    assert torch.tensor(1e-8).half() == 0
    constant = torch.full((2, 5), 3.0, dtype=torch.float16)
    value, gradient = value_and_gradient(logit_standardized_kd, constant, torch.randn(2, 5).half())
    assert value.isfinite() and gradient.isfinite().all()


# --- errors -----------------------------------------------------------------------------------


X = torch.rand(4, 5)


@pytest.mark.parametrize("loss", [kd, logit_standardized_kd, dkd_7, dist, jsd, crd])
@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_is_above_zero_and_finite(loss: Loss, temperature: float) -> None:
    with pytest.raises(ValueError, match=r"`temperature` is a .*Found: .*Do: "):
        loss(X, X, temperature=temperature)


@pytest.mark.parametrize("loss", [kd, logit_standardized_kd, dkd_7, dist, jsd, fitnet, crd])
def test_different_shapes_are_named(loss: Loss) -> None:
    with pytest.raises(ValueError, match=r"one shape. Found: \(4, 5\) and \(4, 6\). Do: "):
        loss(X, torch.rand(4, 6))


@pytest.mark.parametrize("loss", MASKED)
def test_a_mask_of_another_shape_is_named(loss: Loss) -> None:
    with pytest.raises(ValueError, match=r"Found: \(4, 5\) for \(4, 5\). Do: .*\(4,\)"):
        loss(X, X, mask=torch.ones(4, 5))


ERRORS: list[tuple[Callable[[], Tensor], type[Exception], str]] = [
    (lambda: kd(X[0], X[0]), ValueError, r"Found: \(5\,\). Do: add a batch"),
    (lambda: kd(X.long(), X), TypeError, "student's side.*Found: torch.int64"),
    (lambda: kd(X, [1.0]), TypeError, "teacher's side.*Found: list"),  # type: ignore[arg-type]
    (lambda: kd(X, X.to("meta")), ValueError, "Found: cpu and meta. Do: move the teacher"),
    (lambda: logit_standardized_kd(X[:, :1], X[:, :1]), ValueError, "Found: 1 classes. Do: "),
    (lambda: dkd(X[:, :2], X[:, :2], target=labels(4, classes=2)), ValueError, "Found: 2 classes"),
    (lambda: dkd(X, X, target=torch.tensor([0, 1, 5, 2])), ValueError, r"\[0, 5\).*Found: 5 in"),
    (lambda: dkd(X, X, target=torch.tensor([0, -100, 1, 2])), ValueError, "Found: -100 .*Do: mask"),
    (lambda: dkd(X, X, target=X.softmax(-1)), TypeError, "Found: torch.float32. Do: pass labels"),
    (lambda: dkd(X, X, target=torch.tensor([1])), ValueError, r"Found: \(1,\) for logits \(4, 5\)"),
    (lambda: dist(X[:1], X[:1]), ValueError, r"needs two. Found: 1 in \(1, 5\). Do: drop the last"),
    (lambda: jsd(X, X, beta=1.5), ValueError, "`beta` is a number.*Found: 1.5. Do: "),
    (lambda: jsd(X, X, beta=math.nan), ValueError, "`beta` is a number"),
    (lambda: attention_transfer(X, X), ValueError, r"Found: \(4, 5\) and \(4, 5\). Do: "),
    (lambda: attention_transfer(torch.rand(2, 3, 4), torch.rand(3, 3, 4)), ValueError, "one batch"),
    (
        lambda: attention_transfer(torch.rand(2, 3, 4), torch.rand(2, 3, 4, 4)),
        ValueError,
        "same kind",
    ),
    (
        lambda: attention_transfer(X[None], X[None], form="sum"),  # type: ignore[arg-type]
        ValueError,
        "Found: 'sum'",
    ),
    (lambda: rkd(X, X[:3]), ValueError, r"one batch. Found: \(4, 5\) and \(3, 5\)"),
    (lambda: similarity_preserving(X[0], X[0]), ValueError, r"Found: \(5,\) and \(5,\)"),
    (lambda: crd(X[None], X[None]), ValueError, r"embeddings \(B, D\). Found: \(1, 4, 5\)"),
    (lambda: crd(X, X, negatives=torch.rand(3, 4)), ValueError, r"Found: \(3, 4\) for \(4, 5\)"),
    (lambda: crd(X, X, target=labels(3)), ValueError, r"`target` has.*Found: \(3,\) for \(4, 5\)"),
    (lambda: crd(X, X, negatives_target=labels(3)), ValueError, "`negatives_target` has.*None"),
    (
        lambda: crd(X, X, target=labels(4), negatives=X),
        ValueError,
        "no `negatives_target`. Do: pass",
    ),
    (lambda: crd(X, X, negatives=X, negatives_target=labels(4)), ValueError, "no `target`. Do: "),
    (lambda: crd(X, X, num_data=0), ValueError, "Found: 0. Do: "),
]


@pytest.mark.parametrize(("call", "kind", "text"), ERRORS, ids=[text for _, _, text in ERRORS])
def test_errors_say_what_was_found_and_what_to_do(
    call: Callable[[], Tensor], kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind, match=text):
        call()
