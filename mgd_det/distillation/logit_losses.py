"""Losses between the classification logits of student and teacher (Hinton et al., 2015): functions of tensors.

Both are computed in float32, also under autocast. Only the student gets a gradient. Without any logit they are 0.
"""

from typing import Optional

import torch
import torch.nn.functional as F


def softmax_logit_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Compute ``temperature^2 * KL(softmax(teacher / temperature) || softmax(student / temperature))``, mean over rows.

    Args:
        student: (R, K) logits of R boxes and K classes, background among them.
        teacher: the same of the teacher.
        temperature: > 0. The factor keeps the gradient's size (Hinton et al., section 2).

    Returns:
        A scalar >= 0.

    Example:
        >>> round(softmax_logit_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 100.0]])).item(), 4)
        0.6931
    """
    student, teacher = student.float(), teacher.detach().float()
    log_s, log_t = (F.log_softmax(x / temperature, dim=1) for x in (student, teacher))
    return temperature**2 * F.kl_div(log_s, log_t, reduction="sum", log_target=True) / max(student.shape[0], 1)


def sigmoid_logit_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    temperature: float = 1.0,
    gamma: float = 2.0,
    normalizer: Optional[float] = None,
) -> torch.Tensor:
    """Compute a focal binary cross-entropy with the teacher's probabilities (Li et al., NeurIPS 2020, equation 2).

    With probabilities t and s of teacher and student, ``sigmoid(logit / temperature)``, an entry counts
    ``|t - s|^gamma * temperature^2 * BCE(s, t)``, so that the background, which the student already predicts well,
    does not dominate. The sum is divided by the teacher's soft number of detections: the sum of its squared
    probabilities at temperature 1, at least 1.

    Args:
        student: logits of equal shape, one for each anchor and class.
        teacher: the same of the teacher.
        temperature: > 0.
        gamma: >= 0; 0 is the plain cross-entropy.
        normalizer: what the sum is divided by instead, > 0.

    Returns:
        A scalar >= 0.

    Example:
        >>> round(sigmoid_logit_loss(torch.tensor([0.0]), torch.tensor([100.0]), gamma=0.0).item(), 4)
        0.6931
    """
    student, teacher = student.float(), teacher.detach().float()
    probability = (teacher / temperature).sigmoid()
    error = (probability - (student / temperature).sigmoid()).abs()
    entropy = F.binary_cross_entropy_with_logits(student / temperature, probability, reduction="none")
    if 0 < gamma < 1:  # its slope at 0 is infinite, and equal logits would have the gradient inf * 0
        focus = torch.where(error > 0, error, 1.0).pow(gamma) * (error > 0)
    else:
        focus = error.pow(gamma)
    total = temperature**2 * (focus * entropy).sum()
    return total / (teacher.sigmoid().square().sum().clamp(min=1) if normalizer is None else normalizer)


def bernoulli_logit_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Compute ``KL(sigmoid(teacher) || sigmoid(student))``, mean over all entries: the pixels of masks.

    It is the pixel-wise distillation of Liu et al. (CVPR 2019, section 3.1) for a mask, which has two classes. The
    gradient is that of the binary cross-entropy with the teacher's probabilities, but a perfect student has loss 0.

    Args:
        student: (N, M, M) logits, or of any shape.
        teacher: the same of the teacher.

    Returns:
        A scalar >= 0.

    Example:
        >>> round(bernoulli_logit_loss(torch.tensor([0.0]), torch.tensor([100.0])).item(), 4)
        0.6931
    """
    student, teacher = student.float(), teacher.detach().float()
    probability = teacher.sigmoid()
    entropies = [F.binary_cross_entropy_with_logits(x, probability, reduction="none") for x in (student, teacher)]
    return (entropies[0] - entropies[1]).sum() / max(student.numel(), 1)
