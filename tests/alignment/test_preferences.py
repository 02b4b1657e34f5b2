"""Win probabilities: the four conventions on known matrices, and what holds for any matrix."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparring.alignment.preferences import CONVENTIONS, pair_probabilities, win_probabilities

CYCLIC = [[0.0, 1.2, -0.4], [-0.8, 0.0, 0.6], [0.9, -0.5, 0.0]]
SYMMETRIC = sorted(CONVENTIONS.keys() - {"pairwise-one-order"})


@st.composite
def logits(draw: st.DrawFn, min_size: int = 1, max_size: int = 6) -> torch.Tensor:
    """(1, K, K) with anything on the diagonal."""
    size = draw(st.integers(min_size, max_size))
    cells = st.floats(-30, 30)
    values = draw(st.lists(cells, min_size=size * size, max_size=size * size))
    return torch.tensor(values, dtype=torch.float64).reshape(1, size, size)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def by_hand(matrix: np.ndarray, convention: str) -> np.ndarray:
    """The four formulas, cell by cell."""
    size = len(matrix)
    score = [sum(matrix[i, j] - matrix[j, i] for j in range(size)) / size for i in range(size)]
    formula = {
        "pairwise": lambda i, j: sigmoid((matrix[i, j] - matrix[j, i]) / 2),
        "pairwise-one-order": lambda i, j: sigmoid(matrix[i, j]),
        "mean-probability": lambda i, j: (sigmoid(matrix[i, j]) + 1 - sigmoid(matrix[j, i])) / 2,
        "aggregated": lambda i, j: sigmoid(score[i] - score[j]),
    }[convention]
    return np.array([[0.5 if i == j else formula(i, j) for j in range(size)] for i in range(size)])


@pytest.mark.parametrize(
    ("convention", "expected"),
    [
        ("aggregated", [0.557277, 0.426362, 0.516361]),
        ("pairwise", [0.524683, 0.467692, 0.507625]),
        ("mean-probability", [0.52481, 0.468269, 0.50692]),
    ],
)
def test_cyclic_judge(convention: str, expected: list[float]) -> None:
    wins = win_probabilities(torch.tensor([CYCLIC], dtype=torch.float64), convention)
    np.testing.assert_allclose(wins[0], expected, atol=6e-7)


def test_aggregation_hides_the_cycle() -> None:
    matrix = torch.tensor([CYCLIC], dtype=torch.float64)
    scores = (matrix - matrix.mT).mean(2)
    np.testing.assert_allclose(scores[0], [0.233333, -0.3, 0.066667], atol=1e-6)
    pairwise = pair_probabilities(matrix, "pairwise")[0]
    assert pairwise[0, 1] > 0.5
    assert pairwise[1, 2] > 0.5
    assert pairwise[2, 0] > 0.5
    aggregated = pair_probabilities(matrix, "aggregated")[0]
    assert aggregated[0, 2] > 0.5
    assert aggregated[2, 1] > 0.5
    assert aggregated[0, 1] > 0.5


def test_aggregation_is_twice_as_sharp_on_a_consistent_judge() -> None:
    reward = torch.tensor([[1.0, 0.2, -0.3, 0.5, 0.0]], dtype=torch.float64)
    matrix = reward.unsqueeze(2) - reward.unsqueeze(1)
    repository = pair_probabilities(matrix, "aggregated")[0, 0, 1]
    assert torch.logit(repository).item() == pytest.approx(1.6)
    assert win_probabilities(matrix, "aggregated")[0, 0].item() == pytest.approx(0.774947, abs=1e-6)
    for convention in ("pairwise", "pairwise-one-order", "mean-probability"):
        win = win_probabilities(matrix, convention)[0, 0].item()
        assert win == pytest.approx(0.665865, abs=1e-6)


@pytest.mark.parametrize("convention", CONVENTIONS)
@settings(deadline=None, max_examples=30)
@given(matrix=logits())
def test_matches_numpy(convention: str, matrix: torch.Tensor) -> None:
    clean = matrix[0].numpy() * (1 - np.eye(matrix.shape[1]))
    expected = by_hand(clean, convention)
    np.testing.assert_allclose(pair_probabilities(matrix, convention)[0], expected, atol=1e-12)
    wins = win_probabilities(matrix, convention)[0]
    np.testing.assert_allclose(wins, expected.mean(axis=1), atol=1e-12)


@pytest.mark.parametrize("convention", CONVENTIONS)
@settings(deadline=None, max_examples=30)
@given(matrix=logits(), data=st.data())
def test_permuting_responses_permutes_wins(
    convention: str, matrix: torch.Tensor, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(matrix.shape[1])))
    shuffled = matrix[:, order][:, :, order]
    expected = win_probabilities(matrix, convention)[:, order]
    torch.testing.assert_close(win_probabilities(shuffled, convention), expected)


@pytest.mark.parametrize("convention", SYMMETRIC)
@settings(deadline=None, max_examples=30)
@given(matrix=logits())
def test_one_of_two_wins(convention: str, matrix: torch.Tensor) -> None:
    pair = pair_probabilities(matrix, convention)
    torch.testing.assert_close(pair + pair.mT, torch.ones_like(pair))
    mean = win_probabilities(matrix, convention).mean().item()
    assert mean == pytest.approx(0.5)


def test_one_order_keeps_the_judges_bias_for_a_place() -> None:
    matrix = torch.full((1, 2, 2), 1.0, dtype=torch.float64)
    assert win_probabilities(matrix, "pairwise-one-order").mean() > 0.6
    assert win_probabilities(matrix, "pairwise").tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("convention", SYMMETRIC)
@settings(deadline=None, max_examples=20)
@given(size=st.integers(1, 6), bias=st.floats(-5, 5))
def test_identical_responses_are_even(convention: str, size: int, bias: float) -> None:
    matrix = torch.full((1, size, size), bias, dtype=torch.float64)
    wins = win_probabilities(matrix, convention)
    torch.testing.assert_close(wins, torch.full_like(wins, 0.5))


@pytest.mark.parametrize("convention", CONVENTIONS)
@settings(deadline=None, max_examples=20)
@given(matrix=logits(min_size=2, max_size=2))
def test_two_responses(convention: str, matrix: torch.Tensor) -> None:
    p = pair_probabilities(matrix, convention)[0, 0, 1].item()
    assert win_probabilities(matrix, convention)[0, 0].item() == pytest.approx((0.5 + p) / 2)


@pytest.mark.parametrize("convention", CONVENTIONS)
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), cut=st.integers(0, 5))
def test_splitting_the_batch_changes_no_row(convention: str, seed: int, cut: int) -> None:
    batch = torch.from_numpy(np.random.default_rng(seed).normal(size=(5, 4, 4)))
    parts = [win_probabilities(part, convention) for part in (batch[:cut], batch[cut:])]
    torch.testing.assert_close(torch.cat(parts), win_probabilities(batch, convention))


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_diagonal_is_not_read(convention: str) -> None:
    clean = torch.tensor([CYCLIC], dtype=torch.float64)
    dirty = clean.clone()
    dirty[0].fill_diagonal_(float("nan"))
    assert torch.equal(win_probabilities(dirty, convention), win_probabilities(clean, convention))
    assert torch.isnan(dirty[0, 0, 0]), "the caller's tensor was changed"
    assert pair_probabilities(dirty, convention)[0].diagonal().tolist() == [0.5] * 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_refuses_logits_that_are_not_finite(bad: float) -> None:
    batch = torch.zeros(4, 3, 3)
    batch[1, 0, 2] = batch[3, 2, 0] = bad
    with pytest.raises(ValueError, match=r"row 1, 3 of 4"):
        win_probabilities(batch)


@pytest.mark.parametrize("shape", [(3, 3), (2, 3, 2), (1, 0, 0), (1, 2, 2, 2)])
def test_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(B, K, K\)"):
        win_probabilities(torch.zeros(shape))


def test_refuses_integers_and_unknown_conventions() -> None:
    with pytest.raises(ValueError, match=r"int64"):
        win_probabilities(torch.zeros(1, 2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"pairwise-one-order, mean-probability.*got 'elo'"):
        win_probabilities(torch.zeros(1, 2, 2), "elo")


def test_dtype_and_empty_batches_pass_through() -> None:
    assert win_probabilities(torch.zeros(0, 3, 3)).shape == (0, 3)
    assert win_probabilities(torch.zeros(1, 3, 3)).dtype == torch.float32
