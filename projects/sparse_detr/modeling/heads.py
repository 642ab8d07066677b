"""Classification and box heads of the decoder layers.

Deformable DETR, App. A.4: sigmoid classification without a background class, boxes as offsets to a
reference in logit space.
"""

from __future__ import annotations

import copy
import math

from torch import Tensor, nn

from .layers import MLP, ModuleList, at_least_float32

PRIOR_PROBABILITY = 0.01  # of any class at the start (RetinaNet, Sec. 4.1)


class ClassHead(nn.Linear):
    """(..., C) -> (..., num_classes) logits, starting at probability 0.01."""

    def __init__(self, *, embed_dim: int, num_classes: int):
        if not num_classes:
            raise ValueError(
                f"num_classes={num_classes}: the number of classes must be known before the model "
                "is built; pass model.num_classes=..."
            )
        super().__init__(embed_dim, num_classes)
        self.init_weights()

    def init_weights(self) -> None:
        self.reset_parameters()
        nn.init.constant_(self.bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))


class BoxHead(MLP):
    """(..., C) -> (..., 4) offsets of cxcywh in logit space, starting at ``(0, 0, s, s)``.

    ``size_logit`` s = -2 starts boxes small where references are points without a size.
    """

    def __init__(self, *, embed_dim: int, size_logit: float = 0.0):
        super().__init__(input_dim=embed_dim, hidden_dim=embed_dim, output_dim=4, num_layers=3)
        self.size_logit = size_logit
        self.init_weights()

    def init_weights(self) -> None:
        for layer in self.layers:
            layer.reset_parameters()
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)
        nn.init.constant_(self.layers[-1].bias[2:], self.size_logit)


class DetectionHeads(nn.Module):
    """One class and one box head per decoder layer, or one pair for all layers.

    Args:
        share: one pair serves every layer (plain Deformable DETR; official DINO).
        size_logit: start of the first layer's box size, see ``BoxHead``; -2 for single-stage
            models, 0 where queries start from proposals.
    """

    def __init__(
        self,
        *,
        embed_dim: int = 256,
        num_classes: int,
        num_layers: int = 6,
        share: bool = False,
        size_logit: float = 0.0,
    ):
        super().__init__()
        self.num_layers = num_layers
        self.num_classes = num_classes
        count = 1 if share else num_layers
        self.class_heads = ModuleList(
            ClassHead(embed_dim=embed_dim, num_classes=num_classes) for _ in range(count)
        )
        self.box_heads = ModuleList(
            BoxHead(embed_dim=embed_dim, size_logit=size_logit if i == 0 else 0.0) for i in range(count)
        )
        self.init_weights()

    def init_weights(self) -> None:
        """All layers start from the same heads, as the published models do."""
        for heads in (self.class_heads, self.box_heads):
            heads[0].init_weights()
            for head in heads[1:]:
                state = copy.deepcopy(heads[0].state_dict())
                head.load_state_dict(state)
        for head in self.box_heads[1:]:
            nn.init.zeros_(head.layers[-1].bias)

    def classify(self, layer: int, x: Tensor) -> Tensor:
        """(B, Q, C) -> (B, Q, num_classes) logits."""
        return self.class_heads[min(layer, len(self.class_heads) - 1)](x)

    def regress(self, layer: int, x: Tensor) -> Tensor:
        """(B, Q, C) -> (B, Q, 4) offsets in logit space."""
        return self.box_heads[min(layer, len(self.box_heads) - 1)](x)

    def refine(self, layer: int, x: Tensor, proposals: Tensor) -> Tensor:
        """Boxes (B, K, 4), cxcywh, of tokens (B, K, C) around proposals (B, K, 4) in logit space."""
        return (at_least_float32(self.regress(layer, x)) + proposals).sigmoid()
