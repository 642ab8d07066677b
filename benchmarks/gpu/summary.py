"""The run of benchmarks/gpu_check.sh as gpu_check.json and gpu_check.md.

python benchmarks/gpu/summary.py STAGES.tsv RESULTS TARGET [--dry-run]

RESULTS holds the stages' JSON files, TARGET receives the two.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import _checkout

from benchmarks.report import markdown, write_json


def main() -> None:
    results, target, dry = Path(sys.argv[2]), Path(sys.argv[3]), "--dry-run" in sys.argv
    stages = [line.split("\t") for line in Path(sys.argv[1]).read_text().splitlines()]
    names = ("machine", "micro", "targets", "op", "op_bf16", "model", "model_dino")
    names += ("batch", "batch_dino", "compile")
    parts = {
        n: json.loads((results / f"{n}.json").read_text()) for n in names if (results / f"{n}.json").is_file()
    }
    whole = {
        "dry_run": dry,
        "stages": [dict(zip(("name", "state", "seconds", "last line"), s)) for s in stages],
        **parts,
    }
    write_json(target / "gpu_check.json", whole)

    machine = parts.get("machine", {})
    text = ["# GPU check" + (" (rehearsal without a GPU: no number below is a GPU's)" if dry else "")]
    text.append(" · ".join(f"{k} {v}" for k, v in machine.items() if v and not isinstance(v, dict)))
    text.append(
        markdown(["stage", "", "s", "last line"], [[n, s, t, x.replace("|", "/")] for n, s, t, x in stages])
    )
    if "micro" in parts:
        rates = {k: v for k, v in parts["micro"].items() if isinstance(v, dict)}
        text.append(
            "## Rates\n\n"
            + markdown(
                ["", "median", "best", ""], [[k, v["median"], v["best"], v["unit"]] for k, v in rates.items()]
            )
        )
    if "targets" in parts:
        text.append(
            "## Kernel times\n\n"
            + markdown(
                ["", "", "", "median us", "best-worst", "target (must, hoped for)", ""],
                [
                    [
                        x["kind"],
                        x["dtype"],
                        x["what"],
                        f"{x['microseconds']:.1f}",
                        f"{x['best']:.1f}-{x['worst']:.1f}",
                        "" if x["target"] is None else str(x["target"]),
                        x["verdict"],
                    ]
                    for x in parts["targets"]["results"]
                ],
            )
        )
    text.append("What `benchmarks/benchmark.py` printed is in log.txt, its numbers in gpu_check.json.")
    (target / "gpu_check.md").write_text("\n\n".join(text) + "\n")


if __name__ == "__main__":
    _checkout.run(main)
