"""From feature maps to predictions: tokens, encoder, query selection, decoder.

The encoder, the query selection and the decoder are built by the config; nothing here depends on
which paper they come from.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .attention import Samples
from .criterion import Predictions
from .decoder import DecoderOutput, DeformableDecoder
from .encoder import Encoder, EncoderOutput
from .fusion import FusionNeck
from .heads import DetectionHeads
from .layers import SinePosition, TransformerLayer
from .matcher import Assignment, Target
from .proposals import ProposalHead, Proposals, QueryGroup, QuerySelection
from .tokens import Tokens, count_valid, flatten_levels, valid_sizes


@dataclass
class TransformerOutput:
    """Everything one forward pass computed.

    logits: (B, Q, num_classes) and boxes: (B, Q, 4) cxcywh in [0, 1] of the unpadded image, of
    the last decoder layer's detection queries; memory: (B, N, C), what the decoder attended to.
    ``proposals`` is None for single-stage models.
    """

    logits: Tensor
    boxes: Tensor
    memory: Tensor
    tokens: Tokens
    encoded: EncoderOutput
    proposals: Proposals | None
    decoded: DecoderOutput
    groups: list[QueryGroup]


class DetectionTransformer(nn.Module):
    """Base x encoder.

    Args:
        proposal_head: two-stage head; needed by two-stage query selection and by encoders that score
            tokens with it.
        share_proposal_heads: the proposals use the decoder's class and box head (two-stage models
            without per-layer heads).
        denoising: makes denoising queries in training (DINO), or None.
        fusion: exchanges what the encoder's levels hold by convolutions, before proposals and decoder
            read it, or None.
        level_embed: add a learned vector of its level to a token's position code.
        activation_checkpointing: encoder and decoder layers keep their inputs only and are
            computed again in the backward pass: less memory, about a third more time.
    """

    training_only = ("denoising",)

    def __init__(
        self,
        *,
        encoder: Encoder,
        decoder: DeformableDecoder,
        heads: DetectionHeads,
        query_selection: QuerySelection,
        proposal_head: ProposalHead | None = None,
        share_proposal_heads: bool = False,
        position: SinePosition,
        denoising: nn.Module | None = None,
        fusion: FusionNeck | None = None,
        level_embed: bool = True,
        activation_checkpointing: bool = False,
        embed_dim: int = 256,
        num_levels: int = 4,
    ):
        super().__init__()
        if proposal_head is None:
            for part in (query_selection, encoder):
                if getattr(part, "two_stage", False) or getattr(part, "needs_proposal_head", False):
                    raise ValueError(
                        f"{type(part).__name__} needs a two-stage head: set model.transformer.proposal_head"
                    )
        if query_selection.two_stage and not decoder.refine:
            if not share_proposal_heads:
                raise ValueError(
                    "a two-stage model whose decoder has refine=False shares one pair of heads: "
                    "set model.transformer.share_proposal_heads=True and heads.share=True"
                )
        self.position = position
        self.level_embed = nn.Parameter(torch.empty(num_levels, embed_dim)) if level_embed else None
        self.encoder = encoder
        self.query_selection = query_selection
        self.proposal_head = proposal_head
        self.decoder = decoder
        self.heads = heads
        self.denoising = denoising
        self.fusion = fusion
        if share_proposal_heads:
            if proposal_head is None:
                raise ValueError(
                    "share_proposal_heads=True needs a two-stage head: set model.transformer.proposal_head"
                )
            proposal_head.class_head = heads.class_heads[0]
            proposal_head.box_head = heads.box_heads[0]
        for module in self.modules():
            if isinstance(module, TransformerLayer):
                module.activation_checkpointing = activation_checkpointing
        self.init_weights()

    def init_weights(self) -> None:
        """Xavier for every matrix, then what each module prescribes for itself."""
        for part in (self.encoder, self.query_selection, self.proposal_head, self.decoder):
            for parameter in part.parameters() if part is not None else ():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)
        if self.level_embed is not None:
            nn.init.normal_(self.level_embed)
        for module in reversed(list(self.modules())):  # parts first: their owner has the last word
            init_weights = getattr(module, "init_weights", None)
            if module is not self and init_weights is not None:
                init_weights()

    def forward(
        self,
        maps: Sequence[Tensor],
        masks: Sequence[Tensor],
        has_padding: bool = True,
        targets: Sequence[Target] | None = None,
        *,
        extents: Tensor | None = None,
        padded_size: tuple[int, int] | None = None,
        record: bool = False,
    ) -> TransformerOutput:
        """Detect objects in projected feature maps.

        Args:
            maps: per level (B, C, H_l, W_l).
            masks: per level (B, H_l, W_l) bool, True on padding; on the CPU they spare encoders that
                count tokens a wait for the device.
            has_padding: False promises that no mask holds True.
            targets: objects of each image, needed for denoising in training.
            extents: (B, L, 2), see ``Tokens``; None counts the unpadded cells, as published.
            padded_size: (height, width) of the batch in pixels.
            record: keep where the decoder looked, also where the encoder does not ask for it.
        """
        tokens = self.tokenize(maps, masks, has_padding, extents, padded_size)
        encoded = self.encoder(tokens, self.proposal_head)
        memory = encoded.memory if self.fusion is None else self.fusion(encoded.memory, tokens)
        queries, proposals = self.query_selection(memory, tokens, self.proposal_head)
        if self.denoising is not None and self.training:
            assert targets is not None, "training with denoising needs targets"
            queries = self.denoising(queries, targets)
        decoded = self.decoder(
            queries,
            memory,
            tokens,
            self.heads,
            record=record or (self.training and self.encoder.needs_decoder_samples),
        )
        detected = _slices(queries.groups)[[g.assignment.suffix for g in queries.groups].index("")]
        decoded.samples = [Samples(*(x[:, detected] for x in s)) for s in decoded.samples]
        return TransformerOutput(
            logits=decoded.logits[-1][:, detected],
            boxes=decoded.boxes[-1][:, detected],
            memory=memory,
            tokens=tokens,
            encoded=encoded,
            proposals=proposals,
            decoded=decoded,
            groups=queries.groups,
        )

    def tokenize(
        self,
        maps: Sequence[Tensor],
        masks: Sequence[Tensor],
        has_padding: bool = True,
        extents: Tensor | None = None,
        padded_size: tuple[int, int] | None = None,
    ) -> Tokens:
        """Flatten maps (B, C, H_l, W_l) and masks (B, H_l, W_l), finest level first."""
        counts = _valid_counts(masks, has_padding)
        masks = [m.to(maps[0].device, non_blocking=True) for m in masks]
        features = flatten_levels(maps)
        dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
        exact = extents is not None
        extents = (valid_sizes(masks) if extents is None else extents).to(features.device, dtype)
        codes = [self.position(m, extent) for m, extent in zip(masks, extents.unbind(1))]
        if self.level_embed is not None:
            codes = [code + e for code, e in zip(codes, self.level_embed)]
        return Tokens(
            features=features,
            position=torch.cat(codes, dim=1).to(features.dtype),  # sums with features stay in their dtype
            mask=flatten_levels(masks),
            shapes=tuple((m.shape[-2], m.shape[-1]) for m in maps),
            extents=extents,
            has_padding=has_padding,
            counts=counts,
            exact=exact,
            padded_size=padded_size,
        )

    def predictions(self, output: TransformerOutput) -> list[Predictions]:
        """All prediction sets of a training step: decoder layers, proposals, encoder."""
        sets = []
        last = len(output.decoded.logits) - 1
        for group, part in zip(output.groups, _slices(output.groups)):
            for layer in [last, *range(last)]:
                suffix = group.assignment.suffix + ("" if layer == last else f"_{layer}")
                how = replace(group.assignment, suffix=suffix)
                sets.append(
                    Predictions(
                        output.decoded.logits[layer][:, part], output.decoded.boxes[layer][:, part], how
                    )
                )
        if output.proposals is not None:
            assert self.proposal_head is not None
            how = Assignment("_enc", class_agnostic=self.proposal_head.class_agnostic)
            sets.append(Predictions(output.proposals.logits, output.proposals.boxes, how))
        for suffix, (logits, boxes) in output.encoded.predictions.items():
            sets.append(Predictions(logits, boxes, Assignment(suffix)))
        return sets


def _valid_counts(masks: Sequence[Tensor], has_padding: bool) -> tuple[tuple[int, ...], ...] | None:
    """Unpadded tokens of each image and level, or None if only the device knows."""
    if not has_padding:
        return (tuple(m[0].numel() for m in masks),) * masks[0].shape[0]
    return count_valid(masks) if masks[0].device.type == "cpu" else None


def _slices(groups: Sequence[QueryGroup]) -> list[slice]:
    """Where each group lies on the query axis."""
    ends = itertools.accumulate(g.size for g in groups)
    return [slice(end - g.size, end) for g, end in zip(groups, ends)]
