"""The distillation losses of all positions, with the layers and the state that they need."""

import math
from typing import Any, Dict, List, Mapping, Optional, Sequence, Set

import torch
from detectron2.layers import get_norm
from torch import nn

from mgd_det.distillation.inherited_channels import check_inherited_channels, no_inherited_channels
from mgd_det.distillation.position_losses import DEFAULT_LOSSES, PositionFeatures, PositionLoss
from mgd_det.distillation.positions import Position
from mgd_det.distillation.reducers import REDUCERS
from mgd_det.distillation.schedule import decay_factor
from mgd_det.distillation.weighted_losses import weighted_loss
from mgd_det.errors import ArgumentError, UserError, check_choice, check_count


class Distiller(nn.Module):
    """Computes the losses of paired features (MGD, section 3).

    It owns the student's training-time norm layers and adapters, and for each position the groups of the current
    matching, the teacher's margins and the mean square of the target, in their final shapes from the start.
    :meth:`distillation_state` saves all of them. Between two updates of the matching only the layers change.

    Attributes:
        teacher_hash, detector_hash: what tells the teacher's weights from others (those that make the features, those
            of the whole detector), saved to refuse a resume with another teacher; "" if the distiller's owner does not
            know it.
    """

    def __init__(
        self,
        positions: Sequence[Position],
        *,
        reducer: str = "amp",
        norm: str = "GN",
        norm_groups: int = 32,
        losses: Optional[Mapping[str, Mapping[str, Any]]] = None,
    ) -> None:
        """
        Args:
            positions: what to distil.
            reducer: a key of :data:`REDUCERS`.
            norm: norm layer of the student's features, a name of ``detectron2.layers.get_norm``.
            norm_groups: groups of "GN"; their greatest common divisor with the channels, if they do not divide them.
            losses: by name in :data:`POSITION_LOSS_REGISTRY`, the loss's arguments and "weights": one weight >= 0 for
                each position, or one for all (default: 1). Where it is 0 the loss is not computed. "decay" is one of
                :data:`DECAYS` (default: "constant"). Default: :data:`DEFAULT_LOSSES`.

        Raises:
            ArgumentError: an argument has a wrong value.
        """
        super().__init__()
        check_choice("reducer", reducer, REDUCERS)
        self.positions = list(positions)
        if not self.positions:
            raise ArgumentError("positions", "is empty: name at least one feature, or train without distillation")
        self.reducer = reducer
        losses = DEFAULT_LOSSES if losses is None else losses
        self._losses = [weighted_loss(name, options, self.positions) for name, options in losses.items()]
        self.norms = nn.ModuleDict(
            # No entry where no loss would train it: DistributedDataParallel waits for every gradient.
            {
                p.name: _student_norm(norm, norm_groups, p.matched_channels)
                for p in self.positions
                if any(loss.needs_norm for loss in self._losses_at(p))
            }
        )
        with torch.random.fork_rng(devices=[]):  # the detector's heads start as they do without distillation
            self.adapters = nn.ModuleDict(
                {
                    p.name: nn.Conv2d(p.student_channels, p.teacher_channels, kernel_size=1, bias=False)
                    for p in self.positions
                    if p.matching == "adapter" and any(loss.needs_matching for loss in self._losses_at(p))
                }
            )
        self.teacher_hash = self.detector_hash = ""
        # By config key, what else a saved state depends on.
        self._settings: Dict[str, Any] = {
            "MODEL.MGD.MATCHING.KINDS": ", ".join(p.matching for p in self.positions),
        }
        if self.matched_positions:
            self._settings["MODEL.MGD.REDUCER"] = reducer
        if len(self.norms) > 0:
            self._settings["MODEL.MGD.NORM"] = norm
            if norm == "GN":
                self._settings["MODEL.MGD.NORM_GROUPS"] = norm_groups
        for name, weighted in zip(losses, self._losses):
            scale = getattr(weighted.loss, "scale", None)
            if isinstance(scale, str) and any(weighted.weights.values()):
                self._settings[f"MODEL.MGD.LOSS.{name.upper()}.SCALE"] = scale
        self._matched: Set[str] = set()  # names of the positions whose matching is solved
        self._has_inherited_channels = False
        for p in self.positions:
            # Buffers follow .to(device); they are saved by distillation_state() alone.
            groups = p.fixed_groups(self.group_size(p))
            rows = None
            if p.matched_channels > p.teacher_channels:
                rows = torch.arange(p.teacher_channels) if groups is None else _matched_rows(groups)
            if groups is None:
                groups = torch.full((p.matched_channels, self.group_size(p)), -1)
            self.register_buffer(f"groups_{p.name}", groups, persistent=False)
            self.register_buffer(f"margin_{p.name}", torch.zeros(p.teacher_channels), persistent=False)
            self.register_buffer(f"mean_square_{p.name}", torch.ones(()), persistent=False)
            # The student channels that have a group; known to the host, so that a step need not wait for the device.
            self.register_buffer(f"rows_{p.name}", rows, persistent=False)

    @property
    def has_losses(self) -> bool:
        """True if any loss has a weight above 0 at any position."""
        return any(self._losses_at(p) for p in self.positions)

    def check_mask(self, mask: str) -> None:
        """Check that every loss weights pixels by a mask.

        Args:
            mask: its name, for the message.

        Raises:
            ArgumentError: one does not, or there is none.
        """
        names = [w.log_name for w in self._losses if any(w.weights.values()) and not w.loss.takes_mask]
        if names or not self.has_losses:
            which = f"the loss {names[0]!r} takes none (PositionLoss.takes_mask)" if names else "no position has a loss"
            raise ArgumentError("pixel_mask.name", f"is {mask!r}, but {which}: use '', or another loss")

    def _losses_at(self, position: Position) -> List[PositionLoss]:
        """Return the losses that read the features of a position."""
        index = self.positions.index(position)
        before = self.positions[index - 1].name if index > 0 else position.name
        return [
            weighted.loss
            for weighted in self._losses
            if weighted.weights[position.name] > 0 or (weighted.loss.needs_following and weighted.weights[before] > 0)
        ]

    # ------------------------------------------------------------------ the matching in force
    @property
    def is_matched(self) -> bool:
        """True if every position has what its losses read."""
        return all(p.name in self._matched for p in self.matched_positions)

    def has_matching(self, position: Position) -> bool:
        """Return whether the position's groups are solved."""
        return position.name in self._matched

    @property
    def matched_positions(self) -> List[Position]:
        """The positions with a loss that reads something measured: groups that are assigned, margins, or the scale."""
        return [p for p in self.positions if any(_reads_measured(loss, p) for loss in self._losses_at(p))]

    @property
    def inheriting_positions(self) -> List[Position]:
        """The positions whose groups are the channels that the student has inherited."""
        return [p for p in self.positions if p.matching == "inherited"]

    def set_inherited_channels(self, channels: torch.Tensor) -> None:
        """Let the channels of each inherited level learn from those that they come from, (Cs,) long of the teacher's.

        Raises:
            ValueError: they do not fit a level.
        """
        for p in self.inheriting_positions:
            check_inherited_channels(p, channels)
            self.groups(p).copy_(channels.unsqueeze(1))
        self._has_inherited_channels = True

    def require_inherited_channels(self) -> None:
        """Raise a UserError if the groups of the :attr:`inheriting_positions` are not known."""
        if self.inheriting_positions and not self._has_inherited_channels:
            raise no_inherited_channels(self.inheriting_positions)

    def groups(self, position: Position) -> torch.Tensor:
        """Return (Cs, group size) long; a row of -1 is a student channel without a teacher channel. All -1 at first."""
        return getattr(self, f"groups_{position.name}")

    def margin(self, position: Position) -> torch.Tensor:
        """Return the margins of the teacher's channels, (Ct,) <= 0."""
        return getattr(self, f"margin_{position.name}")

    def mean_square(self, position: Position) -> torch.Tensor:
        """Return the mean of the squared target, a scalar > 0, as measured in the matching's first window."""
        return getattr(self, f"mean_square_{position.name}")

    def set_matching(
        self, position: Position, *, groups: torch.Tensor, margin: torch.Tensor, mean_square: torch.Tensor
    ) -> None:
        """Put a position's matching in force. A mean square of 0 (a silent teacher) counts as 1.

        Args:
            groups: (Cs, group size) long, see :meth:`groups`.
            margin: (Ct,) <= 0.
            mean_square: scalar >= 0.

        Raises:
            ValueError: the groups have another shape, or match fewer or more than min(Cs, Ct) student channels.
        """
        name = position.name
        if groups.shape != self.groups(position).shape:
            raise ValueError(
                f"the groups at {name} are {tuple(groups.shape)}, and must be {tuple(self.groups(position).shape)}"
            )
        rows = _matched_rows(groups.cpu())
        if len(rows) != min(position.matched_channels, position.teacher_channels):
            raise ValueError(f"the groups at {name} give {len(rows)} student channels a teacher channel")
        self.groups(position).copy_(groups)
        self.margin(position).copy_(margin)
        self.mean_square(position).copy_(torch.where(mean_square > 0, mean_square, torch.ones_like(mean_square)))
        if self._rows(position) is not None:
            self._rows(position).copy_(rows)
        self._matched.add(name)

    def group_size(self, position: Position) -> int:
        """Return the teacher channels of a student channel: max(Ct // Cs, 1), but 1 if sparse or inherited."""
        if self.reducer == "sm" or position.matching == "inherited":
            return 1
        return max(position.teacher_channels // position.matched_channels, 1)

    def _rows(self, position: Position) -> Any:
        return getattr(self, f"rows_{position.name}")

    # ------------------------------------------------------------------ the loss
    def forward(
        self,
        student: Dict[str, torch.Tensor],
        teacher: Dict[str, torch.Tensor],
        progress: float = 0.0,
        masks: Optional[Mapping[str, torch.Tensor]] = None,
    ) -> Dict[str, torch.Tensor]:
        """Compute the losses.

        Args:
            student: features by name, (B, Cs, H, W), before the norm layers of this module.
            teacher: features by name, (B, Ct, H, W), without gradient.
            progress: the part of the distillation that is done, in [0, 1], for weights that decay.
            masks: by name of the position, (B, 1, H, W), see :mod:`mgd_det.distillation.masks`; None for none.

        Returns:
            ``loss_mgd_<position>`` of partial L2 and ``loss_<name>_<position>`` of any other loss -> scalar, weighted.

        Raises:
            RuntimeError: no matching has been solved yet.
        """
        self.require_inherited_channels()
        if not self.is_matched:
            raise RuntimeError(
                "the channel matching is not solved yet: train with the hook mgd_det.engine.MatchingUpdate, which "
                "solves it in the first step, or call detector.backbone.mgd.solve_matching(detector, batches)"
            )
        features = {p.name: self._features(p, student[p.student], teacher[p.teacher]) for p in self.positions}
        in_order = list(features.values())
        for here, after in zip(in_order, in_order[1:]):
            here.following = after
        for name, mask in (masks or {}).items():
            features[name].mask = mask
        return {
            f"loss_{weighted.log_name}_{p.name}": (
                weighted.weights[p.name] * decay_factor(weighted.decay, progress) * weighted.loss(p, features[p.name])
            )
            for weighted in self._losses
            for p in self.positions
            if weighted.weights[p.name] > 0
        }

    def _features(self, position: Position, student: torch.Tensor, teacher: torch.Tensor) -> PositionFeatures:
        return PositionFeatures(
            student,
            teacher,
            teacher_margin=self.margin(position),
            groups=self.groups(position),
            mean_square=self.mean_square(position),
            norm=self.norms[position.name] if position.name in self.norms else None,
            reducer=self.reducer,
            adapter=self.adapters[position.name] if position.name in self.adapters else None,
            rows=self._rows(position),
        )

    @torch.no_grad()
    def adapted(self, position: Position, student: torch.Tensor) -> torch.Tensor:
        """Return the student's feature behind the position's adapter, if it has one, without gradient."""
        return self.adapters[position.name](student) if position.name in self.adapters else student

    def reduce(self, teacher: torch.Tensor, margin: torch.Tensor, groups: torch.Tensor) -> Any:
        """Apply the distiller's reducer; see :mod:`mgd_det.distillation.reducers`."""
        return REDUCERS[self.reducer](teacher, margin, groups)

    # ------------------------------------------------------------------ saved with training
    def distillation_state(self) -> Dict[str, Any]:
        """Return all that training needs in addition to the student, on the CPU."""
        matchings = {}
        for p in self.positions:
            tensors = {"groups": self.groups(p), "margin": self.margin(p), "mean_square": self.mean_square(p)}
            matchings[p.name] = {key: value.cpu().clone() for key, value in tensors.items()}
        return {
            "matchings": matchings,
            "matched": sorted(self._matched),
            "norms": _tensors(self.norms),
            "adapters": _tensors(self.adapters),
            "fingerprint": self._fingerprint(),
        }

    def _fingerprint(self) -> Dict[str, Any]:
        """Return by config key what a state depends on and its tensors do not show."""
        hashes = {"MODEL.MGD.TEACHER": self.teacher_hash, "MODEL.MGD.TEACHER with its heads": self.detector_hash}
        return {**{key: f"weights {value}" for key, value in hashes.items() if value}, **self._settings}

    def load_distillation_state(self, state: Dict[str, Any]) -> None:
        """Restore what :meth:`distillation_state` returned.

        Raises:
            UserError: it is of other positions, channels, norm layers, or of another teacher, reducer or scale. Then
                nothing has changed.
        """
        matchings = state["matchings"]
        # Version 0.1 had no adapters, no list of solved positions and no fingerprint.
        layers = {"norms": state["norms"], "adapters": state.get("adapters", {})}
        matched = state.get("matched", [p.name for p in self.positions])
        self._check_state(matchings, layers, state.get("fingerprint", {}))
        self.norms.load_state_dict(layers["norms"])
        self.adapters.load_state_dict(layers["adapters"])
        channels = {p.name: matchings[p.name]["groups"].squeeze(1) for p in self.inheriting_positions}
        if channels and all((of_level >= 0).all() for of_level in channels.values()):
            self.set_inherited_channels(next(iter(channels.values())))  # the same at every level
        for p in self.positions:
            if p.name in matched and (matchings[p.name]["groups"] >= 0).any():
                self.set_matching(p, **matchings[p.name])

    def _check_state(
        self, matchings: Dict[str, Any], layers: Dict[str, Dict[str, torch.Tensor]], fingerprint: Dict[str, Any]
    ) -> None:
        advice = "resume with the config of the checkpoint, or start a new OUTPUT_DIR"
        mine, theirs = [p.name for p in self.positions], list(matchings)
        if mine != theirs:
            raise UserError(
                f"the checkpoint was distilled at {', '.join(theirs)}, but MODEL.MGD.POSITIONS gives "
                f"{', '.join(mine)}: {advice}"
            )
        own = self._fingerprint()
        others = [
            f"{key} {value!r}, which is now {own[key]!r}"
            for key, value in fingerprint.items()
            if key in own and own[key] != value
        ]
        if others:
            raise UserError(f"the checkpoint was trained with {'; '.join(others)}: {advice}")
        for p in self.positions:
            groups, margin = matchings[p.name]["groups"], matchings[p.name]["margin"]
            # Version 0.1 saved empty groups where there was no matching yet.
            if groups.shape[0] not in (0, p.matched_channels) or margin.shape[0] != p.teacher_channels:
                raise UserError(
                    f"the checkpoint's matching at {p.name} is of {groups.shape[0]} student and {margin.shape[0]} "
                    f"teacher channels, but the nets have {p.matched_channels} and {p.teacher_channels}: {advice}"
                )
            if groups.dtype != torch.long or (
                groups.numel() and not -1 <= int(groups.min()) <= int(groups.max()) < p.teacher_channels
            ):
                raise UserError(f"the checkpoint's groups at {p.name} are not indices of teacher channels: {advice}")
            if groups.numel() > 0 and groups.shape[1] != self.group_size(p):
                raise UserError(
                    f"the checkpoint's groups at {p.name} have {groups.shape[1]} teacher channels, but "
                    f"MODEL.MGD.REDUCER {self.reducer!r} needs {self.group_size(p)}: {advice}"
                )
        for part, key in (("norms", "MODEL.MGD.NORM"), ("adapters", "MODEL.MGD.MATCHING.KINDS")):
            shapes = {name: value.shape for name, value in self.get_submodule(part).state_dict().items()}
            if shapes != {name: value.shape for name, value in layers[part].items()}:
                raise UserError(f"the checkpoint has other {part} of the student's features than {key} gives: {advice}")


def _reads_measured(loss: PositionLoss, position: Position) -> bool:
    return loss.needs_statistics or (loss.needs_matching and position.matching == "assignment")


def _tensors(module: nn.Module) -> Dict[str, torch.Tensor]:
    """Return a copy of the module's state dict on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}


def _matched_rows(groups: torch.Tensor) -> torch.Tensor:
    """Return the student channels that have a group, ascending."""
    return (groups[:, 0] >= 0).nonzero().squeeze(1)


def _student_norm(norm: str, norm_groups: int, channels: int) -> nn.Module:
    if norm == "GN":
        groups = math.gcd(check_count("norm_groups", norm_groups), channels)
        # A group of one channel forgets how strong a map is, and of a map of one pixel everything.
        return nn.GroupNorm(groups // 2 if groups == channels and channels % 2 == 0 else groups, channels)
    try:
        return get_norm(norm, channels) or nn.Identity()
    except KeyError as e:
        raise ArgumentError("norm", f"is {norm!r}; use one of GN, BN, SyncBN, LN or ''") from e
