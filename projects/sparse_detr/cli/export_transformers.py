"""Write a trained Deformable DETR as a folder that Hugging Face's transformers loads.

    sparse-detr export-transformers --run output/my_run --output my_detr
    sparse-detr export-transformers --config-file deformable_detr/deformable_detr_r50_50ep \\
        --weights model.pth --output my_detr

The folder holds weights, config and image processor: DeformableDetrForObjectDetection and
AutoImageProcessor have from_pretrained("my_detr"). One-stage, refining and two-stage models on ResNets can
be written, those of the other methods not: transformers has none of them.
"""

import argparse

from ..engine.huggingface_folder import save_transformers
from ..predictor import Predictor
from . import flags


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = flags.parser(__doc__)
    flags.add_model(parser)
    parser.add_argument("--output", required=True, metavar="DIR")
    flags.add_overrides(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    predict = Predictor(args.run or args.config_file, args.weights, overrides=args.opts, device="cpu")
    save_transformers(predict.model, args.output, class_names=predict.class_names, **predict.resizing)
    print(f"{args.output}: model.safetensors, config.json, preprocessor_config.json")
