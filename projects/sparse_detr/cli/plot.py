"""A page on a run, or on several: one HTML file that opens anywhere.

    sparse-detr plot output/my_run                   # writes output/my_run/report.html
    sparse-detr plot output/first output/second --output both.html

Losses, AP and learning rate over iterations; COCO's numbers by class and size, precision over recall and a
confusion matrix of the last evaluation; the images with the most errors, truth beside detections. Several
runs share curves and tables. Runs that are under way, interrupted or not evaluated show what there is.
"""

from pathlib import Path

from ..errors import UserError
from ..report import write_page
from . import flags


def main() -> None:
    parser = flags.parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folders")
    parser.add_argument("--output", metavar="FILE", help="(default: report.html in the first run's folder)")
    parser.add_argument("--images", type=int, default=12, metavar="N", help="shown per run (default: 12)")
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.4,
        metavar="SCORE",
        help="lowest score in images and confusion (default: 0.4)",
    )
    parser.add_argument("--pictures", metavar="DIR", help="write the page's pictures there, too")
    flags.add_opts(parser)
    args = parser.parse_args()
    output = Path(args.output or Path(args.runs[0]) / "report.html")
    if output.is_dir():
        raise UserError(f"--output {output} is a folder: name a file, such as {output / 'report.html'}")
    missing = write_page(
        args.runs,
        output,
        threshold=args.threshold,
        num_images=args.images,
        overrides=args.opts,
        pictures=args.pictures,
    )
    for reason in missing:
        print(f"without detections of {reason}")
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB")
