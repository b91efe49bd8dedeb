"""Rows of a toy study, and pages made of them."""

from accuracy_study.page import render
from accuracy_study.results import COLUMNS, Result, ResultsFile


def result(arm, seed, ap, curve="", evaluation_set="val", **others):
    values = dict.fromkeys(COLUMNS, "")
    values.update(study="toy", arm=arm, seed=seed, AP=ap, AP50=2 * ap, AP75=ap / 2, mask_AP=None, iterations=600)
    values.update(seconds=300.0, cpu_seconds=120.0, seconds_per_iteration=0.5, cpu_seconds_per_iteration=0.2)
    values.update(curve=curve, evaluation_set=evaluation_set, device="cpu", hardware="abacus", torch="2.0")
    return Result(**{**values, **others})


ALONE = {1: 10.0, 2: 11.0, 3: 12.0}
DISTILLED = {1: 14.0, 2: 14.0, 3: 17.0}


def write_results(folder, rows):
    folder.mkdir(exist_ok=True)
    (folder / "toy.csv").unlink(missing_ok=True)
    file = ResultsFile(folder / "toy.csv")
    for row in rows:
        file.append(row)


def toy_rows(distilled=DISTILLED):
    rows = [result("alone", seed, ap, f"300:{ap / 2} 600:{ap}") for seed, ap in ALONE.items()]
    rows += [result("distilled", seed, ap, f"300:{ap / 2} 600:{ap}") for seed, ap in distilled.items()]
    return rows + [result("alone", 1, 9.0, evaluation_set="final")]


def gap_rows():
    teacher = [result("teacher", 0, 20.0, iterations=0, seconds=0.0, cpu_seconds=0.0)]
    short = [result("short", seed, ap, "300:1.0 600:2.0") for seed, ap in {1: 10.0, 2: 12.0}.items()]
    short += [result("short_mgd", seed, ap, "300:1.0 600:2.0") for seed, ap in {1: 15.0, 2: 18.0, 3: 99.0}.items()]
    long = [result("long", 1, 16.0, iterations=1200), result("long_mgd", 1, 21.0, iterations=1300)]
    return [*teacher, *short, *long, result("best", 1, 25.0)]


def block(page, marker):
    page.write_text(f"<!-- results: {marker} -->\n<!-- end of results -->\n")
    return render(page, page.parent / "results", page.parent)


PAGE = """# Title

Prose above.
<!-- results: {study: toy, show: scores} -->
an old table
<!-- end of results -->
Prose between.
<!-- results: {study: toy, show: differences, against: [alone]} -->
<!-- end of results -->
<!-- results: {study: toy, show: scores, set: final} -->
<!-- end of results -->
<!-- results: {study: toy, show: curves, title: Curves} -->
<!-- end of results -->
<!-- results: {study: toy, show: provenance, arms: [alone]} -->
<!-- end of results -->
<!-- results: {study: other, show: scores} -->
<!-- end of results -->
Prose below.
"""


def run_report(report, page, *flags):
    folders = ["--results", str(page.parent / "results"), "--studies", str(page.parent)]
    args = report.parse_args(["--page", str(page), *folders, *flags])
    report.run(args)
