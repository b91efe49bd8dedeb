"""What became of a model's tensors, and of a file's, when weights were loaded."""

from dataclasses import dataclass, field
from typing import Dict, List, Tuple

from tabulate import tabulate


@dataclass(frozen=True)
class LoadReport:
    """Which tensors were loaded, by part of the detector; printed, a table.

    Attributes:
        model: names of the model's tensors.
        unset: those of them that are not in the file, left at their initial value.
        other_shape: those of them that have another shape in the file, also left: shape in the file, and in the
            model.
        unused: names of the file's tensors that the model has no place for.
    """

    model: List[str]
    unset: List[str] = field(default_factory=list)
    other_shape: Dict[str, Tuple[Tuple[int, ...], Tuple[int, ...]]] = field(default_factory=dict)
    unused: List[str] = field(default_factory=list)

    @property
    def not_loaded(self) -> List[str]:
        """Names of the model's tensors that were left at their initial value, for whatever reason."""
        return [*self.unset, *self.other_shape]

    def partly_loaded(self) -> List[str]:
        """Parts of the detector that have loaded and unloaded tensors, which is seldom meant."""
        left = set(self.not_loaded)
        states: Dict[str, set] = {}
        for name in self.model:
            states.setdefault(part_of(name), set()).add(name in left)
        return [part for part, state in states.items() if len(state) == 2]

    def __str__(self) -> str:
        unset, other_shape = set(self.unset), set(self.other_shape)
        rows: Dict[str, List[int]] = {}
        for name in self.model:
            row = rows.setdefault(part_of(name), [0] * 5)
            row[0] += 1
            row[2 if name in unset else 3 if name in other_shape else 1] += 1
        for name in self.unused:
            rows.setdefault(part_of(name), [0] * 5)[4] += 1
        headers = [
            "part",
            "tensors",
            "loaded",
            "left as\ninitialised",
            "of other shape\nin the file",
            "unused\nin the file",
        ]
        lines = [tabulate([[part, *row] for part, row in rows.items()], headers=headers)]
        shapes = [f"{name} {file} in the file, {model} here" for name, (file, model) in self.other_shape.items()]
        for title, names in (
            ("Left as initialised", self.unset),
            ("Of other shape in the file", shapes),
            ("Unused in the file", self.unused),
        ):
            if names:
                lines.append(f"{title}: {', '.join(names[:4])}" + (f", ... ({len(names)})" if len(names) > 4 else ""))
        return "\n".join(lines)


def part_of(name: str) -> str:
    """The part of a detector that a tensor belongs to, by its name: "bottom_up", "fpn", "roi_heads.box_head"..."""
    first, *others = name.split(".")
    if first == "backbone" and others:
        if others[0].startswith("fpn"):
            return "fpn"
        return others[0] if others[0] in ("bottom_up", "top_block") else "backbone"
    if first == "roi_heads" and len(others) > 1:
        return f"{first}.{others[0]}"
    return first
