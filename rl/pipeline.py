"""The pipeline `rl`: every method with every seed, then their curves. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sparring.launch.arms import Arm, ArmsPipeline
from sparring.launch.comparison import COMPARE, CompareConfig
from sparring.launch.stages import Stage
from sparring.rl.config import METHODS, LearnConfig, Recipe

LEARN = Stage(
    name="learn",
    summary="train a policy by one method, ranks being rollout workers",
    function="sparring.rl.learning:run",
    config=LearnConfig,
    version="1",
    inputs={},
    packages=("torch", "numpy", "gymnasium", "mujoco"),
)


class RlPipeline(ArmsPipeline):
    """What `sparring run` needs to know of this package."""

    recipe = Recipe
    stages: Mapping[str, Stage] = {LEARN.name: LEARN, COMPARE.name: COMPARE}

    def algorithms(self) -> dict[str, str]:
        """What `sparring recipes` lists."""
        return {name: about for name, (about, _, _) in METHODS.items()}

    def arms(self, recipe: Recipe) -> Sequence[Arm]:
        """The methods."""
        names = [name for name, _ in recipe.arms]
        return [
            Arm(name, LEARN, settings, recipe.seeds)
            for name, settings in zip(names, recipe.settings(), strict=True)
        ]

    def compared(self, recipe: Recipe) -> CompareConfig:
        """Mean return of the trajectories in each part of the budget."""
        return CompareConfig(
            cost="trajectories",
            value="return_mean",
            budget=recipe.trajectories,
            figures=("max_weight", "env_steps"),
        )

    def lead(self, recipe: Recipe) -> str:
        """One sentence on top of the report."""
        task = recipe.environment
        return (
            f"Policy gradients on {task.id}: horizon {task.horizon}, gamma {task.gamma}, "
            f"{recipe.trajectories} trajectories a run, {recipe.seeds} seeds."
        )


PIPELINE = RlPipeline()
