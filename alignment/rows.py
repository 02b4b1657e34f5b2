"""The rows that stages hand to each other, one dataclass a parquet file."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Prompt:
    """A conversation that ends with the user's turn, and what is known about a good answer."""

    prompt_id: str
    messages: tuple[Message, ...]
    group: str
    """Rows of one group never land on both sides of the training and held-out split."""
    real: str | None = None
    """The human (ground-truth) response, for SPIN and SFT."""
    verifier: str | None = None
    """JSON {"id": IFEval instruction id, "kwargs": {...}} of the constraint to check."""

    @property
    def text(self) -> str:
        """What a judge reads, and a policy without a chat template: the last turn alone, or the
        labelled turns when there are more, below what the system says."""
        system = [m.content for m in self.messages if m.role == "system"]
        turns = [m for m in self.messages if m.role != "system"]
        one = len(turns) == 1
        asked = turns[0].content if one else "\n".join(f"{m.role}: {m.content}" for m in turns)
        return "\n\n".join([*system, asked])


@dataclass(frozen=True)
class Response:
    """One sampled (or given) response. The ids are what training sees: nothing is re-tokenised."""

    prompt_id: str
    k: int
    """Number of the response among those of its prompt, from 0."""
    iteration: int
    text: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    """Ends with exactly one EOS when finish_reason is "stop", with none when it is "length"."""
    finish_reason: str
    seed: int
    logps: tuple[float, ...] = ()
    """Of a probe: the sampler's log-probability of each response token, in nats, at its temperature
    and top_p; what the parity gate compares. Empty for all other responses."""


@dataclass(frozen=True)
class Judged:
    """A prompt's K responses compared with each other."""

    prompt_id: str
    iteration: int
    logits: tuple[tuple[float, ...], ...]
    """(K, K) judge logits, row beats column; the diagonal is 0."""
    details: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """Judge's own (K,) figures a response, such as passed and relevance."""


@dataclass(frozen=True)
class Ranked:
    """One judged response among those of its prompt, for best of K and for reading."""

    prompt_id: str
    k: int
    rank: int
    """1 is best; equals share the better rank."""
    win_probability: float
    """P̂ over the K responses, self term included; both orders averaged as logits."""
    text: str


@dataclass(frozen=True)
class Pair:
    """Two responses to one prompt, with what the losses need."""

    pair_id: str
    prompt_id: str
    iteration: int
    """The iteration whose policy wrote the generated responses."""
    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    chosen_win: float
    """Estimated probability that the chosen response beats the policy, in [0, 1]."""
    rejected_win: float
    pair_win: float
    """Estimated probability that the chosen response beats the rejected one, in [0, 1]."""


@dataclass(frozen=True)
class ReferencedPair(Pair):
    """A pair with the reference policy's log-probabilities, in nats, summed over the response."""

    chosen_reference_logp: float
    rejected_reference_logp: float
