"""The csv of results: one row for each training and set that scored it."""

import csv
import dataclasses
import io
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Generic, List, Mapping, Optional, Sequence, Tuple, Type, TypeVar

from mgd_det.errors import UserError
from mgd_det.files.atomic_files import write_atomically


@dataclass(frozen=True)
class Training:
    """What the rows of all studies begin with.

    A study's own rows add fields of type str, int, float or Optional[float].

    Attributes:
        study, arm, seed: the training.
        config, overrides: what was trained, as the program that trains takes it.
        evaluation_set: what the scores are of.
    """

    study: str
    arm: str
    seed: int
    config: str
    overrides: str
    evaluation_set: str


@dataclass(frozen=True)
class Result(Training):
    """A row of a study of detectors. The fields are the columns.

    Attributes:
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
Row = TypeVar("Row", bound=Training)
_DECIMALS = {
    **dict.fromkeys(("seconds", "cpu_seconds"), 2),
    **dict.fromkeys(("seconds_per_iteration", "cpu_seconds_per_iteration"), 5),
}
_OTHER_DECIMALS = 4  # of a score


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


class ResultsFile(Generic[Row]):
    """A csv of results, to which rows are appended.

    Attributes:
        path: the file; it need not exist.
        rows: its rows.
    """

    def __init__(self, path: Path, kind: Type[Row] = Result) -> None:
        """
        Args:
            path: the file.
            kind: the dataclass of its rows.

        Raises:
            UserError: the file is not a csv of such results.
        """
        self.path, self._kind = path, kind
        self.rows: List[Row] = read_results(path, kind) if path.exists() else []

    def append(self, row: Row) -> None:
        """Add a row, on the disk too, to what the file has by now: another run may have added rows of its own."""
        self.rows = [*(read_results(self.path, self._kind) if self.path.exists() else []), row]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = _csv_text(self.rows, self._kind).encode("utf-8")
        write_atomically(str(self.path), lambda file: file.write(text))

    def find(self, arm: str, seed: int, evaluation_set: str) -> Optional[Row]:
        """Return the row of a training on a set, or None."""
        key = (arm, seed, evaluation_set)
        return next((row for row in self.rows if (row.arm, row.seed, row.evaluation_set) == key), None)


def read_results(path: Path, kind: Type[Row] = Result) -> List[Row]:
    """Read a csv of results.

    Args:
        path: the file.
        kind: the dataclass of its rows.

    Raises:
        UserError: the file cannot be read, or is not such a csv.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"results {path} cannot be read: {e}") from e
    columns, reader = _columns(kind), csv.DictReader(io.StringIO(text))
    if list(reader.fieldnames or ()) != [name for name, _ in columns]:
        raise UserError(
            f"results {path} has the columns {reader.fieldnames}, not {[name for name, _ in columns]}: name another "
            "file"
        )
    rows: List[Row] = []
    for row in reader:
        try:
            rows.append(kind(**{name: _value(name, type_, row[name]) for name, type_ in columns}))
        except (TypeError, ValueError) as e:
            raise UserError(f"results {path}, line {reader.line_num}: {e}; remove or repair the line") from e
    return rows


def _columns(kind: Type[Any]) -> List[Tuple[str, Any]]:
    """Return name and type of each column."""
    return [(field.name, field.type) for field in dataclasses.fields(kind)]


def _csv_text(rows: Sequence[Any], kind: Type[Any]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    columns = _columns(kind)
    writer.writerow([name for name, _ in columns])
    writer.writerows([_text(name, type_, getattr(row, name)) for name, type_ in columns] for row in rows)
    return file.getvalue()


def _text(name: str, type_: Any, value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.{_DECIMALS.get(name, _OTHER_DECIMALS)}f}" if type_ in (float, Optional[float]) else str(value)


def _value(name: str, type_: Any, text: str) -> Any:
    if text is None:
        raise ValueError(f"there is no {name}")
    if type_ == Optional[float]:
        return float(text) if text else None
    return type_(text)
