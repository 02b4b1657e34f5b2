"""Judges compare the K responses to a prompt and give a (K, K) matrix of logits.

Names are loaded on first use, so importing this package costs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparring.alignment.judges.build import build_ensemble, build_judge
    from sparring.alignment.judges.cache import VerdictCache
    from sparring.alignment.judges.ensemble import Ensemble, Member
    from sparring.alignment.judges.llm import LLMJudge
    from sparring.alignment.judges.pairrm import PairRM
    from sparring.alignment.judges.pairwise import PairwiseJudge
    from sparring.alignment.judges.protocol import (
        Judge,
        Metered,
        checked_matrix,
        scores_to_matrix,
    )
    from sparring.alignment.judges.relevance import Relevance, RelevanceJudge
    from sparring.alignment.judges.reward_model import RewardModel
    from sparring.alignment.judges.verifier import VerifierJudge

_HOMES = {
    "Ensemble": "ensemble",
    "Judge": "protocol",
    "LLMJudge": "llm",
    "Member": "ensemble",
    "Metered": "protocol",
    "PairRM": "pairrm",
    "PairwiseJudge": "pairwise",
    "Relevance": "relevance",
    "RelevanceJudge": "relevance",
    "RewardModel": "reward_model",
    "VerdictCache": "cache",
    "VerifierJudge": "verifier",
    "build_ensemble": "build",
    "build_judge": "build",
    "checked_matrix": "protocol",
    "scores_to_matrix": "protocol",
}

__all__ = [
    "Ensemble",
    "Judge",
    "LLMJudge",
    "Member",
    "Metered",
    "PairRM",
    "PairwiseJudge",
    "Relevance",
    "RelevanceJudge",
    "RewardModel",
    "VerdictCache",
    "VerifierJudge",
    "build_ensemble",
    "build_judge",
    "checked_matrix",
    "scores_to_matrix",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
