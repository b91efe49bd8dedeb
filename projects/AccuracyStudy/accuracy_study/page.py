"""A page of Markdown whose tables and pictures come from the csv files of results.

What stands between two markers is replaced; all else on the page stays:

    <!-- results: {study: recipe, show: scores, set: fashion_scenes_small_val, arms: [alone, distilled]} -->
    <!-- end of results -->

``show`` is one of:

- "scores": means.
- "differences": paired by seed, with ``against``: a list of arms.
- "gains": distilled against alone, a line for each of ``pairs``: [[distilled, alone], ...]; ``score`` is "AP", if it is
  left out, or "mask_AP".
- "gap": how much of the gap to the ``teacher``, an arm, is closed, with ``pairs``: [[distilled, alone], ...].
- "curves": a picture beside the page, with ``title``.
- "latency": a picture of AP over latency, <page>_<study>_latency.png, with ``title``. The times are those of
  ``runtime`` ("ONNX Runtime") at ``size`` ("320x320") in ``latency`` ("latency.csv"), a csv of
  tools/benchmark.py --inference in the folder of results. ``detectors`` names the detectors of arms that the csv has
  under another name: {resnet18: retinanet_R_18_FPN}.
- "latency_table": the latency of each detector of the csv in all runtimes, with AP; ``size``, ``latency`` and
  ``detectors`` as above.
- "provenance": what the results were measured with.

``arms`` and ``set`` may be left out: all arms, and the set that was used during training.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Set, Tuple

import yaml

from accuracy_study.curves import draw_curves, fingerprint, is_current
from accuracy_study.latency import (
    draw_latency,
    latency_fingerprint,
    latency_of_arms,
    measured_at,
    read_latency,
    read_measurements,
)
from accuracy_study.latency_table import latency_table
from accuracy_study.results import Result, read_results
from accuracy_study.study import read_study
from accuracy_study.tables import (
    BLOCK,
    NO_RESULTS,
    difference_table,
    gain_table,
    gap_table,
    provenance,
    score_table,
    select,
)
from mgd_det.errors import UserError, check_choice, first_line, named_as

_COMMON = ("study", "show", "set", "arms")
# The options of each content besides those: what it needs, and what it may have.
_SHOWN: Dict[str, Tuple[Tuple[str, ...], Tuple[str, ...]]] = {
    "scores": ((), ()),
    "differences": (("against",), ()),
    "gains": (("pairs",), ("score",)),
    "gap": (("teacher", "pairs"), ()),
    "curves": ((), ("title",)),
    "latency": ((), ("title", "latency", "runtime", "size", "detectors")),
    "latency_table": ((), ("latency", "size", "detectors")),
    "provenance": ((), ()),
}
_SIZE = "320x320"


@dataclass(frozen=True)
class Picture:
    """A picture that a page shows.

    Attributes:
        path: its file.
        fingerprint: a hash of all that it shows, which the file has too.
        draw: writes the file.
    """

    path: Path
    fingerprint: str
    draw: Callable[[], None]


@dataclass(frozen=True)
class Page:
    """A page as the results give it."""

    text: str
    pictures: List[Picture]


def render(page: Path, results: Path, studies: Path) -> Page:
    """Return the page with all of its blocks made from the results.

    Arms and sets that a study has, but its csv has not yet, are left out.

    Args:
        page: a Markdown file with markers.
        results: folder of the csv files, <study>.csv.
        studies: folder of the study files, <study>.yaml.

    Raises:
        UserError: the page cannot be read, has no marker, or a marker asks for what there is not.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"page {page} cannot be read: {e}") from e
    pictures: List[Picture] = []

    def replaced(match: "re.Match[str]") -> str:
        try:
            options = _options(match["options"])
            content = _content(options, page, results, _to_come(studies, options["study"]), pictures)
        except UserError as e:
            line = text.count("\n", 0, match.start()) + 1
            raise UserError(f"page {page}, line {line}: {e}") from e
        return f"{match[1]}{content}{match[4]}"

    made, number = BLOCK.subn(replaced, text)
    if number == 0 or number != text.count("<!-- results:"):
        raise UserError(
            f"page {page}: {number} of {text.count('<!-- results:')} markers <!-- results: ... --> have their "
            "<!-- end of results -->; each needs one, in a line of its own"
        )
    return Page(made, pictures)


def write(page: Path, made: Page) -> None:
    """Write a page and its pictures."""
    page.write_text(made.text, encoding="utf-8")
    for picture in made.pictures:
        picture.draw()


def stale_parts(page: Path, made: Page) -> List[Path]:
    """Return the files that are not what the results give."""
    stale = [] if page.read_text(encoding="utf-8") == made.text else [page]
    return stale + [picture.path for picture in made.pictures if not is_current(picture.path, picture.fingerprint)]


def _options(text: str) -> Dict[str, Any]:
    try:
        options = yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise UserError(f"the marker's options {text!r} are not yaml: {first_line(e)}") from e
    if not isinstance(options, dict) or not {"study", "show"} <= set(options):
        raise UserError(f"the marker's options {text!r} must have study and show")
    with named_as(lambda argument: argument):
        check_choice("show", options["show"], tuple(_SHOWN))
        if "score" in options:
            check_choice("score", options["score"], ("AP", "mask_AP"))
    needed, possible = _SHOWN[options["show"]]
    for option in needed:
        if option not in options:
            raise UserError(f"the marker's options {text!r}: show: {options['show']} needs {option}")
    for option in options:
        if option not in _COMMON + needed + possible:
            known = ", ".join(_COMMON + needed + possible)
            raise UserError(f"the marker's options {text!r}: show: {options['show']} has no {option}; it has {known}")
    detectors = options.get("detectors", {})
    if not isinstance(detectors, dict) or not all(isinstance(name, str) for name in detectors.values()):
        raise UserError(f"the marker's options {text!r}: detectors is {detectors!r}; give {{arm: detector, ...}}")
    pairs = options.get("pairs", [])
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise UserError(f"the marker's options {text!r}: pairs is {pairs!r}; give [[distilled, alone], ...]")
    return options


def _to_come(studies: Path, name: str) -> Set[str]:
    """Return the names of the arms and of the final set that a study has or will have."""
    file = studies / f"{name}.yaml"
    if not file.exists():
        return set()
    study = read_study(str(file))
    return {arm.name for arm in study.arms} | ({study.final.name} if study.final else set())


def _content(options: Mapping[str, Any], page: Path, results: Path, to_come: Set[str], pictures: List[Picture]) -> str:
    file = results / f"{options['study']}.csv"
    rows = read_results(file) if file.exists() else []
    missing = to_come - {name for row in rows for name in (row.arm, row.evaluation_set)}
    arms = options.get("arms")
    if not rows or options.get("set") in missing or (arms and missing.issuperset(arms)):
        return NO_RESULTS
    rows = select(rows, arms and [arm for arm in arms if arm not in missing], options.get("set"))
    against = [arm for arm in options.get("against", []) if arm not in missing]
    picture = _picture(options, page, results, rows)
    if picture is not None:
        if picture.path in [other.path for other in pictures]:
            raise UserError(f"{picture.path.name} would be two pictures: show one of them on another page")
        pictures.append(picture)
        title = "AP over the training" if options["show"] == "curves" else "AP over latency"
        return f"![{options.get('title', title)}]({picture.path.name})\n"
    pairs = [pair for pair in options.get("pairs", []) if missing.isdisjoint(pair)]
    if "pairs" in options and (options.get("teacher") in missing or not pairs):
        return NO_RESULTS
    if "against" in options and (not against or {row.arm for row in rows} <= set(against[:1])):
        return NO_RESULTS
    latency_file, size = _latency_file(options, results), options.get("size", _SIZE)
    makers: Dict[str, Callable[[], str]] = {
        "scores": lambda: score_table(rows),
        "differences": lambda: difference_table(rows, against),
        "gains": lambda: gain_table(rows, pairs, options.get("score", "AP")),
        "gap": lambda: gap_table(rows, options["teacher"], pairs),
        "provenance": lambda: provenance(rows),
        "latency_table": lambda: latency_table(
            rows, measured_at(read_measurements(latency_file), size, latency_file), options.get("detectors", {})
        ),
    }
    return makers[options["show"]]() + "\n"


def _picture(options: Mapping[str, Any], page: Path, results: Path, rows: Sequence[Result]) -> Optional[Picture]:
    """Return the picture that a marker asks for; None if it asks for none."""
    if options["show"] == "curves":
        path = page.parent / f"{page.stem}_{options['study']}.png"
        return Picture(path, fingerprint(rows), lambda: draw_curves(rows, path))
    if options["show"] == "latency":
        path = page.parent / f"{page.stem}_{options['study']}_latency.png"
        runtime, size = options.get("runtime", "ONNX Runtime"), options.get("size", _SIZE)
        known = read_latency(_latency_file(options, results), runtime, size)
        latency = latency_of_arms(rows, known, options.get("detectors", {}))
        shown = latency_fingerprint(rows, latency, runtime, size)
        return Picture(path, shown, lambda: draw_latency(rows, latency, runtime, size, path))
    return None


def _latency_file(options: Mapping[str, Any], results: Path) -> Path:
    return results / str(options.get("latency", "latency.csv"))
