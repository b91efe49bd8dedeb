"""An optional writer of a training's scalars to Weights & Biases."""

from typing import Any, Dict, Mapping, Optional

from detectron2.utils.events import EventWriter, get_event_storage

from mgd_det.errors import UserError


class WandbWriter(EventWriter):
    """Writes the scalars that Detectron2's JSONWriter writes, under the same names, to a run of Weights & Biases.

    The package wandb is imported here only. Its own environment variables hold: WANDB_MODE=offline, or WANDB_RUN_ID
    and WANDB_RESUME=allow to continue a run.
    """

    def __init__(
        self,
        project: str,
        name: str = "",
        *,
        folder: str,
        config: Optional[Mapping[str, Any]] = None,
        window_size: int = 20,
    ) -> None:
        """
        Args:
            project: of Weights & Biases.
            name: of the run; "" for one of its own.
            folder: where it keeps its files.
            config: the training's, to be shown with the run.
            window_size: iterations whose median is written of losses and times.

        Raises:
            UserError: the package is not installed.
        """
        try:
            import wandb
        except ImportError as e:
            raise UserError(
                f"WANDB.ENABLED (train.wandb) asks for Weights & Biases, which cannot be imported ({e}): "
                "`pip install wandb`, or turn it off"
            ) from e
        self._run = wandb.init(project=project, name=name or None, dir=folder, config=dict(config or {}))
        self._window_size = window_size
        self._last_write = -1

    def write(self) -> None:
        by_iteration: Dict[int, Dict[str, float]] = {}
        for name, (value, iteration) in get_event_storage().latest_with_smoothing_hint(self._window_size).items():
            if iteration > self._last_write:
                by_iteration.setdefault(iteration, {})[name] = value
        for iteration in sorted(by_iteration):  # its steps must not go back
            self._run.log(by_iteration[iteration], step=iteration)
            self._last_write = iteration

    def close(self) -> None:
        self._run.finish()
