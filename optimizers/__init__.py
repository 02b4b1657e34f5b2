"""Optimizers by name."""

from sparring.optimizers.build import build_optimizer

__all__ = ["build_optimizer"]
