"""The network of PairRM: DeBERTa-v2 with a comparison head.

Parameter names are those of the published checkpoints, which agree in both layouts.

Shape legend: B rows of a batch, T tokens, H hidden size.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn

with warnings.catch_warnings():
    # transformers 5 still scripts helpers of DeBERTa while it is imported.
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
    from transformers import DebertaV2Config, DebertaV2Model, DebertaV2PreTrainedModel

__all__ = ["DebertaV2Config", "DebertaV2PairRM"]


class DebertaV2PairRM(DebertaV2PreTrainedModel):  # type: ignore[misc]
    """DeBERTa-v2 with a comparison head."""

    config_class = DebertaV2Config

    def __init__(self, config: DebertaV2Config) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.pretrained_model = DebertaV2Model(config)
        self.head_layer = nn.Sequential(
            nn.Dropout(config.drop_out),
            nn.Linear(2 * width, width),
            nn.Tanh(),
            nn.Dropout(config.drop_out),
            nn.Linear(width, config.n_tasks),
        )
        self.post_init()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, marker_positions: torch.Tensor
    ) -> torch.Tensor:
        """Logit that the first candidate beats the second: mean over tasks of h_1 − h_2.

        Args:
            input_ids, attention_mask: (B, T).
            marker_positions: (B, 3) places of the source, candidate-1 and candidate-2 markers.
                They are given, not searched for, so that text cannot pose as a marker.

        Returns:
            (B,) logits, > 0 when the first candidate is better.
        """
        hidden_BTH = self.pretrained_model(
            input_ids=input_ids, attention_mask=attention_mask
        ).last_hidden_state
        rows_B1 = torch.arange(len(input_ids), device=hidden_BTH.device).unsqueeze(1)
        marked_B3H = hidden_BTH[rows_B1, marker_positions]
        source_BH, first_BH, second_BH = marked_B3H.unbind(dim=1)
        first_h = self.head_layer(torch.cat([source_BH, first_BH], dim=-1))
        second_h = self.head_layer(torch.cat([source_BH, second_BH], dim=-1))
        logits_B: torch.Tensor = (first_h - second_h).mean(dim=-1)
        return logits_B
