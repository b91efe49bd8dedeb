"""The closest separable convolution, against numpy's singular values and other separable ones."""

import numpy as np
import torch
from torch.nn.functional import conv2d

from mgd_det.matching import closest_separable


def test_the_error_is_that_of_the_other_singular_values_and_no_other_split_has_less():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 3, 3, 3, generator=generator)
    depthwise, pointwise = closest_separable(weight)
    assert depthwise.shape == (3, 1, 3, 3) and pointwise.shape == (5, 3, 1, 1) and depthwise.dtype == torch.float32

    def error(depthwise, pointwise):
        return (weight - pointwise * depthwise.transpose(0, 1)).square().sum().item()

    values = [np.linalg.svd(weight[:, c].reshape(5, 9).numpy(), compute_uv=False) for c in range(3)]
    least = error(depthwise, pointwise)
    np.testing.assert_allclose(least, sum((v[1:] ** 2).sum() for v in values), rtol=1e-5)
    for scale in (1e-2, 0.1, 1.0):
        for _ in range(20):
            others = [part + scale * torch.randn(part.shape, generator=generator) for part in (depthwise, pointwise)]
            assert error(*others) > least


def test_a_separable_convolution_is_found_again():
    generator = torch.Generator().manual_seed(1)
    kernels, mix = (torch.randn(*shape, generator=generator) for shape in ((4, 1, 3, 3), (6, 4, 1, 1)))
    kernels[2] = 0  # a channel that nothing reads
    weight = mix * kernels.transpose(0, 1)
    x = torch.randn(2, 4, 7, 8, generator=generator)
    depthwise, pointwise = closest_separable(weight)
    found = conv2d(conv2d(x, depthwise, padding=1, groups=4), pointwise)
    torch.testing.assert_close(found, conv2d(x, weight, padding=1), rtol=1e-4, atol=1e-4)
