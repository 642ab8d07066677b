#!/usr/bin/env python
"""Draw which tokens an encoder keeps, how it scores them, and where the decoder looks.

    python tools/visualize_tokens.py --config-file sparse_detr/sparse_detr_r50_10_50ep \\
        --weights model.pth --input image.jpg [photos/ ...] --output pictures
    python tools/visualize_tokens.py --config-file ... --input image.jpg --keep-ratio 0.1

Writes one PNG per image: detections, then a column per feature level with the kept tokens, the
score map and the decoder attention map. `--config-file` takes a file, the name of a shipped config,
or the output folder of a run, whose last checkpoint is then used.
"""

import os

import _checkout
import numpy as np
from demo import find_images
from PIL import Image

from sparse_detr.data import read_image
from sparse_detr.overlays import draw_tokens, recorded_output
from sparse_detr.predictor import Predictor
from sparse_detr.visualize import draw_detections


def main() -> None:
    parser = _checkout.parser(__doc__)
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--weights", default="", metavar="FILE", help="a checkpoint")
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="images, folders, globs")
    parser.add_argument("--output", default="output/tokens", metavar="DIR")
    parser.add_argument("--width", type=int, default=480, help="of each picture (default: 480)")
    parser.add_argument("--threshold", type=float, default=0.4, help="score of drawn detections")
    _checkout.add_keep_ratio(parser)
    parser.add_argument(
        "--opts", nargs="+", default=[], metavar="KEY=VALUE", help="config overrides, path.key=value"
    )
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
        image = Image.fromarray(read_image(str(path), "RGB"))
        with recorded_output(predict.model) as outputs:
            instances = predict(np.asarray(image)[..., ::-1])["instances"]
        scale = args.width / image.width
        size = (args.width, round(image.height * scale))
        detected = draw_detections(
            np.asarray(image), instances, predict.metadata, threshold=args.threshold, scale=scale
        )
        image, detected = (np.asarray(x.resize(size)) for x in (image, Image.fromarray(detected)))
        target = os.path.join(args.output, f"{path.stem}_tokens.png")
        Image.fromarray(draw_tokens(image, outputs[0], detected=detected)).save(target)
        print(target)


if __name__ == "__main__":
    _checkout.run(main)
