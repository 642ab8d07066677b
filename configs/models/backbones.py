"""Backbones: the detectron2 module, the maps taken from it and their channels.

A model config takes ``backbone``, ``in_features`` and ``neck.in_channels`` from one of these.
"""

from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import BasicStem, ResNet
from torchvision.models import SwinTransformer, convnext_large

from sparse_detr.modeling import StagedBackbone, TimmBackbone, build_resnet_d, build_swin, timm_channels

# torchvision's ResNet: stride in the 3x3 convolution, frozen norms, stem and res2 not trained.
resnet50 = dict(
    backbone=L(ResNet)(
        stem=L(BasicStem)(in_channels=3, out_channels=64, norm="FrozenBN"),
        stages=L(ResNet.make_default_stages)(depth=50, stride_in_1x1=False, norm="FrozenBN"),
        out_features=["res3", "res4", "res5"],
        freeze_at=2,
    ),
    in_features=["res3", "res4", "res5"],
    in_channels=[512, 1024, 2048],
)

# detectron2's own ResNet (MSRA, Caffe): stride in the first 1x1 convolution; its weights expect
# BGR in 0..255 minus the mean. Set on the model as well: ``model.update(msra_input)``.
resnet50_msra = dict(
    backbone=L(ResNet)(
        stem=L(BasicStem)(in_channels=3, out_channels=64, norm="FrozenBN"),
        stages=L(ResNet.make_default_stages)(depth=50, stride_in_1x1=True, norm="FrozenBN"),
        out_features=["res3", "res4", "res5"],
        freeze_at=2,
    ),
    in_features=["res3", "res4", "res5"],
    in_channels=[512, 1024, 2048],
)
msra_input = dict(pixel_mean=[103.53, 116.28, 123.675], pixel_std=[1.0, 1.0, 1.0], input_format="BGR")

# ResNet-D with frozen norms and stem, and smaller ones of which all is trained, as RT-DETR trains them.
resnet50_d = dict(
    backbone=L(build_resnet_d)(depth=50, norm="FrozenBN", freeze_at=1),
    in_features=["res3", "res4", "res5"],
    in_channels=[512, 1024, 2048],
)

resnet18_d = dict(
    backbone=L(build_resnet_d)(depth=18, norm="BN", freeze_at=0),
    in_features=["res3", "res4", "res5"],
    in_channels=[128, 256, 512],
)

swin_tiny = dict(
    backbone=L(build_swin)(
        embed_dim=96,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        drop_path_rate=0.2,
        out_indices=[1, 2, 3],
        frozen_stages=2,
    ),
    in_features=["p1", "p2", "p3"],
    in_channels=[192, 384, 768],
)

# The other sizes, trained from their first layer on; 384 is the size of the pre-training images.
swin_small = dict(
    backbone=L(build_swin)(
        embed_dim=96,
        depths=[2, 2, 18, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        drop_path_rate=0.2,
        out_indices=[1, 2, 3],
    ),
    in_features=["p1", "p2", "p3"],
    in_channels=[192, 384, 768],
)

swin_base_384 = dict(
    backbone=L(build_swin)(
        embed_dim=128,
        depths=[2, 2, 18, 2],
        num_heads=[4, 8, 16, 32],
        window_size=12,
        drop_path_rate=0.2,
        out_indices=[1, 2, 3],
        pretrain_img_size=384,
    ),
    in_features=["p1", "p2", "p3"],
    in_channels=[256, 512, 1024],
)

swin_large_384 = dict(
    backbone=L(build_swin)(
        embed_dim=192,
        depths=[2, 2, 18, 2],
        num_heads=[6, 12, 24, 48],
        window_size=12,
        drop_path_rate=0.2,
        out_indices=[1, 2, 3],
        pretrain_img_size=384,
    ),
    in_features=["p1", "p2", "p3"],
    in_channels=[384, 768, 1536],
)

# torchvision's modules: no norms behind the stages; the first and the step down behind it are not trained.
torchvision_swin_large = dict(
    backbone=L(StagedBackbone)(
        model=L(SwinTransformer)(
            patch_size=[4, 4],
            embed_dim=192,
            depths=[2, 2, 18, 2],
            num_heads=[6, 12, 24, 48],
            window_size=[7, 7],
            stochastic_depth_prob=0.2,
        ),
        channels=[192, 384, 768, 1536],
        channels_last=True,
    ),
    in_features=["p1", "p2", "p3"],
    in_channels=[384, 768, 1536],
)

torchvision_convnext_large = dict(
    backbone=L(StagedBackbone)(
        model=L(convnext_large)(stochastic_depth_prob=0.5), channels=[192, 384, 768, 1536]
    ),
    in_features=["p1", "p2", "p3"],
    in_channels=[384, 768, 1536],
)

# timm's FocalNet with norms behind the stages; the first and the step down behind it are not trained.
focalnet_large = dict(
    backbone=L(TimmBackbone)(
        name="focalnet_large_fl4",
        out_features="${model.in_features}",
        freeze_at=2,
        freeze=["layers_1.downsample"],
        output_norm=True,
        # as it was trained, with the mean over focal levels; timm's default is their sum
        options=dict(normalize_modulator=True, drop_path_rate=0.5),
    ),
    in_features=["stride8", "stride16", "stride32"],
    in_channels=[384, 768, 1536],
)

# Any backbone of timm: what the rest of the model must know of it is read from it, by its name alone.
# ``model.update(timm_input)``: pixels as its weights were trained with.
timm = dict(
    backbone=L(TimmBackbone)(
        name="resnet18",
        out_features="${model.in_features}",
        freeze_at=2,  # stem and first stage: all that the map of stride 4 is computed from
        norm="FrozenBN",
        options=None,  # of timm.create_model: dict(drop_path_rate=0.1)
    ),
    in_features=["stride8", "stride16", "stride32"],
    in_channels=L(timm_channels)(
        name="${model.backbone.name}",
        out_features="${model.in_features}",
        options="${model.backbone.options}",
    ),
)
timm_input = dict(pixel_mean=None, pixel_std=None, input_format="RGB")
