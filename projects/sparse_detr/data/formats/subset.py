"""Some classes of a set, in an order of one's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ...errors import UserError, listed
from ..report import Report, record_id


def select_classes(report: Report, classes: Sequence[str]) -> None:
    """Leaves ``classes`` alone in a set, in this order, and all images.

    Raises:
        UserError: the set does not have one of them.
    """
    categories = report.content["categories"]
    numbers = {name: number for number, name in enumerate(classes, 1)}
    known = {record_id(c): c.get("name") for c in categories}
    if missing := [name for name in classes if name not in known.values()]:
        raise UserError(
            f"data.classes: {listed(missing, 5)} {'are' if len(missing) > 1 else 'is'} not among the classes "
            f"of {report.json_file} ({listed([str(name) for name in known.values()], 20)})"
        )
    kept, dropped = [], Counter[str]()
    for annotation in report.content["annotations"]:
        name = known.get(record_id(annotation, "category_id"))
        if name is None:  # unknown, for the check to tell
            kept.append(annotation)
        elif name in numbers:
            kept.append({**annotation, "category_id": numbers[name]})
        else:
            dropped[str(name)] += 1
    report.content.update(
        annotations=kept, categories=[{"id": number, "name": name} for name, number in numbers.items()]
    )
    report.add(
        f"data.classes leaves out boxes of {len(set(known.values()) - numbers.keys())} other classes",
        [f"{name} {count}" for name, count in dropped.most_common()],
        "their images stay",
    )
