"""What every judge promises, and the check that a promise was kept.

Shape legend: N prompts, K responses a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from sparring.alignment.rows import Prompt
from sparring.launch.errors import SparringError

PromptLike: TypeAlias = str | Prompt
FloatArray: TypeAlias = npt.NDArray[np.float32]


class Judge(Protocol):
    """Compares the responses to a prompt with each other."""

    @property
    def name(self) -> str:
        """Short name for messages and reports."""
        ...

    @property
    def identity(self) -> str:
        """A string that changes whenever scores would: weights' hash, settings, versions."""
        ...

    def matrix(
        self, prompts: Sequence[PromptLike], responses: Sequence[Sequence[str]]
    ) -> FloatArray:
        """(N, K, K) float32 logits: entry [n, i, j] > 0 when response i beats j; diagonal 0."""
        ...

    def details(
        self, prompts: Sequence[PromptLike], responses: Sequence[Sequence[str]]
    ) -> dict[str, FloatArray]:
        """The judge's own (N, K) figures a response; may be empty."""
        ...


@runtime_checkable
class Metered(Protocol):
    """A judge that counts what it does; optional."""

    def usage(self) -> dict[str, float]:
        """Totals since it was built, such as pairs computed or tokens paid for.

        Ranks and resumed processes are added up, so each value must be a sum.
        """
        ...


def scores_to_matrix(scores_NK: npt.ArrayLike) -> FloatArray:
    """Logits of a scalar judge under Bradley–Terry: L_ij = s_i − s_j.

    Args:
        scores_NK: (N, K) scores in logits; higher is better.

    Returns:
        (N, K, K) float32, antisymmetric.
    """
    scores = np.asarray(scores_NK, dtype=np.float64)
    matrix: FloatArray = (scores[:, :, None] - scores[:, None, :]).astype(np.float32)
    return matrix


def prompt_label(prompt: PromptLike, n: int) -> str:
    """How a message names a prompt: by its id, or by its place when it is a bare string."""
    return prompt.prompt_id if isinstance(prompt, Prompt) else f"#{n}"


def prompt_text(prompt: PromptLike) -> str:
    """What a judge reads of a prompt."""
    return prompt.text if isinstance(prompt, Prompt) else prompt


def common_k(prompts: Sequence[PromptLike], responses: Sequence[Sequence[str]]) -> int:
    """The number of responses that all prompts share (0 when there are no prompts).

    Raises:
        SparringError: prompts and responses differ in number, or a prompt has another K.
    """
    if len(prompts) != len(responses):
        raise SparringError(
            f"{len(prompts)} prompts came with the responses of {len(responses)}; "
            f"a judge needs one list of responses a prompt"
        )
    if not responses:
        return 0
    k = len(responses[0])
    for n, (prompt, given) in enumerate(zip(prompts, responses, strict=True)):
        if len(given) != k or not given:
            raise SparringError(
                f"prompt {prompt_label(prompt, n)} has {len(given)} responses, the first prompt "
                f"has {k}; every prompt needs the same number, at least 1"
            )
    return k


def checked_matrix(
    judge: Judge, prompts: Sequence[PromptLike], responses: Sequence[Sequence[str]]
) -> FloatArray:
    """`judge.matrix`, refused when it is not what the protocol promises.

    Returns:
        (N, K, K) float32 logits, finite, with a zero diagonal.

    Raises:
        SparringError: responses are ragged, the shape is wrong, an entry is NaN or infinite, or a
            response does not tie with itself.
    """
    k = common_k(prompts, responses)
    matrix = np.asarray(judge.matrix(prompts, responses))
    if matrix.shape != (len(prompts), k, k):
        raise SparringError(
            f"judge {judge.name} returned an array of shape {matrix.shape}; "
            f"(N, K, K) = {(len(prompts), k, k)} was expected"
        )
    bad = np.argwhere(~np.isfinite(matrix))
    if len(bad):
        n, i, j = (int(x) for x in bad[0])
        raise SparringError(
            f"judge {judge.name} returned {matrix[n, i, j]} for prompt "
            f"{prompt_label(prompts[n], n)}, response k={i} against k={j} "
            f"({len(bad)} such entries); in half precision, try float32 for the judge"
        )
    loops = np.argwhere(np.diagonal(matrix, axis1=1, axis2=2) != 0)
    if len(loops):
        n, i = (int(x) for x in loops[0])
        raise SparringError(
            f"judge {judge.name} lets response k={i} of prompt {prompt_label(prompts[n], n)} "
            f"beat itself by {matrix[n, i, i]}; the diagonal must be 0"
        )
    checked: FloatArray = matrix.astype(np.float32, copy=False)
    return checked
