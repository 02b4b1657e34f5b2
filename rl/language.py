"""REINFORCE with recursive variance reduction on a causal language model with a checkable reward.

STORM-PG (arXiv 2003.04302) where a trajectory is a response, its reward comes at the end, and a
policy is a LoRA adapter: see docs/rl/language.md.

Shape legend: P prompts, K responses a prompt, N = P K responses.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparring.launch.seeds import derive
from sparring.optimizers.recursive import RecursiveEstimator
from sparring.rl.language_policy import POLICY, PREVIOUS, Answer, LanguagePolicy
from sparring.rl.ranges import check_count, check_range
from sparring.rl.states import check_settings
from sparring.rl.steps import Ascent, StepRule, norm

Reward = Callable[[int, str], float]
"""(number of the prompt, text of the response) to a finite number."""
Record = dict[str, float]


def leave_one_out(rewards_PK: Tensor) -> Tensor:
    """(P, K) reward less the mean of the prompt's other responses, which leaves no bias.

    Raises:
        ValueError: K below 2.
    """
    k = rewards_PK.shape[1]
    if k < 2:
        raise ValueError(f"leave-one-out needs at least 2 responses a prompt, not {k}")
    return (rewards_PK - rewards_PK.mean(1, keepdim=True)) * (k / (k - 1))


def sequence_weights(
    old_N: Tensor,
    new_N: Tensor,
    advantage_N: Tensor,
    *,
    clip: float | None = None,
    dual: float | None = None,
) -> Tensor:
    """w = pi_old(y | x) / pi_new(y | x), one a response; E w = 1 under pi_new.

    With the reward at the end the weight is that of the whole response, and its variance grows with
    the length. Clipping bounds it, with bias, as PPO's surrogate does (arXiv 1707.06347):

        clip = e   at most 1 + e where the advantage is not negative, at least 1 - e where it is
        dual = c   also at most c where the advantage is negative (dual clip, arXiv 1912.09729)

    Args:
        old_N, new_N: log-probabilities of whole responses, float64.
        advantage_N: their sign chooses the side.
        clip: in (0, 1), or None.
        dual: at least 1, or None; needs `clip`.

    Returns:
        (N,) without gradient.

    Raises:
        ValueError: clip or dual outside its range.
        FloatingPointError: a weight that is not finite, for all that was clipped.
    """
    check_clip(clip, dual)
    with torch.no_grad():
        # Bounds act on logarithms, or a weight that they are for would overflow before.
        logs = old_N - new_N
        if clip is not None:
            below = logs.clamp(math.log(1 - clip), None if dual is None else math.log(dual))
            logs = torch.where(advantage_N < 0, below, logs.clamp(max=math.log(1 + clip)))
        weights = logs.exp()
        if not torch.isfinite(weights).all():
            raise FloatingPointError(
                f"a log weight is {float(logs.max()):.4g}: the step between the two policies is "
                "too long; lower lr, shorten the responses, or set clip and dual"
            )
        return weights


def check_clip(clip: float | None, dual: float | None) -> None:
    """Raises ValueError: clip or dual outside its range."""
    if clip is not None and not 0 < clip < 1:
        raise ValueError(f"clip must lie in (0, 1), not {clip!r}; None is off")
    if dual is not None and (clip is None or not dual >= 1):
        raise ValueError(f"dual must be at least 1 and needs clip, not {dual!r} with {clip!r}")


class LanguageStormPG:
    """STORM-PG on responses of a language model.

        d(xi)        = (1/N) sum_n A_n grad log pi_xi(y_n | x_n)                 y ~ pi_xi
        d^{xi'}(xi)  = (1/N) sum_n w_n A_n grad log pi_xi(y_n | x_n)             y ~ pi_xi'
        g_{t+1}      = d(xi_{t+1}) + (1 - alpha) (g_t - d^{xi_{t+1}}(xi_t))

    A_n is the reward less the mean of the prompt's other responses, w_n = `sequence_weights`.
    alpha = 1 is REINFORCE with that baseline; the correction costs a second backward pass.

    Args:
        policy: the model with its adapters.
        prompts: token ids of the training prompts, at least as many as a batch takes.
        reward: of (number of the prompt, text).
        alpha: weight of the new estimate, in [0, 1].
        batch: P, prompts an iteration.
        init_batch: prompts of the first iteration; `batch` if None.
        k: K, responses a prompt, at least 2.
        max_new_tokens: limit of a response.
        lr: learning rate.
        optimizer: "adam", "sgd", "normalised" or "mars".
        clip, dual: as of `sequence_weights`.
        seed: of the order of prompts and of the responses.

    Raises:
        ValueError: an argument outside its range.

    A record has: iteration, samples (responses so far), tokens (sampled so far), reward (mean of
    the batch), length (mean, in tokens), gradient_norm (of g), lr; and of the weights before
    clipping max_weight, ess (as a share of N), clipped (share that was changed) and kl (estimate of
    KL(present || previous) in nats a response).
    """

    def __init__(
        self,
        policy: LanguagePolicy,
        prompts: Sequence[Sequence[int]],
        reward: Reward,
        *,
        alpha: float,
        batch: int,
        max_new_tokens: int,
        lr: float,
        init_batch: int | None = None,
        k: int = 4,
        optimizer: StepRule = "adam",
        clip: float | None = None,
        dual: float | None = None,
        seed: int = 0,
    ) -> None:
        check_range("alpha", alpha, 0, 1)
        batch, k = check_count("batch", batch), check_count("k", k)
        init_batch = batch if init_batch is None else check_count("init_batch", init_batch)
        if k < 2:
            raise ValueError(f"k must be at least 2, the baseline is of the others, not {k}")
        check_clip(clip, dual)
        if len(prompts) < max(batch, init_batch):
            raise ValueError(
                f"{len(prompts)} prompts are fewer than one batch takes: batch = {batch}, "
                f"init_batch = {init_batch}"
            )
        self.policy, self.prompts, self.reward = policy, prompts, reward
        self.alpha, self.batch, self.init_batch, self.k = alpha, batch, init_batch, k
        self.max_new_tokens = check_count("max_new_tokens", max_new_tokens)
        self.clip, self.dual, self.seed = clip, dual, seed
        # With alpha = 1 the correction has weight 0, and its cost can be saved.
        self.recursion = RecursiveEstimator(1 - alpha, gamma=float(alpha < 1))
        self._ascent = Ascent(policy.parameters(POLICY).items(), optimizer, lr, 1.0)
        self.iteration = self.taken = self.samples = self.tokens = 0

    def chosen(self) -> list[int]:
        """Numbers of the next iteration's prompts: each epoch takes all, in an order of its own."""
        size = self.batch if self.iteration else self.init_batch
        count, found = len(self.prompts), []
        for place in range(self.taken, self.taken + size):
            order = np.random.default_rng(derive(self.seed, "order", place // count))
            found.append(int(order.permutation(count)[place % count]))
        return found

    def step(self) -> Record:
        """One iteration; returns its record.

        Raises:
            ValueError: a reward is not finite.
            FloatingPointError: the run has diverged: a weight or the gradient is not finite. The
                method is as it was at the beginning of the iteration.
        """
        numbers = self.chosen()
        answers = self.policy.sample(
            [self.prompts[n] for n in numbers],
            self.k,
            self.max_new_tokens,
            derive(self.seed, "responses", self.iteration),
        )
        rewards_PK = self._rewards(numbers, answers)
        present, reference, figures = self.gradients(answers, leave_one_out(rewards_PK).flatten())
        past = copy.deepcopy(self.recursion.state_dict())
        # Copies, since the next step of the recursion works in place.
        direction = [g.clone() for g in self.recursion.update(present, reference)]
        length = float(norm(direction))
        if not math.isfinite(length):
            self.recursion.load_state_dict(past)
            raise FloatingPointError(
                f"the gradient estimate of iteration {self.iteration + 1} is not finite; lower lr"
            )
        lr = self._ascent.lr
        self.policy.remember()
        self._ascent.step(direction)
        self.iteration += 1
        self.taken += len(numbers)
        self.samples += len(answers)
        lengths = [len(answer.response) for answer in answers]
        self.tokens += sum(lengths)
        return {
            "iteration": self.iteration,
            "samples": self.samples,
            "tokens": self.tokens,
            "reward": float(rewards_PK.mean()),
            "length": sum(lengths) / len(lengths),
            "gradient_norm": length,
            "lr": lr,
            **figures,
        }

    def _rewards(self, numbers: Sequence[int], answers: Sequence[Answer]) -> Tensor:
        values = [
            float(self.reward(numbers[n // self.k], self.policy.text(answer)))
            for n, answer in enumerate(answers)
        ]
        rewards = torch.tensor(values, dtype=torch.float64).view(len(numbers), self.k)
        if not torch.isfinite(rewards).all():
            raise ValueError("a reward is not finite; fix the reward function")
        return rewards

    def gradients(
        self, answers: Sequence[Answer], advantage_N: Tensor
    ) -> tuple[list[Tensor], list[Tensor] | None, Record]:
        """d at the present policy, d at the previous one on the same answers, and figures."""
        advantage_N = advantage_N.to(self.policy.device)
        size = len(answers)

        def plain(rows: slice, logp: Tensor) -> Tensor:
            return advantage_N[rows] / size

        present, new_N = self.policy.gradient(POLICY, answers, plain)
        if self.iteration == 0 or self.alpha == 1:
            return present, None, {"max_weight": 1.0, "ess": 1.0, "clipped": 0.0, "kl": 0.0}

        def weighted(rows: slice, logp: Tensor) -> Tensor:
            pair = (logp, new_N[rows], advantage_N[rows])
            weights = sequence_weights(*pair, clip=self.clip, dual=self.dual)
            return weights * advantage_N[rows] / size

        reference, old_N = self.policy.gradient(PREVIOUS, answers, weighted)
        logs = old_N - new_N  # those before clipping may be too large for a float
        used = sequence_weights(old_N, new_N, advantage_N, clip=self.clip, dual=self.dual)
        figures = {
            "max_weight": min(float(logs.max().exp()), sys.float_info.max),
            "ess": float((2 * logs.logsumexp(0) - (2 * logs).logsumexp(0)).exp()) / size,
            "clipped": float((logs.exp() != used).double().mean()),
            "kl": float((new_N - old_N).mean()),
        }
        return present, reference, figures

    def evaluate(
        self, prompts: Sequence[Sequence[int]], reward: Reward, *, k: int = 1, seed: int = 0
    ) -> float:
        """Mean reward of K responses to each of other prompts; changes nothing."""
        total = 0.0
        for begin in range(0, len(prompts), self.batch):
            part = prompts[begin : begin + self.batch]
            place = derive(seed, "evaluate", begin)
            answers = self.policy.sample(part, k, self.max_new_tokens, place)
            texts = [self.policy.text(answer) for answer in answers]
            total += sum(reward(begin + n // k, text) for n, text in enumerate(texts))
        return total / (len(prompts) * k)

    def _settings(self) -> dict[str, Any]:
        """What a state must agree on to be gone on from."""
        names = ("alpha", "batch", "init_batch", "k", "max_new_tokens", "clip", "dual", "seed")
        return {name: getattr(self, name) for name in names}

    def state_dict(self) -> dict[str, Any]:
        """All that the next iteration depends on, but the model: adapter-sized."""
        counters = ("iteration", "taken", "samples", "tokens")
        return {
            "settings": self._settings(),
            **{
                adapter: {n: p.detach().clone() for n, p in self.policy.parameters(adapter).items()}
                for adapter in (POLICY, PREVIOUS)
            },
            "recursion": self.recursion.state_dict(),
            "optimizer": self._ascent.state_dict(),
            "counters": {name: getattr(self, name) for name in counters},
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state, exactly.

        Raises:
            ValueError: the state is of other settings.
        """
        check_settings(self._settings(), state["settings"])
        for adapter in (POLICY, PREVIOUS):
            for name, parameter in self.policy.parameters(adapter).items():
                parameter.copy_(state[adapter][name])
        self.recursion.load_state_dict(state["recursion"])
        self._ascent.load_state_dict(state["optimizer"])
        for name, value in state["counters"].items():
            setattr(self, name, value)
