"""Draw which tokens an encoder keeps, how it scores them, and where the decoder looks.

    sparse-detr visualize-tokens --config-file sparse_detr/sparse_detr_r50_10_50ep \\
        --weights model.pth --input image.jpg [photos/ ...] --output pictures
    sparse-detr visualize-tokens --config-file ... --input image.jpg --keep-ratio 0.1

Writes one PNG per image: detections, then a column per feature level with the kept tokens, the
score map and the decoder attention map. `--config-file` takes a file, the name of a shipped config,
or the output folder of a run, whose last checkpoint is then used.
"""

import os

import numpy as np
from PIL import Image

from ..data import read_image
from ..overlays import draw_tokens, recorded_output
from ..predictor import Predictor
from ..visualize import draw_detections
from . import flags
from .predict import find_images


def main() -> None:
    parser = flags.parser(__doc__)
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--weights", default="", metavar="FILE", help="a checkpoint")
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="images, folders, globs")
    parser.add_argument("--output", default="output/tokens", metavar="DIR")
    parser.add_argument("--width", type=int, default=480, help="of each picture (default: 480)")
    parser.add_argument("--threshold", type=float, default=0.4, help="score of drawn detections")
    flags.add_keep_ratio(parser)
    flags.add_opts(parser)
    args = parser.parse_args()

    paths = find_images(args.input)
    predict = Predictor(
        args.config_file,
        args.weights,
        overrides=args.opts,
        threshold=args.threshold,
        keep_ratio=args.keep_ratio,
    )
    os.makedirs(args.output, exist_ok=True)
    for path in paths:
        image = read_image(str(path), "RGB")
        with recorded_output(predict.model) as outputs:
            instances = predict(image[..., ::-1])["instances"]
        scale = args.width / image.shape[1]
        size = (args.width, round(image.shape[0] * scale))
        detected = draw_detections(image, instances, predict.metadata, threshold=args.threshold, scale=scale)
        image, detected = (np.asarray(Image.fromarray(x).resize(size)) for x in (image, detected))
        target = os.path.join(args.output, f"{path.stem}_tokens.png")
        Image.fromarray(draw_tokens(image, outputs[0], detected=detected)).save(target)
        print(target)
