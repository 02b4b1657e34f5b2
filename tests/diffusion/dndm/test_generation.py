"""`generate` with a BERT from transformers, and with functions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

from sparring.diffusion.dndm import (
    CosineCounts,
    LinearCounts,
    Reveal,
    absorbing,
    dndm,
    dndm_c,
    generate,
    integer_time,
    masked_lm,
    shaped,
    uniform,
)
from sparring.diffusion.dndm.denoisers import Network
from sparring.diffusion.dndm.network import TextDenoiser, TextDenoiserConfig

V, MASK = 30, 4


@pytest.fixture(scope="module")
def bert() -> BertForMaskedLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=V,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=32,
            initializer_range=0.5,
        )
        return BertForMaskedLM(config).eval()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


PROMPT = torch.tensor([[2, 7, MASK, MASK, 9, MASK, 3, 0], [2, MASK, 8, 8, MASK, MASK, MASK, 3]])
ATTENTION = (PROMPT != 0).long()


@pytest.mark.parametrize(
    ("sampler", "settings", "calls"),
    [
        ("dndm", {"steps": 1000}, 4),
        ("dndm-k", {}, 4),
        ("dndm-c", {}, 4),
        ("first-hitting", {}, 4),
        ("autoregressive", {}, 4),
        ("d3pm", {"steps": 6}, 6),
        ("rdm-k", {"steps": 6}, 6),
        (Reveal(counts=CosineCounts(2), position="margin"), {}, 2),
    ],
)
def test_infilling(
    bert: BertForMaskedLM, sampler: object, settings: dict[str, object], calls: int
) -> None:
    made = generate(
        bert,
        PROMPT,
        mask_token_id=MASK,
        attention_mask=ATTENTION,
        sampler=sampler,  # type: ignore[arg-type]
        generator=seeded(),
        output_history=True,
        suppress_tokens=[0, 2, 3],
        **settings,
    )
    fixed = PROMPT != MASK
    assert torch.equal(made.sequences[fixed], PROMPT[fixed])
    assert not set(made.sequences[~fixed].tolist()) & {0, 2, 3, MASK}
    assert made.nfe <= calls
    assert made.history is not None
    assert len(made.history) >= made.nfe + 1
    assert torch.equal(made.history[0], PROMPT)


def test_greedy_left_to_right_is_the_loop_written_out(bert: BertForMaskedLM) -> None:
    """And the attention mask goes along, cut to the rows of a call."""
    made = generate(
        bert, PROMPT, mask_token_id=MASK, attention_mask=ATTENTION, sampler="autoregressive"
    )
    for row in range(2):
        x = PROMPT[row : row + 1].clone()
        for n in (x[0] == MASK).nonzero()[:, 0]:
            with torch.no_grad():
                logits = bert(input_ids=x, attention_mask=ATTENTION[row : row + 1]).logits
            logits[..., MASK] = -math.inf
            x[0, n] = logits[0, n].argmax()
        assert torch.equal(made.sequences[row], x[0])
    seen: list[Tensor] = []

    def spy(x: Tensor, t: Tensor, attention_mask: Tensor) -> Tensor:
        seen.append(attention_mask)
        return masked_lm(bert)(x, t, attention_mask=attention_mask)

    again = generate(
        spy,
        PROMPT,
        noise=absorbing(V, MASK),
        attention_mask=ATTENTION,
        sampler="autoregressive",
    )
    assert torch.equal(again.sequences, made.sequences)
    assert [len(mask) for mask in seen] == [2, 2, 2, 1]
    assert torch.equal(seen[0], ATTENTION)
    assert torch.equal(seen[3], ATTENTION[1:])


def test_new_tokens(bert: BertForMaskedLM) -> None:
    x = torch.tensor([[0, 2, 7], [2, 8, 9]])
    attention = torch.tensor([[0, 1, 1], [1, 1, 1]])
    made = generate(
        bert,
        x,
        mask_token_id=MASK,
        attention_mask=attention,
        max_new_tokens=5,
        sampler="dndm-c",
        generator=seeded(),
    )
    assert made.sequences.shape == (2, 8)
    assert torch.equal(made.sequences[:, :3], x)
    assert made.nfe == 5
    assert made.row_evaluations == 10


def test_new_tokens_stand_before_the_padding(bert: BertForMaskedLM) -> None:
    """So that a row of a batch is what it is alone."""
    x = torch.tensor([[2, 7, 0, 0], [2, 8, 9, 6]])
    options: dict[str, Any] = {"mask_token_id": MASK, "max_new_tokens": 3, "steps": 9}
    made = generate(
        bert, x, attention_mask=x.ne(0).long(), generator=[seeded(1), seeded(2)], **options
    ).sequences
    alone = generate(bert, x[:1, :2], generator=[seeded(1)], **options).sequences
    assert torch.equal(made[0], torch.cat([alone[0], torch.zeros(2, dtype=torch.long)]))
    assert torch.equal(made[1, :4], x[1])
    with pytest.raises(ValueError, match=r"cond\['token_type_ids'\] has a value for each of 4"):
        generate(bert, x, cond={"token_type_ids": torch.zeros_like(x)}, **options)


def test_multinomial_noise_and_a_denoiser() -> None:
    def denoiser(x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        return torch.nn.functional.one_hot((x + shift[:, None]) % 5, 5).double() * 1e4

    x, free = torch.tensor([[1, 1, 1]]), torch.tensor([[False, True, True]])
    made = generate(
        denoiser,
        x,
        noise=uniform(5, [2]),
        free_mask=free,
        sampler="dndm",
        steps=3,
        generator=seeded(),
        cond={"shift": torch.tensor([1])},
    )
    assert made.sequences.tolist() == [[1, 3, 3]]


def test_the_default_generator_is_torchs(bert: BertForMaskedLM) -> None:
    with torch.random.fork_rng():
        made = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            made.append(generate(bert, PROMPT, mask_token_id=MASK).sequences)
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_temperature_shapes_the_law() -> None:
    logits = torch.tensor([[[0.0, 1.0, 2.0]]])
    cold = shaped(lambda x, t: logits, temperature=0.5, suppress_tokens=[2])
    assert cold(None, None).tolist() == [[[0.0, 2.0, -math.inf]]]
    assert logits.tolist() == [[[0.0, 1.0, 2.0]]]


def test_only_the_likeliest_tokens() -> None:
    chances = torch.tensor([[[0.4, 0.3, 0.2, 0.1], [0.05, 0.05, 0.1, 0.8]]])

    def kept(**options: float | list[int]) -> list[list[int]]:
        law = shaped(lambda x, t: chances.log(), **options)(None, None).softmax(-1)  # type: ignore[arg-type]
        left = [row.nonzero().flatten().tolist() for row in law[0]]
        for row, tokens, before in zip(law[0], left, chances[0], strict=True):
            torch.testing.assert_close(row[tokens], before[tokens] / before[tokens].sum())
        return left

    assert kept(top_k=1) == [[0], [3]]
    assert kept(top_k=3) == [[0, 1, 2], [0, 1, 2, 3]]  # equals stay together
    assert kept(top_p=0.65) == [[0, 1], [3]]
    assert kept(top_p=0.65, suppress_tokens=[0]) == [[1, 2], [3]]
    assert kept(top_k=9, top_p=1.0) == [[0, 1, 2, 3], [0, 1, 2, 3]]


def test_samples_are_of_the_likeliest_tokens(bert: BertForMaskedLM) -> None:
    for seed in range(5):
        one, best = (
            generate(
                bert,
                PROMPT,
                mask_token_id=MASK,
                generator=torch.Generator().manual_seed(seed),
                **options,
            ).sequences
            for options in ({"top_k": 1}, {"token": "argmax"})
        )
        assert torch.equal(one, best)


@pytest.mark.parametrize("steps", [1, 3, 50, 1000, 4000, 100_000])
def test_integer_times_are_the_trained_ones(steps: int) -> None:
    """k / T in float32 is step k - 1; between steps the next one; never T."""
    seen: list[int] = []

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        assert t.dtype == torch.int64
        seen.extend(t.tolist())
        return x

    wrapped = integer_time(denoiser, steps)
    grid = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    wrapped(grid, grid.float())
    assert seen == list(range(steps))
    seen.clear()
    wrapped(grid, (grid - 0.3 / steps).float())
    assert seen == list(range(steps))
    seen.clear()
    wrapped(grid, torch.tensor([1e-12, 1.0]))
    assert seen == [0, steps - 1]


@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [1000, 4000])
def test_samplers_ask_for_the_trained_steps(default: torch.dtype, steps: int) -> None:
    """Whatever the default type: in bfloat16 most of 1000 steps would be another one's."""
    seen: list[int] = []

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        seen.extend(t.tolist())
        return torch.zeros(*x.shape, 3, dtype=torch.float32)

    rows = torch.full((steps, 1), 2)
    network = Network(integer_time(denoiser, steps), absorbing(3, 2), {}, steps, rows.device)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        grid = torch.arange(1, steps + 1, dtype=torch.float64) / steps
        network(rows, grid, torch.ones(steps, dtype=torch.bool))
    finally:
        torch.set_default_dtype(before)
    assert seen == list(range(steps))


def test_a_network_of_this_package_knows_its_noise() -> None:
    """And which options it takes: the same call as its sampler's own, and other masks refused."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = TextDenoiserConfig(vocab_size=8, max_target=6)
        network = TextDenoiser(config).eval()
    x = torch.tensor([[1, 3, 1, 1, 4], [1, 1, 1, 5, 1]])
    made = generate(network, x, sampler="dndm-c", generator=seeded())
    wanted = dndm_c().sample(network.denoiser, x, x == 1, noise=config.noise, generator=seeded())
    assert torch.equal(made.sequences, wanted.sequences)
    assert torch.equal(
        generate(network, x, mask_token_id=1, sampler="dndm-c", generator=seeded()).sequences,
        made.sequences,
    )
    with pytest.raises(ValueError, match="trained for the mask 1, not 2"):
        generate(network, x, mask_token_id=2)
    with pytest.raises(ValueError, match="TextDenoiser is in training mode"):
        generate(network.train(), x)


def test_bad_input(bert: BertForMaskedLM) -> None:
    cases = [
        ({"mask_token_id": None}, "pass one of"),
        ({"noise": absorbing(V, MASK)}, "pass one of"),
        ({"mask_token_id": V}, r"mask_id must lie in 0\.\.29"),
        ({"mask_token_id": None, "noise": uniform(V)}, "pass free_mask"),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0, not -1"),
        ({"temperature": 0.0}, "temperature must be positive, not 0.0"),
        ({"top_k": -1}, "top_k must be at least 1, or 0 for all tokens, not -1"),
        ({"top_p": 0.0}, "top_p is a probability above 0, not 0.0"),
        ({"sampler": "beam"}, "algorithm must be one of"),
        ({"sampler": dndm(3), "steps": 5}, "belong to named samplers"),
        ({"steps": 0}, "steps must be .* not 0"),
        ({"input_ids": torch.tensor([[5, 6]])}, "row 0 has all tokens fixed"),
        ({"input_ids": torch.tensor([5, 4])}, r"input_ids must have shape \(rows, positions\)"),
        ({"attention_mask": torch.ones(8)}, "attention_mask must have shape .*input_ids"),
        ({"free_mask": torch.ones(1, 8, dtype=torch.bool)}, "free_mask must have shape"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "both at least 1"),
        ({"model": lambda x, t: x}, "has no config.vocab_size"),
        ({"sampler": Reveal(counts=LinearCounts()), "noise": absorbing(9, MASK),
          "mask_token_id": None}, r"not \(2, 8, 9\)"),
    ]  # fmt: skip
    for change, message in cases:
        given = {"model": bert, "input_ids": PROMPT.clamp(max=8), "mask_token_id": MASK, **change}
        with pytest.raises(ValueError, match=message):
            generate(**given)
    bert.train()
    try:
        with pytest.raises(ValueError, match="BertForMaskedLM is in training mode"):
            masked_lm(bert)
    finally:
        bert.eval()
    with pytest.raises(ValueError, match="steps must be at least 1, not 0"):
        integer_time(lambda x, t: x, 0)
