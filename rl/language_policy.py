"""A causal language model with two LoRA adapters: the policy, and the one before it.

Shape legend: N responses, T tokens of a padded row, R response tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparring.launch.seeds import derive

POLICY, PREVIOUS = "policy", "previous"
Coefficients = Callable[[slice, Tensor], Tensor]
"""Of `LanguagePolicy.gradient`: (rows, their log-probabilities without gradient) to (n,) c."""


@dataclass(frozen=True)
class Answer:
    """A sampled response; `response` ends with EOS unless it was cut at the limit."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]


class LanguagePolicy:
    """pi(y | x) of a model whose weights stay, and the adapters that move.

    A policy is an adapter (LoRA, arXiv 2106.09685), so that keeping the previous policy, gradients
    and their recursive estimate cost the size of an adapter, not of the model.

    Args:
        model: a causal language model of transformers, without dropout while it is used.
        tokenizer: its own.
        rank: of the adapters, at least 1; `lora_alpha` is twice as much.
        targets: names of the linear layers to adapt.
        seed: of the adapter's first weights.
        micro: responses a forward pass.

    Raises:
        ValueError: rank or micro below 1, no such layer, or a tokenizer without EOS.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        rank: int = 8,
        targets: Sequence[str] = ("q_proj", "v_proj"),
        seed: int = 0,
        micro: int = 8,
    ) -> None:
        from peft import LoraConfig, get_peft_model

        if min(rank, micro) < 1:
            raise ValueError(f"rank and micro must be at least 1, not {rank} and {micro}")
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no EOS token, so that no response could end")
        settings = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=list(targets), task_type="CAUSAL_LM"
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "adapter"))
            self.model: Any = get_peft_model(model, settings, adapter_name=POLICY)
            self.model.add_adapter(PREVIOUS, settings)
        self.model.eval()  # gradients flow all the same; dropout would be another policy
        self.tokenizer, self.micro = tokenizer, micro
        self.eos = _eos(model, tokenizer)
        self.pad = self.eos[0] if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
        self.remember()

    def parameters(self, adapter: str) -> dict[str, nn.Parameter]:
        """An adapter's parameters by their names without the adapter's."""
        mark = f".{adapter}."
        return {
            name.replace(mark, "."): parameter
            for name, parameter in self.model.named_parameters()
            if mark in name
        }

    @torch.no_grad()
    def remember(self) -> None:
        """Make the present policy the previous one."""
        old = self.parameters(PREVIOUS)
        for name, parameter in self.parameters(POLICY).items():
            old[name].copy_(parameter)
        self.model.set_adapter(POLICY)

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[Sequence[int]], k: int, max_new_tokens: int, seed: int
    ) -> list[Answer]:
        """K responses of the present policy to each prompt, at temperature 1 and from the whole
        vocabulary: any truncation would be another policy than the one that is differentiated.
        What else the model's own generation_config asks for is left out.

        Returns:
            The answers of the first prompt, then of the second, and so on.
        """
        from transformers import GenerationConfig

        longest = max(len(prompt) for prompt in prompts)
        ids = torch.full((len(prompts), longest), self.pad)
        mask = torch.zeros_like(ids)
        for n, prompt in enumerate(prompts):
            ids[n, longest - len(prompt) :] = torch.tensor(prompt)
            mask[n, longest - len(prompt) :] = 1
        settings = GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=k,
            max_new_tokens=max_new_tokens, eos_token_id=self.eos, pad_token_id=self.pad,
        )  # fmt: skip
        with (
            torch.random.fork_rng(devices=[]),
            _bare_generation(self.model.get_base_model()) as bare,
        ):
            torch.manual_seed(seed)
            made = bare.generate(
                input_ids=ids.to(self.device),
                attention_mask=mask.to(self.device),
                generation_config=settings,
            )
        rows = made[:, longest:].tolist()
        return [Answer(tuple(prompts[n // k]), self._ended(row)) for n, row in enumerate(rows)]

    def _ended(self, row: list[int]) -> tuple[int, ...]:
        """Up to the first EOS, which belongs to the response."""
        ends = [place for place, token in enumerate(row) if token in self.eos]
        return tuple(row[: ends[0] + 1] if ends else row)

    def text(self, answer: Answer) -> str:
        """What a reward reads."""
        return str(self.tokenizer.decode(answer.response, skip_special_tokens=True))

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        found: torch.device = next(self.model.parameters()).device
        return found

    def log_probabilities(self, answers: Sequence[Answer]) -> Tensor:
        """(N,) log pi(y | x) of the active adapter, summed over response tokens; float64."""
        # Padded on the right, where a causal model does not look from the left.
        begin = min(len(a.prompt) for a in answers)
        longest = max(len(a.prompt) + len(a.response) for a in answers)
        ids = torch.full((len(answers), longest), self.pad)
        counted = torch.zeros(len(answers), longest - begin, dtype=torch.bool)
        for n, a in enumerate(answers):
            length = len(a.prompt) + len(a.response)
            ids[n, :length] = torch.tensor([*a.prompt, *a.response])
            counted[n, len(a.prompt) - begin : length - begin] = True
        ids, counted = ids.to(self.device), counted.to(self.device)
        logits = self.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            logits_to_keep=longest - begin + 1,
            use_cache=False,
        ).logits[:, :-1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = functional.cross_entropy(
            logits.flatten(0, 1), ids[:, begin:].flatten(), reduction="none"
        ).view(counted.shape)
        return -(loss.double() * counted).sum(1)

    def gradient(
        self, adapter: str, answers: Sequence[Answer], coefficients: Coefficients
    ) -> tuple[list[Tensor], Tensor]:
        """The gradient of sum_n c_n log pi(y_n | x_n) at an adapter, and the (N,) logarithms."""
        self.model.set_adapter(adapter)
        try:
            wanted = list(self.parameters(adapter).values())
            total = [torch.zeros_like(parameter) for parameter in wanted]
            found = []
            for begin in range(0, len(answers), self.micro):
                rows = slice(begin, begin + self.micro)
                logp = self.log_probabilities(answers[rows])
                found.append(logp.detach())
                loss = (coefficients(rows, found[-1]) * logp).sum()
                parts = torch.autograd.grad(loss, wanted)
                torch._foreach_add_(total, list(parts))
        finally:  # an error of `coefficients` leaves the policy that samples in its place
            self.model.set_adapter(POLICY)
        return total, torch.cat(found)


@contextmanager
def _bare_generation(model: Any) -> Iterator[Any]:
    """The model without settings of its own: `generate` fills from them whatever the call leaves
    None (min_p, repetition_penalty, suppress_tokens, ...), and each changes the law of samples."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield model
    finally:
        model.generation_config = own


def _eos(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end a response."""
    more = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = [tokenizer.eos_token_id, *([more] if isinstance(more, int) else more or [])]
    return list(dict.fromkeys(int(i) for i in ids))
