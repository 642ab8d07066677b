"""Hybrid matching: a second group of queries, assigned one-to-many, in training only.

H-DETR (Jia et al., "DETRs with Hybrid Matching", CVPR 2023), Sec. 3.3, hybrid branch scheme. Both
groups run through the same decoder without seeing each other; the second is matched to every object
``repeat`` times, which trains encoder and decoder on many more positives. Inference uses the first
group alone: no extra cost.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .matcher import Assignment
from .proposals import ProposalHead, ProposalQueries, Proposals, Queries, QueryGroup
from .tokens import Tokens


class HybridQueries(ProposalQueries):
    """The best proposals become one-to-one queries, in training the next best one-to-many ones.

    Positions are coded from the proposals' boxes, contents are learned ("mixed query selection").

    Args:
        num_queries: one-to-one queries, the detector's output.
        num_one_to_many: queries of the second group; 0 leaves the detector without it.
        repeat: how often each object is matched in the second group.
        weight: of the second group's losses, on top of the criterion's weights.
        skip_invalid, nms_threshold: see ``QuerySelection``.
    """

    def __init__(
        self,
        *,
        embed_dim: int = 256,
        num_queries: int = 300,
        num_one_to_many: int = 1500,
        repeat: int = 6,
        weight: float = 1.0,
        skip_invalid: bool = False,
        nms_threshold: float | None = None,
    ):
        super().__init__(
            embed_dim=embed_dim,
            num_queries=num_queries,
            skip_invalid=skip_invalid,
            nms_threshold=nms_threshold,
        )
        self.num_one_to_many = num_one_to_many
        self.repeat = repeat
        self.weight = weight
        self.content = nn.Embedding(num_queries + num_one_to_many, embed_dim)

    def init_weights(self) -> None:
        nn.init.normal_(self.content.weight)

    @property
    def num_selected(self) -> int:
        """Both groups in training, the first one in inference."""
        return self.num_queries + (self.num_one_to_many if self.training else 0)

    def forward(self, memory: Tensor, tokens: Tokens, head: ProposalHead) -> tuple[Queries, Proposals]:
        queries, proposals = super().forward(memory, tokens, head)
        batch, total, _ = queries.content.shape
        queries.content = self.content.weight[:total].expand(batch, -1, -1)  # (B, Q, C)
        if self.training and self.num_one_to_many:
            # On images with fewer tokens than queries, the second group is what is left, or empty.
            first = min(self.num_queries, total)
            queries.groups = [
                QueryGroup(first, Assignment()),
                QueryGroup(total - first, Assignment("_one2many", repeat=self.repeat, weight=self.weight)),
            ]
            second = torch.arange(total, device=memory.device) >= first
            queries.attn_mask = second[:, None] != second  # (Q, Q)
        return queries, proposals
