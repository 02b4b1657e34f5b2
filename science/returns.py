"""Returns of assets for portfolios: drawn, monthly and daily. Rows are periods, columns assets."""

from __future__ import annotations

import bz2
import gzip
from typing import Any

import numpy as np
import numpy.typing as npt

from sparring.launch.packaged import packaged

FloatArray = npt.NDArray[np.float64]


def synthetic_returns(
    periods: int = 2000, assets: int = 200, *, kappa: float = 20.0, seed: int = 0
) -> FloatArray:
    """(T, N) rows from N(μ, U diag(1, …, 1, κ) Uᵀ), U a random rotation and μ from N(0, I/4)."""
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.standard_normal((assets, assets)))
    scale = np.ones(assets)
    scale[-1] = np.sqrt(kappa)
    mean = rng.standard_normal(assets) / 2
    drawn: FloatArray = mean + (rng.standard_normal((periods, assets)) * scale) @ rotation.T
    return drawn


def monthly_returns() -> FloatArray:
    """(819, 30) monthly returns 1949-2017 in percent: 12 industries, 18 Ken French portfolios.

    From the data that the package linearmodels ships (licence NCSA).

    Raises:
        SparringError: linearmodels is not installed (`pip install --no-deps linearmodels`).
    """
    path = packaged("linearmodels", "datasets/french/french.csv.bz2", "linearmodels")
    with bz2.open(path, "rt") as lines:
        columns, table = _table(lines)
    return 100 * table[:, columns.index("NoDur") :]  # the factors come before it


def daily_returns() -> FloatArray:
    """(8312, 20) daily returns 1990-2022 in percent of 20 stocks of the S&P 500.

    From the prices that the package skfolio ships (licence BSD-3).

    Raises:
        SparringError: skfolio is not installed (`pip install --no-deps skfolio`).
    """
    path = packaged("skfolio", "datasets/data/sp500_dataset.csv.gz", "skfolio")
    with gzip.open(path, "rt") as lines:
        _, prices = _table(lines)
    return np.asarray(100 * (prices[1:] / prices[:-1] - 1))


def _table(lines: Any) -> tuple[list[str], FloatArray]:
    """Names and numbers of the columns after the first, which has dates."""
    names = next(lines).strip().split(",")[1:]
    return names, np.array([line.strip().split(",")[1:] for line in lines], dtype=np.float64)
