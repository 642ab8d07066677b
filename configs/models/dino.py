"""DINO: the base that dense DINO, Focus-DETR and Lite-DINO configs start from.

``model`` is DINO as detrex trains it; ``official`` as its authors do: one pair of heads for all
decoder layers (the proposals keep their own), position codes of temperature 20, one unused label
row in the denoising, ResNet frozen up to res2. The authors index their 91-way heads by COCO
category id; ``num_classes`` stays the number of contiguous classes here, and the converter picks
the rows of a checkpoint that these are.
"""

import copy

from detectron2.config import LazyCall as L

from sparse_detr.modeling import (
    DINO,
    ChannelMapper,
    ContrastiveDenoising,
    DeformableDecoder,
    DeformableDecoderLayer,
    DeformableEncoderLayer,
    DenseEncoder,
    DetectionHeads,
    DetectionTransformer,
    HungarianMatcher,
    MixedQueries,
    MSDeformAttn,
    ProposalHead,
    SetCriterion,
    SinePosition,
)

from .backbones import resnet50

attention = L(MSDeformAttn)(
    embed_dim="${model.transformer.embed_dim}",
    num_heads=8,
    num_levels="${model.transformer.num_levels}",
    num_points=4,
)

model = L(DINO)(
    num_classes=80,
    backbone=resnet50.backbone,
    in_features=resnet50.in_features,
    neck=L(ChannelMapper)(
        in_channels=resnet50.in_channels,
        embed_dim="${model.transformer.embed_dim}",
        num_levels="${model.transformer.num_levels}",
    ),
    transformer=L(DetectionTransformer)(
        embed_dim=256,
        num_levels=4,
        position=L(SinePosition)(
            embed_dim="${model.transformer.embed_dim}", temperature=10000.0, offset=-0.5
        ),
        encoder=L(DenseEncoder)(
            layer=L(DeformableEncoderLayer)(
                attention=attention,
                embed_dim="${model.transformer.embed_dim}",
                ffn_dim=2048,
                dropout=0.0,
            ),
            num_layers=6,
        ),
        proposal_head=L(ProposalHead)(
            embed_dim="${model.transformer.embed_dim}", num_classes="${model.num_classes}"
        ),
        query_selection=L(MixedQueries)(
            embed_dim="${model.transformer.embed_dim}",
            num_queries=900,
            learned_content=True,
            skip_invalid="${model.exact_sizes}",
        ),
        denoising=L(ContrastiveDenoising)(
            embed_dim="${model.transformer.embed_dim}",
            num_classes="${model.num_classes}",
            num_queries=100,
            label_noise_ratio=0.5,
            box_noise_scale=1.0,
            flavour="detrex",
        ),
        decoder=L(DeformableDecoder)(
            layer=L(DeformableDecoderLayer)(
                cross_attention=attention,
                embed_dim="${model.transformer.embed_dim}",
                num_heads=8,
                ffn_dim=2048,
                dropout=0.0,
            ),
            num_layers=6,
            embed_dim="${model.transformer.embed_dim}",
            look_forward_twice=True,
            norm=True,
            position_from_reference=True,
            eps=1e-3,
        ),
        heads=L(DetectionHeads)(
            embed_dim="${model.transformer.embed_dim}",
            num_classes="${model.num_classes}",
            num_layers="${model.transformer.decoder.num_layers}",
        ),
    ),
    criterion=L(SetCriterion)(
        matcher=L(HungarianMatcher)(cost_class=2.0, cost_bbox=5.0, cost_giou=2.0, giou_eps=1e-6),
        weight_class=1.0,
        weight_bbox=5.0,
        weight_giou=2.0,
        giou_eps=1e-6,
    ),
    max_detections=300,
    exact_sizes=False,  # True: docs/reference_points.md; the published checkpoints need False
    pad_features="${model.exact_sizes}",
)
model.backbone.freeze_at = 1  # the stem only

official = copy.deepcopy(model)
official.backbone.freeze_at = 2
official.transformer.position.update(temperature=20.0, offset=0.0)
official.transformer.heads.share = True
official.transformer.denoising.flavour = "official"
