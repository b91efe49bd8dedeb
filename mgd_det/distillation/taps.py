"""Reading features inside a network while it runs, without changing it."""

from contextlib import contextmanager
from typing import Any, Dict, Iterator, Optional

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from mgd_det.distillation.features import FeatureSpec


class FeatureTaps:
    """Reads named features of a network during one forward, by hooks on the modules that make them.

    Outside :meth:`reading` the hooks do nothing. A feature before its activation is the input of the
    last ReLU that its module runs. Detectron2's blocks run it in place, so that ReLU is run out of
    place while reading: the features and all that follows keep their values and gradients.
    """

    def __init__(self, network: nn.Module, specs: Dict[str, FeatureSpec], stop_after_last: bool = False) -> None:
        """
        Args:
            network: the network that owns the modules which ``specs`` name.
            specs: what to read, by the name it gets.
            stop_after_last: end the forward once the last feature is read; what follows does not run.
                The forward's own result is lost then.
        """
        self._taps = {name: _Tap(self, network.get_submodule(spec.module), name, spec) for name, spec in specs.items()}
        self._stop_after_last = stop_after_last
        self._features: Optional[Dict[str, torch.Tensor]] = None
        self._versions: Dict[str, int] = {}

    @contextmanager
    def reading(self) -> Iterator[Dict[str, torch.Tensor]]:
        """Within it, one forward of the network fills the yielded dict: name to (B, C, H, W).

        The features are the network's own tensors: read them, do not write them.

        Raises:
            RuntimeError: at its end, where a feature was not made, or was overwritten after it was read.
        """
        features: Dict[str, torch.Tensor] = {}
        self._features, self._versions = features, {}
        try:
            yield features
        except _LastFeatureRead:
            pass
        finally:
            self._features = None
            for tap in self._taps.values():
                tap.close()
        for name in self._taps:
            if name not in features:
                raise RuntimeError(f"the forward did not run the module of feature {name!r}")
            if features[name]._version != self._versions[name]:
                raise RuntimeError(f"feature {name!r} was overwritten in place after it was read")

    @property
    def active(self) -> bool:
        return self._features is not None

    def add(self, name: str, feature: torch.Tensor) -> None:
        """Takes a feature from its tap."""
        assert self._features is not None
        self._features[name], self._versions[name] = feature, feature._version
        if self._stop_after_last and len(self._features) == len(self._taps):
            raise _LastFeatureRead


class _LastFeatureRead(Exception):
    """Ends a forward whose remainder nobody needs."""


class _Tap:
    """The hooks on one module. They are bound methods, so that a deep copy of the network works."""

    def __init__(self, taps: FeatureTaps, module: nn.Module, name: str, spec: FeatureSpec) -> None:
        self._taps, self._name, self._spec = taps, name, spec
        self._activations: Optional[_ActivationInputs] = None
        if spec.before_activation:
            module.register_forward_pre_hook(self._enter)
        # always_call: the mode must also end where the module raises.
        module.register_forward_hook(self._leave, always_call=True)

    def close(self) -> None:
        """Ends what a forward left open: torch skips the hooks after a KeyboardInterrupt."""
        if self._activations is not None:
            activations, self._activations = self._activations, None
            activations.__exit__(None, None, None)

    def _enter(self, module: nn.Module, args: Any) -> None:
        if self._taps.active:
            self._activations = _ActivationInputs()
            self._activations.__enter__()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        feature = output
        if self._activations is not None:
            activations = self._activations
            self.close()
            if output is None:  # the module raised
                return
            if output is not activations.last_output:
                raise RuntimeError(
                    f"feature {self._name!r}: module {self._spec.module!r} does not end in a ReLU, "
                    "so there is no feature before its activation"
                )
            feature = activations.last_input
        if self._taps.active and output is not None:
            self._taps.add(self._name, feature)


class _ActivationInputs(TorchFunctionMode):
    """Runs every ReLU and ReLU6 out of place, and keeps the last one's input and output."""

    last_input: Optional[torch.Tensor] = None
    last_output: Optional[torch.Tensor] = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func not in _ACTIVATIONS:
            return func(*args, **kwargs)
        x = args[0] if args else kwargs["input"]
        if func in (F.hardtanh, F.relu6):
            y = F.hardtanh(x, *_hardtanh_range(func, args, kwargs))
        else:
            y = torch.relu(x)
        self.last_input, self.last_output = x, y
        return y


_ACTIVATIONS = {F.relu, F.relu_, torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_, F.relu6, F.hardtanh}


def _hardtanh_range(func: Any, args: Any, kwargs: Dict[str, Any]) -> Any:
    if func is F.relu6:
        return 0.0, 6.0
    low = args[1] if len(args) > 1 else kwargs.get("min_val", -1.0)
    high = args[2] if len(args) > 2 else kwargs.get("max_val", 1.0)
    return low, high
