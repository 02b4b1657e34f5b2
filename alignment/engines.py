"""Engines: what samples responses. vLLM first; transformers' generate where vLLM does not run.

Each request carries its own seed, so a response depends on its prompt and seed, not on its batch
(up to rounding, which is why shards have a fixed composition).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from sparring.alignment.stages import GenerateStage
from sparring.launch.errors import SparringError
from sparring.launch.processes import World


@dataclass(frozen=True)
class Request:
    """A prompt to continue."""

    prompt_ids: Sequence[int]
    seed: int
    probe: bool = False
    """Whether the sampled tokens' log-probabilities are wanted."""


@dataclass(frozen=True)
class Sample:
    """A continuation; `ids` ends with the EOS that stopped it, if one did."""

    ids: tuple[int, ...]
    finish_reason: str
    logps: tuple[float, ...] = ()
    """Of a probe: log-probability of each token, in nats, in the distribution that it was drawn
    from, that is after temperature and top_p (of a greedy sample: before)."""


class Engine(Protocol):
    """Samples one continuation a request, in the order of the requests."""

    def sample(self, requests: Sequence[Request]) -> list[Sample]: ...


def build_engine(
    config: GenerateStage,
    model: Path,
    *,
    eos: Sequence[int],
    max_length: int,
    world: World,
) -> Engine:
    """The engine that a recipe names; `world` is of ranks with `config.devices` accelerators."""
    kind = VLLMEngine if config.engine == "vllm" else TransformersEngine
    return kind(config, model, eos=eos, max_length=max_length, world=world)


def vllm_environment(world: World, *, memory: float, devices: int = 1) -> None:
    """Environment that vLLM reads at import. Each rank is an engine of its own.

    Args:
        world: this rank among those with `devices` accelerators each.
        memory: GiB of a CPU's key-value cache; 0 for 2.
        devices: accelerators of the engine; on a CPU processes, which share the rank's cores.
    """
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    # In one process the scheduler sees all requests before its first step, every time: with its own
    # process, batches would depend on when requests arrive.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    mine = range(world.local_rank * devices, (world.local_rank + 1) * devices)
    cores = sorted(os.sched_getaffinity(0))
    shares = [cores[n :: world.local_size * devices] or cores for n in mine]
    bound = "|".join(",".join(map(str, share)) for share in shares)
    given = os.environ.get("VLLM_CPU_OMP_THREADS_BIND")
    # One list a process: another engine's, or one for a whole engine, would stop vLLM.
    if given is None or given.count("|") + 1 != devices:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = bound
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(int(memory) or 2))
    if world.size > 1:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = seen.split(",") if seen else [str(n) for n in range(world.local_size * devices)]
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names[n % len(names)] for n in mine)


class VLLMEngine:
    """vLLM with one engine a process."""

    def __init__(
        self,
        config: GenerateStage,
        model: Path,
        *,
        eos: Sequence[int],
        max_length: int,
        world: World,
    ) -> None:
        vllm_environment(world, memory=config.memory, devices=config.devices)
        try:
            import vllm
        except ImportError as error:
            raise SparringError(
                f"vLLM cannot be imported here ({error}); install it (`make install`), name "
                'another interpreter under [launch.python], or set generate.engine = "transformers"'
            ) from None
        options: dict[str, Any] = {}
        if config.memory and self._on_gpu():
            options["gpu_memory_utilization"] = config.memory
        if not self._on_gpu():
            # Chunked prefill rewinds per-request generators by their offset, which CPU generators
            # do not have ("CPU Generator does not use offset", vllm 0.32).
            options |= {"enforce_eager": True, "enable_chunked_prefill": False}
            options["max_num_batched_tokens"] = max(4096, max_length)
        self._llm = vllm.LLM(
            str(model),
            dtype=config.dtype,
            tensor_parallel_size=config.devices,
            max_model_len=max_length,
            max_num_seqs=config.max_batch,
            seed=0,
            logprobs_mode="processed_logprobs",
            **options,
        )
        self._vllm, self._config, self._eos = vllm, config, list(eos)

    @staticmethod
    def _on_gpu() -> bool:
        import torch

        return torch.cuda.is_available()

    def sample(self, requests: Sequence[Request]) -> list[Sample]:
        config = self._config
        self._llm.reset_prefix_cache()  # what an earlier shard left there must not change rounding
        prompts = [self._vllm.TokensPrompt(prompt_token_ids=list(r.prompt_ids)) for r in requests]
        params = [
            self._vllm.SamplingParams(
                temperature=config.temperature,
                top_p=config.top_p,
                max_tokens=config.max_new_tokens,
                stop_token_ids=self._eos,
                seed=r.seed,
                detokenize=False,
                logprobs=0 if r.probe else None,  # 0: of the sampled token alone
            )
            for r in requests
        ]
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        return [
            self._sample(request, output) for request, output in zip(requests, outputs, strict=True)
        ]

    @staticmethod
    def _sample(request: Request, output: Any) -> Sample:
        if list(output.prompt_token_ids) != list(request.prompt_ids):
            raise SparringError(
                f"vLLM read a prompt of {len(request.prompt_ids)} tokens as other "
                f"{len(output.prompt_token_ids)} tokens; sampling and training would not agree"
            )
        done = output.outputs[0]
        ids = tuple(done.token_ids)
        logps: tuple[float, ...] = ()
        if request.probe:
            logps = tuple(
                float(at[token].logprob) for token, at in zip(ids, done.logprobs, strict=True)
            )
        return Sample(ids, str(done.finish_reason), logps)


class TransformersEngine:
    """transformers' generate, with seeds a response by the Gumbel-max trick.

    argmax(logits/T + Gumbel noise) is an exact sample of softmax(logits/T); each row draws its
    noise from its own generator, so that a row's randomness does not depend on its batch.
    """

    def __init__(
        self,
        config: GenerateStage,
        model: Path,
        *,
        eos: Sequence[int],
        max_length: int,
        world: World,
    ) -> None:
        from transformers import GenerationConfig

        from sparring.alignment.models import place_policy

        self._config, self._eos = config, list(eos)
        self._model = place_policy(model, config.dtype, config.devices)
        # What a checkpoint recommends (suppressed tokens, a repetition penalty) fills every setting
        # that a call leaves open, and would sample from another distribution than is trained.
        self._model.generation_config = GenerationConfig()

    def sample(self, requests: Sequence[Request]) -> list[Sample]:
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids))
        found: dict[int, Sample] = {}
        for start in range(0, len(order), self._config.max_batch):
            batch = order[start : start + self._config.max_batch]
            samples = self._batch([requests[i] for i in batch])
            found |= dict(zip(batch, samples, strict=True))
        return [found[i] for i in range(len(requests))]

    def _batch(self, requests: Sequence[Request]) -> list[Sample]:
        import torch
        from transformers import GenerationConfig, LogitsProcessorList

        width = max(len(r.prompt_ids) for r in requests)
        pad = self._eos[0]
        ids = torch.full((len(requests), width), pad)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(requests):
            ids[row, width - len(request.prompt_ids) :] = torch.tensor(list(request.prompt_ids))
            mask[row, width - len(request.prompt_ids) :] = 1
        where = self._model.device
        probes = _Probes([row for row, request in enumerate(requests) if request.probe])
        with torch.no_grad():
            output = self._model.generate(
                input_ids=ids.to(where),
                attention_mask=mask.to(where),
                generation_config=GenerationConfig(
                    max_new_tokens=self._config.max_new_tokens,
                    do_sample=False,
                    eos_token_id=self._eos,
                    pad_token_id=pad,
                ),
                logits_processor=LogitsProcessorList(self._processors(requests, probes)),
            )
        return probes.complete([self._cut(row) for row in output[:, width:].tolist()])

    def _processors(self, requests: Sequence[Request], probes: _Probes) -> list[Any]:
        from transformers import TemperatureLogitsWarper, TopPLogitsWarper

        config = self._config
        chain: list[Any] = []
        if config.temperature > 0:
            chain.append(TemperatureLogitsWarper(float(config.temperature)))
            if config.top_p < 1:
                chain.append(TopPLogitsWarper(float(config.top_p)))
        if probes.rows:
            chain.append(probes.processor())
        if config.temperature > 0:
            chain.append(_gumbel([r.seed for r in requests]))
        return chain

    def _cut(self, ids: list[int]) -> Sample:
        for place, token in enumerate(ids):
            if token in self._eos:
                return Sample(tuple(ids[: place + 1]), "stop")
        return Sample(tuple(ids), "length")


class _Probes:
    """The distributions that transformers' generate draws some rows from, step by step."""

    def __init__(self, rows: list[int]) -> None:
        self.rows = rows
        self._steps: list[Any] = []

    def processor(self) -> Any:
        """A logits processor that keeps what it sees and changes nothing."""
        from transformers import LogitsProcessor

        rows, steps = self.rows, self._steps

        class Keep(LogitsProcessor):  # type: ignore[misc]
            def __call__(self, input_ids: Any, scores: Any) -> Any:
                steps.append(scores[rows].float().log_softmax(-1))
                return scores

        return Keep()

    def complete(self, samples: list[Sample]) -> list[Sample]:
        """The batch's samples, the probed ones with the log-probabilities of their tokens."""
        for n, row in enumerate(self.rows):
            ids = samples[row].ids
            logps = tuple(float(self._steps[place][n, token]) for place, token in enumerate(ids))
            samples[row] = replace(samples[row], logps=logps)
        return samples


def _gumbel(seeds: Sequence[int]) -> Any:
    """A logits processor that adds Gumbel noise, each row from its own seed."""
    import torch
    from transformers import LogitsProcessor

    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    class Gumbel(LogitsProcessor):  # type: ignore[misc]
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            # -log(E) with E exponential is Gumbel noise; float64 keeps the tail.
            noise = torch.stack(
                [
                    torch.empty(scores.shape[-1], dtype=torch.float64).exponential_(generator=g)
                    for g in generators
                ]
            )
            return scores.double() - noise.log().to(scores.device)

    return Gumbel()
