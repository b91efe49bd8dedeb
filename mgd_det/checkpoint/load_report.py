"""The report of a load of weights: which tensors of the model and of the file were used."""

from dataclasses import dataclass, field
from typing import Dict, List, Tuple

from tabulate import tabulate


@dataclass(frozen=True)
class LoadReport:
    """Which tensors were loaded. It prints as a table with one row for each part of the detector.

    Attributes:
        model: names of the model's tensors.
        unset: those that the file lacks. They keep their initial value.
        other_shape: those with another shape in the file, with the shapes in the file and in the model. They keep
            their initial value.
        unused: names of the file's tensors that the model lacks.
    """

    model: List[str]
    unset: List[str] = field(default_factory=list)
    other_shape: Dict[str, Tuple[Tuple[int, ...], Tuple[int, ...]]] = field(default_factory=dict)
    unused: List[str] = field(default_factory=list)

    @property
    def not_loaded(self) -> List[str]:
        """Names of the model's tensors that keep their initial value."""
        return [*self.unset, *self.other_shape]

    def partly_loaded(self) -> List[str]:
        """Return the parts of the detector that were loaded only in part, which is probably a mistake."""
        return [part for part, row in self._rows().items() if 0 < row[1] < row[0]]

    def _rows(self) -> Dict[str, List[int]]:
        """Return by part the numbers of tensors: all, loaded, unset, of another shape, unused."""
        unset, other_shape = set(self.unset), set(self.other_shape)
        rows: Dict[str, List[int]] = {}
        for name in self.model:
            row = rows.setdefault(part_of(name), [0] * 5)
            row[0] += 1
            row[2 if name in unset else 3 if name in other_shape else 1] += 1
        for name in self.unused:
            rows.setdefault(part_of(name), [0] * 5)[4] += 1
        return rows

    def __str__(self) -> str:
        headers = "part", "tensors", "loaded", "left as\ninitialised", "other shape\nin the file", "unused\nin the file"
        lines = [tabulate([[part, *row] for part, row in self._rows().items()], headers=headers)]
        shapes = [f"{name} {file} in the file, {model} here" for name, (file, model) in self.other_shape.items()]
        lists = {
            "Left as initialised": self.unset,
            "Other shape in the file": shapes,
            "Unused in the file": self.unused,
        }
        for title, names in lists.items():
            if names:
                lines.append(f"{title}: {', '.join(names[:4])}" + (f", ... ({len(names)})" if len(names) > 4 else ""))
        return "\n".join(lines)


def part_of(name: str) -> str:
    """Return the part of a detector that a tensor belongs to, such as "bottom_up", "fpn" or "roi_heads.box_head"."""
    first, *others = name.split(".")
    if first == "backbone" and others:
        if others[0].startswith("fpn"):
            return "fpn"
        return others[0] if others[0] in ("bottom_up", "top_block") else "backbone"
    if first == "roi_heads" and len(others) > 1:
        return f"{first}.{others[0]}"
    return first
