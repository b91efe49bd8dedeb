"""projects/Classification: the classifier, its evaluator, the distillation of its logits, and the authors' loss."""

import numpy as np
import pytest
import torch
from classification.authors_loss import AUTHORS_WEIGHTS, authors_losses
from classification.classifier import Classifier, add_classifier_config, normalised
from classification.evaluator import AccuracyEvaluator
from classification.networks import DepthwiseMobileNetV2, cifar_resnet, mobilenet_v1, resnet
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from torch import nn
from toy import randomize_norms

from mgd_det.distillation import PixelFormat, TeacherNetwork, distillation_features, negative_margin
from mgd_det.errors import UserError
from mgd_det.modeling import ShuffleNetV2, attach_losses, distilled_backbone

MEAN, STD = [110.0, 120.0, 130.0], [50.0, 55.0, 60.0]
PIXELS = PixelFormat("RGB", tuple(MEAN), tuple(STD))


def classifier(backbone=None, classes: int = 6, **options) -> Classifier:
    backbone = cifar_resnet(depth=8, width=1) if backbone is None else backbone
    feature = list(backbone.output_shape())[-1]
    return Classifier(
        **{
            "backbone": backbone,
            "num_classes": classes,
            "pixel_mean": MEAN,
            "pixel_std": STD,
            "in_feature": feature,
            **options,
        }
    )


def batch(images: int = 4, classes: int = 6, side: int = 32) -> list:
    rng = np.random.default_rng(3)
    pixels = torch.from_numpy(rng.integers(0, 256, (images, 3, side, side)).astype(np.uint8))
    return [{"image": image, "label": int(rng.integers(classes))} for image in pixels]


def distilled(classes: int = 6, teacher_classes: int = 6, **options) -> Classifier:
    torch.manual_seed(0)
    teacher = classifier(cifar_resnet(depth=8, width=2), teacher_classes)
    randomize_norms(teacher)  # those of an untrained one look folded, and the margin is then measured
    student = classifier(classes=classes)
    student.backbone = distilled_backbone(
        student=student.backbone,
        teacher=TeacherNetwork(teacher, PIXELS),
        pixels=PIXELS,
        **{"positions": ["res3", "res4"], "norm": "BN", **options},
    )
    return student.train()


# ------------------------------------------------------------------ the model
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_the_smoothed_cross_entropy_of_pooled_features(smoothing):
    model, inputs = classifier(label_smoothing=smoothing).train(), batch()
    losses = model(inputs)
    assert list(losses) == ["loss_cls"]
    images = torch.stack(
        [(x["image"] - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1) for x in inputs]
    )
    features = model.backbone(images)["res4"].detach().numpy().astype(np.float64)
    weight, bias = (p.detach().numpy().astype(np.float64) for p in (model.linear.weight, model.linear.bias))
    logits = features.mean(axis=(2, 3)) @ weight.T + bias
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    target = np.full(log_p.shape, smoothing / log_p.shape[1])
    target[np.arange(len(inputs)), [x["label"] for x in inputs]] += 1 - smoothing
    assert losses["loss_cls"].item() == pytest.approx(-(target * log_p).sum(axis=1).mean(), rel=1e-4)


def test_logits_in_evaluation_do_not_depend_on_the_memory_format():
    torch.manual_seed(1)
    model, inputs = classifier().eval(), batch()
    other = classifier(channels_last=True).eval()
    other.load_state_dict(model.state_dict())
    assert other.linear.weight.shape == (6, 64)
    for one, two in zip(model(inputs), other(inputs)):
        assert torch.allclose(one["logits"], two["logits"], atol=1e-4)


def test_yaml_builds_the_same_classifier():
    cfg = get_cfg()
    add_classifier_config(cfg)
    cfg.merge_from_list(
        ["MODEL.META_ARCHITECTURE", "Classifier", "MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.DEVICE", "cpu"]
        + ["MODEL.RESNETS.OUT_FEATURES", "['res5']", "MODEL.CLASSIFIER.NUM_CLASSES", "7"]
        + ["MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"]
        + ["MODEL.CLASSIFIER.LAST_CHANNELS", "24", "MODEL.CLASSIFIER.LAST_ACTIVATION", "relu6"]
    )
    model = build_model(cfg)
    assert isinstance(model, Classifier) and model.linear.weight.shape == (7, 24)
    assert isinstance(model.last_conv[2], nn.ReLU6)
    cfg.MODEL.CLASSIFIER.LABEL_SMOOTHING = 1.0
    with pytest.raises(UserError, match=r"MODEL.CLASSIFIER.LABEL_SMOOTHING.*model.label_smoothing.*1\.0"):
        build_model(cfg)


@pytest.mark.parametrize(
    "key, value", [("num_classes", 0), ("in_feature", "res9"), ("last_channels", -1), ("last_activation", "gelu")]
)
def test_a_wrong_value_is_one_message(key, value):
    with pytest.raises(UserError, match=rf"model\.{key}.*{value}"):
        classifier(**{key: value})


@pytest.mark.parametrize("label", [6, -1])
def test_a_label_that_is_no_class_is_one_message(label):
    inputs = batch(2)
    inputs[1]["label"] = label
    with pytest.raises(UserError, match=rf"label {label}.*model\.num_classes\) is 6"):
        classifier().train()(inputs)


def test_images_of_different_sizes_are_an_error():
    inputs = [*batch(1), *batch(1, side=40)]
    with pytest.raises(ValueError, match="40"):
        normalised(inputs, torch.zeros(3, 1, 1), torch.ones(3, 1, 1))


# ------------------------------------------------------------------ the score
def test_accuracy_is_that_of_a_sort():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(50, 9)), rng.integers(9, size=50)
    evaluator = AccuracyEvaluator()
    for part in (slice(0, 30), slice(30, 50)):
        inputs = [{"label": int(label)} for label in labels[part]]
        evaluator.process(inputs, [{"logits": torch.from_numpy(row)} for row in logits[part]])
    scores = evaluator.evaluate()["accuracy"]
    order = np.argsort(-logits, axis=1)
    for k in (1, 5):
        expected = 100 * np.mean([label in row[:k] for label, row in zip(labels, order)])
        assert scores[f"top{k}"] == pytest.approx(expected)
        assert scores[f"error{k}"] == pytest.approx(100 - expected)
    evaluator.reset()
    evaluator.process([{"label": 2}], [{"logits": torch.tensor([0.0, 1.0, -1.0])}])
    assert evaluator.evaluate()["accuracy"] == {"top1": 0.0, "top5": 100.0, "error1": 100.0, "error5": 0.0}


# ------------------------------------------------------------------ distillation
def test_kd_is_the_divergence_at_the_temperature_times_its_square():
    model, inputs = distilled(logits={"weight": 2.0, "temperature": 1.5}, losses={}), batch()
    attach_losses(model)
    assert sorted(model(inputs)) == ["loss_cls", "loss_kd_logits"]
    teacher = model.backbone.mgd.teacher.detector
    images = normalised(inputs, model.pixel_mean, model.pixel_std)
    theirs = teacher.eval().logits(teacher.backbone(images)).detach().numpy().astype(np.float64) / 1.5
    kept = []
    handle = model.linear.register_forward_hook(lambda *args: kept.append(args[2].detach().numpy().astype(np.float64)))
    again = model.train()(inputs)
    handle.remove()
    mine = kept[0] / 1.5
    p, q = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (theirs, mine))
    expected = 2.0 * 1.5**2 * (p * np.log(p / q)).sum(axis=1).mean()
    assert again["loss_kd_logits"].item() == pytest.approx(expected, rel=1e-4)
    again["loss_kd_logits"].backward()
    assert model.linear.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize(
    "options, words",
    [
        ({"logits": {"weight": 1.0}, "teacher_classes": 5}, "6 classes.*5"),
        ({"boxes": {"weight": 1.0}}, "boxes.weight.*1.0"),
        ({"logits": {"weight": 1.0, "temperature": 0.0}}, "logits.temperature.*0.0"),
    ],
)
def test_logits_that_do_not_fit_are_one_message(options, words):
    with pytest.raises(Exception, match=words):
        attach_losses(distilled(losses={}, **options))


def test_the_authors_loss_is_their_sum():
    torch.manual_seed(0)
    model, inputs = distilled(losses={"partial_l2_sum": {"weights": [0.25, 0.5], "divisor": 10.0}}), batch()
    attach_losses(model)
    model.backbone.mgd.solve_matching(model, [inputs])
    distillation, seen = model.backbone.mgd, {}
    distillation.observer = lambda student, teacher: seen.update(student=student, teacher=teacher)
    losses = model(inputs)
    for position, weight in zip(distillation.distiller.positions, (0.25, 0.5)):
        student = seen["student"][position.student].detach().double()
        # Batch norm of weight 1 and bias 0, by hand.
        mean, var = (
            f(student)
            for f in (lambda x: x.mean((0, 2, 3), True), lambda x: x.var((0, 2, 3), keepdim=True, unbiased=False))
        )
        student = ((student - mean) / (var + 1e-5).sqrt()).numpy()
        teacher = seen["teacher"][position.teacher].double().numpy()
        groups = distillation.distiller.groups(position).numpy()
        norm = distillation.teacher.norm(position.teacher)
        margins = negative_margin(norm.weight.detach(), norm.bias.detach()).double().numpy()
        total = 0.0
        for i, group in enumerate(groups):
            member = np.abs(teacher[:, group]).argmax(axis=1)[:, None]
            target = np.maximum(np.take_along_axis(teacher[:, group], member, axis=1)[:, 0], margins[group].mean())
            difference = student[:, i] - target
            total += (difference**2 * ((difference > 0) | (target > 0))).sum()
        expected = weight * total / len(inputs) / 10.0
        assert losses[f"loss_partial_l2_sum_{position.name}"].item() == pytest.approx(expected, rel=1e-3)


def test_the_authors_weights_halve_with_every_shallower_stage():
    assert AUTHORS_WEIGHTS == {f"res{i + 2}": 1 / 2 ** (3 - i) for i in range(4)}
    assert authors_losses(["res3.depthwise=res3", "res5"])["partial_l2_sum"]["weights"] == [0.25, 1.0]


# ------------------------------------------------------------------ networks
@pytest.mark.parametrize(
    "network, strides",
    [
        (resnet(depth=18, width=8, out_features=["res2", "res5"]), {"res2": (8, 4), "res5": (64, 32)}),
        (resnet(depth=50, width=8, out_features=["res2", "res5"]), {"res2": (32, 4), "res5": (256, 32)}),
        (cifar_resnet(depth=20, width=1, out_features=["res2", "res4"]), {"res2": (16, 1), "res4": (64, 4)}),
        (cifar_resnet(depth=8, width=4), {"res4": (256, 4)}),
        (mobilenet_v1(norm="BN", width_mult=0.25, out_features=["res5"]), {"res5": (256, 32)}),
        (DepthwiseMobileNetV2(width_mult=0.25, out_features=["res3", "res5"]), {"res3": (16, 8), "res5": (80, 32)}),
    ],
)
def test_networks_make_what_they_declare(network, strides):
    outputs = network.eval()(torch.zeros(1, 3, 64, 64))
    assert {name: (x.shape[1], 64 // x.shape[2]) for name, x in outputs.items()} == strides
    shapes = {name: (shape.channels, shape.stride) for name, shape in network.output_shape().items()}
    assert {name: shapes[name] for name in strides} == strides


def test_mobilenet_v1_has_relu_alone():
    activations = [type(m) for m in mobilenet_v1(norm="BN").modules() if isinstance(m, (nn.ReLU, nn.ReLU6))]
    assert activations == [nn.ReLU] * 27


def test_positions_of_mobilenet_v2_are_the_authors():
    network = DepthwiseMobileNetV2(norm="BN").eval()
    specs, sizes = distillation_features(network), {}
    assert list(specs) == ["res3.depthwise", "res4.depthwise", "res5.depthwise"]
    for name, spec in specs.items():
        network.get_submodule(spec.module).register_forward_hook(
            lambda m, a, y, name=name: sizes.update({name: y.shape})
        )
        assert isinstance(network.get_submodule(spec.norm), nn.BatchNorm2d)
    network(torch.zeros(1, 3, 64, 64))
    assert {name: (s[1], s[2]) for name, s in sizes.items()} == {
        "res3.depthwise": (192, 8),
        "res4.depthwise": (384, 4),
        "res5.depthwise": (960, 2),
    }


@pytest.mark.parametrize("make, words", [(lambda: resnet(depth=51), "51"), (lambda: cifar_resnet(depth=21), "21")])
def test_there_is_no_such_depth(make, words):
    with pytest.raises(UserError, match=words):
        make()


def test_shufflenet_learns_at_the_authors_stages():
    assert {"res3", "res4", "res5"} <= set(distillation_features(ShuffleNetV2(norm="BN")))
