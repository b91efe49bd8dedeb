"""A training step and its parts, with and without distillation, on random images."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model
from detectron2.solver import build_optimizer
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
from detectron2.utils.events import EventStorage
from torch import nn

from mgd_det.benchmark.naive import naive_partial_l2
from mgd_det.config import class_head, without_distillation
from mgd_det.distillation import PixelFormat, Position, TeacherNetwork
from mgd_det.distillation.fused import amp_partial_l2
from mgd_det.matching import assign_channels
from mgd_det.modeling import attach_losses, distilled_backbone, evaluating, teacher_config
from mgd_det.modeling.mgd_backbone import arguments_from_config
from mgd_det.modeling.teachers import teacher_options

Features = Dict[str, torch.Tensor]


class DistillationBenchmark:
    """The functions to measure, for the detector of a config with distillation.

    Both nets have random weights, which take as long as trained ones. The plain student and the distilled one are two
    detectors with equal weights, which train on the same batch, already on their device. With ``SOLVER.AMP.ENABLED``
    all forwards but the measuring pass run in mixed precision.
    """

    def __init__(self, cfg: CfgNode, *, size: Tuple[int, int], batch: int) -> None:
        """
        Args:
            cfg: a config whose backbone is "build_mgd_backbone".
            size: height and width of the images, in pixels.
            batch: images a step, > 0.
        """
        plain_cfg = without_distillation(cfg)
        plain_cfg.MODEL.WEIGHTS = ""
        self.device = torch.device(cfg.MODEL.DEVICE)
        self._is_mixed = cfg.SOLVER.AMP.ENABLED
        torch.manual_seed(0)
        self.plain = build_model(plain_cfg).train()
        self.distilled = build_model(plain_cfg)
        self.distilled.load_state_dict(self.plain.state_dict())
        arguments = arguments_from_config(cfg, ShapeSpec(channels=len(cfg.MODEL.PIXEL_MEAN)), _random_teacher)
        arguments["student"] = self.distilled.backbone
        distilled_backbone(**arguments).to(self.device)
        attach_losses(self.distilled.train())
        self._distillation = self.distilled.backbone.mgd
        self._optimizers = {id(net): build_optimizer(plain_cfg, net) for net in (self.plain, self.distilled)}
        self._scalers = {
            key: torch.amp.GradScaler(self.device.type, enabled=self._is_mixed) for key in self._optimizers
        }
        for optimizer in self._optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = 1e-6  # noise teaches nothing, and many steps of it would end in NaN
        model = plain_cfg.MODEL
        keypoints = model.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS if model.KEYPOINT_ON else 0
        inputs = random_batch(size, batch, class_head(plain_cfg).NUM_CLASSES, model.MASK_ON, keypoints)
        self._batch = [_moved(image, self.device) for image in inputs]
        self._images = self.distilled.preprocess_image(self._batch).tensor
        distiller = self._distillation.distiller
        for position in distiller.inheriting_positions:  # any channels take as long
            distiller.set_inherited_channels(torch.arange(position.student_channels))
        self._statistics = self._distillation.start_matching()
        self.measuring_pass()
        self._statistics.solve()
        self._window = self._distillation.start_matching(of_training=True)
        self._features = self._features_of_matched_positions()
        self._buffers = {
            name: (torch.zeros_like(student), torch.zeros_like(teacher[:, : teacher.shape[1] // 2]))
            for name, (student, teacher) in self._features.items()
        }

    # ------------------------------------------------------------------ whole steps
    def plain_step(self) -> None:
        self._step(self.plain)

    def distilled_step(self) -> None:
        self._step(self.distilled)

    def online_step(self) -> None:
        """Run a distilled step in the window of an update whose source is "online"."""
        self._distillation.observer = self._window.update
        self._step(self.distilled)
        self._distillation.observer = None

    def observation(self) -> None:
        """Run what an online step does besides a distilled one."""
        self._window.update(self._statistics.last_student, self._statistics.last_teacher)

    def _step(self, detector: nn.Module) -> None:
        optimizer = self._optimizers[id(detector)]
        torch.manual_seed(0)  # detectors with proposals draw some of them: the same in every step
        scaler = self._scalers[id(detector)]
        with EventStorage(), self._precision():
            total = sum(detector(self._batch).values())
        optimizer.zero_grad()
        scaler.scale(total).backward()
        scaler.step(optimizer)
        scaler.update()

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.float16) if self._is_mixed else nullcontext()

    # ------------------------------------------------------------------ parts
    @property
    def images(self) -> torch.Tensor:
        """The batch as the backbones get it, (B, 3, H, W)."""
        return self._images

    @torch.no_grad()
    def teacher_bottom_up(self, images: Optional[torch.Tensor] = None) -> Features:
        """Run the teacher and return its features by name; ``images`` are the batch by default."""
        with self._precision():
            return self._distillation.teacher(self._images if images is None else images)

    @torch.no_grad()
    def student_bottom_up(self) -> None:
        backbone = self.plain.backbone
        with evaluating(backbone), self._precision():
            getattr(backbone, "bottom_up", backbone)(self._images)

    def measuring_pass(self) -> None:
        """Run the forwards of one batch of a matching update."""
        with evaluating(self.distilled):
            self._distillation.measure(self.distilled, self._batch, self._statistics)

    def assignment(self) -> None:
        """Solve the matching of all positions for the costs measured so far."""
        for p in self.positions:
            assign_channels(self._statistics.cost(p), self._distillation.distiller.group_size(p))

    @property
    def positions(self) -> List[Position]:
        """The positions whose student channels all have a group."""
        return [p for p in self._distillation.distiller.matched_positions if p.name in self._features]

    def distillation_part(
        self, position: Position, partial_l2: Callable[..., torch.Tensor] = amp_partial_l2
    ) -> torch.Tensor:
        """Run reduction, loss and backward of a position as in the default loss, without the norm layer.

        Returns:
            The loss, a scalar.
        """
        distiller = self._distillation.distiller
        student, teacher = self._features[position.name]
        student = student.detach().requires_grad_()
        loss = partial_l2(student, teacher, distiller.margin(position), distiller.groups(position))
        torch.autograd.grad(loss, student)
        return loss.detach()

    def naive_part(self, position: Position) -> torch.Tensor:
        return self.distillation_part(position, naive_partial_l2)

    def copies(self, position: Position) -> None:
        """Copy as much as the distillation part must move, into memory that is allocated already.

        Forward reads both maps and writes the residual; backward reads that and writes the gradient. A copy reads and
        writes, so half of the teacher's map and twice the student's are as much.
        """
        student, teacher = self._features[position.name]
        to_student, to_teacher = self._buffers[position.name]
        to_teacher.copy_(teacher[:, : to_teacher.shape[1]])
        to_student.copy_(student)
        to_student.copy_(student)

    def copied_bytes(self, position: Position) -> int:
        """Return how much memory :meth:`copies` reads and writes."""
        to_student, to_teacher = self._buffers[position.name]
        return 2 * (2 * to_student.nbytes + to_teacher.nbytes)

    @torch.no_grad()
    def _features_of_matched_positions(self) -> Dict[str, Tuple[torch.Tensor, torch.Tensor]]:
        """Return the student's normed feature and the teacher's, in the precision of the steps."""
        distiller, statistics = self._distillation.distiller, self._statistics
        if self._is_mixed:
            with self._precision():
                self.measuring_pass()
        features = {}
        for p in distiller.matched_positions:
            if (distiller.groups(p)[:, 0] >= 0).all():
                student = statistics.last_student[p.student]
                if p.name in distiller.norms:
                    with self._precision():
                        student = distiller.norms[p.name](student)
                features[p.name] = (student, statistics.last_teacher[p.teacher])
        return features


def random_batch(
    size: Tuple[int, int], batch: int, num_classes: int, masks: bool, keypoints: int = 0
) -> List[Dict[str, Any]]:
    """Make inputs like those of Detectron2's DatasetMapper: noise, with seven objects in each image.

    Args:
        size: height and width of the images, in pixels.
        batch: number of images.
        num_classes: classes of the objects.
        masks: whether the objects have masks.
        keypoints: visible keypoints of each object.
    """
    height, width = size
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for _ in range(batch):
        instances = Instances(size)
        corners = torch.rand(7, 2, 2, generator=generator).sort(dim=1).values * torch.tensor([width, height])
        corners[:, 1] = torch.maximum(corners[:, 1], corners[:, 0] + 8)
        instances.gt_boxes = Boxes(corners.flatten(1))
        instances.gt_boxes.clip(size)
        instances.gt_classes = torch.randint(num_classes, (7,), generator=generator)
        if masks:
            instances.gt_masks = BitMasks(torch.rand(7, height, width, generator=generator) > 0.5)
        if keypoints:
            first, last = instances.gt_boxes.tensor[:, None].chunk(2, dim=2)
            points = first + (last - first) * torch.rand(7, keypoints, 2, generator=generator)
            instances.gt_keypoints = Keypoints(torch.cat([points, torch.full((7, keypoints, 1), 2.0)], dim=2))
        image = torch.randint(256, (3, height, width), dtype=torch.uint8, generator=generator)
        inputs.append({"image": image, "instances": instances, "height": height, "width": width})
    return inputs


def _moved(image: Dict[str, Any], device: torch.device) -> Dict[str, Any]:
    return {**image, "image": image["image"].to(device), "instances": image["instances"].to(device)}


def _random_teacher(cfg: CfgNode) -> TeacherNetwork:
    teacher_cfg = teacher_config(cfg)
    pixels = PixelFormat.from_config(teacher_cfg)
    return TeacherNetwork(build_backbone(teacher_cfg), pixels, options=teacher_options(cfg))
