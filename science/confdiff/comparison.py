"""An ensemble against a reference, each distance beside the noise floor of the reference's halves.

Shape legend: S test and R reference structures, N residues. Coordinates are in nm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from sparring.science.confdiff import metrics
from sparring.science.confdiff.metrics import Distance, FloatArray
from sparring.science.confdiff.tica import TicaModel


def halves(trajectories: Sequence[FloatArray]) -> tuple[FloatArray, FloatArray]:
    """Two halves of a reference: its replicas if there are several, else before and after."""
    if len(trajectories) > 1:
        middle = len(trajectories) // 2
        return np.concatenate(trajectories[:middle]), np.concatenate(trajectories[middle:])
    middle = len(trajectories[0]) // 2
    return trajectories[0][:middle], trajectories[0][middle:]


def thinned(count: int, number: int, seed: int) -> npt.NDArray[np.int64]:
    """Which `number` of `count` structures to keep, at random and in their order; all of fewer.

    A histogram of fewer draws is farther from that of the same law (JS of 50 bins: .08 for 1000
    draws, .02 for 20 000), so that ensembles compare at one number only.
    """
    chosen = np.random.default_rng(seed).permutation(count)[:number]
    return np.sort(chosen)


def noise_floor(
    metric: Callable[[FloatArray, FloatArray], Distance],
    trajectories: Sequence[FloatArray],
    number: int,
) -> Distance:
    """What so many structures of the reference score against its other half.

    It is what a perfect model would get, but for the noise of the halves themselves, whose frames
    correlate.
    """
    first, second = halves(trajectories)
    return metric(first[thinned(len(first), number, 0)], second)


def compare(
    test: FloatArray,
    reference: Sequence[FloatArray],
    tica: TicaModel | None,
    log_weights: FloatArray | None = None,
) -> dict[str, float]:
    """Every metric of CA coordinates here, with `<name>_hit_rate` and `<name>_floor` of each JS.

    Args:
        test: (S, N, 3).
        reference: (R, N, 3) of each replica.
        tica: of the reference, if there is one.
        log_weights: (S,).

    Returns:
        js_pwd, js_rg_per_residue, js_rg, js_tic, js_tic2d, rmse_contact, val_clash, val_break; of
        a chain of fewer than four residues without js_pwd, without `tica` without its two.
    """
    whole = np.concatenate(reference)
    figures = {
        "rmse_contact": metrics.rmse_contact(test, whole, log_weights),
        "val_clash": metrics.val_clash(test, log_weights),
        "val_break": metrics.val_break(test, log_weights),
    }
    measures: dict[str, Callable[..., Distance]] = {
        "js_rg_per_residue": metrics.js_rg_per_residue,
        "js_rg": metrics.js_rg,
    }
    if whole.shape[1] > 3:
        measures["js_pwd"] = metrics.js_pwd
    found = {
        name: (metric(test, whole, log_weights), noise_floor(metric, reference, len(test)))
        for name, metric in measures.items()
    }
    if tica:
        first, second = (tica(half) for half in halves(reference))
        first = first[thinned(len(first), len(test), 0)]
        floor = metrics.mean_distance(metrics.js_channels(first, second))
        found["js_tic"] = tica.js_tic(test, log_weights), floor
        found["js_tic2d"] = tica.js_tic2d(test, log_weights), metrics.js_2d(first, second)
    for name, (distance, floor) in found.items():
        figures |= {
            name: distance.js,
            f"{name}_hit_rate": distance.hit_rate,
            f"{name}_floor": floor.js,
        }
    return figures
