"""Two-stage Deformable DETR, made small enough to learn *Shapes* on a CPU in minutes."""

from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import BasicStem, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler

from ..common.data.shapes import data, dataloader  # noqa: F401 (data: for the command line)
from ..common.optim import optimizer
from ..common.train import train
from ..models.deformable_detr_two_stage import efficient as model

# ResNet-10 with half its channels, trained from scratch: norms are not frozen
model.backbone = L(ResNet)(
    stem=L(BasicStem)(in_channels=3, out_channels=32, norm="BN"),
    stages=[
        L(ResNet.make_stage)(
            block_class=BasicBlock,
            num_blocks=1,
            stride_per_block=[stride],
            in_channels=in_channels,
            out_channels=out_channels,
            norm="BN",
        )
        for stride, in_channels, out_channels in (
            (1, 32, 32),
            (2, 32, 64),
            (2, 64, 128),
            (2, 128, 256),
        )
    ],
    out_features=["res3", "res4", "res5"],
    freeze_at=0,
)
model.num_classes = 5
model.exact_sizes = True
model.pad_features = False  # its batch norms learn from whole batches
model.neck.in_channels = [64, 128, 256]
model.transformer.embed_dim = 96
model.transformer.num_levels = 3
for part in (
    model.transformer.encoder.layer.attention,
    model.transformer.decoder.layer.cross_attention,
    model.transformer.decoder.layer,
):
    part.num_heads = 6
model.transformer.encoder.num_layers = 2
model.transformer.encoder.layer.ffn_dim = 256
model.transformer.encoder.layer.dropout = 0.0
model.transformer.query_selection.num_queries = 60
model.transformer.decoder.num_layers = 3
model.transformer.decoder.layer.ffn_dim = 256
model.transformer.decoder.layer.dropout = 0.0

dataloader.train.total_batch_size = 8
# two cores compute: a worker process would take one of them
dataloader.train.num_workers = 0
dataloader.test.num_workers = 0

optimizer.lr = 1e-3
optimizer.params.lr_factor_func.rules = {"sampling_offsets": 0.1, "reference_points": 0.1}
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.01),
    warmup_length=0.05,
    warmup_factor=0.01,
)

train.output_dir = "./output/quick/deformable_detr_shapes"
train.epochs = None
train.max_iter = 1500
train.eval_period = 500
train.checkpointer.period = 500
train.log_period = 20
