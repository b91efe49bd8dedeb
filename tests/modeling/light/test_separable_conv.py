"""Separable convolutions: what they compute, and what they take over from dense ones."""

import copy

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from torch import nn

from mgd_det.errors import ArgumentError
from mgd_det.modeling.light import SeparableConv2d, make_separable, separable_from


@pytest.mark.parametrize("stride, dilation", [(1, 1), (2, 1), (1, 2)])
def test_it_is_a_dense_convolution_whose_kernels_are_products(stride, dilation):
    torch.manual_seed(0)
    norm = nn.GroupNorm(2, 6)
    nn.init.normal_(norm.weight)
    separable = SeparableConv2d(4, 6, 3, stride, dilation, dilation, bias=True, norm=norm, activation=F.relu)
    nn.init.normal_(separable.bias)
    # Kernel of output o and input c: the depthwise kernel of c, times the pointwise weight of (o, c).
    kernels = torch.einsum("oc,chw->ochw", separable.weight[:, :, 0, 0], separable.depthwise.weight[:, 0])
    x = torch.randn(2, 4, 7, 9)
    expected = norm(F.conv2d(x, kernels, separable.bias, stride, dilation, dilation)).relu()
    torch.testing.assert_close(separable(x), expected)
    assert (expected == 0).any() and (expected > 0).any()


@pytest.mark.parametrize(
    "init", [lambda w: nn.init.normal_(w, std=0.01), nn.init.xavier_uniform_, nn.init.kaiming_normal_]
)
def test_it_starts_at_the_scale_of_the_dense_one(init):
    torch.manual_seed(0)
    dense = nn.Conv2d(128, 256, 3, padding=1, bias=False)
    init(dense.weight)
    x = F.avg_pool2d(torch.randn(4, 128, 32, 32), 3, 1, 1).relu()  # neighbours resemble each other, as in maps
    ratio = separable_from(dense)(x).square().mean() / dense(x).square().mean()
    assert 0.7 < ratio < 1.4


def test_bias_norm_and_activation_are_the_dense_ones():
    dense = Conv2d(8, 4, 3, stride=2, padding=1, norm=nn.GroupNorm(2, 4), activation=nn.ReLU()).double()
    nn.init.constant_(dense.bias, -4.6)
    made = separable_from(dense)
    assert made.bias is dense.bias and made.norm is dense.norm and made.activation is dense.activation
    assert made.depthwise.stride == (2, 2) and made.depthwise.padding == (1, 1)
    assert {p.dtype for p in made.parameters()} == {torch.float64}
    assert [tuple(p.shape) for p in (made.weight, made.depthwise.weight)] == [(4, 8, 1, 1), (8, 1, 3, 3)]
    assert separable_from(Conv2d(8, 4, 3, bias=False)).bias is None


def test_only_dense_kernels_are_replaced():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.tower = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1))
            self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
            self.up = nn.ConvTranspose2d(4, 4, 2, 2)
            self.last = Conv2d(4, 2, 5, padding=2)
            self.bottom_up = nn.Conv2d(3, 4, 3)
            self.in_a_list = [self.last]

    head = Head()
    others = [head.tower[2], head.depthwise, head.up, head.bottom_up]
    assert make_separable(head) is head
    assert [type(m) for m in head.tower] == [SeparableConv2d, nn.ReLU, nn.Conv2d]
    assert all(a is b for a, b in zip(others, [head.tower[2], head.depthwise, head.up, head.bottom_up]))
    assert type(head.last) is SeparableConv2d and head.in_a_list == [head.last]
    assert head.last.depthwise.kernel_size == (5, 5)
    with pytest.raises(ArgumentError, match="module is a Head"):
        make_separable(head)  # a second time
    copied = copy.deepcopy(head)
    assert copied.in_a_list[0] is copied.last and copied.last is not head.last
