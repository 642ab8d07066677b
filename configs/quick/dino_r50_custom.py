"""DINO on data of your own on a small machine; data and budget of deformable_detr_r50_custom."""

from ..models.backbones import msra_input, resnet50_msra
from ..models.dino import model
from .deformable_detr_r50_custom import data, dataloader, lr_multiplier, optimizer, train

model.backbone = resnet50_msra.backbone
model.num_classes = None  # read from the annotations
model.exact_sizes = True
model.update(msra_input)
model.transformer.encoder.num_layers = 3
model.transformer.decoder.num_layers = 3
model.transformer.query_selection.num_queries = 100
model.max_detections = 100

train.output_dir = "./output/quick/dino_r50_custom"
