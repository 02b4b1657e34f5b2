"""PairRM, the pairwise ranker of LLM-Blender (arXiv 2306.02561), on current transformers.

One DeBERTa pass reads a prompt and two candidates and says which is better. llm-blender is not
imported; tests compare with its own classes.

Shape legend: B rows of a batch, T tokens, N prompts or pairs, K responses.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from sparring.alignment.judges.cache import Triple
from sparring.alignment.judges.deberta import DebertaV2Config, DebertaV2PairRM
from sparring.alignment.judges.pairrm_layouts import (
    ADDED_TOKENS,
    CANDIDATE_TOKENS,
    MARKER_KEYS,
    MARKERS,
    SOURCE_TOKENS,
    load_checkpoint,
)
from sparring.alignment.judges.pairwise import PairwiseJudge
from sparring.alignment.judges.protocol import FloatArray, PromptLike, prompt_text
from sparring.alignment.judges.weights import placement, weights_hash
from sparring.launch.errors import SparringError

__all__ = [
    "MARKERS",
    "SOURCE_TOKENS",
    "TOTAL_TOKENS",
    "DebertaV2Config",
    "DebertaV2PairRM",
    "PairRM",
]

TOTAL_TOKENS = SOURCE_TOKENS + 2 * CANDIDATE_TOKENS


class _Row(NamedTuple):
    ids: tuple[int, ...]
    markers: tuple[int, int, int]
    truncated: bool


class PairRM(PairwiseJudge):
    """The pairwise judge. All K(K−1) ordered pairs are scored, so both orders are on record.

    Where it departs from LLM-Blender, on purpose: text that spells a special token is read as a
    space, whichever token it is (there only [SEP]; a marker in a text ends in an error or another
    score), and a response is cut by its own prompt's length (there by the longest of the batch).
    """

    name = "pairrm"

    def __init__(
        self,
        model: DebertaV2PairRM,
        tokenizer: Any,
        batch_size: int = 256,
        batch_tokens: int = 0,
        source_tokens: int = SOURCE_TOKENS,
        total_tokens: int = TOTAL_TOKENS,
    ) -> None:
        """Wrap a loaded model; most callers want `from_pretrained`.

        Args:
            model: on its device, in its dtype.
            tokenizer: with the markers as single tokens.
            batch_size: pairs a forward pass, at most; does not change the result.
            batch_tokens: tokens a forward pass, padding included, at most (one pair always goes);
                0: 2048 on a CPU, where larger tensors leave the caches, else 16384.
            source_tokens: where a prompt is cut.
            total_tokens: what prompt and both candidates have together.

        Raises:
            SparringError: the tokenizer lacks a marker, or disagrees with the config about its id,
                or a size is out of range.
        """
        super().__init__()
        if batch_size < 1 or batch_tokens < 0:
            raise SparringError(
                f"pairrm's batch_size must be at least 1 and batch_tokens at least 0, not "
                f"{batch_size} and {batch_tokens}"
            )
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.batch_tokens = batch_tokens or (2048 if model.device.type == "cpu" else 16384)
        self.source_tokens = source_tokens
        self.total_tokens = total_tokens
        self._check_markers()
        # A response may contain text that spells a special token; to the model it would be one.
        special = {*tokenizer.all_special_tokens, *ADDED_TOKENS}
        alternatives = (re.escape(token) for token in sorted(special, key=len, reverse=True))
        self._special = re.compile("|".join(alternatives))
        self._encode = lru_cache(maxsize=4096)(self._encode_text)

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int = 256,
        batch_tokens: int = 0,
        base: str = "",
    ) -> PairRM:
        """Load a checkpoint in the layout of `PairRM-hf` or of the original `PairRM`.

        Args:
            path_or_hub_id: folder, or hub id such as "llm-blender/PairRM-hf".
            device: torch device; CUDA when there is one, else the CPU, when None.
            dtype: "float32", "float16" or "bfloat16"; when None float16 on CUDA, else float32.
            batch_size: pairs a forward pass, at most.
            batch_tokens: tokens a forward pass, padding included, at most; 0: 2048 on a CPU, else
                16384.
            base: for the original layout, folder or hub id of the DeBERTa it was trained from,
                whose configuration and tokenizer are read; empty: what the checkpoint names.

        Raises:
            SparringError: nothing there, another layout, or weights that do not fill the model.
        """
        where, precision = placement(device, dtype)
        found = load_checkpoint(path_or_hub_id, base, precision)
        return cls(
            found.model.to(where),
            found.tokenizer,
            batch_size,
            batch_tokens,
            found.source_tokens,
            found.total_tokens,
        )

    def _check_markers(self) -> None:
        for marker, key in zip(MARKERS, MARKER_KEYS, strict=True):
            found = self.tokenizer.encode(marker, add_special_tokens=False)
            wanted = getattr(self.model.config, key, None)
            if wanted is None or found != [wanted]:
                raise SparringError(
                    f"the tokenizer reads {marker} as {found}, the config's {key} is {wanted}: "
                    f"tokenizer and weights do not belong together"
                )

    @cached_property
    def identity(self) -> str:
        """Hash of weights (in the dtype they run in) and vocabulary, and the token limits."""
        digest = weights_hash(self.model, self.tokenizer)
        return f"pairrm/1 {digest} tokens={self.source_tokens}/{self.total_tokens}"

    def compare(self, triples: Sequence[Triple]) -> Iterator[tuple[Triple, float | None]]:
        """One-order logits; NaN where the forward pass gives that.

        A prompt is cut to `source_tokens`, each response to (total_tokens − tokens of the
        prompt) // 2, at the end.
        """
        rows = {triple: self._row(*triple) for triple in triples}
        # Longest first: running out of memory shows at once, and padding stays short.
        order = sorted(rows, key=lambda triple: (-len(rows[triple].ids), triple))
        start = 0
        while start < len(order):
            fitting = self.batch_tokens // len(rows[order[start]].ids)
            batch = order[start : start + min(self.batch_size, max(1, fitting))]
            yield from zip(batch, self._forward([rows[triple] for triple in batch]), strict=True)
            start += len(batch)

    def details(
        self, prompts: Sequence[PromptLike], responses: Sequence[Sequence[str]]
    ) -> dict[str, FloatArray]:
        """(N, K) empty: 1 where a response is blank; truncated: 1 where the prompt or the response
        did not fit and was cut."""
        figures = super().details(prompts, responses)
        cut = [
            float(self._row(prompt_text(prompt), response, response).truncated)
            for prompt, given in zip(prompts, responses, strict=True)
            for response in given
        ]
        figures["truncated"] = np.array(cut, dtype=np.float32).reshape(figures["empty"].shape)
        return figures

    def _encode_text(self, marker: str, text: str) -> list[int]:
        """marker text, without [CLS] and [SEP], uncut."""
        clean = self._special.sub(" ", text)
        ids: list[int] = self.tokenizer.encode(marker + clean, add_special_tokens=False)
        return ids

    def _part(self, place: int, text: str, limit: int) -> tuple[tuple[int, ...], bool]:
        """[CLS] marker text [SEP], at most `limit` tokens, and whether text was cut."""
        # A response is encoded once: as the second candidate it differs in the marker alone.
        ids = self._encode(MARKERS[min(place, 1)], text)
        body = (getattr(self.model.config, MARKER_KEYS[place]), *ids[1 : limit - 2])
        tokenizer = self.tokenizer
        return (tokenizer.cls_token_id, *body, tokenizer.sep_token_id), len(ids) > limit - 2

    def _row(self, prompt: str, first: str, second: str) -> _Row:
        source, cut = self._part(0, prompt, self.source_tokens)
        limit = (self.total_tokens - len(source)) // 2
        one, cut_one = self._part(1, first, limit)
        two, cut_two = self._part(2, second, limit)
        markers = (1, len(source) + 1, len(source) + len(one) + 1)
        return _Row(source + one + two, markers, cut or cut_one or cut_two)

    @torch.inference_mode()
    def _forward(self, rows: Sequence[_Row]) -> list[float]:
        device = self.model.device
        longest = max(len(row.ids) for row in rows)
        pad = self.tokenizer.pad_token_id
        padded = [row.ids + (pad,) * (longest - len(row.ids)) for row in rows]
        mask = [[1] * len(row.ids) + [0] * (longest - len(row.ids)) for row in rows]
        logits_B = self.model(
            torch.tensor(padded, device=device),
            torch.tensor(mask, device=device),
            torch.tensor([row.markers for row in rows], device=device),
        )
        values: list[float] = logits_B.float().cpu().tolist()
        return values
