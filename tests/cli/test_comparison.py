from mgd_det.cli.comparison import comparison_table

SCORES = {"AP": 30.125, "AP50": 50.0, "AP75": 31.0, "mask AP": None, "keypoint AP": None}


def row(name, dataset="val", **changes):
    return {"detector": name, "data set": dataset, **SCORES, "parameters": 1234567, "training seconds": 61.4, **changes}


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_only_scores_that_somebody_has_are_columns():
    header, _, first, second = cells(comparison_table([row("a"), row("b", AP=None, **{"training seconds": None})]))
    assert header == ["detector", "AP", "AP50", "AP75", "parameters (M)", "training s"]
    assert first == ["a", "30.12", "50.00", "31.00", "1.23", "61"]
    assert second == ["b", "-", "50.00", "31.00", "1.23", "-"]
    header = cells(comparison_table([row("a"), row("b", **{"mask AP": 20.0})]))[0]
    assert "mask AP" in header and "keypoint AP" not in header


def test_several_data_sets_are_named():
    header, _, first, second = cells(comparison_table([row("a", "one"), row("a", "two")]))
    assert header[1] == "data set" and (first[1], second[1]) == ("one", "two")
