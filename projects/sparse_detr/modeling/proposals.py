"""Two-stage proposals and the ways to turn them into decoder queries.

Every token proposes a box around its cell; a head refines and scores the proposals, and the best
become the decoder's queries (Deformable DETR, Sec. 4.2 "Two-Stage" and App. A.4). The head's
projection is also what encoders score tokens with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.ops import nms

from .heads import BoxHead, ClassHead
from .layers import at_least_float32, box_code, tensor_like
from .matcher import Assignment
from .tokens import LevelShapes, Tokens, cell_centres, gather_tokens

CANDIDATES = 4  # per query, where neighbours are suppressed


@dataclass
class QueryGroup:
    """A run of ``size`` decoder queries whose predictions are assigned to objects in one way.

    The group without a suffix is the detector's output.
    """

    size: int
    assignment: Assignment


@dataclass
class Queries:
    """The decoder's input.

    content: (B, Q, C).
    position: (B, Q, C), or None where the decoder derives it from the reference in every layer.
    reference: (B, Q, 2) points or (B, Q, 4) cxcywh boxes, in [0, 1] of the unpadded image.
    groups: how the Q queries divide, in order.
    attn_mask: (Q, Q) bool, True where the query of a row must not see that of a column, or None.
    """

    content: Tensor
    position: Tensor | None
    reference: Tensor
    groups: list[QueryGroup]
    attn_mask: Tensor | None = None


@dataclass
class Proposals:
    """Scored proposals: all tokens' for Deformable DETR's losses, otherwise only the selected ones'.

    logits: (B, N or Q, num_classes).
    boxes: (B, N or Q, 4) cxcywh in [0, 1] of the unpadded image.
    selected: (B, Q) int64, the tokens that became queries, best first.
    """

    logits: Tensor
    boxes: Tensor
    selected: Tensor


class ProposalHead(nn.Module):
    """Projection, class head and box head of the two-stage model.

    Args:
        class_agnostic: the score is channel 0 (Deformable DETR trains it as foreground); otherwise
            the best class.
    """

    def __init__(self, *, embed_dim: int = 256, num_classes: int, class_agnostic: bool = False):
        super().__init__()
        self.class_agnostic = class_agnostic
        self.projection = nn.Linear(embed_dim, embed_dim)
        self.norm = nn.LayerNorm(embed_dim)
        self.class_head = ClassHead(embed_dim=embed_dim, num_classes=num_classes)
        self.box_head = BoxHead(embed_dim=embed_dim)

    def project(self, x: Tensor, invalid: Tensor) -> Tensor:
        """LayerNorm(Linear(x)) with ``invalid`` (B, N) rows of ``x`` (B, N, C) zeroed first."""
        return self.norm(self.projection(x.masked_fill(invalid[..., None], 0.0)))

    def score(self, logits: Tensor) -> Tensor:
        """(B, N, num_classes) -> (B, N), the ranking of the proposals."""
        return logits[..., 0] if self.class_agnostic else logits.amax(-1)

    def refine(self, x: Tensor, proposals: Tensor) -> Tensor:
        """(B, K, C) projected tokens and (B, K, 4) proposals -> (B, K, 4) boxes in logit space."""
        return at_least_float32(self.box_head(x)) + proposals


class QuerySelection(nn.Module):
    """Turns the encoder's memory into decoder queries; ``two_stage`` ones use a proposal head.

    Args:
        skip_invalid: rank padding and border proposals last. The published models leave them in
            the ranking, all with one and the same score, so a batch's padding can displace queries.
        nms_threshold: neighbours do not both become queries, see ``first_of_neighbours``; None: off.
    """

    two_stage = True

    def __init__(self, *, num_queries: int, skip_invalid: bool = False, nms_threshold: float | None = None):
        super().__init__()
        self.num_queries = num_queries
        self.skip_invalid = skip_invalid
        self.nms_threshold = nms_threshold

    @property
    def num_selected(self) -> int:
        """How many tokens become queries."""
        return self.num_queries

    def select(self, scores: Tensor, tokens: Tokens) -> Tensor:
        """Scores (B, N) of ``tokens`` -> (B, Q) best tokens; Q shrinks to N on smaller images."""
        if self.skip_invalid:
            scores = scores.masked_fill(tokens.unproposed, float("-inf"))
        count = min(self.num_selected, scores.shape[1])
        if self.nms_threshold is None:
            return scores.topk(count, dim=1).indices
        candidates = min(CANDIDATES * count, scores.shape[1])
        return first_of_neighbours(scores, tokens.shapes, candidates, self.nms_threshold)[0][:, :count]


def first_of_neighbours(
    scores: Tensor, shapes: LevelShapes, candidates: int, threshold: float
) -> tuple[Tensor, Tensor]:
    """The ``candidates`` (M) best tokens, but for each group of neighbours the best one first.

    Non-maximum suppression of squares, two cells wide, around the tokens of a level (Salience DETR,
    "redundancy removal"): where they overlap by more than ``threshold``, the better one is kept. Direct
    neighbours have IoU 1/3, diagonal ones 1/7. A suppressed candidate comes behind all that are kept, so
    that there are queries enough on any image; published code fails where too few are kept.

    Args:
        scores: (B, N); -inf is never kept.

    Returns:
        (B, M) int64 tokens, those that were kept first, both parts by falling score; and (B,) how many
        were kept.
    """
    value, index = scores.detach().topk(candidates, dim=1)  # (B, M)
    centres = []
    for level, centre in enumerate(cell_centres(shapes, at_least_float32(scores))):
        # Levels side by side, so that squares of two levels never overlap.
        offset = sum(width + 2 for _, width in shapes[:level])
        centres.append(centre + tensor_like([offset, 0], centre))
    centre = torch.cat(centres)[index]  # (B, M, 2)
    square = torch.cat([centre - 1, centre + 1], dim=-1)
    rank = torch.arange(candidates, device=scores.device)
    order, counts = [], []
    for image in range(scores.shape[0]):
        kept = torch.zeros_like(rank, dtype=torch.bool)
        kept[nms(square[image], at_least_float32(value[image]), threshold)] = True
        kept &= value[image] > float("-inf")
        order.append(torch.where(kept, rank, rank + candidates).argsort())
        counts.append(kept.sum())
    return index.gather(1, torch.stack(order)), torch.stack(counts)


class LearnedQueries(QuerySelection):
    """Learned contents and positions; the reference point is read off the position.

    Deformable DETR, Sec. 4.1 "Deformable Transformer Decoder" (single stage).
    """

    two_stage = False

    def __init__(self, *, embed_dim: int = 256, num_queries: int = 300):
        super().__init__(num_queries=num_queries)
        self.position = nn.Embedding(num_queries, embed_dim)
        self.content = nn.Embedding(num_queries, embed_dim)
        self.reference_points = nn.Linear(embed_dim, 2)

    def init_weights(self) -> None:
        nn.init.normal_(self.position.weight)
        nn.init.normal_(self.content.weight)
        nn.init.xavier_uniform_(self.reference_points.weight)
        nn.init.zeros_(self.reference_points.bias)

    def forward(
        self, memory: Tensor, tokens: Tokens, head: ProposalHead | None = None
    ) -> tuple[Queries, None]:
        batch = memory.shape[0]
        position = self.position.weight.expand(batch, -1, -1)  # (B, Q, C)
        content = self.content.weight.expand(batch, -1, -1)  # (B, Q, C)
        reference = at_least_float32(self.reference_points(position)).sigmoid()
        return Queries(content, position, reference, [QueryGroup(self.num_queries, Assignment())]), None


class ProposalQueries(QuerySelection):
    """The best proposals become references; contents and positions are coded from their boxes.

    Deformable DETR, Sec. 4.2. With ``content_from_memory`` the contents are the chosen tokens
    themselves, with gradient (Efficient DETR's initialisation, Sparse DETR, App. A.3 "top-k").
    """

    def __init__(
        self,
        *,
        embed_dim: int = 256,
        num_queries: int = 300,
        content_from_memory: bool = False,
        skip_invalid: bool = False,
        nms_threshold: float | None = None,
    ):
        super().__init__(num_queries=num_queries, skip_invalid=skip_invalid, nms_threshold=nms_threshold)
        if embed_dim % 4:
            raise ValueError(f"ProposalQueries: embed_dim={embed_dim} must be a multiple of 4")
        self.content_from_memory = content_from_memory
        self.num_feats = embed_dim // 2
        outputs = embed_dim if content_from_memory else 2 * embed_dim
        self.position_proj = nn.Linear(2 * embed_dim, outputs)
        self.position_norm = nn.LayerNorm(outputs)

    def forward(self, memory: Tensor, tokens: Tokens, head: ProposalHead) -> tuple[Queries, Proposals]:
        projected = head.project(memory, tokens.unproposed)
        logits = head.class_head(projected)  # (B, N, num_classes)
        selected = self.select(head.score(logits), tokens)  # (B, Q)
        if self.training:  # the losses look at all tokens' boxes
            boxes = head.refine(projected, tokens.proposals)  # (B, N, 4)
            chosen = gather_tokens(boxes, selected)
        else:
            logits = gather_tokens(logits, selected)
            boxes = chosen = head.refine(
                gather_tokens(projected, selected), gather_tokens(tokens.proposals, selected)
            )

        reference = chosen.detach().sigmoid()
        code = box_code(reference, self.num_feats)  # (B, Q, 2 * C)
        position = self.position_norm(self.position_proj(code.to(memory.dtype)))
        if self.content_from_memory:
            content = gather_tokens(memory, selected)
        else:
            position, content = position.chunk(2, dim=-1)
        queries = Queries(content, position, reference, [QueryGroup(selected.shape[1], Assignment())])
        return queries, Proposals(logits, boxes.sigmoid(), selected)


class MixedQueries(QuerySelection):
    """References from the best proposals, contents learned: DINO, Sec. 3.4 (mixed selection).

    Args:
        learned_content: False takes the chosen projected tokens, detached, as contents instead.
    """

    def __init__(
        self,
        *,
        embed_dim: int = 256,
        num_queries: int = 900,
        learned_content: bool = True,
        skip_invalid: bool = False,
        nms_threshold: float | None = None,
    ):
        super().__init__(num_queries=num_queries, skip_invalid=skip_invalid, nms_threshold=nms_threshold)
        self.content = nn.Embedding(num_queries, embed_dim) if learned_content else None

    def forward(self, memory: Tensor, tokens: Tokens, head: ProposalHead) -> tuple[Queries, Proposals]:
        projected = head.project(memory, tokens.unproposed)
        scores = head.score(head.class_head(projected))
        selected = self.select(scores, tokens)  # (B, Q)

        # The heads act on tokens one by one: refine and classify only the chosen ones.
        chosen = gather_tokens(projected, selected)  # (B, Q, C)
        boxes = head.refine(chosen, gather_tokens(tokens.proposals, selected)).sigmoid()
        logits = head.class_head(chosen)
        if self.content is None:
            content = chosen.detach()
        else:
            content = self.content.weight[: selected.shape[1]].expand(memory.shape[0], -1, -1)
        queries = Queries(content, None, boxes.detach(), [QueryGroup(selected.shape[1], Assignment())])
        return queries, Proposals(logits, boxes, selected)
