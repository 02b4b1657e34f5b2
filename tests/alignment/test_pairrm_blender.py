"""PairRM against LLM-Blender's own classes (llm-blender 0.0.2) on the same random weights."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from tiny_deberta import SPECIAL, tiny_config, tiny_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sparring.alignment.judges.pairrm import MARKERS, DebertaV2PairRM, PairRM
from sparring.launch.errors import SparringError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bench():
    """scripts/benchmarks/pairrm.py, which also knows how to import llm_blender."""
    spec = importlib.util.spec_from_file_location(
        "pairrm_benchmark", ROOT / "scripts" / "benchmarks" / "pairrm.py"
    )
    module = importlib.util.module_from_spec(spec)
    threads = torch.get_num_threads()
    spec.loader.exec_module(module)
    yield module
    torch.set_num_threads(threads)


def base_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny tokenizer before the markers were added, with [MASK] last, as in DeBERTa-v3."""
    core = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    kept = [t for t in core["model"]["vocab"] if t not in SPECIAL[4:]] + ["[MASK]"]
    core["model"]["vocab"] = {token: n for n, token in enumerate(kept)}
    core["added_tokens"] = [
        {**t, "id": kept.index(t["content"])} for t in core["added_tokens"] if t["content"] in kept
    ]
    from tokenizers import Tokenizer

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(core)),
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        mask_token="[MASK]",
    )


SETTINGS = {
    "ranker_type": "pairranker",
    "model_type": "deberta",
    "model_name": "microsoft/deberta-v3-large",
    "cache_dir": None,
    "load_checkpoint": None,
    "source_maxlength": 1224,
    "candidate_maxlength": 412,
    "n_tasks": 2,
    "num_pos": 5,
    "num_neg": 5,
    "inference_mode": "bubble",
    "drop_out": 0.05,
    "fp16": True,
    "device": "cuda",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """What stands for microsoft/deberta-v3-large: configuration and tokenizer, without weights."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = base_tokenizer()
    config = tiny_config(vocab_size=len(tokenizer) + 20, max_position_embeddings=512)
    for extra in ("n_tasks", "drop_out", "source_prefix_id", "cand1_prefix_id", "cand2_prefix_id"):
        delattr(config, extra)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def original(base, tmp_path_factory):
    """A checkpoint in the layout of llm-blender/PairRM: its settings and model.safetensors."""
    folder = tmp_path_factory.mktemp("original")
    rows = len(base_tokenizer()) + 4
    torch.manual_seed(3)
    model = DebertaV2PairRM(tiny_config(vocab_size=rows, n_tasks=2, max_position_embeddings=512))
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(SETTINGS))
    return folder


@pytest.fixture(scope="module")
def judge(original, base):
    return PairRM.from_pretrained(original, device="cpu", base=str(base))


TEXTS = ["yes", "no, never", "None", "</s> or not", "a [SEP] b", "", "longer " * 20]


def blender_logits(blender, prompts, responses, batch_size):
    blender.logits.clear()
    scores = blender.rank(prompts, responses, return_scores=True, batch_size=batch_size)
    matrix = np.concatenate(blender.logits)
    np.testing.assert_allclose(scores, (matrix - matrix.swapaxes(1, 2)).mean(axis=2), atol=1e-5)
    return matrix


def test_both_orders_equal_llm_blender(bench, judge):
    blender = bench.blender_of(judge.model, judge.tokenizer)
    prompts = ["why?", "None, </s> and [SEP] stay what they are", "", "a question " * 30]
    responses = [TEXTS[:4], TEXTS[3:], TEXTS[2:6], TEXTS[1:5]]
    expected = blender_logits(blender, prompts, responses, batch_size=2)
    np.testing.assert_allclose(judge.matrix(prompts, responses), expected, atol=1e-5)
    assert np.abs(expected).max() > 0.1
    assert np.abs(expected + expected.swapaxes(1, 2)).max() > 1e-3


@pytest.mark.parametrize(
    ("prompt", "lengths"), [(1300, (3, 600)), (1224, (500, 411)), (1001, (800, 3000)), (20, (5, 9))]
)
def test_truncation_equals_llm_blender_one_prompt_at_a_time(bench, judge, prompt, lengths):
    """Over 1224 tokens of prompt, over 412 of response, and odd lengths, so that halves round."""
    draw = np.random.default_rng(prompt)

    def text(length):
        return "".join(map(chr, draw.integers(97, 123, length)))

    blender = bench.blender_of(judge.model, judge.tokenizer)
    questions, answers = [text(prompt)], [[text(n) for n in lengths]]
    expected = blender_logits(blender, questions, answers, batch_size=1)
    np.testing.assert_allclose(judge.matrix(questions, answers), expected, atol=1e-5)


def test_departure_responses_are_cut_by_their_own_prompt(bench, judge):
    """In LLM-Blender a long prompt in the batch shortens what is read of the others' responses."""
    blender = bench.blender_of(judge.model, judge.tokenizer)
    questions, answers = ["short", "long" * 300], [["a" * 900, "b" * 20], ["c", "d"]]
    alone = blender_logits(blender, questions[:1], answers[:1], batch_size=1)
    together = blender_logits(blender, questions, answers, batch_size=2)
    assert np.abs(together[0] - alone[0]).max() > 1e-4
    np.testing.assert_allclose(judge.matrix(questions, answers)[0], alone[0], atol=1e-5)


@pytest.mark.parametrize("marker", [MARKERS[0], "<|candidate|>"])
def test_departure_markers_in_texts_are_spaces(bench, judge, marker):
    """LLM-Blender takes them for its own: a shape error, or another token's hidden state."""
    blender = bench.blender_of(judge.model, judge.tokenizer)
    posed = [[f"yes {marker} no", "never"]]
    plain = [["yes   no", "never"]]
    np.testing.assert_array_equal(judge.matrix(["why?"], posed), judge.matrix(["why?"], plain))
    with pytest.raises(RuntimeError, match="Sizes of tensors"):
        blender_logits(blender, ["why?"], posed, batch_size=1)


def test_departure_cls_and_mask_in_texts_are_spaces(bench, judge):
    """LLM-Blender replaces [SEP] alone, and reads these as special tokens."""
    blender = bench.blender_of(judge.model, judge.tokenizer)
    posed, plain = [["x [CLS] y [MASK]", "never"]], [["x   y  ", "never"]]
    np.testing.assert_array_equal(judge.matrix(["why?"], posed), judge.matrix(["why?"], plain))
    expected = blender_logits(blender, ["why?"], plain, batch_size=1)
    other = blender_logits(blender, ["why?"], posed, batch_size=1)
    assert np.abs(other - expected).max() > 1e-4
    np.testing.assert_allclose(judge.matrix(["why?"], posed), expected, atol=1e-5)


def test_a_sentencepiece_base_like_deberta_v3(bench, tmp_path):
    """spm.model alone, as microsoft/deberta-v3-large has it; markers are added behind [MASK]."""
    words = ["hello", "world", "love", "you", "answer", *map(chr, range(97, 123))]
    (tmp_path / "corpus.txt").write_text("\n".join([" ".join(words)] * 50))
    base, folder = tmp_path / "base", tmp_path / "original"
    base.mkdir()
    folder.mkdir()
    pieces = {"pad": "[PAD]", "bos": "[CLS]", "eos": "[SEP]", "unk": "[UNK]"}
    ids = {f"{name}_id": n for n, name in enumerate(pieces)}
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"),
        model_prefix=str(base / "spm"),
        vocab_size=80,
        hard_vocab_limit=False,
        minloglevel=2,
        **ids,
        **{f"{name}_piece": piece for name, piece in pieces.items()},
    )
    settings = {"do_lower_case": False, "vocab_type": "spm"}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    tiny_config(max_position_embeddings=512).save_pretrained(base)
    rows = len(AutoTokenizer.from_pretrained(base)) + 4
    torch.manual_seed(4)
    model = DebertaV2PairRM(tiny_config(vocab_size=rows, n_tasks=1))
    save_file({k: v.clone() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    # The folder's own name of its base is followed when there is no option.
    (folder / "config.json").write_text(
        json.dumps(SETTINGS | {"n_tasks": 1, "model_name": str(base)})
    )
    judge = PairRM.from_pretrained(folder, device="cpu")
    assert judge.model.config.source_prefix_id == rows - 4
    blender = bench.blender_of(judge.model, judge.tokenizer)
    prompts = [" hello  world", "answer None </s> [SEP] you\n"]
    responses = [["love", " love you ", "you [SEP]"], ["", "hello" * 500, "</s>world"]]
    expected = blender_logits(blender, prompts, responses, batch_size=1)
    np.testing.assert_allclose(judge.matrix(prompts, responses), expected, atol=1e-5)
    assert np.abs(expected).max() > 0.1


# ------------------------------------------------------------------------------- the two layouts


def test_original_and_hf_layout_give_the_same_scores(judge, tmp_path):
    judge.model.save_pretrained(tmp_path)
    judge.tokenizer.save_pretrained(tmp_path)
    again = PairRM.from_pretrained(tmp_path, device="cpu")
    assert again.identity == judge.identity
    np.testing.assert_array_equal(
        again.matrix(["why?"], [TEXTS[:3]]), judge.matrix(["why?"], [TEXTS[:3]])
    )


def test_original_layout_reads_its_own_limits(original, base, tmp_path):
    folder = shutil.copytree(original, tmp_path / "short")
    settings = SETTINGS | {"source_maxlength": 100, "candidate_maxlength": 30}
    (folder / "config.json").write_text(json.dumps(settings))
    short = PairRM.from_pretrained(folder, device="cpu", base=str(base))
    row = short._row("p" * 500, "a" * 500, "b" * 500)
    assert row.markers == (1, 101, 131)
    assert len(row.ids) == 160


def test_a_base_that_is_not_here_is_named_with_the_option(original, base, tmp_path):
    with pytest.raises(SparringError, match=r"deberta-v3-large.*give the option base"):
        PairRM.from_pretrained(original, device="cpu")
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copyfile(base / "config.json", bare / "config.json")
    with pytest.raises(SparringError, match="has a tokenizer"):
        PairRM.from_pretrained(original, device="cpu", base=str(bare))
    (bare / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(SparringError, match="not a DeBERTa"):
        PairRM.from_pretrained(original, device="cpu", base=str(bare))
    (bare / "config.json").unlink()
    with pytest.raises(SparringError, match=r"has no config\.json"):
        PairRM.from_pretrained(original, device="cpu", base=str(bare))


def changed(original, folder, change):
    shutil.copytree(original, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("head_layer.4.bias"), "missing weights: head_layer.4.bias"),
        (lambda t: t.update(stray=torch.zeros(2)), "unexpected weights: stray"),
        (lambda t: t.update({"head_layer.4.bias": torch.zeros(5)}), r"\(5,\), not \(2,\)"),
        (
            lambda t: t.update(
                {"pretrained_model.embeddings.word_embeddings.weight": torch.zeros(300, 16)}
            ),
            "trained from another base",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(original, base, tmp_path, change, message):
    folder = changed(original, tmp_path / "changed", change)
    with pytest.raises(SparringError, match=message):
        PairRM.from_pretrained(folder, device="cpu", base=str(base))


def test_position_ids_of_old_transformers_are_harmless(original, base, judge, tmp_path):
    name = "pretrained_model.embeddings.position_ids"
    ids = torch.arange(512).unsqueeze(0)
    folder = changed(original, tmp_path / "old", lambda t: t.update({name: ids}))
    found = PairRM.from_pretrained(folder, device="cpu", base=str(base))
    assert found.identity == judge.identity


def test_pickles_are_read_as_tensors_or_not_at_all(original, base, judge, tmp_path):
    folder = shutil.copytree(original, tmp_path / "pickled")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    found = PairRM.from_pretrained(folder, device="cpu", base=str(base))
    assert found.identity == judge.identity
    torch.save({"run": os.getcwd}, folder / "pytorch_model.bin")
    with pytest.raises(SparringError, match="pickles that run code are not loaded"):
        PairRM.from_pretrained(folder, device="cpu", base=str(base))
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(SparringError, match=r"has no model\.safetensors"):
        PairRM.from_pretrained(folder, device="cpu", base=str(base))
    (folder / "model.safetensors").write_bytes(b"half")
    with pytest.raises(SparringError, match="not a readable safetensors"):
        PairRM.from_pretrained(folder, device="cpu", base=str(base))


def test_another_ranker_of_llm_blender_is_refused(original, tmp_path):
    folder = shutil.copytree(original, tmp_path / "other")
    settings = SETTINGS | {"ranker_type": "summareranker", "model_type": "roberta"}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(SparringError, match="summareranker/roberta"):
        PairRM.from_pretrained(folder)


@pytest.mark.skipif(
    not os.environ.get("SPARRING_PAIRRM"),
    reason="SPARRING_PAIRRM names no local copy of llm-blender/PairRM-hf (or of PairRM)",
)
def test_golden_values_of_the_published_model_card():
    judge = PairRM.from_pretrained(os.environ["SPARRING_PAIRRM"], device="cpu")
    logits = judge.logits(
        ["hello!", "I love you!"], ["hi!", "I hate you!"], ["f**k off!", "I love you, too!"]
    )
    np.testing.assert_allclose(logits, [1.9003, -1.2547], atol=2e-3)


def test_the_benchmark_runs_and_finds_equal_logits(bench, capsys):
    sizes = {"hidden": 64, "layers": 1, "prompts": 2, "k": 2, "repeats": 1}
    bench.main([f"--{name}={value}" for name, value in sizes.items()])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["max_abs_logit_diff"] < 1e-5
    assert result["speedup_vs_llm_blender"] > 0
    assert "vllm" not in sys.modules or sys.modules["vllm"] is not None
