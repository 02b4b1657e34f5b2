"""The pipeline `science`: every solver with every seed, then their curves. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparring.launch.arms import Arm, ArmsPipeline
from sparring.launch.comparison import COMPARE, CompareConfig
from sparring.launch.stages import Stage
from sparring.science.config import SOLVERS, AdmmStage, ComposeStage, Recipe

_PACKAGES = ("torch", "numpy", "scipy")

COMPOSE = Stage(
    name="compose",
    summary="one run of a compositional solver",
    function="sparring.science.portfolio_stage:run",
    config=ComposeStage,
    version="1",
    inputs={},
    single=True,
    packages=_PACKAGES,
)
ADMM = Stage(
    name="admm",
    summary="one run of stochastic ADMM on the lasso",
    function="sparring.science.lasso_stage:run",
    config=AdmmStage,
    version="1",
    inputs={},
    single=True,
    packages=(*_PACKAGES, "scikit-learn"),
)
CONSENSUS = Stage(
    name="consensus",
    summary="one run of consensus ADMM on the lasso, its parts dealt out to ranks",
    function="sparring.science.lasso_stage:run",
    config=AdmmStage,
    version="1",
    inputs={},
    packages=(*_PACKAGES, "scikit-learn"),
)


class SciencePipeline(ArmsPipeline):
    """What `sparring run` needs to know of this package."""

    recipe = Recipe
    stages: Mapping[str, Stage] = {s.name: s for s in (COMPOSE, ADMM, CONSENSUS, COMPARE)}

    def algorithms(self) -> dict[str, str]:
        """What `sparring recipes` lists."""
        return SOLVERS

    def arms(self, recipe: Recipe) -> Sequence[Arm]:
        """The solvers."""
        found = []
        for name, settings in zip(recipe.names, recipe.settings(), strict=True):
            if isinstance(settings, ComposeStage):
                seeds = 1 if settings.solver.method == "gd" else recipe.seeds
                found.append(Arm(name, COMPOSE, settings, seeds))
            else:
                stage = CONSENSUS if settings.scheme.parts > 1 else ADMM
                found.append(Arm(name, stage, settings, recipe.seeds))
        return found

    def compared(self, recipe: Recipe) -> CompareConfig:
        """Gap against passes, or distance to the optimum against sampled rows."""
        common: dict[str, Any] = {"measure": "last", "scale": "log", "columns": 3}
        if recipe.compositional:
            return CompareConfig(
                **common,
                cost="passes",
                value="gap",
                budget=recipe.portfolio.passes,
                figures=("ifo",),
            )
        return CompareConfig(
            **common,
            cost="rows",
            value="distance",
            budget=recipe.lasso.batch * recipe.lasso.iterations,
            figures=("residual", "std", "predicted_std"),
        )

    def lead(self, recipe: Recipe) -> str:
        """One sentence on top of the report."""
        if recipe.compositional:
            return (
                f"Solvers of min f(g(x)) on a portfolio of {recipe.portfolio.returns} returns: gap "
                f"to the optimum against IFO calls, {recipe.portfolio.passes:g} passes."
            )
        return (
            f"Stochastic ADMM on a lasso (diabetes, penalty {recipe.lasso.penalty:g}, rho "
            f"{recipe.lasso.rho:g}, {recipe.lasso.batch} rows an iteration): distance to the "
            "optimum against sampled rows; standard deviation of a coordinate of the support over "
            "the second half, beside that of the modified equation."
        )


PIPELINE = SciencePipeline()
