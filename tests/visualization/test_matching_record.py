"""The first and the last matching of a training, across a resume."""

import numpy as np
import pytest
import torch

from mgd_det.visualization.matching_record import MATCHING_FILE, read_matchings, record_matching


def matching(seed):
    generator = torch.Generator().manual_seed(seed)
    cost = 4 * torch.rand(2, 5, generator=generator, dtype=torch.float64)
    return {"res3": (cost, torch.randperm(5, generator=generator)[:4].reshape(2, 2))}


def test_the_first_groups_stay_and_the_rest_is_the_last(tmp_path):
    folder = str(tmp_path)
    assert read_matchings(folder) == []
    for seed in range(3):
        record_matching(folder, matching(seed), is_first=seed == 0)
    (position,) = read_matchings(folder)
    cost, groups = matching(2)["res3"]
    assert position.name == "res3" and torch.equal(position.groups, groups)
    assert torch.equal(position.former, matching(0)["res3"][1])
    torch.testing.assert_close(position.cost.double(), cost, atol=2e-3, rtol=0)
    assert position.optimal_cost == pytest.approx(cost[[0, 0, 1, 1], groups.flatten()].mean().item(), abs=2e-3)


def test_a_new_training_forgets_the_one_before(tmp_path):
    record_matching(str(tmp_path), matching(0), is_first=True)
    record_matching(str(tmp_path), matching(1), is_first=True)
    assert torch.equal(read_matchings(str(tmp_path))[0].former, matching(1)["res3"][1])


def test_another_file_is_refused(tmp_path):
    np.savez(tmp_path / MATCHING_FILE, **{"res3/cost": np.zeros((2, 2))})
    with pytest.raises(ValueError, match=MATCHING_FILE):
        read_matchings(str(tmp_path))
