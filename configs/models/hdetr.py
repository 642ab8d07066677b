"""H-Deformable-DETR: the base that H-DETR and Lite-H-DETR configs start from.

Two-stage Deformable DETR with its authors' three tricks, no dropout, mixed query selection and
looking forward twice, and with hybrid matching: in training 1500 more queries, matched to every
object six times.
"""

from detectron2.config import LazyCall as L

from sparse_detr.modeling import HybridQueries

from .deformable_detr_two_stage import model

for _layer in (model.transformer.encoder.layer, model.transformer.decoder.layer):
    _layer.ffn_dim = 2048
    _layer.dropout = 0.0
model.transformer.decoder.look_forward_twice = True
model.transformer.query_selection = L(HybridQueries)(
    embed_dim="${model.transformer.embed_dim}",
    num_queries=300,
    num_one_to_many=1500,
    skip_invalid="${model.exact_sizes}",
    repeat=6,
    weight=1.0,
)
