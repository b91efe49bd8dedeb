"""Pictures of a matching: the numbers they show, and the colours of the maps."""

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from mgd_det.matching import assign_channels
from mgd_det.matching.assignment import pair_costs
from mgd_det.visualization import matching
from mgd_det.visualization.matching import (
    MatchedPosition,
    plot_matched_channels,
    plot_matching,
    spread_channels,
)

COST = torch.tensor([[0.1, 2.0, 0.3, 2.0, 2.0], [2.0, 0.2, 2.0, 0.4, 1.9]], dtype=torch.float64)
BEST = torch.tensor([[0, 2], [1, 3]])
FORMER = torch.tensor([[0, 1], [2, 4]])


def test_numbers_of_a_matched_position():
    m = MatchedPosition("res4", COST, BEST, FORMER)
    assert m.random_cost == pytest.approx((0.1 + 0.3 + 3 * 2.0 + 0.2 + 0.4 + 2 * 2.0 + 1.9) / 10)
    assert m.optimal_cost == pytest.approx((0.1 + 0.3 + 0.2 + 0.4) / 4)
    assert m.former_cost == pytest.approx((0.1 + 2.0 + 2.0 + 1.9) / 4)
    assert m.left_out == 1
    assert m.moved == 3  # of 0, 1, 2 and 3 all but 0; 4 is left out now
    assert sorted(pair_costs(COST, FORMER).tolist()) == pytest.approx([0.1, 1.9, 2.0, 2.0])
    without = MatchedPosition("res4", COST, BEST)
    assert without.former_cost is None and without.moved is None


def test_more_student_than_teacher_channels():
    cost = COST.t().contiguous()
    groups = assign_channels(cost)
    m = MatchedPosition("res4", cost, groups)
    assert groups.flatten().tolist() == [0, 1, -1, -1, -1]
    assert m.left_out == 0
    assert m.optimal_cost == pytest.approx(0.15)
    assert pair_costs(cost, groups).tolist() == pytest.approx([0.1, 0.2])
    assert spread_channels(cost, groups, 5) == [0, 1]


def test_spread_channels_goes_from_best_to_worst():
    cost = torch.tensor([0.9, 0.1, 0.5, 0.3, 0.7]).diag().double() + 2 * (1 - torch.eye(5))
    groups = torch.arange(5).unsqueeze(1)
    assert spread_channels(cost, groups, 3) == [1, 2, 0]
    assert spread_channels(cost, groups, 5) == [1, 3, 2, 4, 0]
    assert spread_channels(cost, groups, 99) == [1, 3, 2, 4, 0]
    assert spread_channels(cost, groups, 1) == [1]


def has_color(picture, rgb, tolerance=6):
    return (np.abs(picture - np.array(rgb)).max(axis=-1) <= tolerance).sum()


def read(path):
    return (imread(path)[..., :3] * 255).round().astype(int)


@pytest.mark.slow
@pytest.mark.parametrize("number, former", [(1, FORMER), (4, None), (5, FORMER)])
def test_plot_matching(tmp_path, number, former):
    positions = [MatchedPosition(f"res{i}", COST, BEST, former) for i in range(number)]
    output = tmp_path / "new" / "matching.png"
    assert plot_matching(positions, output) == str(output)
    picture = read(output)
    rows, columns = -(-number // 4), min(number, 4)
    height = round(100 * (3.0 * rows + 1.1 + 0.34 * number + 0.5))
    assert abs(picture.shape[0] - height) <= 1 and picture.shape[1] == round(100 * max(3.6 * columns, 7.2))
    new, orange = (0, 0x72, 0xB2), (0xD5, 0x5E, 0)
    assert has_color(picture, new) > 500
    assert (has_color(picture, orange) > 50) == (former is not None)


def test_bars_are_as_long_as_their_numbers(tmp_path):
    picture = read(plot_matching([MatchedPosition("res4", COST, BEST, FORMER)], tmp_path / "m.png"))
    below = picture[300:]
    new, moved, left_out = (0, 0x72, 0xB2), (153, 199, 224), (0xD9, 0xD9, 0xD9)
    lengths = []
    for color in (new, moved, left_out):
        rows = (np.abs(below - np.array(color)).max(axis=-1) <= 3).sum(axis=1)
        lengths.append(rows.max())
    unit = lengths[0]  # one channel in its place, three moved, one left out
    assert unit > 50
    assert lengths[1] / unit == pytest.approx(3, abs=0.15)
    assert lengths[2] / unit == pytest.approx(1, abs=0.15)


def signs(size=8):
    """A map that is 1 in its left half and -1 in its right half."""
    values = torch.ones(size, size)
    values[:, size // 2 :] = -1
    return values


def test_maps_are_red_above_and_blue_below_zero(tmp_path):
    student = torch.stack([signs(), torch.zeros(8, 8)])
    teacher = torch.stack([5 * signs(), torch.zeros(8, 8), -10 * signs(), torch.zeros(8, 8), torch.zeros(8, 8)])
    image = np.full((64, 64, 3), (10, 200, 10), np.uint8)
    output = tmp_path / "channels.png"
    path = plot_matched_channels(
        image, student, teacher, {"AMP": teacher[:2]}, BEST, output, channels=[0], cost=COST, student_note="after GN"
    )
    picture = read(path)
    assert picture.shape == (242, 840, 3)
    assert has_color(picture, (10, 200, 10)) > 3000, "the image is not there"
    # Columns of the picture from left to right: image, student, its bar, teacher 0, teacher 2, AMP, their bar.
    red, blue = (103, 0, 31), (5, 48, 97)  # the ends of the colour map
    is_red = np.abs(picture - np.array(red)).max(axis=-1) <= 4
    is_blue = np.abs(picture - np.array(blue)).max(axis=-1) <= 4
    red_columns = is_red.sum(axis=0) > 60
    blue_columns = is_blue.sum(axis=0) > 60
    # At full strength: the student (its own scale), and teacher 2, the strongest of its scale, with signs swapped.
    starts = [
        (start, name)
        for name, columns in (("red", red_columns), ("blue", blue_columns))
        for start in np.flatnonzero(np.diff(columns.astype(int)) == 1)
    ]
    assert [name for _, name in sorted(starts)] == ["red", "blue", "blue", "red"]


@pytest.mark.slow
def test_members_beyond_the_limit_are_left_out(tmp_path, monkeypatch):
    student, teacher = torch.zeros(2, 4, 4), torch.zeros(8, 4, 4)
    groups = torch.arange(8).view(2, 4)
    image = np.zeros((8, 8, 3), np.uint8)
    widths = {}
    for limit in (2, 4, 9):
        monkeypatch.setattr(matching, "_MOST_MEMBERS", limit)
        path = plot_matched_channels(
            image, student, teacher, {}, groups, tmp_path / f"{limit}.png", channels=[0, 1], cost=torch.zeros(2, 8)
        )
        widths[limit] = read(path).shape[1]
    assert widths == {2: 690, 4: 990, 9: 990}


def test_channels_without_a_group():
    groups = torch.tensor([[0], [-1]])
    maps = torch.zeros(2, 4, 4)
    image = np.zeros((8, 8, 3), np.uint8)
    for channels in ([1], []):
        with pytest.raises(ValueError, match="matched student channels"):
            plot_matched_channels(
                image, maps, maps[:1], {}, groups, "nowhere.png", channels=channels, cost=torch.zeros(2, 1)
            )
    with pytest.raises(ValueError, match="at least one position"):
        plot_matching([], "nowhere.png")
