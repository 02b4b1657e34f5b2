"""A scalar reward model as a judge: any transformers sequence classifier with one label.

Shape legend: B rows of a batch, N prompts, K responses.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence, Set
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from sparring.alignment.judges.protocol import (
    FloatArray,
    PromptLike,
    common_k,
    prompt_text,
    scores_to_matrix,
)
from sparring.alignment.judges.weights import (
    checkpoint_name,
    load_or_explain,
    placement,
    weights_hash,
)
from sparring.alignment.rows import Prompt
from sparring.launch.errors import SparringError


class RewardModel:
    """Bradley–Terry judge: L_ij = r_i − r_j, so P(i beats j) = σ(r_i − r_j)."""

    name = "reward-model"

    def __init__(
        self, model: Any, tokenizer: Any, batch_size: int = 16, max_tokens: int = 2048
    ) -> None:
        """Wrap a loaded model; most callers want `from_pretrained`.

        Args:
            model: a sequence classifier with one label.
            tokenizer: its tokenizer; with a chat template, conversations are written with it.
            batch_size: conversations a forward pass; does not change the result.
            max_tokens: longer conversations lose their beginning, never the response's end.

        Raises:
            SparringError: the model has another number of labels.
        """
        if model.config.num_labels != 1:
            raise SparringError(
                f"a reward model gives one number a response; this checkpoint has "
                f"{model.config.num_labels} labels"
            )
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.max_tokens = max_tokens
        self._last: tuple[object, dict[str, FloatArray]] | None = None

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int = 16,
        max_tokens: int = 2048,
    ) -> RewardModel:
        """Load a checkpoint.

        Args:
            path_or_hub_id: folder or hub id of a sequence classifier with one label.
            device: torch device; CUDA when there is one, else the CPU, when None.
            dtype: "float32", "float16" or "bfloat16"; when None float16 on CUDA, else float32.
            batch_size: conversations a forward pass.
            max_tokens: what is read of a conversation, at most.

        Raises:
            SparringError: nothing there, several labels, or a head without weights.
        """
        name = checkpoint_name(path_or_hub_id)
        where, precision = placement(device, dtype)
        labels = load_or_explain(AutoConfig, name).num_labels
        if labels != 1:
            raise SparringError(
                f"{name!r} has {labels} labels; a reward model gives one number a response"
            )
        tokenizer = load_or_explain(AutoTokenizer, name)
        model, info = load_or_explain(
            AutoModelForSequenceClassification, name, dtype=precision, output_loading_info=True
        )
        if info["missing_keys"]:
            # A causal LM loads too, with a random head.
            raise SparringError(
                f"{name!r} is not a trained reward model; missing weights: "
                f"{', '.join(sorted(info['missing_keys'])[:5])}"
            )
        return cls(model.to(where), tokenizer, batch_size, max_tokens)

    @cached_property
    def identity(self) -> str:
        """Hash of weights (in the dtype they run in) and vocabulary, template and limit."""
        digest = weights_hash(self.model, self.tokenizer)
        return f"reward-model/1 {digest} tokens={self.max_tokens} {self.tokenizer.chat_template!r}"

    def matrix(
        self, prompts: Sequence[PromptLike], responses: Sequence[Sequence[str]]
    ) -> FloatArray:
        """(N, K, K) Bradley–Terry logits r_i − r_j.

        Raises:
            SparringError: responses are ragged.
        """
        return scores_to_matrix(self.details(prompts, responses)["reward"])

    def details(
        self, prompts: Sequence[PromptLike], responses: Sequence[Sequence[str]]
    ) -> dict[str, FloatArray]:
        """(N, K) figures: reward, and truncated (1 where the conversation was cut).

        Raises:
            SparringError: responses are ragged.
        """
        key = (tuple(prompts), tuple(tuple(given) for given in responses))
        if self._last is None or self._last[0] != key:  # matrix and details ask for the same batch
            self._last = (key, self._figures(prompts, responses))
        return dict(self._last[1])

    def _figures(
        self, prompts: Sequence[PromptLike], responses: Sequence[Sequence[str]]
    ) -> dict[str, FloatArray]:
        shape = (len(prompts), common_k(prompts, responses))
        full = [
            self._tokens(prompt, response)
            for prompt, given in zip(prompts, responses, strict=True)
            for response in given
        ]
        rows = [ids[-self.max_tokens :] for ids in full]
        rewards = np.zeros(len(rows), dtype=np.float32)
        order = sorted(range(len(rows)), key=lambda r: -len(rows[r]))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            rewards[batch] = self._forward([rows[r] for r in batch])
        truncated = [float(len(ids) > self.max_tokens) for ids in full]
        return {
            "reward": rewards.reshape(shape),
            "truncated": np.array(truncated, dtype=np.float32).reshape(shape),
        }

    def _tokens(self, prompt: PromptLike, response: str) -> list[int]:
        """A conversation in the model's own template, or as a text pair when it has none."""
        if self.tokenizer.chat_template is None:
            pair: list[int] = self.tokenizer(prompt_text(prompt), response)["input_ids"]
            return pair
        turns = (
            [{"role": m.role, "content": m.content} for m in prompt.messages]
            if isinstance(prompt, Prompt)
            else [{"role": "user", "content": prompt}]
        )
        turns.append({"role": "assistant", "content": response})
        text = self.tokenizer.apply_chat_template(turns, tokenize=False)
        # The template wrote the special tokens already.
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _padding(self, ends: Set[int]) -> int:
        """A token that ends no row: decoder classifiers read the last one that is none of these.

        EOS, where a tokenizer has no token for padding, is what many templates end a turn with.
        """
        own = self.tokenizer.pad_token_id
        pad = next(i for i in itertools.chain([own], itertools.count()) if i not in {None, *ends})
        self.model.config.pad_token_id = pad
        return int(pad)

    @torch.inference_mode()
    def _forward(self, rows: Sequence[list[int]]) -> FloatArray:
        longest = max(len(row) for row in rows)
        pad = self._padding({row[-1] for row in rows if row})
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        device = self.model.device
        output = self.model(input_ids=ids.to(device), attention_mask=mask.to(device))
        rewards: FloatArray = output.logits[:, 0].float().cpu().numpy()
        return rewards
