"""A DeBERTa that fits a test: its configuration, and a tokenizer of single characters."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sparring.alignment.judges.deberta import DebertaV2Config
from sparring.alignment.judges.pairrm_layouts import MARKERS

SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", *MARKERS, "<|candidate|>"]


def tiny_tokenizer(chat_template=None):
    """Letters as tokens, so that token counts are character counts."""
    letters = sorted(set(map(chr, range(32, 127))))
    vocab = {token: i for i, token in enumerate([*SPECIAL, *letters])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        mask_token="[MASK]",
        additional_special_tokens=SPECIAL[5:],
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_config(**changes):
    options = {
        "vocab_size": 128,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 16,
        "max_position_embeddings": 2048,
        "type_vocab_size": 0,
        "position_biased_input": False,
        "n_tasks": 3,
        "drop_out": 0.5,
        "source_prefix_id": 5,
        "cand1_prefix_id": 6,
        "cand2_prefix_id": 7,
        "cand_prefix_id": 8,
        "initializer_range": 0.5,
    }
    return DebertaV2Config(**{**options, **changes})
