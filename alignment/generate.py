"""Stage `generate`: K sampled responses a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparring.alignment import tokens
from sparring.alignment.engines import Request, build_engine
from sparring.alignment.prompt_files import load_prompts
from sparring.alignment.prompting import is_prompt_set
from sparring.alignment.rows import Prompt, Response
from sparring.alignment.stages import GenerateStage
from sparring.launch import shards
from sparring.launch.errors import SparringError
from sparring.launch.rows import read_rows, write_rows
from sparring.launch.seeds import derive
from sparring.launch.stages import Context, Figures


def read_prompts(path: Path, stage: GenerateStage) -> Sequence[Prompt]:
    """This stage's share of a prompts artifact, or of a plain JSONL or parquet file."""
    file = path / f"{stage.part}.parquet"
    prompts = read_rows(file, Prompt) if is_prompt_set(path) else load_prompts(path)
    end = stage.start + stage.count if stage.count else len(prompts)
    if end > len(prompts):
        raise SparringError(
            f"{path} has {len(prompts)} prompts, but {stage.start} to {end} were asked for"
        )
    return shards.portion(prompts[stage.start : end], stage.chunk, stage.shard)


def run(
    config: GenerateStage, inputs: Mapping[str, Path], output: Path, context: Context
) -> Figures:
    """Sample this rank's shards."""
    world = context.world.sharing(config.devices)
    if world is None:
        return {}
    prompts = read_prompts(inputs["prompts"], config)
    tokenizer = tokens.load_tokenizer(inputs["model"])
    ids = {p.prompt_id: tokens.prompt_ids(tokenizer, p, config) for p in prompts}
    if config.too_long == "drop":
        ids = {name: one for name, one in ids.items() if len(one) <= config.max_prompt_tokens}
    if not ids:
        raise SparringError(
            f"no prompt of {inputs['prompts']} has at most {config.max_prompt_tokens} tokens"
        )
    for prompt_id, prompt_ids in ids.items():
        tokens.check_length(prompt_id, prompt_ids, limit=config.max_prompt_tokens)
    longest = _longest(inputs["model"], ids, config.max_new_tokens)
    eos = tokens.eos_ids(tokenizer, inputs["model"])
    engine = build_engine(
        config,
        inputs["model"],
        eos=eos,
        max_length=longest,
        world=world,
    )

    probes = _probes([p.prompt_id for p in prompts if p.prompt_id in ids], config.probes)

    def sample(chunk: Sequence[Prompt]) -> list[Response]:
        keys = [(p, k) for p in chunk if p.prompt_id in ids for k in range(config.k)]
        seeds = [derive(context.seed, p.prompt_id, k) for p, k in keys]
        requests = [
            Request(ids[p.prompt_id], seed, probe=k == 0 and p.prompt_id in probes)
            for (p, k), seed in zip(keys, seeds, strict=True)
        ]
        return [
            Response(
                prompt_id=p.prompt_id,
                k=k,
                iteration=config.iteration,
                text=_text(tokenizer, sample.ids, config.answer_after),
                prompt_ids=tuple(ids[p.prompt_id]),
                response_ids=sample.ids,
                finish_reason=sample.finish_reason,
                seed=seed,
                logps=sample.logps,
            )
            for (p, k), seed, sample in zip(keys, seeds, engine.sample(requests), strict=True)
        ]

    ours = replace(context, world=world)
    shards.make(prompts, config.chunk, Response, sample, ours, unit="prompts")
    return {}


def _text(tokenizer: Any, ids: Sequence[int], after: str) -> str:
    """What judges read of a response: all, or what follows the last end of the model's thinking."""
    special = [token for token in tokens.special(tokenizer) if after and token in after]
    text = str(tokenizer.decode(ids, skip_special_tokens=not special))
    if after:
        text = answer(text, after)
    if special:  # the marker was one, so that the others are still there
        for token in tokens.special(tokenizer):
            text = text.replace(token, "")
    return text.strip()


def answer(text: str, after: str) -> str:
    """What follows the last place of a marker; nothing without one."""
    return text.rpartition(after)[2] if after in text else ""


def _probes(prompt_ids: Sequence[str], count: int) -> set[str]:
    """Prompts whose first response the parity gate checks: evenly spread over all ranks' shards."""
    count = min(count, len(prompt_ids))
    return {prompt_ids[n * len(prompt_ids) // count] for n in range(count)}


def _longest(model: Path, ids: Mapping[str, Sequence[int]], max_new_tokens: int) -> int:
    """Tokens that the longest prompt needs with its response, which the model's context holds."""
    from transformers import AutoConfig

    name = max(ids, key=lambda prompt_id: len(ids[prompt_id]))
    longest = len(ids[name]) + max_new_tokens
    context = getattr(AutoConfig.from_pretrained(str(model)), "max_position_embeddings", None)
    if context is not None and longest > context:
        raise SparringError(
            f"prompt {name!r} and generate.max_new_tokens need {longest} tokens, but the model's "
            f"context holds {context}; lower generate.max_new_tokens, or remove longer prompts"
        )
    return longest


def finish(
    config: GenerateStage, inputs: Mapping[str, Path], output: Path, context: Context
) -> Figures:
    """Merge the shards into ``responses.parquet``."""
    prompts = read_prompts(inputs["prompts"], config)
    count = len(shards.chunks(prompts, config.chunk))
    rows = shards.merge(count, Response, context.work)
    write_rows(output / "responses.parquet", Response, rows)
    sampled = sum(len(row.response_ids) for row in rows)
    empty = sum(not row.text for row in rows)
    if empty:
        context.emit(note=f"{empty} of {len(rows)} responses are empty; they are judged as such")
    return {
        "responses": len(rows),
        "tokens": sampled,
        "mean_tokens": sampled / len(rows),
        "cut": sum(row.finish_reason == "length" for row in rows) / len(rows),
        "empty": empty,
        "too_long": len(prompts) - len({row.prompt_id for row in rows}),
    }
