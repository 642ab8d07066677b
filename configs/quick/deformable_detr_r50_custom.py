"""Data of your own on a small machine: R50 fine-tuned at a shorter side of 240 pixels.

    python train_net.py --config-file configs/quick/deformable_detr_r50_custom.py \\
        data.train_json=... data.train_images=... data.val_json=... data.val_images=... \\
        train.init_checkpoint=R-50.pkl

The backbone takes detectron2's own (MSRA) ImageNet weights.
"""

from ..common.data.custom import data, dataloader
from ..common.optim import lr_multiplier, optimizer
from ..common.train import train
from ..models.backbones import msra_input, resnet50_msra
from ..models.deformable_detr_two_stage import efficient as model

model.backbone = resnet50_msra.backbone
model.num_classes = None  # read from the annotations
model.exact_sizes = True
model.update(msra_input)
model.transformer.encoder.num_layers = 3
model.transformer.decoder.num_layers = 3
model.transformer.query_selection.num_queries = 100
model.transformer.encoder.layer.dropout = 0.0
model.transformer.decoder.layer.dropout = 0.0

dataloader.train.mapper.augmentations.update(
    short_edges=[192, 208, 224, 240, 256, 272],
    max_size=400,
    pre_crop_short_edges=[200, 240, 280],
    crop_size=[160, 240],
)
dataloader.train.mapper.image_format = "${model.input_format}"
dataloader.test.mapper.image_format = "${model.input_format}"
dataloader.test.mapper.augmentations.update(short_edge=240, max_size=400)
dataloader.test.batch_size = 4
dataloader.train.total_batch_size = 4
dataloader.train.num_workers = 1
dataloader.test.num_workers = 1

lr_multiplier.milestones = [12]
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
train.output_dir = "./output/quick/deformable_detr_r50_custom"
train.epochs = 15
train.eval_period = 0
