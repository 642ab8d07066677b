"""COCO 2017 detection, found under DETECTRON2_DATASETS (default ./datasets) as detectron2 expects:

``coco/annotations/instances_{train,val}2017.json``, ``coco/train2017`` and ``coco/val2017``.
"""

from detectron2.config import LazyCall as L
from detectron2.data import build_detection_test_loader

from sparse_detr.data import (
    DetrDatasetMapper,
    FastCOCOEvaluator,
    build_train_loader,
    registered_dataset,
    test_augmentations,
    train_augmentations,
)

dataloader = dict(
    train=L(build_train_loader)(
        # images without objects stay in: they teach what is background
        dataset=L(registered_dataset)(names="coco_2017_train", filter_empty=False),
        mapper=L(DetrDatasetMapper)(
            is_train=True,
            augmentations=L(train_augmentations)(
                short_edges=[480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800],
                max_size=1333,
                pre_crop_short_edges=[400, 500, 600],
                crop_size=[384, 600],
            ),
        ),
        total_batch_size=16,  # over all processes
        num_workers=4,
        aspect_ratio_grouping=True,  # as detectron2 and detrex; the authors' own code does not
    ),
    test=L(build_detection_test_loader)(
        dataset=L(registered_dataset)(names="coco_2017_val", filter_empty=False),
        mapper=L(DetrDatasetMapper)(
            is_train=False, augmentations=L(test_augmentations)(short_edge=800, max_size=1333)
        ),
        batch_size=1,
        num_workers=4,
    ),
    evaluator=L(FastCOCOEvaluator)(
        dataset_name="${..test.dataset.names}",
        output_dir="${train.output_dir}/inference",
        max_dets_per_image=100,  # detections that count for AP; [1, 10, 300] sets all of COCO's limits
    ),
)
