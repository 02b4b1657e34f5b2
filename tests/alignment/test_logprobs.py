"""Log-probabilities of responses against a hand loop, and against every way of batching them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sparring.alignment import tokens
from sparring.alignment.logprobs import ScoredPolicy, collate, response_logps
from sparring.alignment.models import load_policy
from sparring.alignment.rows import Pair, Prompt, ReferencedPair, Response
from sparring.launch.errors import SparringError
from sparring.launch.rows import read_rows

Row = tuple[tuple[int, ...], tuple[int, ...]]
PAD, BOS, EOS = 2, 1, 2


@pytest.fixture(scope="module")
def policy(tiny_model: Path) -> ScoredPolicy:
    return ScoredPolicy(load_policy(tiny_model))


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """Prompts of 2 to 9 tokens and responses of 1 to 12, the last token an EOS."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(9):
        prompt = rng.integers(3, 36, rng.integers(1, 9)).tolist()
        response = rng.integers(3, 36, rng.integers(0, 12)).tolist()
        made.append(((BOS, *prompt), (*response, EOS)))
    return made


@pytest.fixture(scope="module")
def by_hand(policy: ScoredPolicy, rows: list[Row]) -> list[float]:
    """log-softmax in float64, one row and one token at a time, without padding."""
    found = []
    for prompt, response in rows:
        ids = [*prompt, *response]
        with torch.no_grad():
            logits_TV = policy.model(torch.tensor([ids])).logits[0].numpy().astype(np.float64)
        total = 0.0
        for place in range(len(prompt), len(ids)):
            row = logits_TV[place - 1]
            total += row[ids[place]] - row.max() - np.log(np.exp(row - row.max()).sum())
        found.append(total)
    return found


def score(policy: ScoredPolicy, rows: list[Row], *, left: int = 0, right: int = 0) -> Tensor:
    """(B,) log-probabilities, with this much more padding on the left and right."""
    batch = collate(rows, pad=PAD)

    def widened(tensor: Tensor, value: int) -> Tensor:
        return torch.nn.functional.pad(tensor, (left, right), value=value)

    return policy(
        widened(batch.ids_BT, PAD), widened(batch.attention_BT, 0), widened(batch.response_BT, 0)
    )


def test_the_sum_is_that_of_a_hand_loop(
    policy: ScoredPolicy, rows: list[Row], by_hand: list[float]
) -> None:
    logp = score(policy, rows)
    assert logp.dtype == torch.float32
    np.testing.assert_allclose(logp.detach(), by_hand, rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize(("left", "right"), [(0, 7), (7, 0), (3, 4)])
def test_padding_on_either_side_changes_nothing(
    policy: ScoredPolicy, rows: list[Row], by_hand: list[float], left: int, right: int
) -> None:
    logp = score(policy, rows, left=left, right=right)
    np.testing.assert_allclose(logp.detach(), by_hand, rtol=2e-6, atol=2e-5)


def test_padding_with_learned_positions(rows: list[Row]) -> None:
    """Llama's rotary positions are relative and would forgive a shift; GPT-2's are not."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 36, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    policy = ScoredPolicy(GPT2LMHeadModel(GPT2Config(**sizes)).eval())
    plain = torch.cat([score(policy, [row]) for row in rows])
    torch.testing.assert_close(score(policy, rows, left=9), plain, rtol=2e-6, atol=2e-5)


def test_longer_neighbours_change_nothing(
    policy: ScoredPolicy, rows: list[Row], by_hand: list[float]
) -> None:
    longest: Row = ((BOS, *range(3, 30)), (*range(3, 36), EOS))
    alone = [float(score(policy, [row]).detach()) for row in rows]
    beside = [float(score(policy, [row, longest]).detach()[0]) for row in rows]
    np.testing.assert_allclose(alone, by_hand, rtol=2e-6, atol=2e-5)
    np.testing.assert_allclose(beside, by_hand, rtol=2e-6, atol=2e-5)


def test_chosen_and_rejected_together_or_apart(policy: ScoredPolicy, rows: list[Row]) -> None:
    together = score(policy, rows)
    apart = torch.cat([score(policy, rows[:4]), score(policy, rows[4:])])
    torch.testing.assert_close(together, apart, rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("batch", [1, 2, 4, 100])
def test_response_logps_keeps_the_order(
    policy: ScoredPolicy, rows: list[Row], by_hand: list[float], batch: int
) -> None:
    found = response_logps(policy, rows, pad=PAD, batch=batch, device="cpu")
    np.testing.assert_allclose(found, by_hand, rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_chunked_logits_give_the_same_values_and_gradients(
    tiny_model: Path, rows: list[Row], chunk: int
) -> None:
    model = load_policy(tiny_model)
    found: list[tuple[Tensor, list[Tensor]]] = []
    for size in (10_000, chunk):
        model.zero_grad()
        logp = score(ScoredPolicy(model, logits_chunk=size), rows)
        (logp * torch.arange(len(rows))).sum().backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append((logp.detach(), gradients))
    whole, chunked = found
    torch.testing.assert_close(whole[0], chunked[0], rtol=2e-6, atol=2e-5)
    assert len(whole[1]) == len(chunked[1]) == len(list(model.parameters()))
    for one, other in zip(whole[1], chunked[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_layers_elsewhere_change_nothing(
    tiny_model: Path, policy: ScoredPolicy, rows: list[Row], tmp_path: Path
) -> None:
    # A layer that stays on disk takes the path of one on another accelerator.
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb"), "cpu")
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "lm_head": "cpu"}
    model = load_policy(tiny_model, device_map=places, offload_folder=str(tmp_path))
    assert model.model.layers[1].mlp.up_proj.weight.is_meta
    spread = ScoredPolicy(model)
    with torch.no_grad():
        torch.testing.assert_close(score(spread, rows), score(policy, rows))
    spread.verify([*rows[0][0], *rows[0][1]])


SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "initializer_range": 1.0,  # logits far above the cap
}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gemma2", {"final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8}),
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 4.0}),
    ],
)
def test_models_that_scale_or_cap_their_logits(
    name: str, settings: dict[str, Any], rows: list[Row]
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **SMALL, **settings)
    policy = ScoredPolicy(AutoModelForCausalLM.from_config(config).eval())
    prompt, response = rows[3]
    ids = torch.tensor([[*prompt, *response]])
    with torch.no_grad():
        logp_TV = policy.model(input_ids=ids).logits[0].log_softmax(-1)
        expected = logp_TV[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None]).sum()
        torch.testing.assert_close(score(policy, [rows[3]])[0], expected)
    policy.verify(ids[0].tolist())


def test_a_model_that_does_something_unknown_behind_its_head_is_refused(
    policy: ScoredPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = policy.model.forward

    def sharper(*arguments: Any, **options: Any) -> Any:
        found = original(*arguments, **options)
        found.logits = found.logits * 1.5
        return found

    policy.verify([BOS, 5, 6, EOS])
    monkeypatch.setattr(policy.model, "forward", sharper)
    with pytest.raises(SparringError, match="LlamaForCausalLM does something between its head"):
        policy.verify([BOS, 5, 6, EOS])


def test_only_response_tokens_are_scored(policy: ScoredPolicy, rows: list[Row]) -> None:
    batch = collate(rows, pad=PAD)
    for n, (prompt, response) in enumerate(rows):
        scored = batch.response_BT[n].nonzero()[:, 0].tolist()
        assert scored == list(range(len(prompt), len(prompt) + len(response)))
        assert batch.ids_BT[n, batch.response_BT[n].bool()].tolist() == list(response)
        assert batch.attention_BT[n].sum() == len(prompt) + len(response)


def test_prompt_tokens_give_no_loss_of_their_own(policy: ScoredPolicy) -> None:
    """The log-probability of a response is the whole text's less the prompt's."""
    prompt, response = (BOS, 5, 6, 7), (8, 9, EOS)
    whole = score(policy, [((BOS,), (*prompt[1:], *response))])
    start = score(policy, [((BOS,), prompt[1:])])
    torch.testing.assert_close(
        score(policy, [(prompt, response)]), whole - start, atol=1e-5, rtol=0
    )


def test_an_empty_response_has_probability_one(policy: ScoredPolicy) -> None:
    assert score(policy, [((BOS, 5), ()), ((BOS, 5), (6,))])[0] == 0


def test_a_uniform_model_gives_minus_log_v_a_token(tiny_model: Path, rows: list[Row]) -> None:
    model = load_policy(tiny_model)
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    logp = score(ScoredPolicy(model), rows).detach()
    expected = [-len(response) * np.log(36) for _, response in rows]
    np.testing.assert_allclose(logp, expected, rtol=1e-6)


def test_sampling_reference_and_training_see_the_same_ids(tiny_chain: dict[str, Path]) -> None:
    responses = read_rows(tiny_chain["generate"] / "responses.parquet", Response)
    sampled: dict[str, set[Any]] = {}
    for row in responses:
        sampled.setdefault(row.prompt_id, set()).add((row.prompt_ids, row.response_ids))
    pairs = read_rows(tiny_chain["pair"] / "pairs.parquet", Pair)
    assert pairs
    for pair in pairs:
        for ids in (pair.chosen_ids, pair.rejected_ids):
            assert (pair.prompt_ids, ids) in sampled[pair.prompt_id]
    referenced = read_rows(tiny_chain["reference"] / "pairs.parquet", ReferencedPair)
    assert [r.pair_id for r in referenced] == [p.pair_id for p in pairs]
    assert [(r.prompt_ids, r.chosen_ids, r.rejected_ids) for r in referenced] == [
        (p.prompt_ids, p.chosen_ids, p.rejected_ids) for p in pairs
    ]


def test_one_bos_and_at_most_one_eos(tiny_chain: dict[str, Path]) -> None:
    for row in read_rows(tiny_chain["generate"] / "responses.parquet", Response):
        assert row.prompt_ids.count(BOS) == 1
        assert row.prompt_ids[0] == BOS
        assert row.response_ids.count(EOS) == (row.finish_reason == "stop")
        assert EOS not in row.response_ids[:-1]


def test_the_prompt_ids_are_the_templates(tiny_chain: dict[str, Path], tiny_model: Path) -> None:
    tokenizer = tokens.load_tokenizer(tiny_model)
    prompts = {p.prompt_id: p for p in read_rows(tiny_chain["prompts"] / "train.parquet", Prompt)}
    for row in read_rows(tiny_chain["generate"] / "responses.parquet", Response):
        text = tokenizer.decode(row.prompt_ids, skip_special_tokens=True)
        assert text == f"u: {prompts[row.prompt_id].text}\na: "


def test_stored_reference_is_what_the_policy_gives(
    tiny_chain: dict[str, Path], policy: ScoredPolicy
) -> None:
    for pair in read_rows(tiny_chain["reference"] / "pairs.parquet", ReferencedPair):
        texts = [(pair.prompt_ids, pair.chosen_ids), (pair.prompt_ids, pair.rejected_ids)]
        stored = [pair.chosen_reference_logp, pair.rejected_reference_logp]
        np.testing.assert_allclose(score(policy, texts).detach(), stored, atol=2e-5)


def test_capped_attention_is_computed_with_its_cap(tmp_path: Path) -> None:
    """Gemma 2's, which torch's own attention leaves out."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 32}
    config = Gemma2Config(**shape, **heads, attn_logit_softcapping=0.5, initializer_range=1.0)
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    policy = load_policy(tmp_path)
    assert policy.config._attn_implementation == "eager"
    ids = torch.tensor([[3, 9, 4, 7, 1]])
    other = Gemma2ForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    with torch.no_grad():
        assert float((policy(ids).logits - other(ids).logits).abs().max()) > 1e-3
