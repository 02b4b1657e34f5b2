"""From messages to token ids, the same ids for sampling, reference and training."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparring.alignment.rows import Prompt
from sparring.launch.errors import SparringError

INSTRUCTION = "### Instruction: {prompt}\n\n### Response: "  # SPIN's own (arXiv 2401.01335, App. B)


def load_tokenizer(path: Path | str) -> Any:
    """The tokenizer of a model folder, without running any code from that folder."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
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


def prompt_ids(tokenizer: Any, prompt: Prompt, template: str) -> list[int]:
    """Token ids of a prompt up to where the response begins, with one BOS at most.

    Raises:
        SparringError: the tokenizer has no chat template.
    """
    if template == "chat":
        if not getattr(tokenizer, "chat_template", None):
            raise SparringError(
                "the model's tokenizer has no chat template; start from an instruction-tuned "
                'model, or set generate.template = "instruction"'
            )
        ids = _chat_ids(tokenizer, prompt)
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


def _chat_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """The chat template's ids, in which what a user writes is text.

    A message that spells a special token ("<|im_end|>") would otherwise end its own turn.
    """
    spelt = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
    messages = [{"role": m.role, "content": m.content} for m in prompt.messages]
    found = sorted({token for token in spelt for m in messages if token in m["content"]}, key=len)
    if not found:
        return list(
            tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        )
    # Characters of the private use area stand for the spelt tokens until the template is filled in.
    marks = {chr(0xE000 + n): token for n, token in enumerate(reversed(found))}
    for mark, token in marks.items():
        messages = [{**m, "content": m["content"].replace(token, mark)} for m in messages]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return [
        token
        for piece in re.split(f"([{''.join(marks)}])", text)
        for token in tokenizer(
            marks.get(piece, piece), add_special_tokens=False, split_special_tokens=piece in marks
        )["input_ids"]
    ]


def response_ids(tokenizer: Any, text: str, *, limit: int) -> list[int]:
    """Token ids of a given response with one EOS at its end; cut at `limit` without EOS.

    Special tokens that the text spells are text.
    """
    made = tokenizer(text.strip(), add_special_tokens=False, split_special_tokens=True)
    ids = [int(i) for i in made["input_ids"]]
    return ids[:limit] if len(ids) >= limit else [*ids, int(tokenizer.eos_token_id)]


def check_length(prompt_id: str, ids: Sequence[int], *, limit: int) -> None:
    """Refuse a prompt that does not fit.

    Raises:
        SparringError: names the prompt, its length and the setting.
    """
    if len(ids) > limit:
        raise SparringError(
            f"prompt {prompt_id!r} has {len(ids)} tokens, more than the {limit} allowed; shorten "
            "or remove it, or raise prompts.max_tokens of the recipe or --max-prompt-tokens of the "
            "command (the context must hold prompt and response)"
        )
