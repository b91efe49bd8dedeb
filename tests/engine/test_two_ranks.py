"""Two gloo processes on the CPU: one matching for all ranks, and DistributedDataParallel without tricks."""

import pytest
import torch
import toy
from detectron2.engine import SimpleTrainer
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch.nn.parallel import DistributedDataParallel

from mgd_det.engine import MatchingUpdate
from mgd_det.modeling.backbone import find_mgd_backbone


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    return toy.distilled_config(toy.save_teacher(tmp_path_factory.mktemp("teacher") / "teacher.pth"))


def seeded_model(cfg):
    torch.manual_seed(11)
    return build_model(cfg)


def matched(cfg, batches, wrap=lambda model: model, dtype=torch.float32):
    """The model after the matching before training, and a training step of learning rate 0."""
    model = wrap(seeded_model(cfg).to(dtype))
    trainer = SimpleTrainer(model, batches, torch.optim.SGD(model.parameters(), lr=0.0))
    trainer.register_hooks([MatchingUpdate(model, lambda: batches, num_batches=len(batches), periods=[10])])
    trainer.train(0, 1)
    return model


def matchings(model):
    return find_mgd_backbone(model).distiller.distillation_state()["matchings"]


def distillation_gradients(model, batch):
    """Losses and gradients of distillation alone: RetinaNet normalises its own by the objects of each rank."""
    model.zero_grad()
    with EventStorage():
        losses = model(batch)
    sum(loss if "mgd" in name else 0 * loss for name, loss in losses.items()).backward()
    gradients = {name: p.grad for name, p in find_mgd_backbone(model).named_parameters() if p.grad is not None}
    return gradients, {name: float(loss) for name, loss in losses.items() if "mgd" in name}


def test_all_ranks_have_the_matching_of_the_union_of_their_images(cfg, run_ranks):
    union = [toy.batch(seed=i) for i in range(3)]

    def rank_train(rank):
        mine = union[:2] if rank == 0 else union[2:]  # unequal numbers of images
        return matchings(matched(cfg, mine, DistributedDataParallel))

    first, second = run_ranks(rank_train, 2)
    alone = matchings(matched(cfg, union))
    for position, matching in alone.items():
        for ranks in (first, second):
            assert torch.equal(ranks[position]["groups"], matching["groups"]), position
            torch.testing.assert_close(ranks[position]["margin"], matching["margin"])


def test_two_ranks_of_half_the_batch_have_the_loss_and_gradients_of_one(cfg, run_ranks):
    """Not so in the authors' code, whose loss shrinks with the number of ranks."""
    # In float64, as a ReLU that flips by rounding changes a gradient. Batch norm would see other batches: it is
    # evaluated with its running statistics here.
    cfg = cfg.clone()
    cfg.MODEL.RESNETS.NORM = cfg.MODEL.FPN.NORM = "FrozenBN"
    cfg.MODEL.RETINANET.NORM = ""
    images = toy.batch(((64, 64),) * 4)

    def rank_step(rank):
        mine = images[2 * rank : 2 * rank + 2]
        return distillation_gradients(matched(cfg, [mine], DistributedDataParallel, torch.float64), mine)

    (gradients, losses), (_, other_losses) = run_ranks(rank_step, 2)
    expected, expected_losses = distillation_gradients(matched(cfg, [images], dtype=torch.float64), images)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-6, atol=1e-12, msg=name)
    for name, loss in expected_losses.items():
        assert (losses[name] + other_losses[name]) / 2 == pytest.approx(loss, rel=1e-5), name
