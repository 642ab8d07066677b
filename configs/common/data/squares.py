"""Every image a square of 640 pixels, as RT-DETR takes them: no batch is padded.

dataloader.train.mapper.augmentations = train_augmentations
dataloader.test.mapper.augmentations = test_augmentations
"""

from detectron2.config import LazyCall as L

from sparse_detr.data import square_test_augmentations, square_train_augmentations

train_augmentations = L(square_train_augmentations)(
    size=640,
    sizes=None,  # then one of these for each batch: RT-DETR's are 480 to 800
)
test_augmentations = L(square_test_augmentations)(size=640)
