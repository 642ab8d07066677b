"""A LazyConfig for tests: a detector that takes milliseconds per step, on a dozen small images."""

from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import BasicStem, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock

from ...configs.common.data.shapes import data, dataloader  # noqa: F401
from ...configs.common.optim import lr_multiplier, optimizer
from ...configs.common.train import train
from ...configs.models.deformable_detr_two_stage import efficient as model

model.backbone = L(ResNet)(
    stem=L(BasicStem)(in_channels=3, out_channels=8, norm="BN"),
    stages=[
        L(ResNet.make_stage)(
            block_class=BasicBlock,
            num_blocks=1,
            stride_per_block=[stride],
            in_channels=in_channels,
            out_channels=out_channels,
            norm="BN",
        )
        for stride, in_channels, out_channels in ((1, 8, 8), (2, 8, 16), (2, 16, 24), (2, 24, 32))
    ],
    out_features=["res3", "res4", "res5"],
    freeze_at=0,
)
model.num_classes = 5
model.neck.in_channels = [16, 24, 32]
model.transformer.embed_dim = 32
model.transformer.num_levels = 3
model.transformer.encoder.num_layers = 1
model.transformer.encoder.layer.ffn_dim = 32
model.transformer.query_selection.num_queries = 10
model.transformer.decoder.num_layers = 2
model.transformer.decoder.layer.ffn_dim = 32

dataloader.train.dataset.num_images = 12
dataloader.train.mapper.augmentations.update(
    short_edges=[64], max_size=256, pre_crop_short_edges=[72], crop_size=[48, 64]
)
dataloader.train.total_batch_size = 2
dataloader.train.num_workers = 0
dataloader.test.dataset.num_images = 6
dataloader.test.mapper.augmentations.short_edge = 64
dataloader.test.num_workers = 0

optimizer.lr = 1e-3
lr_multiplier.milestones = [0.5]
train.device = "cpu"
train.epochs = 1
train.eval_period = 4
train.checkpointer.period = 3
train.log_period = 2
