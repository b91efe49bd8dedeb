"""The definitions of EmbedMask in loops over pixels and float64: what the project is tested against."""

import itertools

import numpy as np


def probability(pixel, proposal, margin):
    return np.exp(-sum(m * (p - q) ** 2 for m, p, q in zip(margin, pixel, proposal)))


def jaccard_loss(wrong, labels):
    """1 - IoU of the labels and what is left of them if the pixels ``wrong`` are."""
    predicted = [label != (i in wrong) for i, label in enumerate(labels)]
    union = sum(a or b for a, b in zip(labels, predicted))
    return 1 - sum(a and b for a, b in zip(labels, predicted)) / union if union else 0.0


def lovasz_by_thresholds(errors, labels):
    """The Lovasz extension by its definition: the integral over t of the loss of the pixels with an error >= t."""
    levels = sorted({0.0, *errors})
    return sum(
        (high - low) * jaccard_loss({i for i, error in enumerate(errors) if error >= high}, labels)
        for low, high in zip(levels, levels[1:])
    )


def lovasz_by_permutations(errors, labels):
    """The same as the support function of the base polytope: the best of all orders in which pixels become wrong."""
    best = -np.inf
    for order in itertools.permutations(range(len(errors))):
        losses = [jaccard_loss(set(order[:n]), labels) for n in range(len(order) + 1)]
        best = max(best, sum(errors[i] * (losses[n + 1] - losses[n]) for n, i in enumerate(order)))
    return best


def hinge_errors(probabilities, labels):
    return [max(0.0, 1 - (1 if label else -1) * (2 * p - 1)) for p, label in zip(probabilities, labels)]


def resized(values, size):
    """Bilinear with half-pixel centres, one value at a time."""
    height, width = values.shape
    result = np.empty(size)
    for i, j in itertools.product(*map(range, size)):
        y = max((i + 0.5) * height / size[0] - 0.5, 0)
        x = max((j + 0.5) * width / size[1] - 0.5, 0)
        i0, j0 = int(y), int(x)
        i1, j1 = min(i0 + 1, height - 1), min(j0 + 1, width - 1)
        top = values[i0, j0] * (1 - x + j0) + values[i0, j1] * (x - j0)
        bottom = values[i1, j0] * (1 - x + j0) + values[i1, j1] * (x - j0)
        result[i, j] = top * (1 - y + i0) + bottom * (y - i0)
    return result


def iou(one, other):
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    common = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return common / (sum(areas) - common)
