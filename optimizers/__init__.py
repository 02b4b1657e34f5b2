"""Optimizers: MARS, and others by name."""

from sparring.optimizers.build import build_optimizer
from sparring.optimizers.mars import MARS
from sparring.optimizers.recursive import RecursiveEstimator

__all__ = ["MARS", "RecursiveEstimator", "build_optimizer"]
