"""What a look at COCO-format data found, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ..errors import listed


@dataclass(frozen=True)
class Finding:
    """``what`` is the case with ``records`` (their names; none: with the file as a whole).

    ``then`` says what is done about it, or what must be.
    """

    what: str
    records: Sequence[str]
    then: str
    fatal: bool = False

    def __str__(self) -> str:
        if not self.records:
            return f"{self.what}; {self.then}"
        shown = listed(self.records, limit=3)
        return f"{self.what}: {len(self.records)} ({shown}); {self.then}"


@dataclass
class Report:
    """What was found in one data set, and the parsed JSON."""

    json_file: str
    image_root: str
    content: dict
    findings: list[Finding] = field(default_factory=list)

    def add(self, what: str, records: Iterable[object], then: str, *, fatal: bool = False) -> None:
        """Keeps a finding if it concerns any record."""
        names = [str(record) for record in records]
        if names:
            self.findings.append(Finding(what, names, then, fatal))

    def fail(self, what: str, then: str) -> None:
        """Keeps an error that concerns the file as a whole."""
        self.findings.append(Finding(what, (), then, fatal=True))

    @property
    def errors(self) -> list[str]:
        return [f"{self.json_file}: {finding}" for finding in self.findings if finding.fatal]

    @property
    def remarks(self) -> list[str]:
        return [f"{self.json_file}: {finding}" for finding in self.findings if not finding.fatal]

    def summary(self) -> str:
        """Images, boxes per class, crowd regions and images without a box, in one line."""
        annotations = self.content["annotations"]
        boxes = Counter(record_id(a, "category_id") for a in annotations if not a.get("iscrowd"))
        filled = {record_id(a, "image_id") for a in annotations if not a.get("iscrowd")}
        empty = sum(record_id(image) not in filled for image in self.content["images"])
        classes = [f"{c.get('name')} {boxes[record_id(c)]}" for c in self.content["categories"]]
        return (
            f"{self.json_file}: {len(self.content['images'])} images, {boxes.total()} boxes "
            f"({listed(classes, limit=20)}), {len(annotations) - boxes.total()} crowd regions, "
            f"{empty} images without a box"
        )


def to_mend(errors: Sequence[str]) -> str:
    """All that is wrong with data, numbered, as one message."""
    problems = "".join(f"\n  {number}. {text}" for number, text in enumerate(errors, 1))
    return f"the data must be mended first:{problems}"


def is_id(value: object) -> bool:
    """COCO's ids are whole numbers; texts are taken, too."""
    return isinstance(value, int | str) and not isinstance(value, bool)


def record_id(record: dict, key: str = "id") -> int | str | None:
    """A record's id, or None where it is none."""
    value = record.get(key)
    return value if is_id(value) else None
