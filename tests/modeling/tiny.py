"""Small versions of the shipped models: the same configs with small numbers."""

import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.modeling.backbone import BasicStem, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock
from detectron2.structures import Boxes, Instances
from omegaconf import DictConfig

from sparse_detr.config import get_config

METHODS = [  # one config of each
    "deformable_detr/deformable_detr_r50_50ep",
    "deformable_detr/deformable_detr_r50_two_stage_50ep",
    "dino/dino_r50_4scale_12ep",
    "h_deformable_detr/h_deformable_detr_r50_12ep",
    "sparse_detr/sparse_detr_r50_30_50ep",
    "focus_detr/focus_detr_r50_4scale_12ep",
    "salience_detr/salience_detr_r50_4scale_12ep",
    "lite_detr/lite_dino_r50_h3l1_2p1x3_36ep",
    "rt_detr/rt_detr_r50_72ep",
    "rt_detr/hybrid_dino_r50_4scale_12ep",
]


def tiny_backbone() -> dict:
    """Three maps of 12, 16 and 20 channels at strides 8, 16 and 32."""
    stages = [
        L(ResNet.make_stage)(
            block_class=BasicBlock,
            num_blocks=1,
            stride_per_block=[stride],
            in_channels=a,
            out_channels=b,
            norm="FrozenBN",
        )
        for stride, a, b in ((1, 4, 8), (2, 8, 12), (2, 12, 16), (2, 16, 20))
    ]
    stem = L(BasicStem)(in_channels=3, out_channels=4, norm="FrozenBN")
    return L(ResNet)(stem=stem, stages=stages, out_features=["res3", "res4", "res5"], freeze_at=0)


def shrink(model: DictConfig, num_classes: int = 3) -> DictConfig:
    """The config of a model of this project with tiny dimensions, in place."""
    model.backbone = tiny_backbone()
    model.in_features = ["res3", "res4", "res5"]
    model.neck.in_channels = [12, 16, 20]
    model.neck.num_groups = 4
    model.num_classes = num_classes
    transformer = model.transformer
    transformer.embed_dim = 32
    transformer.encoder.num_layers = 2
    if "layer_ratios" in transformer.encoder:
        transformer.encoder.layer_ratios = transformer.encoder.layer_ratios[:2]
    if "num_blocks" in transformer.encoder:
        transformer.encoder.num_blocks = 1
    transformer.decoder.num_layers = 2
    transformer.query_selection.num_queries = 8
    if "num_one_to_many" in transformer.query_selection:
        transformer.query_selection.num_one_to_many = 12
    for layer, attention in (
        (transformer.encoder.layer, "attention"),
        (transformer.decoder.layer, "cross_attention"),
    ):
        layer.ffn_dim = 48
        layer.dropout = 0.0
        if attention in layer:
            layer[attention].num_heads = 4
            layer[attention].num_points = 2
    transformer.decoder.layer.num_heads = 4
    return model


def reveal(model: torch.nn.Module) -> torch.nn.Module:
    """Gives the layers that start at zero random weights: they would hide what is behind them."""
    for name, parameter in model.named_parameters():
        if "box_head" in name or "attention_weights" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def tiny_model(config: str = "deformable_detr/deformable_detr_r50_50ep", seed: int = 0, **kwargs):
    """A shipped config, shrunk and built."""
    torch.manual_seed(seed)
    return instantiate(shrink(get_config(config).model, **kwargs))


SHAPES = ((12, 16), (6, 8), (3, 4), (2, 2))  # four levels for a shrunk transformer


def feature_maps(batch: int = 1, seed: int = 0) -> list[torch.Tensor]:
    """Random maps of ``SHAPES``, float64."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 32, h, w, generator=generator).double() for h, w in SHAPES]


def masks(*valid: tuple[float, float]) -> list[torch.Tensor]:
    """Masks of ``SHAPES``; per image the fraction of rows and columns that are valid."""
    levels = []
    for h, w in SHAPES:
        level = torch.ones(len(valid), h, w, dtype=torch.bool)
        for image, (rows, columns) in enumerate(valid):
            level[image, : max(1, int(h * rows)), : max(1, int(w * columns))] = False
        levels.append(level)
    return levels


def total_losses(model: torch.nn.Module, batch: list[dict], steps: int, lr: float) -> list[float]:
    """Trains on one batch; the total loss of every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    totals = []
    for _ in range(steps):
        total = sum(model(batch).values())
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        totals.append(float(total.detach()))
    return totals


def sample(
    height: int, width: int, num_boxes: int = 2, num_classes: int = 3, seed: int = 0, annotated: bool = True
) -> dict:
    """One image as a data mapper delivers it, with random boxes."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(3, height, width, generator=generator) * 255
    entry = {"image": image, "height": height, "width": width, "file_name": f"image{seed}.jpg"}
    if annotated:
        corner = torch.rand(num_boxes, 2, generator=generator) * 0.6
        size = torch.rand(num_boxes, 2, generator=generator) * 0.3 + 0.1
        scale = torch.tensor([width, height, width, height])
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.cat([corner, corner + size], 1) * scale)
        instances.gt_classes = torch.randint(num_classes, (num_boxes,), generator=generator)
        entry["instances"] = instances
    return entry
