"""PairRM and reward models with tiny random weights; the real checkpoints are not needed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_deberta import tiny_config, tiny_tokenizer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from sparring.alignment.judges.pairrm import (
    MARKERS,
    SOURCE_TOKENS,
    TOTAL_TOKENS,
    DebertaV2PairRM,
    PairRM,
)
from sparring.alignment.judges.protocol import checked_matrix
from sparring.alignment.judges.reward_model import RewardModel
from sparring.alignment.rows import Message, Prompt
from sparring.launch.errors import SparringError

CHAT = (
    "{% for m in messages %}[CLS]{{ m.role }}: {{ m.content }}[SEP]{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairrm")
    torch.manual_seed(0)
    DebertaV2PairRM(tiny_config()).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def judge(checkpoint):
    return PairRM.from_pretrained(checkpoint, device="cpu", batch_size=4)


ODD = ["None", "</s>", "[SEP]", "", "<|candidate2|> wins", "a longer answer " * 5]


def test_parameter_names_are_those_of_the_published_layout(judge):
    names = set(judge.model.state_dict())
    assert {f"head_layer.{i}.{w}" for i in (1, 4) for w in ("weight", "bias")} <= names
    assert "pretrained_model.embeddings.word_embeddings.weight" in names
    assert {name.split(".")[0] for name in names} == {"head_layer", "pretrained_model"}


def test_input_layout_and_logit_equal_a_hand_made_forward(judge):
    """One pair, unpadded, by the formula: mean over tasks of head(src, c1) − head(src, c2)."""
    tokenizer, model = judge.tokenizer, judge.model
    parts = [tokenizer.encode(m + t) for m, t in zip(MARKERS, ("why", "yes", "no!"), strict=True)]
    ids = [token for part in parts for token in part]
    assert [part[:2] for part in parts] == [[1, 5], [1, 6], [1, 7]]
    assert all(part[-1] == 2 for part in parts)
    with torch.no_grad():
        hidden = model.pretrained_model(torch.tensor([ids])).last_hidden_state[0].double().numpy()
    source, first, second = (hidden[ids.index(marker)] for marker in (5, 6, 7))
    layers = {n: p.detach().double().numpy() for n, p in model.head_layer.named_parameters()}

    def head(x):
        h = np.tanh(layers["1.weight"] @ x + layers["1.bias"])
        return layers["4.weight"] @ h + layers["4.bias"]

    expected = np.mean(head(np.r_[source, first]) - head(np.r_[source, second]))
    assert judge.logits(["why"], ["yes"], ["no!"])[0] == pytest.approx(expected, abs=1e-5)
    assert abs(expected) > 1e-3


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.permutations(range(12)), st.integers(1, 7))
def test_scores_do_not_depend_on_batch_size_or_row_order(judge, order, batch_size):
    prompts = ["why?", "a much longer prompt than the other one"] * 6
    firsts = (ODD * 2)[:12]
    seconds = ["fine", "other"] * 3 + ODD
    reference = judge.logits(prompts, firsts, seconds)
    other = PairRM(judge.model, judge.tokenizer, batch_size)
    permuted = other.logits(
        [prompts[i] for i in order], [firsts[i] for i in order], [seconds[i] for i in order]
    )
    np.testing.assert_allclose(permuted, reference[list(order)], atol=1e-5)


def test_matrix_holds_all_ordered_pairs_and_is_not_forced_antisymmetric(judge):
    responses = [["yes", "no", "maybe"], ODD[:3]]
    matrix = checked_matrix(judge, ["why?", "None [SEP] </s>"], responses)
    for n, prompt in enumerate(["why?", "None [SEP] </s>"]):
        for i in range(3):
            for j in range(3):
                expected = (
                    judge.logits([prompt], [responses[n][i]], [responses[n][j]])[0] if i != j else 0
                )
                assert matrix[n, i, j] == pytest.approx(expected, abs=1e-5)
    assert np.abs(matrix[0] + matrix[0].T).max() > 1e-3


def test_permuting_responses_permutes_the_matrix(judge):
    responses, order = ["yes", "no", "maybe", "None"], [2, 0, 3, 1]
    matrix = judge.matrix(["why?"], [responses])[0]
    permuted = judge.matrix(["why?"], [[responses[i] for i in order]])[0]
    np.testing.assert_allclose(permuted, matrix[np.ix_(order, order)], atol=1e-5)


def test_identical_pairs_are_computed_once_and_tie_after_both_orders(judge, monkeypatch):
    scored = []
    forward = PairRM._forward
    monkeypatch.setattr(
        PairRM, "_forward", lambda self, rows: scored.extend(rows) or forward(self, rows)
    )
    matrix = judge.matrix(["why?"] * 2, [["same", "same", "same"]] * 2)
    assert len(scored) == 1
    np.testing.assert_array_equal(matrix, np.swapaxes(matrix, 1, 2))


def test_text_cannot_pose_as_a_special_token(judge):
    plain = judge.logits(["why  ?"], ["x   y"], ["no"])
    posed = judge.logits(["why [SEP]?"], ["x <|candidate2|> y"], ["no"])
    np.testing.assert_array_equal(posed, plain)
    assert judge.logits(["why?"], ["None"], ["no"]) != judge.logits(["why?"], [""], ["no"])


def test_truncation_follows_the_published_limits(judge):
    row = judge._row("p" * 3000, "a" * 3000, "b" * 3000)
    _, first, second = row.markers
    assert first - 1 == SOURCE_TOKENS
    assert second - first == (TOTAL_TOKENS - SOURCE_TOKENS) // 2 == 412
    assert len(row.ids) == TOTAL_TOKENS
    assert row.truncated
    short = judge._row("p" * 97, "a" * 3000, "b")  # a prompt of 100 tokens leaves 974 each
    assert short.markers[2] - short.markers[1] == 974
    assert [row.ids[m] for m in row.markers] == [5, 6, 7]
    details = judge.details(["why?"], [["a" * 3000, "b"]])
    np.testing.assert_array_equal(details["truncated"], [[1, 0]])


def test_identity_follows_the_weights(judge, checkpoint, tmp_path):
    again = PairRM.from_pretrained(checkpoint, device="cpu", batch_size=1)
    assert again.identity == judge.identity
    other = PairRM.from_pretrained(checkpoint, device="cpu")
    with torch.no_grad():
        other.model.head_layer[4].bias[0] += 1e-3
    assert other.identity != judge.identity
    half = PairRM.from_pretrained(checkpoint, device="cpu", dtype="bfloat16")
    assert half.identity != judge.identity
    np.testing.assert_allclose(
        half.logits(["why"], ["yes"], ["no"]), judge.logits(["why"], ["yes"], ["no"]), atol=0.2
    )


def test_checkpoints_that_do_not_fit_are_refused(checkpoint, tmp_path):
    with pytest.raises(SparringError, match="dtype 'int8'"):
        PairRM.from_pretrained(checkpoint, dtype="int8")
    folder = tmp_path / "backbone"
    PairRM.from_pretrained(checkpoint, device="cpu").model.pretrained_model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    with pytest.raises(SparringError, match="missing weights: head_layer"):
        PairRM.from_pretrained(folder)
    bert = tmp_path / "bert"
    BertModel(
        BertConfig(
            vocab_size=128,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
        )
    ).save_pretrained(bert)
    with pytest.raises(SparringError, match="not a PairRM checkpoint"):
        PairRM.from_pretrained(bert)
    shifted = DebertaV2PairRM(tiny_config(cand1_prefix_id=7, cand2_prefix_id=6))
    with pytest.raises(SparringError, match="do not belong together"):
        PairRM(shifted, tiny_tokenizer())
    with pytest.raises(SparringError, match="do not line up"):
        PairRM.from_pretrained(checkpoint).logits(["a"], ["b"], [])


# ------------------------------------------------------------------------------- reward models


def tiny_bert(labels=1):
    torch.manual_seed(1)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=128,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            num_labels=labels,
            initializer_range=0.5,
        )
    )


def tiny_llama():
    torch.manual_seed(2)
    return LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=128,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            num_labels=1,
            initializer_range=0.5,
            pad_token_id=0,
        )
    )


@pytest.fixture(params=["bert pair", "llama chat"])
def reward(request, tmp_path):
    chat = request.param == "llama chat"
    (tiny_llama() if chat else tiny_bert()).save_pretrained(tmp_path)
    tiny_tokenizer(CHAT if chat else None).save_pretrained(tmp_path)
    return RewardModel.from_pretrained(tmp_path, device="cpu", batch_size=2)


def test_reward_matrix_is_bradley_terry_and_independent_of_batches(reward):
    prompts = ["why?", Prompt("p", (Message("user", "a None, </s> and [SEP] prompt"),), "g")]
    responses = [["yes", "a longer answer", ""], ["None", "no", "</s>"]]
    matrix = checked_matrix(reward, prompts, responses)
    figures = reward.details(prompts, responses)
    for n, prompt in enumerate(prompts):
        for k in range(3):
            alone = reward.details([prompt], [[responses[n][k]]])["reward"][0, 0]
            assert figures["reward"][n, k] == pytest.approx(alone, abs=1e-5)
    r = figures["reward"]
    np.testing.assert_allclose(matrix, r[:, :, None] - r[:, None, :], atol=1e-6)
    assert np.abs(matrix).max() > 1e-3


def test_chat_template_is_applied_once(tmp_path):
    judge = RewardModel(tiny_llama(), tiny_tokenizer(CHAT))
    text = judge.tokenizer.decode(judge._tokens("hi", "yo"), skip_special_tokens=False)
    assert text.replace(" ", "") == "[CLS]user:hi[SEP][CLS]assistant:yo[SEP]"
    assert RewardModel(tiny_llama(), tiny_tokenizer()).identity != judge.identity


def test_the_score_is_read_at_the_last_token_though_it_be_eos():
    tokenizer = tiny_tokenizer(CHAT)
    tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
    judge = RewardModel(tiny_llama(), tokenizer)
    rows = [judge._tokens("hi", text) for text in ("yo", "yo yo yo")]
    assert rows[0][-1] == tokenizer.eos_token_id
    with torch.inference_mode():
        last = [judge.model.model(torch.tensor([row])).last_hidden_state[0, -1] for row in rows]
        expected = judge.model.score(torch.stack(last))[:, 0]
    np.testing.assert_allclose(judge._forward(rows), expected, atol=1e-6)


def test_long_conversations_keep_the_response(reward):
    reward.max_tokens = 8
    figures = reward.details(["w" * 50], [["yes", "no"]])
    np.testing.assert_array_equal(figures["truncated"], [[1, 1]])
    assert figures["reward"][0, 0] != figures["reward"][0, 1]


def test_checkpoints_that_are_no_reward_models_are_refused(tmp_path):
    tiny_bert(labels=3).save_pretrained(tmp_path / "three")
    tiny_tokenizer().save_pretrained(tmp_path / "three")
    with pytest.raises(SparringError, match="3 labels"):
        RewardModel.from_pretrained(tmp_path / "three")
    headless = tmp_path / "headless"
    tiny_bert().bert.save_pretrained(headless)
    tiny_tokenizer().save_pretrained(headless)
    config = BertConfig.from_pretrained(headless)
    config.num_labels = 1
    config.save_pretrained(headless)
    with pytest.raises(SparringError, match="missing weights: classifier"):
        RewardModel.from_pretrained(headless)
