"""The reducers, against numpy."""

import numpy as np
import oracles
import pytest
import torch
from scipy import stats

from mgd_det.distillation import absolute_max_pooling, random_drop, sparse_matching

GROUPS = torch.tensor([[4, 0, 7], [1, 5, 3]])  # of 9 teacher channels; 2, 6 and 8 are left over


def teacher_feature(seed=0, images=2, channels=9, size=(4, 5)):
    return torch.randn(images, channels, *size, generator=torch.Generator().manual_seed(seed))


def margins(channels=9):
    return -torch.arange(1.0, channels + 1)


# ------------------------------------------------------------------ absolute max pooling


def test_amp_takes_the_largest_magnitude_and_keeps_its_sign():
    teacher = teacher_feature()
    target, margin = absolute_max_pooling(teacher, margins(), GROUPS)
    expected, _ = oracles.absolute_max_pooling(teacher.numpy(), margins().numpy(), GROUPS.numpy())
    np.testing.assert_array_equal(target.numpy(), expected)
    assert target.min() < 0 < target.max()
    assert margin.tolist() == pytest.approx([-(5 + 1 + 8) / 3, -(2 + 6 + 4) / 3])


@pytest.mark.parametrize("first, second", [(2.0, -2.0), (-2.0, 2.0)])
def test_amp_of_equal_magnitudes_takes_the_positive(first, second):
    teacher = torch.tensor([first, second, 1.0]).view(1, 3, 1, 1)
    target, _ = absolute_max_pooling(teacher, margins(3), torch.tensor([[0, 1, 2], [2, 1, 0]]))
    assert target.flatten().tolist() == [2.0, 2.0]


def test_amp_of_one_member_is_the_member():
    teacher = teacher_feature()
    target, margin = absolute_max_pooling(teacher, margins(), torch.tensor([[3], [8]]))
    assert torch.equal(target, teacher[:, [3, 8]])
    assert margin.tolist() == [-4, -9]


def test_amp_does_not_write_the_teacher():
    teacher = teacher_feature()
    before = teacher.clone()
    target, _ = absolute_max_pooling(teacher, margins(), GROUPS)
    target.zero_()
    assert torch.equal(teacher, before)


# ------------------------------------------------------------------ random drop


def coded(images, channels, size):
    """A feature whose value at each place is the number of its channel."""
    return torch.arange(float(channels)).view(1, -1, 1, 1).expand(images, channels, *size).contiguous()


def test_rd_draws_members_of_the_group_only_at_their_own_place():
    teacher = teacher_feature()
    target, _ = random_drop(teacher, margins(), GROUPS, generator=torch.Generator().manual_seed(1))
    for channel, group in enumerate(GROUPS.tolist()):
        matches = (target[:, channel, None] == teacher[:, group]).sum(dim=1)
        assert torch.equal(matches, torch.ones_like(matches))


def test_rd_draws_each_member_equally_often():
    target, _ = random_drop(coded(4, 9, (25, 25)), margins(), GROUPS, generator=torch.Generator().manual_seed(2))
    for channel, group in enumerate(GROUPS.tolist()):
        counts = [int((target[:, channel] == member).sum()) for member in group]
        assert sum(counts) == 4 * 25 * 25
        assert stats.chisquare(counts).pvalue > 1e-3


def test_rd_draws_every_pixel_channel_and_image_on_its_own():
    groups = torch.tensor([[0, 1], [2, 3]])
    draws, _ = random_drop(coded(2, 4, (32, 32)), margins(4), groups, generator=torch.Generator().manual_seed(3))
    choice = draws - torch.tensor([0.0, 2.0]).view(1, 2, 1, 1)
    pairs = {
        "pixels of a row": (choice[..., :-1], choice[..., 1:]),
        "pixels of a column": (choice[..., :-1, :], choice[..., 1:, :]),
        "channels": (choice[:, 0], choice[:, 1]),
        "images": (choice[0], choice[1]),
    }
    for name, (one, other) in pairs.items():
        agree = int((one == other).sum())
        assert stats.binomtest(agree, one.numel(), 0.5).pvalue > 1e-3, name


def test_rd_repeats_with_its_generator_and_not_without():
    teacher = teacher_feature()

    def draw(seed):
        return random_drop(teacher, margins(), GROUPS, generator=torch.Generator().manual_seed(seed))

    assert all(torch.equal(a, b) for a, b in zip(draw(4), draw(4)))
    assert not torch.equal(draw(4)[0], draw(5)[0])


def test_rd_with_a_generator_leaves_the_global_one_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    random_drop(teacher_feature(), margins(), GROUPS, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.rand(3), expected)


def test_rd_without_a_generator_follows_the_global_seed():
    torch.manual_seed(7)
    first, _ = random_drop(teacher_feature(), margins(), GROUPS)
    second, _ = random_drop(teacher_feature(), margins(), GROUPS)
    torch.manual_seed(7)
    again, _ = random_drop(teacher_feature(), margins(), GROUPS)
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_rd_margin_is_that_of_one_member_each_equally_often():
    generator = torch.Generator().manual_seed(6)
    teacher = teacher_feature(size=(1, 1))
    drawn = torch.stack([random_drop(teacher, margins(), GROUPS, generator=generator)[1] for _ in range(900)])
    for channel, group in enumerate(GROUPS.tolist()):
        counts = [int((drawn[:, channel] == margins()[member]).sum()) for member in group]
        assert sum(counts) == 900
        assert stats.chisquare(counts).pvalue > 1e-3
    place = [[group.index(int(-m) - 1) for m in drawn[:, i]] for i, group in enumerate(GROUPS.tolist())]
    table = np.histogram2d(*place, bins=3)[0]
    assert stats.chi2_contingency(table).pvalue > 1e-3  # each group draws for itself


# ------------------------------------------------------------------ sparse matching


def test_sm_is_a_choice_of_channels():
    teacher = teacher_feature()
    target, margin = sparse_matching(teacher, margins(), torch.tensor([[7], [0], [2]]))
    np.testing.assert_array_equal(target.numpy(), teacher.numpy()[:, [7, 0, 2]])
    assert margin.tolist() == [-8, -1, -3]


def test_sm_of_larger_groups():
    with pytest.raises(ValueError, match="one teacher channel, got 3"):
        sparse_matching(teacher_feature(), margins(), GROUPS)


# ------------------------------------------------------------------ all of them


def amp(teacher, margin):
    return absolute_max_pooling(teacher, margin, GROUPS)


def rd(teacher, margin):
    return random_drop(teacher, margin, GROUPS, generator=torch.Generator().manual_seed(1))


def sm(teacher, margin):
    return sparse_matching(teacher, margin, GROUPS[:, :1])


reducers = pytest.mark.parametrize("reduce", [amp, rd, sm])


@reducers
def test_layout_in_memory_does_not_matter(reduce):
    teacher = teacher_feature()
    layouts = {
        "channels last": teacher.contiguous(memory_format=torch.channels_last),
        "transposed": teacher.transpose(2, 3).contiguous().transpose(2, 3),
        "a slice": torch.cat([teacher, teacher], dim=3)[..., :5],
    }
    expected = reduce(teacher, margins())
    for name, layout in layouts.items():
        assert name == "channels last" or not layout.is_contiguous()
        for one, other in zip(reduce(layout, margins()), expected):
            assert torch.equal(one, other), name


@reducers
def test_values_are_chosen_not_computed_in_any_precision(reduce):
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        teacher = teacher_feature().to(dtype)
        target, _ = reduce(teacher, margins())
        expected, _ = reduce(teacher.double(), margins())
        assert target.dtype == dtype and torch.equal(target.double(), expected)


@reducers
def test_autocast_changes_nothing(reduce):
    expected = reduce(teacher_feature(), margins())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = reduce(teacher_feature(), margins())
    for one, other in zip(found, expected):
        assert one.dtype == torch.float32 and torch.equal(one, other)


@reducers
def test_shapes_also_of_an_empty_batch(reduce):
    channels = len(GROUPS)
    for images in (3, 0):
        target, margin = reduce(teacher_feature(images=images), margins())
        assert target.shape == (images, channels, 4, 5) and margin.shape == (channels,)


@pytest.mark.parametrize("function", [absolute_max_pooling, random_drop, sparse_matching])
def test_invalid_groups(function):
    for groups in (torch.tensor([0, 1]), torch.tensor([[0.0], [1.0]]), torch.tensor([[0]]).int()):
        with pytest.raises(ValueError, match="groups"):
            function(teacher_feature(), margins(), groups)
    for channel in (-1, 9):  # which the teacher lacks
        with pytest.raises((IndexError, RuntimeError)):
            function(teacher_feature(), margins(), torch.tensor([[0], [channel]]))
