"""Deformable DETR, single stage: the base the other Deformable DETR configs start from."""

from detectron2.config import LazyCall as L

from sparse_detr.modeling import (
    ChannelMapper,
    DeformableDecoder,
    DeformableDecoderLayer,
    DeformableDETR,
    DeformableEncoderLayer,
    DenseEncoder,
    DetectionHeads,
    DetectionTransformer,
    HungarianMatcher,
    LearnedQueries,
    MSDeformAttn,
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

model = L(DeformableDETR)(
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
                ffn_dim=1024,
                dropout=0.1,
            ),
            num_layers=6,
        ),
        query_selection=L(LearnedQueries)(embed_dim="${model.transformer.embed_dim}", num_queries=300),
        decoder=L(DeformableDecoder)(
            layer=L(DeformableDecoderLayer)(
                cross_attention=attention,
                embed_dim="${model.transformer.embed_dim}",
                num_heads=8,
                ffn_dim=1024,
                dropout=0.1,
            ),
            num_layers=6,
            embed_dim="${model.transformer.embed_dim}",
            refine=False,
        ),
        heads=L(DetectionHeads)(
            embed_dim="${model.transformer.embed_dim}",
            num_classes="${model.num_classes}",
            num_layers="${model.transformer.decoder.num_layers}",
            share=True,
            size_logit=-2.0,
        ),
    ),
    criterion=L(SetCriterion)(
        matcher=L(HungarianMatcher)(cost_class=2.0, cost_bbox=5.0, cost_giou=2.0),
        weight_class=2.0,
        weight_bbox=5.0,
        weight_giou=2.0,
    ),
    max_detections=100,
    exact_sizes=False,  # True: docs/reference_points.md; the published checkpoints need False
    pad_features="${model.exact_sizes}",
)
