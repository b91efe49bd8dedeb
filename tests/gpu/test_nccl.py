"""The collective parts over NCCL, with one rank that is told that it is one of two."""

import pytest
import torch
import torch.distributed as dist
import toy
from detectron2.modeling import build_model
from detectron2.utils import comm

from mgd_det.distributed import ranks
from mgd_det.engine import MatchingUpdate
from mgd_det.engine.training_step import TrainStep
from mgd_det.modeling import find_distillation

pytestmark = pytest.mark.gpu


@pytest.fixture
def group(device, tmp_path, monkeypatch):
    """A group of NCCL (gloo on a CPU), which takes tensors of the GPU only."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    # With one rank nothing is reduced or broadcast.
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(comm, "get_local_rank", lambda: 0)
    yield dist.group.WORLD
    comm._get_global_gloo_group.cache_clear()
    dist.destroy_process_group()


@pytest.mark.parametrize("source", ["online", "measured"])
def test_matching_and_steps(device, group, source, tmp_path):
    weights = toy.save_teacher(tmp_path / "teacher.pth")
    torch.manual_seed(0)
    model = build_model(toy.distilled_config(weights, opts=["MODEL.DEVICE", device.type, "MODEL.MGD.NORM", "SyncBN"]))
    model = ranks.distributed(model)
    batches = [toy.batch(seed=i) for i in range(4)]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    step = TrainStep(model, batches, optimizer, amp=device.type == "cuda")
    reduced, all_reduce = [], dist.all_reduce

    def recorded(tensor, *args, **kwargs):
        reduced.append(tensor.device.type)
        return all_reduce(tensor, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", recorded)
        hook = MatchingUpdate(model, lambda: batches[:2], source=source, num_batches=2, periods=[3])
        step.register_hooks([hook])
        step.train(0, 4)
    distiller = find_distillation(model).distiller
    assert distiller.is_matched and len(reduced) >= 4 + 1 and set(reduced) == {device.type}
    state = hook.state_dict()
    assert set(state["matchings"]) == {p.name for p in distiller.positions}
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert all(p.isfinite().all() for p in parameters)
