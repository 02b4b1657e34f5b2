"""What mars_lm.py trains: a small GPT-2, on conversations or a text file in a BPE."""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from torch import Tensor, nn

from sparring.alignment.base_questions import CHITCHAT_FILE
from sparring.launch.artifacts import write_atomically
from sparring.launch.packaged import packaged


@dataclass(frozen=True)
class Data:
    """Rows of context + 1 tokens."""

    train: Tensor
    validation: Tensor
    bytes_per_token: float


def corpus_file(text: Path | None) -> Path:
    return text or packaged("chitchat_dataset", CHITCHAT_FILE, "chitchat-dataset")


def documents(text: Path | None, limit: int | None = None) -> tuple[list[str], list[str]]:
    """Distinct conversations, or paragraphs of a text file: 19 in 20 to train, 1 to validate."""
    content = corpus_file(text).read_text(encoding="utf-8")
    if text:
        pieces = [piece.strip() for piece in content.split("\n\n")]
    else:
        pieces = [
            "\n".join(" ".join(m["text"].split()) for block in chat["messages"] for m in block)
            for chat in json.loads(content).values()
        ]
    pieces = [piece for piece in dict.fromkeys(pieces) if piece]
    random.Random(0).shuffle(pieces)  # one split for all seeds
    pieces = pieces[:limit]
    held = max(1, len(pieces) // 20)
    return pieces[held:], pieces[:held]


def load(options: argparse.Namespace, corpus: str) -> Data:
    """Text to tokens; the BPE is kept in OUT.

    Raises:
        ValueError: training or validation text is shorter than a batch.
    """
    parts, end = documents(options.text, options.documents), "<|end|>"
    size, width = options.vocabulary, options.context + 1
    file = options.out / f"bpe-{corpus[:12]}-{size}-{options.documents or 'all'}.json"
    if not file.exists():
        bpe = ByteLevelBPETokenizer()
        bpe.train_from_iterator(parts[0], size, show_progress=False, special_tokens=[end])
        write_atomically(file, bpe.to_str())
    tokenizer = Tokenizer.from_file(str(file))
    rows = []
    for pieces in parts:
        codes = tokenizer.encode_batch([piece + end for piece in pieces])
        ids = torch.tensor([token for code in codes for token in code.ids])
        rows.append(ids[: len(ids) // width * width].view(-1, width))
        if rows[-1].numel() < options.batch:
            raise ValueError(f"too little text: {rows[-1].numel()} tokens, batch={options.batch}")
    length = sum(len(piece.encode()) for piece in parts[0])
    kept = options.validation // options.context
    return Data(rows[0], rows[1][:kept], length / rows[0].numel())


def batches(rows: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """Shuffled rows without end, every row once before any comes again."""
    generator, left = torch.Generator().manual_seed(seed), rows[:0]
    while True:
        while len(left) < size:
            left = torch.cat([left, rows[torch.randperm(len(rows), generator=generator)]])
        yield left[:size]
        left = left[size:]


class LanguageModel(nn.Module):
    """GPT-2, whose block is torch's encoder layer with a causal mask.

    transformers' took up to 1.5 times as long here, and its matrices are transposed, which inverts
    the rows / columns in Muon's and Shampoo's scale.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        width = options.width
        self.embed_tokens = nn.Embedding(options.vocabulary, width)
        self.embed_positions = nn.Embedding(options.context, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, options.heads, 4 * width, dropout=0.0, bias=False,
                                       activation="gelu", batch_first=True, norm_first=True)
            for _ in range(options.layers)
        )  # fmt: skip
        self.norm = nn.LayerNorm(width, bias=False)
        self.mask = nn.Transformer.generate_square_subsequent_mask(options.context)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                into_residual = name.endswith(("out_proj.weight", "linear2.weight"))
                deep = math.sqrt(2 * options.layers) if into_residual else 1
                nn.init.normal_(weight, std=0.02 / deep)

    def forward(self, rows: Tensor) -> Tensor:
        """Mean loss, in nats a token, of the tokens after the first of each row."""
        x = self.embed_tokens(rows[:, :-1]) + self.embed_positions.weight
        for block in self.blocks:
            x = block(x, src_mask=self.mask, is_causal=True)
        logits = self.norm(x) @ self.embed_tokens.weight.T
        return nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
