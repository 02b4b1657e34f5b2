"""PairRM, the pairwise ranker of LLM-Blender (arXiv 2306.02561), on current transformers.

One DeBERTa pass reads a prompt and two candidates and says which is better. The class here has the
parameter names of the published `PairRM-hf` layout; llm-blender is not imported.

Shape legend: B rows of a batch, T tokens, H hidden size, N prompts or pairs, K responses.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import AutoTokenizer

from sparring.alignment.judges.protocol import FloatArray, PromptLike, common_k, prompt_text
from sparring.alignment.judges.weights import (
    checkpoint_name,
    load_or_explain,
    placement,
    weights_hash,
)
from sparring.launch.errors import SparringError

with warnings.catch_warnings():
    # transformers 5 still scripts helpers of DeBERTa while it is imported.
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
    from transformers import DebertaV2Config, DebertaV2Model, DebertaV2PreTrainedModel

SOURCE_TOKENS = 1224
TOTAL_TOKENS = 2048
MARKERS = ("<|source|>", "<|candidate1|>", "<|candidate2|>")


class DebertaV2PairRM(DebertaV2PreTrainedModel):  # type: ignore[misc]
    """DeBERTa-v2 with a comparison head; state dict as in the `PairRM-hf` checkpoint."""

    config_class = DebertaV2Config

    def __init__(self, config: DebertaV2Config) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.pretrained_model = DebertaV2Model(config)
        self.head_layer = nn.Sequential(
            nn.Dropout(config.drop_out),
            nn.Linear(2 * width, width),
            nn.Tanh(),
            nn.Dropout(config.drop_out),
            nn.Linear(width, config.n_tasks),
        )
        self.post_init()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, marker_positions: torch.Tensor
    ) -> torch.Tensor:
        """Logit that the first candidate beats the second: mean over tasks of h_1 − h_2.

        Args:
            input_ids, attention_mask: (B, T).
            marker_positions: (B, 3) places of the source, candidate-1 and candidate-2 markers.
                They are given, not searched for, so that text cannot pose as a marker.

        Returns:
            (B,) logits, > 0 when the first candidate is better.
        """
        hidden_BTH = self.pretrained_model(
            input_ids=input_ids, attention_mask=attention_mask
        ).last_hidden_state
        rows_B1 = torch.arange(len(input_ids), device=hidden_BTH.device).unsqueeze(1)
        marked_B3H = hidden_BTH[rows_B1, marker_positions]
        source_BH, first_BH, second_BH = marked_B3H.unbind(dim=1)
        first_h = self.head_layer(torch.cat([source_BH, first_BH], dim=-1))
        second_h = self.head_layer(torch.cat([source_BH, second_BH], dim=-1))
        logits_B: torch.Tensor = (first_h - second_h).mean(dim=-1)
        return logits_B


class _Row(NamedTuple):
    ids: tuple[int, ...]
    markers: tuple[int, int, int]
    truncated: bool


class PairRM:
    """The pairwise judge. All K(K−1) ordered pairs are scored, so both orders are on record."""

    name = "pairrm"

    def __init__(self, model: DebertaV2PairRM, tokenizer: Any, batch_size: int = 32) -> None:
        """Wrap a loaded model; most callers want `from_pretrained`.

        Args:
            model: on its device, in its dtype.
            tokenizer: with the markers as single tokens.
            batch_size: pairs a forward pass; does not change the result.

        Raises:
            SparringError: the tokenizer lacks a marker, or disagrees with the config about its id.
        """
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self._check_markers()
        # A response may contain text that spells a special token; to the model it would be one.
        special = {*tokenizer.all_special_tokens, *MARKERS, "<|candidate|>"}
        alternatives = (re.escape(token) for token in sorted(special, key=len, reverse=True))
        self._special = re.compile("|".join(alternatives))
        self._encode = lru_cache(maxsize=4096)(self._encode_part)

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int = 32,
    ) -> PairRM:
        """Load a checkpoint in the `PairRM-hf` layout.

        Args:
            path_or_hub_id: folder, or hub id such as "llm-blender/PairRM-hf".
            device: torch device; CUDA when there is one, else the CPU, when None.
            dtype: "float32", "float16" or "bfloat16"; when None float16 on CUDA, else float32.
            batch_size: pairs a forward pass.

        Raises:
            SparringError: nothing there, another layout, or weights that do not fill the model.
        """
        name = checkpoint_name(path_or_hub_id)
        where, precision = placement(device, dtype)
        config = load_or_explain(DebertaV2Config, name)
        for key in ("n_tasks", "drop_out"):
            if not hasattr(config, key):
                raise SparringError(
                    f"{name!r} is not in the PairRM-hf layout: its config has no {key!r}; "
                    f"the original llm-blender/PairRM files must be converted first"
                )
        tokenizer = load_or_explain(AutoTokenizer, name)
        model, info = load_or_explain(
            DebertaV2PairRM, name, config=config, dtype=precision, output_loading_info=True
        )
        if info["missing_keys"]:
            # transformers would go on with random numbers in their place.
            raise SparringError(
                f"{name!r} does not fill PairRM; missing weights: "
                f"{', '.join(sorted(info['missing_keys'])[:5])}"
            )
        return cls(model.to(where), tokenizer, batch_size)

    def _check_markers(self) -> None:
        config = self.model.config
        keys = ("source_prefix_id", "cand1_prefix_id", "cand2_prefix_id")
        for marker, key in zip(MARKERS, keys, strict=True):
            found = self.tokenizer.encode(marker, add_special_tokens=False)
            wanted = getattr(config, key, None)
            if wanted is None or found != [wanted]:
                raise SparringError(
                    f"the tokenizer reads {marker} as {found}, the config's {key} is {wanted}: "
                    f"tokenizer and weights do not belong together"
                )

    @cached_property
    def identity(self) -> str:
        """Hash of weights (in the dtype they run in) and vocabulary, and the token limits."""
        digest = weights_hash(self.model, self.tokenizer)
        return f"pairrm/1 {digest} tokens={SOURCE_TOKENS}/{TOTAL_TOKENS}"

    def logits(
        self, prompts: Sequence[PromptLike], firsts: Sequence[str], seconds: Sequence[str]
    ) -> FloatArray:
        """One-order logits L_ab = logit that the first response beats the second.

        Args:
            prompts, firsts, seconds: N each. A prompt is cut to 1224 tokens, each response to
                (2048 − tokens of the prompt) // 2, at the end.

        Returns:
            (N,) float32. Independent of the other rows to rounding.

        Raises:
            SparringError: the lists differ in length.
        """
        if not len(prompts) == len(firsts) == len(seconds):
            raise SparringError(
                f"{len(prompts)} prompts, {len(firsts)} firsts and {len(seconds)} seconds "
                f"do not line up"
            )
        texts = [prompt_text(prompt) for prompt in prompts]
        triples = list(zip(texts, firsts, seconds, strict=True))
        rows = {triple: self._row(*triple) for triple in triples}  # equal triples once
        # Longest first: running out of memory shows at once, and padding stays short.
        order = sorted(rows, key=lambda triple: (-len(rows[triple].ids), triple))
        values: dict[tuple[str, str, str], float] = {}
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            scored = self._forward([rows[triple] for triple in batch])
            values.update(zip(batch, scored, strict=True))
        return np.array([values[triple] for triple in triples], dtype=np.float32)

    def matrix(
        self, prompts: Sequence[PromptLike], responses: Sequence[Sequence[str]]
    ) -> FloatArray:
        """(N, K, K) logits, row beats column, of all ordered pairs; the diagonal is 0.

        The matrix is not antisymmetric: PairRM is sensitive to order, and the convention that
        turns L_ij and L_ji into a probability is the pairing stage's choice.

        Raises:
            SparringError: responses are ragged.
        """
        k = common_k(prompts, responses)
        places = [
            (n, i, j) for n in range(len(prompts)) for i in range(k) for j in range(k) if i != j
        ]
        values = self.logits(
            [prompts[n] for n, _, _ in places],
            [responses[n][i] for n, i, _ in places],
            [responses[n][j] for n, _, j in places],
        )
        matrix = np.zeros((len(prompts), k, k), dtype=np.float32)
        for place, value in zip(places, values, strict=True):
            matrix[place] = value
        return matrix

    def details(
        self, prompts: Sequence[PromptLike], responses: Sequence[Sequence[str]]
    ) -> dict[str, FloatArray]:
        """(N, K) truncated: 1 where the prompt or the response did not fit and was cut."""
        shape = (len(prompts), common_k(prompts, responses))
        cut = [
            float(self._row(prompt_text(prompt), response, response).truncated)
            for prompt, given in zip(prompts, responses, strict=True)
            for response in given
        ]
        return {"truncated": np.array(cut, dtype=np.float32).reshape(shape)}

    def _encode_part(self, marker: str, text: str, limit: int) -> tuple[tuple[int, ...], bool]:
        """[CLS] marker text [SEP], at most `limit` tokens, and whether text was cut."""
        clean = self._special.sub(" ", text)
        ids = self.tokenizer.encode(marker + clean, add_special_tokens=False)
        cut = len(ids) > limit - 2
        body = ids[: limit - 2]
        return (self.tokenizer.cls_token_id, *body, self.tokenizer.sep_token_id), cut

    def _row(self, prompt: str, first: str, second: str) -> _Row:
        source, cut = self._encode(MARKERS[0], prompt, SOURCE_TOKENS)
        limit = (TOTAL_TOKENS - len(source)) // 2
        one, cut_one = self._encode(MARKERS[1], first, limit)
        two, cut_two = self._encode(MARKERS[2], second, limit)
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
