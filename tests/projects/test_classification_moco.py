"""projects/Classification: MoCo-v2 against its equations."""

import copy

import numpy as np
import pytest
import torch
from classification.moco import MoCo
from classification.networks import cifar_resnet

from mgd_det.distillation import PixelFormat, TeacherNetwork
from mgd_det.errors import UserError
from mgd_det.modeling import attach_losses, distilled_backbone

MEAN, STD = [120.0] * 3, [60.0] * 3


def moco(**options) -> MoCo:
    torch.manual_seed(0)
    networks = {name: cifar_resnet(depth=8) for name in ("backbone", "key_backbone")}
    sizes = {"in_feature": "res4", "dim": 5, "queue_size": 12, "momentum": 0.9, "temperature": 0.2}
    return MoCo(**{**networks, "pixel_mean": MEAN, "pixel_std": STD, **sizes, **options})


def batch(images: int = 4) -> list:
    rng = np.random.default_rng(1)
    pixels = torch.from_numpy(rng.integers(0, 256, (images, 2, 3, 16, 16)).astype(np.uint8))
    return [{"image": one, "image_key": two} for one, two in pixels]


def embedded(model: MoCo, backbone, head, inputs: list, key: str) -> np.ndarray:
    images = torch.stack([(x[key] - 120.0) / 60.0 for x in inputs])
    with torch.no_grad():
        x = head(backbone(images)["res4"].mean(dim=(2, 3))).double().numpy()
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_a_forward_is_infonce_and_moves_keys_and_queue():
    model, inputs = moco().train(), batch()
    with torch.no_grad():  # the key encoder lags behind
        for parameter in model.backbone.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    before = copy.deepcopy(model)
    loss = model(inputs)["loss_contrast"]
    followed = dict(before.backbone.named_parameters())
    for name, parameter in model.key_backbone.named_parameters():
        expected = 0.9 * before.key_backbone.get_parameter(name) + 0.1 * followed[name]
        assert torch.allclose(parameter, expected, atol=1e-6) and not parameter.requires_grad
    reference = copy.deepcopy(before)
    reference.key_backbone.load_state_dict({**model.key_backbone.state_dict()})
    reference.key_head.load_state_dict(model.key_head.state_dict())
    queries = embedded(model, before.backbone.train(), before.head, inputs, "image")
    keys = embedded(model, reference.key_backbone.train(), reference.key_head, inputs, "image_key")
    queue = before.queue.double().numpy()
    logits = np.concatenate([(queries * keys).sum(axis=1, keepdims=True), queries @ queue.T], axis=1) / 0.2
    expected = np.mean(np.log(np.exp(logits).sum(axis=1)) - logits[:, 0])
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert np.allclose(model.queue[:4].numpy(), keys, atol=1e-5)
    assert torch.equal(model.queue[4:], before.queue[4:]) and int(model.queue_position) == 4
    loss.backward()  # the queue has changed since
    assert model.backbone.get_parameter("stem.conv1.weight").grad.abs().sum() > 0
    for _ in range(2):
        model(inputs)
    assert int(model.queue_position) == 0


@pytest.mark.parametrize(
    "options, words",
    [
        ({"temperature": 0}, "model.temperature.*0"),
        ({"momentum": 1.0}, "model.momentum.*1.0"),
        ({"dim": 0}, "model.dim"),
    ],
)
def test_a_wrong_value_is_one_message(options, words):
    with pytest.raises(UserError, match=words):
        moco(**options)


def test_a_queue_that_is_no_multiple_of_the_batch_is_one_message():
    with pytest.raises(UserError, match="model.queue_size is 12.*5"):
        moco().train()(batch(5))


def test_a_distilled_moco_is_taught_on_the_queries_and_keeps_the_students_state():
    plain = moco()
    torch.manual_seed(3)
    pixels = PixelFormat("RGB", tuple(MEAN), tuple(STD))
    backbone = distilled_backbone(
        student=cifar_resnet(depth=8),
        teacher=TeacherNetwork(cifar_resnet(depth=8, width=2), pixels),
        pixels=pixels,
        positions=["res3", "res4"],
        norm="BN",
    )
    model = moco(backbone=backbone)
    assert set(model.state_dict()) == set(plain.state_dict())
    attach_losses(model)
    inputs = batch()
    model.backbone.mgd.solve_matching(model, [inputs])
    seen = []
    model.backbone.mgd.observer = lambda student, teacher: seen.append(student)
    losses = model.train()(inputs)
    assert sorted(losses) == ["loss_contrast", "loss_mgd_res3", "loss_mgd_res4"]
    assert len(seen) == 1
    sum(losses.values()).backward()
    assert torch.isfinite(model.backbone.get_parameter("stem.conv1.weight").grad).all()


def frozen_moco() -> MoCo:
    """One whose batch norms are constant, and whose two encoders are equal."""
    model = moco(**{name: cifar_resnet(depth=8, norm="FrozenBN") for name in ("backbone", "key_backbone")})
    torch.manual_seed(4)
    for parameter in (*model.backbone.parameters(), *model.head.parameters()):
        torch.nn.init.normal_(parameter, std=0.2)
    model.key_backbone.load_state_dict(model.backbone.state_dict())
    model.key_head.load_state_dict(model.head.state_dict())
    return model.train()


def test_two_ranks_share_keys_and_images_and_get_their_own_back(run_ranks):
    def step(rank):
        model, seen = frozen_moco(), []
        model.key_backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
        torch.manual_seed(rank + 1)  # rank 0 draws the order: one that mixes
        loss = model(batch(4)[2 * rank : 2 * rank + 2])["loss_contrast"]
        return loss.item(), model.queue, seen[0]

    (loss0, queue0, seen0), (loss1, queue1, seen1) = run_ranks(step, 2)
    model = frozen_moco()
    first_queue = model.queue.double().numpy()
    assert torch.equal(queue0, queue1)
    views = torch.stack([(x["image_key"] - 120.0) / 60.0 for x in batch(4)])
    seen = torch.cat([seen0, seen1])
    order = [next(i for i, view in enumerate(views) if torch.equal(view, image)) for image in seen]
    assert sorted(order) == [0, 1, 2, 3] and set(order[:2]) != {0, 1}  # a rank's keys are made on another one too
    keys = embedded(model, model.key_backbone, model.key_head, batch(4), "image_key")
    assert np.allclose(queue0[:4].numpy(), keys, atol=1e-5)  # in the order of the ranks
    queries = embedded(model, model.backbone, model.head, batch(4), "image")
    logits = np.concatenate([(queries * keys).sum(axis=1, keepdims=True), queries @ first_queue.T], axis=1) / 0.2
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[:, 0]
    assert [loss0, loss1] == [pytest.approx(losses[:2].mean(), rel=1e-3), pytest.approx(losses[2:].mean(), rel=1e-3)]
