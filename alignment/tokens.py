"""From messages to token ids, the same ids for sampling, reference and training."""

from __future__ import annotations

import datetime
import itertools
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from sparring.alignment.config import TemplateConfig
from sparring.alignment.rows import Prompt
from sparring.launch.errors import SparringError

INSTRUCTION = "### Instruction: {prompt}\n\n### Response: "  # SPIN's own (arXiv 2401.01335, App. B)


def load_tokenizer(path: Path | str) -> Any:
    """The tokenizer of a model folder, without running any code from that folder."""
    from transformers import AutoTokenizer

    # With tekken.json transformers would give Mistral's own class, which knows no chat template.
    mistral = {"mistral_format": False} if (Path(path) / "tekken.json").is_file() else {}
    try:
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=False, **mistral)
    except (OSError, ValueError) as error:
        raise SparringError(
            f"{path} has no tokenizer that transformers can load: {error}"
        ) from None


def eos_ids(tokenizer: Any, model_path: Path | str) -> list[int]:
    """Ids that end a response: the tokenizer's EOS first, then the generation config's others."""
    from transformers import GenerationConfig

    found = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    if (Path(model_path) / "generation_config.json").is_file():
        more = GenerationConfig.from_pretrained(str(model_path)).eos_token_id
        found += [more] if isinstance(more, int) else list(more or [])
    if not found:
        raise SparringError(f"the tokenizer of {model_path} has no EOS token; set eos_token in it")
    return list(dict.fromkeys(found))


def prompt_ids(tokenizer: Any, prompt: Prompt, how: TemplateConfig) -> list[int]:
    """Token ids of a prompt up to where the response begins, with one BOS at most.

    Raises:
        SparringError: the tokenizer has no chat template, or its template has no such option.
    """
    if how.template == "chat":
        if not getattr(tokenizer, "chat_template", None):
            raise SparringError(
                "the model's tokenizer has no chat template; start from an instruction-tuned "
                'model, or set generate.template = "instruction"'
            )
        ids = _chat_ids(tokenizer, prompt, how.template_options)
    else:
        text = INSTRUCTION.format(prompt=prompt.text)
        ids = tokenizer(text, split_special_tokens=True)["input_ids"]
        if ids and ids[-1] == tokenizer.eos_token_id:  # some tokenizers add EOS by themselves
            ids = ids[:-1]
    ids = [int(i) for i in ids]
    bos = tokenizer.bos_token_id
    # Some templates write BOS as text and some tokenizers add it again.
    while bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    return ids


def _chat_ids(tokenizer: Any, prompt: Prompt, options: Mapping[str, Any]) -> list[int]:
    """The chat template's ids, in which what a user writes is text.

    A message that spells a special token ("<|im_end|>") would otherwise end its own turn.
    """
    for name in options:  # jinja takes any, and says nothing
        if not re.search(rf"\b{re.escape(name)}\b", str(tokenizer.chat_template)):
            raise SparringError(
                f"the model's chat template reads no {name!r} of generate.template_options; "
                "see chat_template in its tokenizer's files for what it reads"
            )
    messages = [{"role": m.role, "content": m.content} for m in prompt.messages]
    texts = [m["content"] for m in messages]
    found = sorted({s for s in special(tokenizer) for t in texts if s in t}, key=len)
    if not found:
        return list(_filled(tokenizer, messages, prompt.prompt_id, **options)["input_ids"])
    # Characters of the private use area stand for the spelt tokens until the template is filled in.
    marks = {chr(0xE000 + n): token for n, token in enumerate(reversed(found))}
    for mark, token in marks.items():
        messages = [{**m, "content": m["content"].replace(token, mark)} for m in messages]
    text = _filled(tokenizer, messages, prompt.prompt_id, tokenize=False, **options)
    return [
        token
        for piece in re.split(f"([{''.join(marks)}])", text)
        for token in tokenizer(
            marks.get(piece, piece), add_special_tokens=False, split_special_tokens=piece in marks
        )["input_ids"]
    ]


@lru_cache(maxsize=4)
def special(tokenizer: Any) -> frozenset[str]:
    """Its special tokens; some have thousands, and collecting them takes milliseconds."""
    return frozenset(str(t) for t in tokenizer.added_tokens_decoder.values() if t.special)


def _same_day(form: str) -> str:
    """What templates that write today's date (Llama 3.2, SmolLM3) are told: prompts of one run, and
    of a run that is made again, are the same on every day."""
    return datetime.date(2024, 7, 26).strftime(form)


def _filled(tokenizer: Any, messages: list[dict[str, str]], name: str, **options: Any) -> Any:
    """The chat template's answer up to where the response begins.

    Raises:
        SparringError: it refuses these messages.
    """
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, strftime_now=_same_day, **options
        )
    except TemplateError as error:
        roles = ", ".join(m["role"] for m in messages)
        raise SparringError(
            f"the model's chat template refuses prompt {name!r} with the roles {roles}: {error}; "
            "give the model what it was made for, such as the system's text in the user's turn"
        ) from None


def ending(tokenizer: Any, model_path: Path | str, how: TemplateConfig) -> int:
    """The id that ends a response as samples end: the one that the chat template closes an
    assistant's turn with, where that is one of `eos_ids`; else the tokenizer's EOS.

    With another one, human responses could be told from samples by their last token.
    """
    ends = eos_ids(tokenizer, model_path)
    # A base model's tokenizer has no template, and its responses come with their ids.
    if how.template == "chat" and len(ends) > 1 and getattr(tokenizer, "chat_template", None):
        options = how.template_options
        question = [{"role": "user", "content": "a"}]
        answer = [*question, {"role": "assistant", "content": "b"}]
        before = _filled(tokenizer, question, "a", **options)["input_ids"]
        dated = {"strftime_now": _same_day, **options}
        whole = tokenizer.apply_chat_template(answer, **dated)["input_ids"]
        same = itertools.takewhile(lambda ids: ids[0] == ids[1], zip(before, whole, strict=False))
        return next((int(i) for i in whole[len(list(same)) :] if i in ends), ends[0])
    return ends[0]


class Turn(NamedTuple):
    """Where a response stands, so that a given one begins and ends as a sample does."""

    before: str
    """The line that it goes on, from the prompt's last special token or line break."""
    end: int
    """See :func:`ending`."""


def turn(tokenizer: Any, model_path: Path | str, how: TemplateConfig) -> Turn:
    """What surrounds responses; raises as :func:`ending`."""
    if how.template != "chat":
        text = INSTRUCTION.format(prompt="a")
    elif getattr(tokenizer, "chat_template", None):
        question = [{"role": "user", "content": "a"}]
        text = _filled(tokenizer, question, "a", tokenize=False, **how.template_options)
    else:
        text = ""
    for token in special(tokenizer):
        text = text.rpartition(token)[2]
    line = re.search(r"\n*[^\n]*\Z", text)
    return Turn(line[0] if line else "", ending(tokenizer, model_path, how))


def response_ids(tokenizer: Any, text: str, place: Turn, *, limit: int) -> list[int]:
    """Token ids of a given response with its end; cut at `limit` without it.

    It is encoded behind what stands before it: alone, SentencePiece would begin it with a space,
    by which it could be told from samples. Special tokens that the text spells are text.
    """

    def encoded(text: str) -> list[int]:
        made = tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        return [int(i) for i in made["input_ids"]]

    text, start = text.strip(), encoded(place.before) if place.before else []
    whole = encoded(place.before + text)
    # Where a token spans both, the prompt that was sampled from has another beginning.
    ids = whole[len(start) :] if whole[: len(start)] == start else encoded(text)
    return ids[:limit] if len(ids) >= limit else [*ids, place.end]


def check_length(prompt_id: str, ids: Sequence[int], *, limit: int) -> None:
    """Refuse a prompt that does not fit.

    Raises:
        SparringError: names the prompt, its length and the setting.
    """
    if len(ids) > limit:
        raise SparringError(
            f"prompt {prompt_id!r} has {len(ids)} tokens, more than the {limit} allowed; shorten "
            "or remove it, raise prompts.max_tokens of the recipe or --max-prompt-tokens of the "
            "command (the context must hold prompt and response), or leave such prompts out with "
            'too_long = "drop" in the recipe or --too-long drop'
        )
