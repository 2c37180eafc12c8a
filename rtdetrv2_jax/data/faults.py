"""Faults of annotations: what they are, and how they are told."""

from collections import Counter
from collections.abc import Iterable
from typing import Literal, NamedTuple, get_args

FaultKind = Literal[
    "unreadable annotation",
    "unreadable image",
    "missing annotation",
    "missing image",
    "missing field",
    "duplicate image id",
    "unknown image",
    "unknown class",
    "box not finite",
    "box inverted",
    "box of zero area",
    "box outside the image",
    "box partly outside the image",
    "no image size",
    "image of another size",
]
TREATMENTS: dict[FaultKind, str] = {
    "unreadable image": "image left out",
    "missing annotation": "image left out",
    "missing image": "image left out",
    "duplicate image id": "second left out",
    "box partly outside the image": "clipped",
    "no image size": "read from the image",
    "image of another size": "to be corrected",
}
"""What is done about a fault; where nothing else is said, what has it is left out."""
LEFT_OUT = "left out"


class DataError(ValueError):
    """A data set that cannot be used as it is. The message says what to do."""


class Fault(NamedTuple):
    """One thing wrong with a data set.

    Attributes:
        file: where: the annotation file, or the image for a fault of the image itself.
        id: what of it: an annotation's or image's id, an object's or line's number in the file.
        kind: what it counts as.
        what: the particulars.
    """

    file: str
    id: int | str
    kind: FaultKind
    what: str


def fault_table(faults: Iterable[Fault], *, examples: int = 2) -> str:
    """A short text: how many faults of each kind, what becomes of them, and some examples of each."""
    faults = tuple(faults)
    counts = Counter(fault.kind for fault in faults)
    lines: list[str] = []
    for kind in get_args(FaultKind):
        if kind in counts:
            lines.append(f"{counts[kind]:>7}  {kind} ({TREATMENTS.get(kind, LEFT_OUT)})")
            shown = [fault for fault in faults if fault.kind == kind][:examples]
            lines += [f"         {fault.file}, {fault.id}: {fault.what}" for fault in shown]
    return "\n".join(lines)
