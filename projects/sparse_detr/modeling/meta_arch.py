"""The detectron2 meta-architecture: images to losses in training, to Instances in inference."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable, instantiate
from detectron2.modeling import Backbone, detector_postprocess
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..devices import resolve_device
from ..errors import UserError
from ..yacs_config import from_yacs
from .backbone import fold_frozen_norms
from .boxes import xyxy_to_cxcywh
from .criterion import BatchPart, SetCriterion
from .elastic import KeepRatios
from .layers import ChannelMapper, at_least_float32, tensor_like
from .matcher import Target
from .postprocess import detections
from .tokens import exact_extents
from .transformer import DetectionTransformer, TransformerOutput

logger = logging.getLogger(__name__)

IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


class SetDetector(nn.Module):
    """A DETR-type detector: backbone, neck, transformer, set criterion.

    Args:
        backbone: detectron2 backbone; its outputs ``in_features`` go to the neck, finest first.
        pixel_mean, pixel_std: of the channels as the data mapper delivers them; None: the backbone's own,
            ImageNet's where it does not tell.
        input_format: "RGB" or "BGR"; what the mapper delivers, used by predictors and drawings.
        num_classes: classes of the data set, contiguous from 0; no background class.
        max_detections: detections per image.
        exact_sizes: reference points, proposals and position codes from an image's size in pixels over
            each level's stride. False counts whole cells, as the published models do and their
            checkpoints need; see docs/reference_points.md.
        pad_features: backbone and neck see each image without padding, which then goes around their
            maps; an image's maps do not depend on its batch. False pads the images, as published.
        size_divisibility: pad images to a multiple of this; 0: to the batch's largest only.
        fit_weights: called with the model and the weights that ``load_state_dict`` gets, which it may
            change in place; None: the class's own.
    """

    default_config = ""  # shipped config behind the yacs name, see ``from_config``
    # Set by ``engine/checkpoint.py`` and, for models of a yacs config, ``yacs.py``: detectron2's checkpointer
    # would leave a model of other names as it was initialised, with log lines alone.
    fit_weights: Callable[[nn.Module, dict[str, Any]], None] | None = None
    yacs_fit_weights: Callable[[nn.Module, dict[str, Any]], None] | None = None
    pixel_mean: Tensor  # (3, 1, 1)
    pixel_std: Tensor  # (3, 1, 1)

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        in_features: Sequence[str],
        neck: ChannelMapper,
        transformer: DetectionTransformer,
        criterion: SetCriterion,
        num_classes: int,
        pixel_mean: Sequence[float] | None = IMAGENET_MEAN,
        pixel_std: Sequence[float] | None = IMAGENET_STD,
        input_format: str = "RGB",
        max_detections: int = 100,
        exact_sizes: bool = False,
        pad_features: bool = False,
        size_divisibility: int = 0,
        fit_weights: Callable[[nn.Module, dict[str, Any]], None] | None = None,
    ):
        super().__init__()
        if transformer.heads.num_classes != num_classes:
            raise ValueError(
                f"model.num_classes={num_classes} but the heads have "
                f"{transformer.heads.num_classes} classes: let them refer to ${{model.num_classes}}"
            )
        if pad_features and any(isinstance(m, _BatchNorm) for m in [*backbone.modules(), *neck.modules()]):
            raise UserError(
                "model.pad_features=True computes a batch image by image, and the backbone's batch norms "
                "would see one image at a time: freeze them (norm=FrozenBN) or set model.pad_features=False"
            )
        if pixel_mean is None:
            pixel_mean = getattr(backbone, "pixel_mean", IMAGENET_MEAN)
        if pixel_std is None:
            pixel_std = getattr(backbone, "pixel_std", IMAGENET_STD)
        _check_input(backbone, pixel_mean, pixel_std, input_format)
        fold_frozen_norms(backbone)
        self.backbone = backbone
        self.in_features = list(in_features)
        self.neck = neck
        self.transformer = transformer
        self.criterion = criterion
        self.num_classes = num_classes
        self.input_format = input_format
        self.max_detections = max_detections
        self.exact_sizes = exact_sizes
        self.pad_features = pad_features
        self.size_divisibility = size_divisibility
        if fit_weights is not None:
            self.fit_weights = fit_weights
        shapes = backbone.output_shape()
        self.strides = [shapes[name].stride for name in in_features]
        self.strides += [
            self.strides[-1] * 2**extra for extra in range(1, len(neck.convs) - len(in_features) + 1)
        ]
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        """Constructor arguments for users of ``MODEL.META_ARCHITECTURE``; see ``yacs.py``."""
        model = from_yacs(cfg, cls.default_config).model
        arguments = {name: instantiate(value) for name, value in model.items() if name != "_target_"}
        return {"fit_weights": cls.yacs_fit_weights, **arguments}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.fit_weights is not None and not prefix:
            self.fit_weights(self, state_dict)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def to(self, *args: Any, **kwargs: Any) -> SetDetector:
        """torch's; the device may be "auto", as in the configs: detectron2's scripts pass it on."""
        if args and args[0] == "auto":
            args = (resolve_device("auto"), *args[1:])
        return super().to(*args, **kwargs)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(
        self, batched_inputs: list[dict], part: BatchPart | None = None
    ) -> dict[str, Tensor] | list[dict]:
        """detectron2's protocol.

        Args:
            batched_inputs: per image a dict with ``image`` (3, H, W), 0..255, and in training
                ``instances`` with ``gt_boxes`` (xyxy pixels) and ``gt_classes``; in inference
                optionally ``height`` and ``width`` of the output.
            part: in training, where the images are a part of their batch only.

        Returns:
            In training, a dict of weighted losses. In inference, a list of
            ``{"instances": Instances}`` with ``pred_boxes`` in output pixels, ``scores`` and
            ``pred_classes``.
        """
        if self.training:
            images = self.preprocess(batched_inputs)
            targets = self.targets(batched_inputs)
            if self.transformer.encoder.elastic is not None:
                return self._elastic_losses(self.transformer.encoder.elastic, images, targets, part)
            output = self.detect(images, targets)
            losses = self.losses(output, targets, part)
            _log(output.encoded.metrics)
            return losses
        # Some encoders look at the whole batch: such an image must not reach them. Their sum tells, in one
        # pass over the pixels.
        broken = [
            index
            for index, entry in enumerate(batched_inputs)
            if entry["image"].is_floating_point() and not at_least_float32(entry["image"]).sum().isfinite()
        ]
        pixels = [
            {"image": torch.zeros_like(entry["image"]) if index in broken else entry["image"]}
            for index, entry in enumerate(batched_inputs)
        ]
        images = self.preprocess(pixels)
        output = self.detect(images)
        results = detections(output.logits, output.boxes, images.image_sizes, self.max_detections)
        results = self._without_broken(results, batched_inputs, broken)
        return [
            {
                "instances": detector_postprocess(
                    result, entry.get("height", size[0]), entry.get("width", size[1])
                )
            }
            for result, entry, size in zip(results, batched_inputs, images.image_sizes)
        ]

    def _without_broken(
        self, results: list[Instances], batched_inputs: list[dict], broken: list[int]
    ) -> list[Instances]:
        """No detections for an image whose pixels (``broken``) or results are NaN or Inf, and a warning
        that names it.

        Raises:
            FloatingPointError: it is the weights that are not finite.
        """
        sound = torch.stack(
            [r.scores.isfinite().all() & r.pred_boxes.tensor.isfinite().all() for r in results]
        ).tolist()
        for index, entry in enumerate(batched_inputs):
            if sound[index] and index not in broken:
                continue
            weights = [name for name, p in self.named_parameters() if not p.isfinite().all()]
            if weights:
                raise FloatingPointError(
                    f"{len(weights)} of the model's weights are not finite ({', '.join(weights[:3])}, ...): "
                    "it detects nothing. Take a checkpoint from before"
                )
            logger.warning(
                "image %s (%s): %s not finite (NaN or Inf); it gets no detections",
                entry.get("image_id", "without an id"),
                entry.get("file_name", "without a file name"),
                "its pixels are" if index in broken else "the model's results are",
            )
            results[index] = results[index][:0]
        return results

    def preprocess(self, batched_inputs: list[dict]) -> ImageList:
        """Normalise, then pad with zeros at the right and bottom to the largest of the batch.

        The padding is rounded up to ``size_divisibility`` only, not to the backbone's stride: it would
        change masks and valid ratios and with them the published models' function.
        """
        images = [
            (x["image"].to(self.device, self.pixel_mean.dtype) - self.pixel_mean) / self.pixel_std
            for x in batched_inputs
        ]
        return ImageList.from_tensors(images, self.size_divisibility)

    def detect(self, images: ImageList, targets: list[Target] | None = None) -> TransformerOutput:
        """Everything between the normalised batch and the predictions."""
        if self.pixel_mean.dtype in (torch.float16, torch.bfloat16):
            self._check_autocast()
        maps, masks, sizes, padded = self._levels(images)
        return self._transform(maps, masks, sizes, padded, targets)

    def _levels(
        self, images: ImageList
    ) -> tuple[list[Tensor], list[Tensor], list[tuple[int, int]], tuple[int, int]]:
        """Maps (B, C, H_l, W_l) and masks (B, H_l, W_l) of the batch, its sizes and its padded size."""
        sizes = [(height, width) for height, width in images.image_sizes]
        padded = images.tensor.shape[-2], images.tensor.shape[-1]
        if self.pad_features and any(size != sizes[0] for size in sizes[1:]):
            maps, masks = self._maps_of_each_size(images.tensor, sizes)
        else:
            maps, masks = self._project(self._features(images.tensor), sizes, padded)
        return maps, masks, sizes, padded

    def _elastic_losses(
        self, ratios: KeepRatios, images: ImageList, targets: list[Target], part: BatchPart | None
    ) -> dict[str, Tensor]:
        """``losses`` of a batch whose images have different keep ratios; the log gets the images' mean."""
        encoder = self.transformer.encoder
        maps, masks, sizes, padded = self._levels(images)
        part = part or BatchPart(sum(len(t.labels) for t in targets))
        step = get_event_storage().iter if has_event_storage() else 0
        losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        usual = encoder.keep_ratio
        try:
            for encoder.keep_ratio, members in ratios.groups(len(targets), step):
                some_maps, some_masks = ([x[members] for x in levels] for levels in (maps, masks))
                output = self._transform(some_maps, some_masks, sizes[members], padded, targets[members])
                group = replace(part, share=len(targets[members]) / len(targets))
                _add(losses, self.losses(output, targets[members], group))
                _add(metrics, {name: value * group.share for name, value in output.encoded.metrics.items()})
        finally:
            encoder.keep_ratio = usual
        _log(metrics)
        return losses

    def _check_autocast(self) -> None:
        """A model that was cast as a whole: coordinates need more digits than half precision has."""
        if not torch.is_autocast_enabled(self.device.type):
            raise UserError(
                f"the model was cast to {self.pixel_mean.dtype}, in which boxes have too few digits: leave "
                "it in float32 and use mixed precision, Predictor(..., dtype=torch.bfloat16), or around the "
                f'call torch.autocast("{self.device.type}", dtype=torch.bfloat16); in training '
                "train.amp.enabled=true"
            )

    def decode(
        self,
        features: Sequence[Tensor],
        image_sizes: Sequence[tuple[int, int]],
        padded_size: tuple[int, int],
        targets: list[Target] | None = None,
    ) -> TransformerOutput:
        """``detect`` from the backbone's maps (B, C_i, H_i, W_i) on."""
        sizes = [(height, width) for height, width in image_sizes]
        padded = padded_size[0], padded_size[1]
        maps, masks = self._project(features, sizes, padded)
        return self._transform(maps, masks, sizes, padded, targets)

    def _features(self, image: Tensor) -> list[Tensor]:
        """The backbone's maps of images (B, 3, H, W)."""
        if not torch.is_grad_enabled():
            # Convolutions are faster, and maps become tokens without a copy. Not in training: the
            # backward pass of torch 2.15 crashes on the CPU for images one pixel wide.
            image = image.contiguous(memory_format=torch.channels_last)
        features = self.backbone(image)
        return [features[name] for name in self.in_features]

    def _maps_of_each_size(
        self, batch: Tensor, sizes: Sequence[tuple[int, int]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Maps (B, C, H_l, W_l) and masks (B, H_l, W_l) of images that no padding has touched."""
        unit = max(self.size_divisibility, 1)
        maps: list[list[Tensor]] = [[] for _ in sizes]  # of each image, by level
        masks: list[list[Tensor]] = [[] for _ in sizes]
        for size in dict.fromkeys(sizes):
            members = [image for image, other in enumerate(sizes) if other == size]
            height, width = (-(-side // unit) * unit for side in size)
            # Not batch[members]: an index from the host makes it wait for the GPU.
            features = self._features(torch.stack([batch[i, :, :height, :width] for i in members]))
            levels, hidden = self._project(features, [size] * len(members), (height, width))
            for row, image in enumerate(members):
                maps[image] = [level[row] for level in levels]
                masks[image] = [level[row] for level in hidden]
        return (
            [_pad_and_stack(level, 0.0) for level in zip(*maps)],
            [_pad_and_stack(level, True) for level in zip(*masks)],
        )

    def _project(
        self, features: Sequence[Tensor], sizes: Sequence[tuple[int, int]], padded: tuple[int, int]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The backbone's maps as the transformer's, (B, C, H_l, W_l), and their masks (B, H_l, W_l)."""
        maps = self.neck(features)
        return maps, self._masks(maps, sizes, padded)

    def _masks(
        self, maps: Sequence[Tensor], sizes: Sequence[tuple[int, int]], padded: tuple[int, int]
    ) -> list[Tensor]:
        """Per level (B, H_l, W_l) bool, True on padding; on the CPU, where counting them is free."""
        masks = [torch.zeros(len(sizes), *m.shape[-2:], dtype=torch.bool) for m in maps]
        if all(size == padded for size in sizes):
            return masks
        if self.exact_sizes:
            for mask, stride in zip(masks, self.strides):
                for image, (height, width) in enumerate(sizes):
                    mask[image, -(-height // stride) :] = True
                    mask[image, :, -(-width // stride) :] = True
            return masks
        mask = torch.ones((len(sizes), *padded), dtype=torch.uint8)
        for image, (height, width) in enumerate(sizes):
            mask[image, :height, :width] = 0
        return [F.interpolate(mask[None], size=m.shape[-2:])[0].bool() for m in maps]

    def _transform(
        self,
        maps: Sequence[Tensor],
        masks: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
        padded: tuple[int, int],
        targets: list[Target] | None,
    ) -> TransformerOutput:
        extents = exact_extents(sizes, self.strides, self.pixel_mean) if self.exact_sizes else None
        has_padding = any(size != padded for size in sizes)
        return self.transformer(maps, masks, has_padding, targets, extents=extents, padded_size=padded)

    def targets(self, batched_inputs: list[dict]) -> list[Target]:
        """Objects of each image, boxes relative to the unpadded network input."""
        targets = []
        for entry in batched_inputs:
            if "instances" not in entry:
                raise ValueError(
                    "training needs annotations: the data mapper delivered no 'instances' for "
                    f"{entry.get('file_name', 'an image')}"
                )
            self._check_classes(entry)
            instances = entry["instances"].to(self.device)
            height, width = instances.image_size
            boxes = instances.gt_boxes.tensor.to(self.pixel_mean.dtype)
            boxes = boxes / tensor_like([width, height, width, height], boxes)
            targets.append(Target(instances.gt_classes, xyxy_to_cxcywh(boxes), (height, width)))
        return targets

    def _check_classes(self, entry: dict) -> None:
        """An index error otherwise, which on a GPU names neither the line nor the cause."""
        classes = entry["instances"].gt_classes
        if classes.device.type != "cpu" or len(classes) == 0:  # no waiting for a GPU
            return
        low, high = classes.min().item(), classes.max().item()
        if low < 0 or high >= self.num_classes:
            raise ValueError(
                f"{entry.get('file_name', 'an image')} has an object of class "
                f"{low if low < 0 else high}, but the model has {self.num_classes} classes, counted "
                "from 0: model.num_classes (yacs: MODEL.SPARSE_DETR.NUM_CLASSES) must be the data set's"
            )

    def losses(
        self, output: TransformerOutput, targets: list[Target], part: BatchPart | None = None
    ) -> dict[str, Tensor]:
        """Weighted losses of the criterion and of the encoder."""
        share = 1.0 if part is None else part.share
        losses = self.criterion(self.transformer.predictions(output), targets, part)
        encoder = self.transformer.encoder
        own = encoder.losses(output.encoded, output.decoded, output.tokens, targets)
        losses.update({name: value * share for name, value in own.items()})
        return losses


def _add(total: dict[str, Tensor], part: Mapping[str, Tensor]) -> None:
    for name, value in part.items():
        total[name] = total[name] + value if name in total else value


def _log(metrics: Mapping[str, Tensor]) -> None:
    if has_event_storage():
        for name, value in metrics.items():
            get_event_storage().put_scalar(name, value)


def _check_input(
    backbone: Backbone, pixel_mean: Sequence[float], pixel_std: Sequence[float], input_format: str
) -> None:
    """Compares the model's input with that of the backbone's weights, if it tells which that is."""
    if input_format != (expected := getattr(backbone, "input_format", input_format)):
        raise UserError(
            f"model.input_format={input_format}, but the backbone's weights take {expected}: set it, and "
            f"the mappers' image_format (yacs: INPUT.FORMAT), to {expected}"
        )
    for key, given in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
        own = getattr(backbone, key, given)
        if max(abs(a - b) for a, b in zip(given, own)) > 1:
            logger.warning(
                "model.%s=%s, but timm's weights of this backbone take %s (null: these); right only for "
                "weights of another origin",
                key,
                list(given),
                [round(value, 3) for value in own],
            )


def _pad_and_stack(maps: Sequence[Tensor], value: float) -> Tensor:
    """(..., H_i, W_i) of each image -> (B, ..., H, W), padded at the right and bottom."""
    height, width = (max(m.shape[axis] for m in maps) for axis in (-2, -1))
    return torch.stack(
        [F.pad(m, (0, width - m.shape[-1], 0, height - m.shape[-2]), value=value) for m in maps]
    )
