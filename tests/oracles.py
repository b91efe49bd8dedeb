"""The definitions of MGD's reduction and loss in numpy and float64: what the package is tested against."""

import numpy as np


def absolute_max_pooling(teacher, margin, groups):
    """Target (B, Cs, H, W) and margin (Cs,) of teacher (B, Ct, H, W), margin (Ct,) and groups (Cs, K)."""
    members = np.asarray(teacher, np.float64)[:, groups]  # (B, Cs, K, H, W)
    largest = np.abs(members).max(axis=2)
    # Of equal magnitudes the positive one counts.
    target = np.where((members == largest[:, :, None]).any(axis=2), largest, -largest)
    return target, np.asarray(margin, np.float64)[groups].mean(axis=1)


def partial_l2(student, target, margin):
    """Loss and gradient of each value, (B, C, H, W) both, of student and target (B, C, H, W) and margin (C,)."""
    target = np.maximum(target, np.reshape(margin, (1, -1, 1, 1)))
    residual = np.where((student > target) | (target > 0), student - target, 0)
    return residual**2, 2 * residual


def amp_partial_l2(student, teacher, margin, groups, factor=1.0):
    """Summed loss and its gradient (B, Cs, H, W) of torch tensors, as ``mgd_det.distillation.fused`` computes them.

    The student is compared with ``factor`` times the teacher and its margin.
    """
    student, teacher, margin, groups = (x.detach().cpu() for x in (student, teacher, margin, groups))
    target, margin = absolute_max_pooling(teacher.double().numpy(), margin.double().numpy(), groups.numpy())
    loss, gradient = partial_l2(student.double().numpy(), factor * target, factor * margin)
    return loss.sum(), gradient
