"""DNDM (arXiv 2312.09193): discrete diffusion that calls the network only when a token changes.

Importing this imports neither torch nor diffusers; `DNDMScheduler` needs diffusers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparring.diffusion.dndm.algorithms import (
        ALGORITHMS,
        Sampler,
        algorithm,
        autoregressive,
        d3pm,
        dndm,
        dndm_c,
        dndm_k,
        dndm_v2,
        entropy_bound,
        first_hitting,
        maskgit,
        mdlm_cache,
        rdm,
        rdm_k,
        threshold,
    )
    from sparring.diffusion.dndm.ancestral import Ancestral
    from sparring.diffusion.dndm.counts import (
        CosineCounts,
        Counts,
        EntropyBoundCounts,
        FirstHitting,
        LinearCounts,
        ThresholdCounts,
        TransitionTimes,
    )
    from sparring.diffusion.dndm.denoisers import Sampled, integer_time, masked_lm, shaped
    from sparring.diffusion.dndm.forward import (
        Corrupted,
        corrupt,
        frozen_path,
        markov_path,
        posterior,
        posterior_mean,
    )
    from sparring.diffusion.dndm.generation import generate
    from sparring.diffusion.dndm.losses import cross_entropy, draw_times, variational_term, weight
    from sparring.diffusion.dndm.noise import Noise, absorbing, uniform, unigram
    from sparring.diffusion.dndm.reveal import Reveal
    from sparring.diffusion.dndm.scheduler import DNDMScheduler
    from sparring.diffusion.dndm.schedules import (
        BetaSchedule,
        CosineSchedule,
        CosineSquaredSchedule,
        CustomSchedule,
        LinearSchedule,
        Schedule,
        as_schedule,
        expected_calls,
    )

__all__ = [
    "ALGORITHMS",
    "Ancestral",
    "BetaSchedule",
    "Corrupted",
    "CosineCounts",
    "CosineSchedule",
    "CosineSquaredSchedule",
    "Counts",
    "CustomSchedule",
    "DNDMScheduler",
    "EntropyBoundCounts",
    "FirstHitting",
    "LinearCounts",
    "LinearSchedule",
    "Noise",
    "Reveal",
    "Sampled",
    "Sampler",
    "Schedule",
    "ThresholdCounts",
    "TransitionTimes",
    "absorbing",
    "algorithm",
    "as_schedule",
    "autoregressive",
    "corrupt",
    "cross_entropy",
    "d3pm",
    "dndm",
    "dndm_c",
    "dndm_k",
    "dndm_v2",
    "draw_times",
    "entropy_bound",
    "expected_calls",
    "first_hitting",
    "frozen_path",
    "generate",
    "integer_time",
    "markov_path",
    "masked_lm",
    "maskgit",
    "mdlm_cache",
    "posterior",
    "posterior_mean",
    "rdm",
    "rdm_k",
    "shaped",
    "threshold",
    "uniform",
    "unigram",
    "variational_term",
    "weight",
]

_CONTENTS = {
    "algorithms": (
        "ALGORITHMS Sampler algorithm autoregressive d3pm dndm dndm_c dndm_k dndm_v2 "
        "entropy_bound first_hitting maskgit mdlm_cache rdm rdm_k threshold"
    ),
    "ancestral": "Ancestral",
    "counts": (
        "Counts CosineCounts EntropyBoundCounts FirstHitting LinearCounts ThresholdCounts "
        "TransitionTimes"
    ),
    "denoisers": "Sampled integer_time masked_lm shaped",
    "forward": "Corrupted corrupt frozen_path markov_path posterior posterior_mean",
    "generation": "generate",
    "losses": "cross_entropy draw_times variational_term weight",
    "noise": "Noise absorbing unigram uniform",
    "reveal": "Reveal",
    "scheduler": "DNDMScheduler",
    "schedules": (
        "BetaSchedule CosineSchedule CosineSquaredSchedule CustomSchedule LinearSchedule Schedule "
        "as_schedule expected_calls"
    ),
}
_HOMES = {name: home for home, names in _CONTENTS.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
