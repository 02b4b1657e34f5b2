"""STORM-PG on a language model: sums over all responses of a tiny one, REINFORCE, resuming."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sparring.rl.language import LanguageStormPG, leave_one_out, sequence_weights
from sparring.rl.language_policy import POLICY, PREVIOUS, Answer, LanguagePolicy

EOS = 0
PROMPTS = [[1, 2], [3], [2, 2, 1]]
# Every response of at most two tokens out of four, the first of which is EOS.
RESPONSES = [(EOS,), *((a, b) for a in (1, 2, 3) for b in range(4))]


class Letters:
    """Just enough of a tokenizer."""

    eos_token_id = EOS
    pad_token_id = None

    def decode(self, ids: Any, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join("_abc"[i] for i in ids if i != EOS)


def policy(*, micro: int = 64, seed: int = 0) -> LanguagePolicy:
    """A random Llama of four tokens in float64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=4,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        eos_token_id=EOS,
        bos_token_id=1,
        pad_token_id=EOS,
        initializer_range=0.6,
    )
    model = LlamaForCausalLM(config).double()
    found = LanguagePolicy(model, Letters(), rank=2, micro=micro, seed=seed)
    found.model.double()
    return found


def part(both: LanguagePolicy, size: float = 0.3) -> None:
    """Move policy and previous policy away from the base and from each other."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for adapter in (PREVIOUS, POLICY):
            for parameter in both.parameters(adapter).values():
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter += size * noise


def reward(number: int, text: str) -> float:
    return 1.5 * text.count("a") - text.count("b") + 0.7 * number + 0.2 * len(text)


def method(both: LanguagePolicy, **changes: Any) -> LanguageStormPG:
    settings = {"alpha": 0.4, "batch": 2, "k": 3, "max_new_tokens": 2, "lr": 0.05, "seed": 3}
    return LanguageStormPG(both, PROMPTS, reward, **{**settings, **changes})


def answers(prompt: list[int]) -> list[Answer]:
    return [Answer(tuple(prompt), response) for response in RESPONSES]


def logp(both: LanguagePolicy, adapter: str, rows: list[Answer]) -> Tensor:
    both.model.set_adapter(adapter)
    return both.log_probabilities(rows)


def true_gradient(both: LanguagePolicy, adapter: str, prompt: list[int], number: int) -> Tensor:
    """Of sum_y pi(y) r(y), by autograd."""
    rows = answers(prompt)
    values = torch.tensor([reward(number, both.text(a)) for a in rows], dtype=torch.float64)
    total = (logp(both, adapter, rows).exp() * values).sum()
    grads = torch.autograd.grad(total, list(both.parameters(adapter).values()))
    return torch.cat([g.flatten() for g in grads])


def test_log_probabilities_are_those_of_a_distribution_whatever_the_padding() -> None:
    both = policy()
    part(both)
    for adapter in (POLICY, PREVIOUS):
        for prompt in PROMPTS:
            with torch.no_grad():
                total = logp(both, adapter, answers(prompt)).exp().sum()
            assert float(total) == pytest.approx(1, abs=1e-12)
    with torch.no_grad():
        mixed = [a for prompt in PROMPTS for a in answers(prompt)]
        together = logp(both, POLICY, mixed)
        alone = torch.cat([logp(both, POLICY, [a]) for a in mixed])
    assert torch.allclose(together, alone, atol=1e-12)


# Each changes the law of the samples if `generate` sees it.
OWN_SETTINGS: list[dict[str, Any]] = [
    {},
    {"min_p": 0.9},
    {"no_repeat_ngram_size": 1, "repetition_penalty": 1.5},
    {"suppress_tokens": [1], "top_k": 2, "temperature": 0.5},
]


@pytest.mark.parametrize("own", OWN_SETTINGS, ids=[str(list(own)) for own in OWN_SETTINGS])
def test_samples_have_the_policys_law_and_keep_their_eos(own: dict[str, Any]) -> None:
    from transformers import GenerationConfig

    both = policy()
    part(both)
    settings = GenerationConfig(do_sample=True, **own)
    both.model.generation_config = both.model.get_base_model().generation_config = settings
    drawn = both.sample([PROMPTS[0], PROMPTS[1]], 2000, 2, seed=1)
    assert both.sample([PROMPTS[0], PROMPTS[1]], 2, 2, seed=1)[0].prompt == tuple(PROMPTS[0])
    for n, prompt in enumerate(PROMPTS[:2]):
        found = [answer.response for answer in drawn[2000 * n : 2000 * (n + 1)]]
        with torch.no_grad():
            chances = logp(both, POLICY, answers(prompt)).exp().tolist()
        assert set(found) <= set(RESPONSES)
        assert both.model.get_base_model().generation_config is settings
        for response, chance in zip(RESPONSES, chances, strict=True):
            error = 4.5 * (chance * (1 - chance) / 2000) ** 0.5
            assert found.count(response) / 2000 == pytest.approx(chance, abs=error)


@pytest.mark.parametrize("corrects", [False, True])
def test_estimates_are_unbiased_at_both_policies(corrects: bool) -> None:
    """E over all pairs of responses, with the leave-one-out baseline and the sequence weights."""
    both = policy()
    part(both)
    here = method(both, k=2)
    here.iteration = 1  # else nothing is corrected
    number, prompt = 1, PROMPTS[1]
    with torch.no_grad():
        chance = logp(both, POLICY, answers(prompt)).exp()
    expected = true_gradient(both, PREVIOUS if corrects else POLICY, prompt, number)
    found = torch.zeros_like(expected)
    for a, b in itertools.product(range(len(RESPONSES)), repeat=2):
        pair = [answers(prompt)[a], answers(prompt)[b]]
        rewards = torch.tensor([[reward(number, both.text(x)) for x in pair]], dtype=torch.float64)
        estimates = here.gradients(pair, leave_one_out(rewards).flatten())
        assert estimates[1] is not None
        flat = torch.cat([g.flatten() for g in estimates[corrects]])
        found += chance[a] * chance[b] * flat
    assert expected.abs().max() > 1e-3
    # Llama's RMSNorm works in float32.
    assert torch.allclose(found, expected, atol=1e-5)
    # The other policy's gradient is another one, so that the check can fail.
    other = true_gradient(both, POLICY if corrects else PREVIOUS, prompt, number)
    assert not torch.allclose(found, other, atol=1e-3)


def test_weights_have_mean_one() -> None:
    both = policy()
    part(both)
    with torch.no_grad():
        new, old = (logp(both, a, answers(PROMPTS[0])) for a in (POLICY, PREVIOUS))
    weights = sequence_weights(old, new, torch.zeros(len(new)))
    assert float((new.exp() * weights).sum()) == pytest.approx(1, abs=1e-12)
    assert float((weights - 1).abs().max()) > 0.05


def test_clipping_by_hand() -> None:
    ratios = np.array([0.5, 0.9, 1.1, 1.5, 0.5, 0.9, 1.5, 4.0])
    advantage = torch.tensor([1.0, 1, 0, 1, -1, -1, -1, -1])
    new = torch.zeros(8, dtype=torch.float64)
    old = torch.from_numpy(np.log(ratios))

    def clipped(**options: Any) -> list[float]:
        return sequence_weights(old, new, advantage, **options).tolist()

    assert clipped() == pytest.approx(ratios)
    single = [0.5, 0.9, 1.1, 1.2, 0.8, 0.9, 1.5, 4.0]
    assert clipped(clip=0.2) == pytest.approx(single)
    assert clipped(clip=0.2, dual=3.0) == pytest.approx([*single[:-1], 3.0])
    with pytest.raises(FloatingPointError, match="lower lr"):
        sequence_weights(old + 800, new, advantage)
    # What is bounded may be as large as it likes.
    bounded = sequence_weights(old + 800, new, advantage, clip=0.2, dual=3.0)
    assert bounded.tolist() == pytest.approx([1.2] * 4 + [3.0] * 4)
    with pytest.raises(FloatingPointError, match="set clip and dual"):
        sequence_weights(old + 800, new, advantage, clip=0.2)


def test_alpha_one_is_plain_reinforce() -> None:
    """By autograd on the loss of a textbook: equal up to the order of its sums."""
    storm = method(policy(), alpha=1.0)
    records = [storm.step() for _ in range(4)]
    assert [r["max_weight"] for r in records] == [1.0] * 4
    again = policy()
    plain = method(again, alpha=1.0)  # for its prompts and seeds only; it never steps
    parameters = list(again.parameters(POLICY).values())
    adam = torch.optim.Adam(parameters, lr=0.05)
    from sparring.launch.seeds import derive

    for t in range(4):
        numbers = plain.chosen()
        drawn = again.sample([PROMPTS[n] for n in numbers], 3, 2, derive(3, "responses", t))
        rewards = torch.tensor(
            [reward(numbers[i // 3], again.text(a)) for i, a in enumerate(drawn)],
            dtype=torch.float64,
        ).view(2, 3)
        others = (rewards.sum(1, keepdim=True) - rewards) / 2
        loss = -((rewards - others).flatten() * again.log_probabilities(drawn)).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        plain.iteration, plain.taken = t + 1, plain.taken + 2
    for mine, theirs in zip(storm.policy.parameters(POLICY).values(), parameters, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-14)


def test_the_recursion_is_stormpgs() -> None:
    """g_{t+1} = d(new) + (1 - alpha) (g_t - d(old)); the previous policy is that of a step ago."""
    storm = method(policy(), alpha=0.3)
    storm.step()
    before = {n: p.clone() for n, p in storm.policy.parameters(POLICY).items()}
    (g,) = [[t.clone() for t in storm.recursion.estimate or []]]
    seen: list[Any] = []
    original = storm.gradients

    def spy(*arguments: Any) -> Any:
        seen.append(original(*arguments))
        return seen[-1]

    storm.gradients = spy  # type: ignore[method-assign]
    record = storm.step()
    present, reference, _ = seen[0]
    for mine, new, old, estimate in zip(
        g, present, reference, storm.recursion.estimate or [], strict=True
    ):
        assert torch.allclose(estimate, new + 0.7 * (mine - old), atol=1e-12)
    for name, parameter in storm.policy.parameters(PREVIOUS).items():
        assert torch.equal(parameter, before[name])
    assert record["max_weight"] != 1
    assert 0 < record["ess"] <= 1
    assert record["clipped"] == 0


def test_micro_batches_change_rounding_only() -> None:
    whole, split = method(policy()), method(policy(micro=4))
    for _ in range(3):
        first, second = whole.step(), split.step()
        assert first == pytest.approx(second, abs=1e-9)


def test_it_resumes_exactly(tmp_path: Path) -> None:
    straight = method(policy(), clip=0.2, dual=2.0)
    records = [straight.step() for _ in range(5)]
    halted = method(policy(), clip=0.2, dual=2.0)
    for _ in range(2):
        halted.step()
    torch.save(halted.state_dict(), tmp_path / "state.pt")
    again = method(policy(seed=9), clip=0.2, dual=2.0)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [again.step() for _ in range(3)] == records[2:]
    for adapter in (POLICY, PREVIOUS):
        pairs = zip(
            again.policy.parameters(adapter).values(),
            straight.policy.parameters(adapter).values(),
            strict=True,
        )
        assert all(torch.equal(a, b) for a, b in pairs)
    with pytest.raises(ValueError, match=r"alpha = 0\.4, here 0\.5"):
        method(policy(), alpha=0.5).load_state_dict(torch.load(tmp_path / "state.pt"))


def test_it_learns_the_reward() -> None:
    storm = method(policy(), alpha=0.8, batch=3, k=8)
    records = [storm.step()["reward"] for _ in range(40)]
    assert np.mean(records[-5:]) > np.mean(records[:5]) + 0.8
    assert storm.evaluate(PROMPTS, reward, k=8) > np.mean(records[:5]) + 0.8


def test_every_epoch_takes_every_prompt() -> None:
    storm = method(policy(), batch=3)
    assert sorted(storm.chosen()) == [0, 1, 2]
    storm.iteration, storm.taken = 1, 3
    assert sorted(storm.chosen()) == [0, 1, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 1.5}, "alpha must lie in"),
        ({"k": 1}, "k must be at least 2"),
        ({"batch": 4}, "3 prompts are fewer"),
        ({"batch": 0}, "batch must be a whole number"),
        ({"clip": 1.2}, "clip must lie in"),
        ({"dual": 2.0}, "dual must be at least 1 and needs clip"),
        ({"lr": 0.0}, "lr must be above 0"),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method(policy(), **changes)


def test_a_reward_must_be_finite() -> None:
    broken = LanguageStormPG(
        policy(), PROMPTS, lambda n, text: float("nan"), alpha=1.0, batch=2, max_new_tokens=2, lr=1
    )
    with pytest.raises(ValueError, match="not finite"):
        broken.step()


def test_weights_beyond_all_floats_are_bounded_and_recorded() -> None:
    """Two policies that have nothing in common: clipping holds, and the record stays JSON."""
    both = policy()
    storm = method(both, clip=0.2, dual=2.0)
    storm.step()
    spread = both.gradient

    def apart(adapter: str, rows: Any, coefficients: Any) -> Any:
        if adapter == POLICY:
            found, logp = spread(adapter, rows, coefficients)
            return found, logp - 2000
        return spread(adapter, rows, coefficients)

    both.gradient = apart  # type: ignore[method-assign]
    record = storm.step()
    assert all(np.isfinite(value) for value in record.values())
    assert record["max_weight"] > 1e300
    assert 0 < record["ess"] <= 1
    assert record["clipped"] == 1


def test_an_error_at_the_previous_adapter_leaves_the_policy_in_place() -> None:
    both = policy()
    answers = both.sample(PROMPTS, 1, 3, seed=0)

    def broken(*_: Any) -> Any:
        raise FloatingPointError("too large")

    with pytest.raises(FloatingPointError, match="too large"):
        both.gradient(PREVIOUS, answers, broken)
    assert both.model.active_adapter == POLICY


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    both = policy()
    storm, straight = method(both), method(policy())
    for _ in range(2):
        storm.step()
        straight.step()
    before, good = storm.state_dict(), both.gradient
    estimate = [g.clone() for g in before["recursion"]["estimate"]]

    def broken(*arguments: Any) -> Any:
        found, logp = good(*arguments)
        return [torch.full_like(g, torch.inf) for g in found], logp

    both.gradient = broken  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError, match="of iteration 3 is not finite; lower lr"):
        storm.step()
    after = storm.state_dict()
    assert after["counters"] == before["counters"]
    for adapter in (POLICY, PREVIOUS):
        assert all(torch.equal(after[adapter][n], p) for n, p in before[adapter].items())
    assert all(
        torch.equal(a, b) for a, b in zip(after["recursion"]["estimate"], estimate, strict=True)
    )
    both.gradient = good  # type: ignore[method-assign]
    assert storm.step() == straight.step()
