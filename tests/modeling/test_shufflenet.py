"""ShuffleNetV2's own: its widths, and that running a stage's last ReLU after it changes nothing."""

import pytest
import torch
import torchvision
import toy

from mgd_det.errors import UserError
from mgd_det.modeling import ShuffleNetV2

STAGES = ["stem", "res2", "res3", "res4", "res5"]
# Where torchvision's network makes them.
MODULES = ["conv1", "maxpool", "stage2", "stage3", "stage4"]


@pytest.mark.parametrize(
    "width_mult, channels",
    [
        (0.5, [24, 24, 48, 96, 192]),
        (1.0, [24, 24, 116, 232, 464]),
        (1.5, [24, 24, 176, 352, 704]),
        (2.0, [24, 24, 244, 488, 976]),
    ],
)
def test_channels_of_the_paper(width_mult, channels):
    shapes = ShuffleNetV2(width_mult=width_mult, out_features=STAGES).output_shape()
    assert {name: shape.channels for name, shape in shapes.items()} == dict(zip(STAGES, channels))


def train_step(forward, network, image):
    """Features of the five stages and all gradients of a random projection of them."""
    network.train()
    features = forward(image)
    generator = torch.Generator().manual_seed(2)
    sum((torch.randn(f.shape, generator=generator) * f).sum() for f in features).backward()
    grads = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return features, grads, dict(network.named_buffers())


@pytest.mark.slow
def test_a_training_step_is_torchvisions():
    torch.manual_seed(0)
    reference = torchvision.models.shufflenet_v2_x1_0()
    toy.randomize_norms(reference)
    network = ShuffleNetV2(norm="BN", out_features=STAGES)
    network.load_state_dict(reference.state_dict(), strict=False)
    # In float32 the zero gradient of a bias before a convolution and its batch norm is all rounding.
    reference.double(), network.double()
    image = torch.randn(2, 3, 75, 101).double()

    def reference_forward(x):
        features = []
        for path in MODULES:
            x = reference.get_submodule(path)(x)
            features.append(x)
        return features

    features, grads, buffers = train_step(lambda x: list(network(x).values()), network, image)
    expected_features, expected_grads, expected_buffers = train_step(reference_forward, reference, image)
    assert set(grads) == set(expected_grads) and len(grads) == len(list(network.parameters()))
    for name, feature, expected in zip(STAGES, features, expected_features):
        assert expected.std() > 0.1 and expected.min() == 0, name
        torch.testing.assert_close(feature, expected)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], msg=name)
    for name, buffer in buffers.items():
        torch.testing.assert_close(buffer, expected_buffers[name])


def test_unknown_widths_are_listed():
    with pytest.raises(UserError, match=r"MODEL.SHUFFLENETS.WIDTH_MULT is 0.75.* 0.5, 1.0, 1.5, 2.0"):
        ShuffleNetV2(width_mult=0.75)
