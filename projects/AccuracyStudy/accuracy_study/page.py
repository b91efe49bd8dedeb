"""A page of Markdown whose tables and pictures come from the csv files of results.

What stands between two markers is replaced; all else on the page stays:

    <!-- results: {study: recipe, show: scores, set: fashion_scenes_small_val, arms: [alone, distilled]} -->
    <!-- end of results -->

``show`` is "scores" (means), "differences" (paired by seed, with ``against``: a list of arms), "curves" (a picture
beside the page, with ``title``) or "provenance" (what the results were measured with). ``arms`` and ``set`` may be left
out: all arms, and the set that was used during training.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Sequence, Set

import yaml

from accuracy_study.curves import draw_curves, is_current
from accuracy_study.results import Result, read_results
from accuracy_study.study import read_study
from accuracy_study.tables import difference_table, provenance, score_table, select
from mgd_det.errors import UserError, check_choice, first_line, named_as

_BLOCK = re.compile(r"(<!-- results: (?P<options>.*?) -->\n)(?P<content>.*?)(<!-- end of results -->)", re.DOTALL)
_SHOWN = ("scores", "differences", "curves", "provenance")
_OPTIONS = ("study", "show", "set", "arms", "against", "title")
NO_RESULTS = "There are no results yet.\n"


@dataclass(frozen=True)
class Picture:
    """A picture that a page shows: its file, and the rows that it is drawn from."""

    path: Path
    rows: Sequence[Result]


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

    made, number = _BLOCK.subn(replaced, text)
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
        draw_curves(picture.rows, picture.path)


def stale_parts(page: Path, made: Page) -> List[Path]:
    """Return the files that are not what the results give."""
    stale = [] if page.read_text(encoding="utf-8") == made.text else [page]
    return stale + [picture.path for picture in made.pictures if not is_current(picture.path, picture.rows)]


def _options(text: str) -> Dict[str, Any]:
    try:
        options = yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise UserError(f"the marker's options {text!r} are not yaml: {first_line(e)}") from e
    if not isinstance(options, dict) or not {"study", "show"} <= set(options) <= set(_OPTIONS):
        raise UserError(f"the marker's options {text!r} must have study and show, and may have {_OPTIONS[2:]}")
    with named_as(lambda argument: argument):
        check_choice("show", options["show"], _SHOWN)
    if (options["show"] == "differences") != ("against" in options):
        raise UserError(f"the marker's options {text!r}: against goes with show: differences")
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
    if options["show"] == "curves":
        picture = Picture(page.parent / f"{page.stem}_{options['study']}.png", rows)
        if picture.path in [other.path for other in pictures]:
            raise UserError(f"a second picture of the study {options['study']!r} would be the same file")
        pictures.append(picture)
        return f"![{options.get('title', 'AP over the training')}]({picture.path.name})\n"
    makers: Dict[str, Callable[[], str]] = {
        "scores": lambda: score_table(rows),
        "differences": lambda: difference_table(rows, against),
        "provenance": lambda: provenance(rows),
    }
    return makers[options["show"]]() + "\n"
