"""The csv of results: one row for each training and set that scored it."""

import csv
import dataclasses
import io
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

from mgd_det.errors import UserError
from mgd_det.files.atomic_files import write_atomically


@dataclass(frozen=True)
class Result:
    """A row. The fields are the columns.

    Attributes:
        study, arm, seed: the training.
        config, overrides: what was trained, as tools/train_net.py takes it.
        evaluation_set: the set that the scores are of.
        AP, AP50, AP75, mask_AP: in percent; mask_AP is None for a detector without masks.
        iterations: steps of the training; 0 for an arm with eval_only.
        seconds, cpu_seconds: of steps and matching updates: see :class:`accuracy_study.clock.StepClock`.
        seconds_per_iteration, cpu_seconds_per_iteration: the same for one step.
        curve: AP over the training, "200:4.98 400:8.29 600:11.06"; "" for a set that was not used during training.
        teacher: first 12 digits of the SHA-256 of the teacher's weights; "" without a teacher. For an arm with
            eval_only, those of the weights that were evaluated.
        commit: of the code, with "+" if it was changed.
        torch: its version.
        device, hardware: "cpu" or "cuda", and its name.
    """

    study: str
    arm: str
    seed: int
    config: str
    overrides: str
    evaluation_set: str
    AP: float
    AP50: float
    AP75: float
    mask_AP: Optional[float]
    iterations: int
    seconds: float
    cpu_seconds: float
    seconds_per_iteration: float
    cpu_seconds_per_iteration: float
    curve: str
    teacher: str
    commit: str
    torch: str
    device: str
    hardware: str

    def curve_points(self) -> Dict[int, float]:
        """Return AP by iteration."""
        pairs = (point.split(":") for point in self.curve.split())
        return {int(iteration): float(ap) for iteration, ap in pairs}


COLUMNS = tuple(field.name for field in dataclasses.fields(Result))
_INTEGERS = ("seed", "iterations")
_DECIMALS = {
    **dict.fromkeys(("AP", "AP50", "AP75", "mask_AP"), 4),
    **dict.fromkeys(("seconds", "cpu_seconds"), 2),
    **dict.fromkeys(("seconds_per_iteration", "cpu_seconds_per_iteration"), 5),
}


def overrides_text(overrides: Mapping[str, Any]) -> str:
    """Return overrides as arguments of tools/train_net.py, quoted for a shell."""
    return shlex.join(overrides_list(overrides))


def overrides_list(overrides: Mapping[str, Any]) -> List[str]:
    """Return overrides as a list KEY, VALUE, KEY, VALUE..."""
    # Double quotes within lists: a shell then needs single ones around them only.
    return [str(part).replace("'", '"') for pair in overrides.items() for part in pair]


def overrides_of_text(text: str) -> Dict[str, str]:
    """Return the overrides of a row, with the values as texts."""
    parts = shlex.split(text)
    return dict(zip(parts[::2], parts[1::2]))


class ResultsFile:
    """A csv of results, to which rows are appended.

    Attributes:
        path: the file; it need not exist.
        rows: its rows.
    """

    def __init__(self, path: Path) -> None:
        """
        Raises:
            UserError: the file is not a csv of results.
        """
        self.path = path
        self.rows: List[Result] = read_results(path) if path.exists() else []

    def append(self, row: Result) -> None:
        """Add a row, on the disk too."""
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = _csv_text(self.rows).encode("utf-8")
        write_atomically(str(self.path), lambda file: file.write(text))

    def find(self, arm: str, seed: int, evaluation_set: str) -> Optional[Result]:
        """Return the row of a training on a set, or None."""
        key = (arm, seed, evaluation_set)
        return next((row for row in self.rows if (row.arm, row.seed, row.evaluation_set) == key), None)


def read_results(path: Path) -> List[Result]:
    """Read a csv of results.

    Raises:
        UserError: the file cannot be read, or is not such a csv.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"results {path} cannot be read: {e}") from e
    reader = csv.DictReader(io.StringIO(text))
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise UserError(f"results {path} has the columns {reader.fieldnames}, not {list(COLUMNS)}: name another file")
    rows: List[Result] = []
    for row in reader:
        try:
            rows.append(Result(**{name: _value(name, row[name]) for name in COLUMNS}))
        except (TypeError, ValueError) as e:
            raise UserError(f"results {path}, line {reader.line_num}: {e}; remove or repair the line") from e
    return rows


def _csv_text(rows: List[Result]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([_text(name, getattr(row, name)) for name in COLUMNS] for row in rows)
    return file.getvalue()


def _text(name: str, value: Any) -> str:
    return "" if value is None else f"{value:.{_DECIMALS[name]}f}" if name in _DECIMALS else str(value)


def _value(name: str, text: str) -> Any:
    if name in _INTEGERS:
        return int(text)
    if name in _DECIMALS:
        return None if name == "mask_AP" and not text else float(text)
    if text is None:
        raise ValueError(f"there is no {name}")
    return text
