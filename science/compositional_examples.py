"""Problems for `minimize_compositional`: portfolios, value evaluation, embedding, tanh regression.

Shape legend: T months, N assets, S states, D variables, L width of g.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import brentq
from scipy.spatial.distance import cdist
from torch import Tensor

from sparring.science.compositional_problem import CompositionalProblem

FloatArray = npt.NDArray[np.float64]


def _matrix(name: str, values: npt.ArrayLike) -> FloatArray:
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim != 2 or not matrix.size or not np.isfinite(matrix).all():
        raise ValueError(f"{name} must be a finite matrix, got shape {matrix.shape}")
    return matrix


def _constants(*tensors: Tensor) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """A problem's constants by number type and device of a tensor, moved once each."""
    moved: dict[tuple[torch.dtype, torch.device], tuple[Tensor, ...]] = {}

    def of(like: Tensor) -> tuple[Tensor, ...]:
        key = (like.dtype, like.device)
        if key not in moved:
            moved[key] = tuple(tensor.to(like) for tensor in tensors)
        return moved[key]

    return of


def portfolio(returns_TN: npt.ArrayLike) -> CompositionalProblem:
    """Mean against variance: Φ(x) = −r̄ᵀx + xᵀΣx, Σ with 1/T (arXiv 1912.13515, section 5).

    g_j(x) = (x, ⟨r_j, x⟩) ∈ R^{N+1} and f_i(y) = −y_{N+1} + (⟨r_i, y_{1:N}⟩ − y_{N+1})². Each f_i
    has the true gradient, factor 2 and all.

    Args:
        returns_TN: (T, N), any unit.

    Returns:
        The problem, with `optimum` = −¼ r̄ᵀΣ⁻¹r̄. `portfolio_optimum` gives x*.

    Raises:
        ValueError: Σ is singular, so that Φ has no minimum.
    """
    table = torch.from_numpy(_matrix("returns", returns_TN))
    (periods, assets), constants = table.shape, _constants(table)

    def inner(x: Tensor, rows: Tensor) -> Tensor:
        (returns,) = constants(x)
        return torch.cat([x.expand(len(rows), -1), (returns[rows] @ x)[:, None]], 1)

    def jacobian(x: Tensor, rows: Tensor) -> Tensor:
        (returns,) = constants(x)
        return torch.cat([torch.eye(assets).to(x), returns[rows].mean(0)[None]])

    def outer(y: Tensor, rows: Tensor) -> Tensor:
        (returns,) = constants(y)
        return (returns[rows] @ y[:-1] - y[-1]) ** 2 - y[-1]

    def gradient(y: Tensor, rows: Tensor) -> Tensor:
        (returns,) = constants(y)
        chosen = returns[rows]
        excess = 2 * (chosen @ y[:-1] - y[-1])
        return torch.cat([excess @ chosen / len(rows), -1 - excess.mean()[None]])

    return CompositionalProblem(
        inner,
        outer,
        inner_count=periods,
        outer_count=periods,
        inner_jacobian=jacobian,
        outer_gradient=gradient,
        optimum=portfolio_optimum(returns_TN)[1],
    )


def portfolio_optimum(returns_TN: npt.ArrayLike) -> tuple[FloatArray, float]:
    """x* = ½ Σ⁻¹ r̄ (N,) and Φ* = −¼ r̄ᵀ Σ⁻¹ r̄.

    Raises:
        ValueError: Σ is singular, as with fewer than N + 1 periods.
    """
    returns = _matrix("returns", returns_TN)
    mean = returns.mean(0)
    covariance = np.atleast_2d(np.cov(returns.T, bias=True))
    if np.linalg.matrix_rank(covariance) < len(mean):
        raise ValueError(
            f"the covariance of {returns.shape[1]} assets over {returns.shape[0]} periods is "
            "singular, so Φ has no minimum; give more periods than assets, none a mix of others"
        )
    solved = np.linalg.solve(covariance, mean)
    return solved / 2, float(-mean @ solved / 4)


def bellman(
    features_SD: npt.ArrayLike,
    transition_SS: npt.ArrayLike,
    rewards: npt.ArrayLike,
    gamma: float = 0.95,
) -> CompositionalProblem:
    """Value evaluation: Φ(w) = (1/S) Σ_i (⟨φ_i, w⟩ − Σ_j P_ij (R_ij + γ ⟨φ_j, w⟩))².

    The expectation over next states j is the inner one: g_j(w) = Φw − S P_·j ∘ (R_·j + γ⟨φ_j, w⟩),
    j uniform, so that every g_j and ∂g_j is unbiased; f_i(y) = y_i². The paper has the sum in
    place of the mean over i.

    Args:
        features_SD: (S, D).
        transition_SS: (S, S), rows of probabilities that sum to at most 1: what is missing ends
            the episode, with value 0.
        rewards: (S, S) R_ij, or (S,) expected rewards r_i.
        gamma: discount, in [0, 1).

    Raises:
        ValueError: shapes do not fit, or no probabilities, or gamma out of range.
    """
    phi, P = (_matrix(n, v) for n, v in (("features", features_SD), ("transition", transition_SS)))
    R = np.asarray(rewards, dtype=np.float64)
    states = len(phi)
    if P.shape != (states, states) or R.shape not in ((states, states), (states,)):
        raise ValueError(
            f"features {phi.shape} need a transition {(states, states)} and rewards of that shape "
            f"or ({states},), got {P.shape} and {R.shape}"
        )
    if (P < 0).any() or (P.sum(1) > 1 + 1e-9).any():
        raise ValueError("the rows of transition must be probabilities that sum to at most 1")
    if not 0 <= gamma < 1:
        raise ValueError(f"gamma must be in [0, 1), got {gamma!r}")
    expected = R if R.ndim == 1 else (P * R).sum(1)
    sampled = np.zeros_like(P) if R.ndim == 1 else states * P * R
    constant = -expected if R.ndim == 1 else np.zeros(states)
    arrays = (phi, gamma * states * P, sampled, constant)
    constants = _constants(*(torch.from_numpy(array) for array in arrays))

    def inner(w: Tensor, rows: Tensor) -> Tensor:
        features, weight, drawn, fixed = constants(w)
        known = features @ w + fixed
        return known - (drawn[:, rows] + weight[:, rows] * (features[rows] @ w)).T

    def jacobian(w: Tensor, rows: Tensor) -> Tensor:
        features, weight, _, _ = constants(w)
        return features - weight[:, rows] @ features[rows] / len(rows)

    def outer(y: Tensor, rows: Tensor) -> Tensor:
        return y[rows] ** 2

    def gradient(y: Tensor, rows: Tensor) -> Tensor:
        return torch.zeros_like(y).index_add(0, rows.to(y.device), 2 * y[rows] / len(rows))

    design = phi - gamma * P @ phi
    best = np.linalg.lstsq(design, expected, rcond=None)[0]
    return CompositionalProblem(
        inner,
        outer,
        inner_count=states,
        outer_count=states,
        inner_jacobian=jacobian,
        outer_gradient=gradient,
        optimum=float(np.mean((design @ best - expected) ** 2)),
    )


def random_bellman(
    states: int = 400, features: int = 100, *, seed: int = 0
) -> CompositionalProblem:
    """`bellman` with uniform features, rewards and normalised transitions, as in 1912.13515."""
    rng = np.random.default_rng(seed)
    transition = rng.random((states, states)) + 1e-5
    transition /= transition.sum(1, keepdims=True)
    return bellman(rng.random((states, features)), transition, rng.random((states, states)))


def gymnasium_bellman(
    environment: str = "FrozenLake-v1", *, gamma: float = 0.95, **options: Any
) -> CompositionalProblem:
    """`bellman` of the uniform policy on a gymnasium environment with a transition table, one-hot.

    Raises:
        ValueError: the environment has no table `P`.
    """
    import gymnasium

    env = gymnasium.make(environment, **options).unwrapped
    table = getattr(env, "P", None)
    if table is None:
        raise ValueError(f"{environment} has no transition table P; try FrozenLake-v1 or Taxi-v4")
    states = len(table)
    transition, reward = np.zeros((states, states)), np.zeros(states)
    for state, actions in table.items():
        for outcomes in actions.values():
            for chance, following, gain, ended in outcomes:
                reward[state] += chance * gain / len(actions)
                transition[state, following] += 0 if ended else chance / len(actions)
    env.close()
    return bellman(np.eye(states), transition, reward, gamma)


def neighbour_probabilities(data_NF: npt.ArrayLike, perplexity: float = 20.0) -> FloatArray:
    """(N, N) symmetric P of SNE: Gaussian neighbours whose widths give each row this perplexity.

    Raises:
        ValueError: perplexity is not in (1, N − 1).
    """
    data = _matrix("data", data_NF)
    count = len(data)
    if not 1 < perplexity < count - 1:
        raise ValueError(f"perplexity must be in (1, {count - 1}), got {perplexity!r}")
    squared = cdist(data, data, "sqeuclidean")
    squared /= np.median(squared)
    P = np.zeros((count, count))
    for i in range(count):
        others = np.delete(squared[i], i)
        others -= others.min()

        def row(log_precision: float, others: FloatArray = others) -> FloatArray:
            weights = np.exp(-np.exp(log_precision) * others)
            return np.asarray(weights / weights.sum())

        def excess(log_precision: float, row: Callable[[float], FloatArray] = row) -> float:
            chance = row(log_precision)
            entropy = -np.sum(chance * np.log(np.maximum(chance, 1e-300)))
            return float(entropy - np.log(perplexity))

        P[i, np.arange(count) != i] = row(float(brentq(excess, -20, 20)))
    return np.asarray((P + P.T) / (2 * count))


def sne(probabilities_NN: npt.ArrayLike, dimensions: int = 2) -> CompositionalProblem:
    """Stochastic neighbour embedding: Σ_ij P_ij (‖w_i − w_j‖² + log Σ_{k≠i} exp(−‖w_i − w_k‖²)).

    x holds the w_i one after the other. g_k(x) = (x, s) with s_i = N [k ≠ i] exp(−‖w_i − w_k‖²)
    and f_i(y) = N Σ_j P_ij (‖w_i − w_j‖² + log s_i); ∂g_k moves with x.

    Args:
        probabilities_NN: (N, N), not negative, as of `neighbour_probabilities`.
        dimensions: of w_i.
    """
    table = torch.from_numpy(_matrix("probabilities", probabilities_NN))
    count, constants = len(table), _constants(table)
    if table.shape != (count, count) or bool((table < 0).any()):
        raise ValueError(f"probabilities must be square and not negative, got {tuple(table.shape)}")

    def kernel(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, d) w_i − w_k and (B, N) N exp(−‖w_i − w_k‖²), 0 where i = k."""
        w = x.view(count, dimensions)
        difference = w[None] - w[rows][:, None]
        value = count * torch.exp(-(difference**2).sum(-1))
        return difference, value * (
            torch.arange(count, device=x.device) != rows.to(x.device)[:, None]
        )

    def inner(x: Tensor, rows: Tensor) -> Tensor:
        return torch.cat([x.expand(len(rows), -1), kernel(x, rows)[1]], 1)

    def jacobian(x: Tensor, rows: Tensor) -> Tensor:
        difference, value = kernel(x, rows)
        slope = -2 * difference * value[..., None] / len(rows)  # ∂s_i/∂w_i; −that is ∂s_i/∂w_k
        lower = x.new_zeros(count, count, dimensions)
        every = torch.arange(count)
        lower[every, every] = slope.sum(0)
        lower.index_add_(1, rows.to(x.device), -slope.transpose(0, 1))
        return torch.cat([torch.eye(len(x)).to(x), lower.view(count, -1)])

    def outer(y: Tensor, rows: Tensor) -> Tensor:
        (P,) = constants(y)
        w, s = y[: count * dimensions].view(count, dimensions), y[count * dimensions :]
        squared = ((w[rows][:, None] - w[None]) ** 2).sum(-1)
        # A batch of few samples may leave nothing, or less, of s_i.
        log_s = torch.log(s[rows].clamp_min(1e-12))
        return count * ((P[rows] * squared).sum(1) + P[rows].sum(1) * log_s)

    return CompositionalProblem(
        inner, outer, inner_count=count, outer_count=count, inner_jacobian=jacobian
    )


def digits_sne(
    points: int = 200, dimensions: int = 2, perplexity: float = 20.0
) -> CompositionalProblem:
    """`sne` of the first images of scikit-learn's digits."""
    from sklearn.datasets import load_digits

    images = load_digits().data[:points]
    return sne(neighbour_probabilities(images, perplexity), dimensions)


def tanh_regression(
    samples: int = 200, width: int = 5, features: int = 4, *, noise: float = 0.0, seed: int = 0
) -> CompositionalProblem:
    """Moments of tanh units, whose Jacobian moves: g_j(x) = b_j ∘ tanh(W a_j), W = x as (L, F).

    f_i(y) = ½ (⟨c_i, y⟩ − t_i)² with t_i = ⟨c_i, g(x°)⟩ + noise · N(0, 1), so that without noise
    Φ* = 0 at x°. c, x° are standard normal, a is 1 + N(0, 1) and b is 1 + N(0, ¼).
    """
    generator = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    a = 1 + torch.randn(samples, features, **options)  # centred, the moments would vanish
    b = 1 + torch.randn(samples, width, **options) / 2
    c = torch.randn(samples, width, **options)
    truth = torch.randn(width, features, **options)
    moments = (b * torch.tanh(a @ truth.T)).mean(0)
    target = c @ moments + noise * torch.randn(samples, **options)
    constants = _constants(a, b, c, target)

    def inner(x: Tensor, rows: Tensor) -> Tensor:
        a, b, _, _ = constants(x)
        return b[rows] * torch.tanh(a[rows] @ x.view(width, features).T)

    def jacobian(x: Tensor, rows: Tensor) -> Tensor:
        a, b, _, _ = constants(x)
        slope = b[rows] * (1 - torch.tanh(a[rows] @ x.view(width, features).T) ** 2)
        # Unit l depends on row l of W only.
        blocks = slope.T @ a[rows] / len(rows)
        wide = x.new_zeros(width, width, features)
        wide[torch.arange(width), torch.arange(width)] = blocks
        return wide.view(width, -1)

    def outer(y: Tensor, rows: Tensor) -> Tensor:
        _, _, c, target = constants(y)
        return (c[rows] @ y - target[rows]) ** 2 / 2

    def gradient(y: Tensor, rows: Tensor) -> Tensor:
        _, _, c, target = constants(y)
        return (c[rows] @ y - target[rows]) @ c[rows] / len(rows)

    return CompositionalProblem(
        inner,
        outer,
        inner_count=samples,
        outer_count=samples,
        inner_jacobian=jacobian,
        outer_gradient=gradient,
        optimum=0.0 if noise == 0 else None,
    )
