"""Focus-DETR's encoder, for any base whose model has a proposal head.

Layers follow the base's decoder in width, heads and dropout. ``keep_ratio=0.5`` is what the
released models use (the layers refresh 30 % of the tokens on average); the -45 % compute of the
paper is that of 0.3. The paper's text differs from its code in four places, each an option:
``size_ranges`` that overlap (e.g. [[-1, 64], [32, 128], [64, 256], [128, 999999]]),
``distance="centre"``, ``probabilities=True`` and ``running_value=True``.
"""

from detectron2.config import LazyCall as L

from sparse_detr.modeling import FocusEncoder

from ..common.encoder_layers import dual_attention_layer

encoder = L(FocusEncoder)(
    layer=dual_attention_layer,
    num_layers=6,
    embed_dim="${model.transformer.embed_dim}",
    num_levels="${model.transformer.num_levels}",
    keep_ratio=0.5,
    layer_ratios=[1.0, 0.8, 0.6, 0.6, 0.4, 0.2],
    num_objects=300,
    strides=[8, 16, 32, 64],
    size_ranges=[[-1, 64], [64, 128], [128, 256], [256, 999999]],
    loss_weight=1.5,
    mask_padding="${model.exact_sizes}",
    elastic=None,  # or the range to train for, [0.1, 1]
)
