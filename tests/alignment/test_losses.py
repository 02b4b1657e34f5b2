"""The losses against hand-computed values, numpy formulas and their own invariances."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparring.alignment.losses import LINKS, dpo_loss, ipo_loss, spin_loss, sppo_loss

Loss = Callable[[Tensor, Tensor], Tensor]

LOSSES: dict[str, Loss] = {
    **{
        f"spin-{link}": lambda a, b, link=link: spin_loss(a, b, lam=0.1, link=link)
        for link in LINKS
    },
    "sppo": lambda a, b: sppo_loss(a, b, eta=1000.0),
    "dpo": lambda a, b: dpo_loss(a, b, beta=0.1),
    "ipo": lambda a, b: ipo_loss(a, b, beta=0.1),
}

ORACLES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "spin-logistic": lambda a, b: np.logaddexp(0, -0.1 * (a - b)),
    "spin-hinge": lambda a, b: np.maximum(0, 1 - 0.1 * (a - b)),
    "spin-exponential": lambda a, b: np.exp(0.1 * (b - a)),
    "spin-correlation": lambda a, b: 1 + 0.1 * (b - a),
    "sppo": lambda a, b: a**2 - 2e3 * a * (b - 0.5) + 1e6 * (b - 0.5) ** 2,
    "dpo": lambda a, b: np.logaddexp(0, 0.1 * (b - a)),
    "ipo": lambda a, b: (a - b) ** 2 - 10 * (a - b) + 25,
}


def double(*values: float, requires_grad: bool = False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=requires_grad)


rows = st.lists(st.tuples(st.floats(-50, 50), st.floats(-50, 50)), min_size=1, max_size=9).map(
    lambda pairs: np.array(pairs, dtype=np.float64)
)


@pytest.mark.parametrize("loss", [spin_loss, lambda r, g, lam: dpo_loss(r, g, beta=lam)])
def test_equal_log_probabilities_give_log_two(loss: Callable[..., Tensor]) -> None:
    real = double(0.0, requires_grad=True)
    value = loss(real, double(0.0), lam=0.1)
    value.sum().backward()
    assert value.item() == pytest.approx(0.693147, abs=1e-6)
    assert real.grad is not None
    assert real.grad.item() == pytest.approx(-0.1 / 2)


def test_values_worked_by_hand() -> None:
    policy_real = double(-10.0, requires_grad=True)
    real, generated = policy_real - double(-11.0), double(-12.0) - double(-11.5)
    assert (real - generated).item() == 1.5
    loss = spin_loss(real, generated, lam=0.1)
    loss.sum().backward()
    assert loss.item() == pytest.approx(0.620957, abs=1e-6)
    assert policy_real.grad is not None
    assert policy_real.grad.item() == pytest.approx(-0.046257, abs=1e-6)
    assert dpo_loss(real, generated, beta=0.1).item() == loss.item()
    assert spin_loss(real, generated, lam=0.1, link="hinge").item() == pytest.approx(0.85)
    assert spin_loss(real, generated, lam=0.1, link="correlation").item() == pytest.approx(0.85)
    exponential = spin_loss(real, generated, lam=0.1, link="exponential").item()
    assert exponential == pytest.approx(math.exp(-0.15))
    assert ipo_loss(real, generated, beta=0.1).item() == pytest.approx(12.25)


def test_sppo_values_of_the_authors_code() -> None:
    logratio = double(2.0, -3.0, requires_grad=True)
    terms = sppo_loss(logratio, double(0.8, 0.2), eta=1000.0)
    terms.mean().backward()
    assert terms.tolist() == pytest.approx([88804.0, 88209.0])
    assert terms.mean().item() == pytest.approx(88506.5)
    assert terms.mean().item() * 1e-6 == pytest.approx(0.0885065)
    assert logratio.grad is not None
    assert logratio.grad[0].item() == pytest.approx(-298.0)
    single = sppo_loss(logratio, double(0.9, 0.1), eta=1000.0)
    assert single.mean().item() == pytest.approx(158006.5)


def test_sppo_with_certain_wins_is_half_of_trl_sppo_hard() -> None:
    chosen, rejected, beta = 2.0, -3.0, 1e-3
    hard = (chosen - 0.5 / beta) ** 2, (rejected + 0.5 / beta) ** 2
    ours = sppo_loss(double(chosen, rejected), double(1.0, 0.0), eta=1 / beta)
    assert hard == pytest.approx((248004.0, 247009.0))
    assert 2 * ours.mean().item() == pytest.approx(495013.0)
    assert 2 * ours.mean().item() == pytest.approx(sum(hard))


def test_sppo_rests_where_nothing_wins() -> None:
    logratio = double(0.0, 0.0, requires_grad=True)
    loss = sppo_loss(logratio, double(0.5, 0.5), eta=1000.0)
    loss.sum().backward()
    assert loss.tolist() == [0.0, 0.0]
    assert logratio.grad is not None
    assert logratio.grad.tolist() == [0.0, 0.0]


def test_first_sppo_loss_is_known_from_the_data() -> None:
    wins = double(0.9, 0.1, 0.62, 0.5)
    first = sppo_loss(torch.zeros_like(wins), wins, eta=1000.0).mean().item()
    assert first == pytest.approx(np.mean((1000 * (wins.numpy() - 0.5)) ** 2))


@pytest.mark.parametrize("name", LOSSES)
@settings(deadline=None, max_examples=40)
@given(pairs=rows)
def test_matches_numpy(name: str, pairs: np.ndarray) -> None:
    loss = LOSSES[name](*torch.from_numpy(pairs).unbind(1))
    np.testing.assert_allclose(loss, ORACLES[name](*pairs.T), rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
@settings(deadline=None, max_examples=25)
@given(pairs=rows, cut=st.integers(0, 9))
def test_splitting_the_batch_changes_no_row(name: str, pairs: np.ndarray, cut: int) -> None:
    whole = LOSSES[name](*torch.from_numpy(pairs).unbind(1))
    parts = [LOSSES[name](*torch.from_numpy(p).unbind(1)) for p in (pairs[:cut], pairs[cut:])]
    assert whole.shape == (len(pairs),)
    # Vectorised kernels may round a row differently at another place in the batch.
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_match_finite_differences(name: str) -> None:
    a, b = double(1.3, -2.0, 8.0, requires_grad=True), double(0.4, 0.9, -1.0, requires_grad=True)
    assert torch.autograd.gradcheck(LOSSES[name], (a, b))


@pytest.mark.parametrize("name", ["spin-logistic", "dpo"])
def test_logistic_losses_are_stable_far_out(name: str) -> None:
    a = double(1e4, -1e4, 300.0, -210.0, requires_grad=True)
    loss = LOSSES[name](a, torch.zeros(4, dtype=torch.float64))
    loss.sum().backward()
    expected = [0.0, 1000.0, math.exp(-30), 21 + math.exp(-21)]
    slopes = [0.0, -0.1, -0.1 * math.exp(-30), -0.1 / (1 + math.exp(-21))]
    assert loss.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-300)
    assert a.grad is not None
    assert a.grad.tolist() == pytest.approx(slopes, rel=1e-12, abs=1e-300)


@pytest.mark.parametrize("name", LOSSES)
def test_float32_stays_float32(name: str) -> None:
    assert LOSSES[name](torch.zeros(2), torch.zeros(2)).dtype == torch.float32


@pytest.mark.parametrize("value", [0.0, -0.5, math.nan, math.inf])
@pytest.mark.parametrize(
    ("loss", "name"),
    [(spin_loss, "lam"), (sppo_loss, "eta"), (dpo_loss, "beta"), (ipo_loss, "beta")],
)
def test_refuses_a_scale_that_is_not_positive(
    loss: Callable[..., Tensor], name: str, value: float
) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be a positive finite number, got {value}"):
        loss(double(0.0), double(0.0), **{name: value})


@pytest.mark.parametrize("name", LOSSES)
def test_refuses_shapes_that_would_broadcast(name: str) -> None:
    with pytest.raises(ValueError, match=r"\(3,\).*\(3, 1\)"):
        LOSSES[name](torch.zeros(3), torch.zeros(3, 1))


def test_refuses_an_unknown_link() -> None:
    with pytest.raises(ValueError, match="logistic, hinge, exponential, correlation; got 'probit'"):
        spin_loss(double(0.0), double(0.0), lam=0.1, link="probit")
