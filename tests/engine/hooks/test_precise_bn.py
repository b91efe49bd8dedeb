"""Precise batch norm of a student that is being distilled."""

import torch
from torch import nn

from mgd_det.distillation import Distiller, Position
from mgd_det.engine.hooks.precise_bn import StudentPreciseBN, student_batch_norms

BATCHES = [torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(i)) + i for i in range(4)]


class Student(nn.Module):
    """Runs its distiller only where gradients are wanted, as an injected backbone does."""

    def __init__(self, norm):
        super().__init__()
        self.norm, self.loss_normalizer = norm, 100.0
        self.mgd = Distiller([Position("res3", "res3", 4, 4)], norm="BN")

    def forward(self, batch):
        self.loss_normalizer *= 0.9
        return self.norm(batch)


def updated(norm):
    student = Student(norm)
    own = next(module for module in student.mgd.modules() if isinstance(module, nn.BatchNorm2d))
    own.running_mean.fill_(3.0)
    own.running_var.fill_(2.0)
    hook = StudentPreciseBN(5, student, BATCHES, num_iter=4)
    hook.update_stats()
    assert (own.running_mean == 3).all() and (own.running_var == 2).all() and own.training
    assert student.loss_normalizer == 100.0
    return student, hook


def test_the_students_statistics_are_those_of_all_batches():
    student, _ = updated(nn.BatchNorm2d(4))
    expected = torch.cat(BATCHES).transpose(0, 1).flatten(1).mean(dim=1)
    torch.testing.assert_close(student.norm.running_mean, expected)
    assert student_batch_norms(student) == [student.norm]


def test_a_student_without_batch_norm_runs_nothing():
    student, hook = updated(nn.GroupNorm(2, 4))
    assert student_batch_norms(student) == [] and hook._disabled
