"""Objectives: each algorithm's loss on a batch of pairs, built from the losses of `losses.py`.

Legend: B pairs. All tensors are (B,), log-ratios in nats summed over response tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparring.alignment.config import TrainConfig
from sparring.alignment.losses import dpo_loss, ipo_loss, spin_loss, sppo_loss


@dataclass(frozen=True)
class PairTerms:
    """What a loss may use of a batch of pairs."""

    chosen_logp: Tensor
    chosen_logratio: Tensor
    rejected_logratio: Tensor
    chosen_win: Tensor
    rejected_win: Tensor
    pair_win: Tensor


def _beta(config: TrainConfig) -> float:
    assert isinstance(config.beta, (int, float)), "schedules are resolved before training"
    return config.beta


def _sppo(terms: PairTerms, config: TrainConfig, chosen: Tensor, rejected: Tensor) -> Tensor:
    # In units of β² a loss of 1e5 becomes one of order 0.1: the minimiser is the same, and clipping
    # at a gradient norm of 1 then means something. The factor is the paper's (βΔ − (P̂−½))² form.
    beta = _beta(config)
    chosen_term = sppo_loss(terms.chosen_logratio, chosen, eta=1 / beta)
    rejected_term = sppo_loss(terms.rejected_logratio, rejected, eta=1 / beta)
    return beta**2 * (chosen_term + rejected_term) / 2


def sppo(terms: PairTerms, config: TrainConfig) -> Tensor:
    """SPPO with P̂ over all K responses (arXiv 2405.00675, eq. 4.7), in units of β²."""
    return _sppo(terms, config, terms.chosen_win, terms.rejected_win)


def sppo_single(terms: PairTerms, config: TrainConfig) -> Tensor:
    """SPPO with the probability that the chosen response beats the rejected one."""
    return _sppo(terms, config, terms.pair_win, 1 - terms.pair_win)


def sppo_hard(terms: PairTerms, config: TrainConfig) -> Tensor:
    """SPPO with win probabilities 1 and 0 (half of TRL's `sppo_hard`, times β²)."""
    ones = torch.ones_like(terms.chosen_win)
    return _sppo(terms, config, ones, 1 - ones)


def spin(terms: PairTerms, config: TrainConfig) -> Tensor:
    """SPIN (arXiv 2401.01335, eq. 4.7); λ is β."""
    return spin_loss(
        terms.chosen_logratio, terms.rejected_logratio, lam=_beta(config), link=config.link
    )


def dpo(terms: PairTerms, config: TrainConfig) -> Tensor:
    """DPO (arXiv 2305.18290, eq. 7)."""
    return dpo_loss(terms.chosen_logratio, terms.rejected_logratio, beta=_beta(config))


def ipo(terms: PairTerms, config: TrainConfig) -> Tensor:
    """IPO (arXiv 2310.12036, eq. 17) on summed log-probabilities, in units of β²."""
    beta = _beta(config)
    return beta**2 * ipo_loss(terms.chosen_logratio, terms.rejected_logratio, beta=beta)


def sft(terms: PairTerms, config: TrainConfig) -> Tensor:
    """Negative log-likelihood of the chosen response, in nats."""
    return -terms.chosen_logp
