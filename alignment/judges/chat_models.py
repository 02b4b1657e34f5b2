"""Chat models that are asked questions: an OpenAI-compatible endpoint, or vLLM in this process."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sparring.launch.errors import SparringError, UsageError

TOP_LOGPROBS = 20  # the most that OpenAI's interface and vLLM's default give


@dataclass(frozen=True)
class Token:
    """One token of an answer."""

    text: str
    top: Mapping[str, float]
    """Log-probabilities of the likeliest tokens at this place, in nats."""


@dataclass(frozen=True)
class Answer:
    """What a chat model said."""

    text: str
    tokens: tuple[Token, ...] = ()
    """Empty when the model gives no log-probabilities."""


@dataclass(frozen=True)
class Refusal:
    """Why there is no usable answer to one question."""

    reason: str


class ChatModel(Protocol):
    """Answers questions; `counts` says what that took (requests, input_tokens, output_tokens)."""

    counts: Counter[str]

    @property
    def identity(self) -> str: ...

    def ask(
        self, questions: Sequence[str], readable: Callable[[Answer], bool]
    ) -> Iterator[tuple[int, Answer | Refusal]]:
        """Each question's number with its answer, as they come."""
        ...


class _Unreadable(Exception):
    """An answer in which `readable` finds nothing."""


class EndpointChat:
    """A model behind an OpenAI-compatible endpoint, asked by several threads."""

    def __init__(
        self,
        model: str,
        base_url: str,
        *,
        api_key_env: str,
        max_tokens: int,
        logprobs: bool,
        concurrency: int,
        timeout: float,
        retries: int,
        backoff: float,
    ) -> None:
        """Make a client; nothing is asked yet.

        Args:
            model: its name there.
            base_url: such as http://localhost:8000/v1.
            api_key_env: name of the environment variable with the key, never the key; empty: none.
            max_tokens: longest answer.
            logprobs: ask for log-probabilities.
            concurrency: questions at a time.
            timeout: of a question, in seconds.
            retries: further attempts at a question.
            backoff: seconds before the first of them, doubling to 30.

        Raises:
            UsageError: a number is out of range, or the environment variable that `api_key_env`
                names is not set.
            SparringError: the packages openai or tenacity are missing.
        """
        self._check(concurrency=(concurrency, 1), retries=(retries, 0), backoff=(backoff, 0))
        if timeout <= 0:
            raise UsageError(f"judge option timeout must be above 0 seconds, not {timeout}")
        try:
            import openai
            import tenacity
        except ImportError as error:
            raise SparringError(
                f"the judge llm needs a package that is not installed here ({error}); "
                f"install it with: pip install 'sparring[judge]'"
            ) from None
        key = self._key(api_key_env)
        self._openai, self._tenacity = openai, tenacity
        # Retries are counted here, so the client must not retry by itself.
        self._client = openai.OpenAI(base_url=base_url, api_key=key, timeout=timeout, max_retries=0)
        self.model, self.base_url = model, base_url
        self.max_tokens, self.logprobs = max_tokens, logprobs
        self.concurrency, self.timeout = concurrency, timeout
        self.retries, self.backoff = retries, backoff
        self.counts: Counter[str] = Counter(requests=0, input_tokens=0, output_tokens=0)
        self._answered = False
        self._lock = threading.Lock()

    @staticmethod
    def _check(**options: tuple[float, float]) -> None:
        for name, (value, least) in options.items():
            if value < least:
                raise UsageError(f"judge option {name} must be at least {least}, not {value}")

    @staticmethod
    def _key(variable: str) -> str:
        if not variable:
            return "none"  # the client wants one; servers without keys ignore it
        key = os.environ.get(variable, "")
        if not key:
            raise UsageError(
                f"judge option api_key_env names {variable!r}, and that environment variable is "
                f"not set here; export it, or remove the option"
            )
        return key

    @property
    def identity(self) -> str:
        """Model and address; what the endpoint serves under that name is not known here."""
        return f"endpoint {self.model} {self.base_url}"

    def ask(
        self, questions: Sequence[str], readable: Callable[[Answer], bool]
    ) -> Iterator[tuple[int, Answer | Refusal]]:
        """Each question's number with its answer, as they come.

        Timeouts, connection errors, HTTP 429 and 5xx and unreadable answers are tried again, with
        waits that double.

        Raises:
            SparringError: the endpoint cannot be reached, has never answered, or refuses the key
                or the model.
        """
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            numbers = {pool.submit(self._ask, q, readable): n for n, q in enumerate(questions)}
            for done in as_completed(numbers):
                yield numbers[done], done.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _ask(self, question: str, readable: Callable[[Answer], bool]) -> Answer | Refusal:
        api, tenacity = self._openai, self._tenacity
        again = (api.APIConnectionError, api.RateLimitError, api.InternalServerError, _Unreadable)
        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self.retries + 1),
            wait=tenacity.wait_exponential(multiplier=self.backoff, max=30)
            + tenacity.wait_random(0, self.backoff),
            retry=tenacity.retry_if_exception_type(again),
            reraise=True,
        )
        try:
            answer: Answer = retrying(self._once, question, readable)
            return answer
        except _Unreadable as error:
            return Refusal(str(error))
        except api.APITimeoutError:
            return self._given_up(f"no answer within {self.timeout:g} s")
        except api.APIConnectionError as error:
            raise SparringError(
                f"the judge's endpoint {self.base_url} cannot be reached "
                f"({error.__cause__ or error}); is the server running, and is base_url right "
                f"(http://host:port/v1)? The same command goes on from here"
            ) from None
        except (api.RateLimitError, api.InternalServerError) as error:
            return self._given_up(f"HTTP {error.status_code}: {error.message}")
        except (api.BadRequestError, api.UnprocessableEntityError) as error:
            return Refusal(f"HTTP {error.status_code}: {error.message}")
        except api.APIStatusError as error:
            raise SparringError(
                f"the judge's endpoint {self.base_url} refuses the model {self.model!r}: "
                f"HTTP {error.status_code}: {error.message}; look at judge.path, base_url and "
                f"api_key_env"
            ) from None

    def _given_up(self, reason: str) -> Refusal:
        if not self._answered:
            raise SparringError(
                f"the judge's endpoint {self.base_url} has not answered once ({reason}, "
                f"{self.retries + 1} times); look at the server, or raise timeout or retries in "
                f"[judge.options]. The same command goes on from here"
            )
        return Refusal(reason)

    def _once(self, question: str, readable: Callable[[Answer], bool]) -> Answer:
        asked: dict[str, Any] = {}
        if self.logprobs:
            asked = {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        with self._lock:
            self.counts["requests"] += 1
        reply = self._client.chat.completions.create(
            model=self.model,
            messages=[{"role": "user", "content": question}],
            temperature=0.0,
            max_tokens=self.max_tokens,
            **asked,
        )
        with self._lock:
            self._answered = True
            if reply.usage:
                self.counts["input_tokens"] += reply.usage.prompt_tokens or 0
                self.counts["output_tokens"] += reply.usage.completion_tokens or 0
        if not reply.choices:
            raise _Unreadable("a reply without choices")
        choice = reply.choices[0]
        listed = (choice.logprobs and choice.logprobs.content) or []
        tokens = tuple(
            Token(at.token, {top.token: top.logprob for top in at.top_logprobs}) for at in listed
        )
        answer = Answer(choice.message.content or "", tokens)
        if not readable(answer):
            raise _Unreadable(f"no verdict in {answer.text[:200]!r}")
        return answer


class LocalChat:
    """vLLM with one engine in this process, greedy."""

    def __init__(
        self, model: str, *, max_tokens: int, max_length: int, dtype: str, memory: float
    ) -> None:
        """Load the model.

        Args:
            model: folder, hub id, or "smollm2".
            max_tokens: longest answer.
            max_length: longest question and answer in tokens; 0: what the model can read.
            dtype: number type of the model.
            memory: as generate.memory.

        Raises:
            SparringError: no such model, or vLLM cannot be imported.
        """
        from sparring.alignment.config import ModelConfig
        from sparring.alignment.engines import vllm_environment
        from sparring.alignment.models import locate
        from sparring.launch.processes import World

        self.folder = Path(locate(ModelConfig(path=model)))
        vllm_environment(World.from_environment(), memory=memory)
        try:
            import vllm
        except ImportError as error:
            raise SparringError(
                f"vLLM cannot be imported here ({error}); install it (`make install`), or give "
                f"the option base_url of an endpoint that serves {model!r}"
            ) from None
        import torch

        options: dict[str, Any] = {"max_model_len": max_length} if max_length else {}
        if not torch.cuda.is_available():
            options["enforce_eager"] = True
        elif memory:
            options["gpu_memory_utilization"] = memory
        self._vllm = vllm
        self._llm = vllm.LLM(str(self.folder), dtype=dtype, seed=0, **options)
        self._tokenizer = self._llm.get_tokenizer()
        self._room = self._llm.llm_engine.model_config.max_model_len - max_tokens
        self.max_tokens, self.dtype = max_tokens, dtype
        self.counts: Counter[str] = Counter(requests=0, input_tokens=0, output_tokens=0)

    @property
    def identity(self) -> str:
        """Hash of the model's files, number type and vLLM's version."""
        from sparring.launch.artifacts import content_digest

        digest = content_digest(self.folder)[:16]
        return f"vllm {self._vllm.__version__} {digest} {self.dtype}"

    def ask(
        self, questions: Sequence[str], readable: Callable[[Answer], bool]
    ) -> Iterator[tuple[int, Answer | Refusal]]:
        """Each question's number with its answer; greedy, so asking again would not change it."""
        prompts = {n: self._tokens(question) for n, question in enumerate(questions)}
        fitting = [n for n, ids in prompts.items() if len(ids) <= self._room]
        for n, ids in prompts.items():
            if len(ids) > self._room:
                yield n, Refusal(f"{len(ids)} tokens of question; the model reads {self._room}")
        params = self._vllm.SamplingParams(
            temperature=0.0, max_tokens=self.max_tokens, logprobs=TOP_LOGPROBS
        )
        outputs = self._llm.generate(
            [self._vllm.TokensPrompt(prompt_token_ids=prompts[n]) for n in fitting],
            params,
            use_tqdm=False,
        )
        for n, output in zip(fitting, outputs, strict=True):
            said = output.outputs[0]
            self.counts["requests"] += 1
            self.counts["input_tokens"] += len(prompts[n])
            self.counts["output_tokens"] += len(said.token_ids)
            tokens = tuple(
                Token(
                    top[token].decoded_token or "",
                    {at.decoded_token or "": at.logprob for at in top.values()},
                )
                for token, top in zip(said.token_ids, said.logprobs, strict=True)
            )
            answer = Answer(said.text, tokens)
            yield n, answer if readable(answer) else Refusal(f"no verdict in {said.text[:200]!r}")

    def _tokens(self, question: str) -> list[int]:
        text = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        # The template wrote the special tokens already.
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids
