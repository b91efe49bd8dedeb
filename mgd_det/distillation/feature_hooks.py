"""Reading features inside a network while it runs, without changing it."""

from contextlib import contextmanager
from typing import Any, Dict, Iterator, Optional

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from mgd_det.distillation.features import FeatureSpec


class FeatureHooks:
    """Reads named features of a network during one forward, by hooks on the modules that make them.

    Outside :meth:`reading` the hooks do nothing. A feature before its activation is the input of the last activation
    that its module runs (see :func:`ends_in_activation`). Most networks run it in place. While reading, activations
    run out of place, which changes no value and no gradient.
    """

    def __init__(self, network: nn.Module, specs: Dict[str, FeatureSpec], stop_after_last: bool = False) -> None:
        """
        Args:
            network: the network that owns the modules which ``specs`` name.
            specs: what to read, by the name it gets.
            stop_after_last: end the forward once the last feature is read; the modules after it do not run, and
                the forward returns nothing.
        """
        self._hooks = {
            name: _ModuleHooks(self, network.get_submodule(spec.module), name, spec) for name, spec in specs.items()
        }
        self._stop_after_last = stop_after_last
        self._features: Optional[Dict[str, torch.Tensor]] = None
        self._versions: Dict[str, int] = {}

    @contextmanager
    def reading(self) -> Iterator[Dict[str, torch.Tensor]]:
        """Read one forward of the network into the yielded dict, name to (B, C, H, W).

        The features are the network's own tensors: read them, do not write them.

        Raises:
            RuntimeError: at its end, if a feature was not made, or was overwritten after it was read.
        """
        features: Dict[str, torch.Tensor] = {}
        self._features, self._versions = features, {}
        try:
            yield features
        except _LastFeatureRead:
            pass
        finally:
            self._features = None
            for hooks in self._hooks.values():
                hooks.close()
        for name in self._hooks:
            if name not in features:
                raise RuntimeError(f"the forward did not run the module of feature {name!r}")
            if features[name]._version != self._versions[name]:
                raise RuntimeError(f"feature {name!r} was overwritten in place after it was read")

    @property
    def active(self) -> bool:
        return self._features is not None

    def add(self, name: str, feature: torch.Tensor) -> None:
        """Keep a feature; called by its module's hooks."""
        assert self._features is not None
        self._features[name], self._versions[name] = feature, feature._version
        if self._stop_after_last and len(self._features) == len(self._hooks):
            raise _LastFeatureRead


@torch.no_grad()
def ends_in_activation(module: nn.Module, example: torch.Tensor) -> bool:
    """Return whether a module ends in an activation, so that :class:`FeatureHooks` can read that one's input.

    Activations are ReLU and its kin (ReLU6, leaky, parametric), ELU and its kin, Hardswish, SiLU, Mish and GELU.

    Args:
        module: runs once, in the mode (training or evaluation) that it is in.
        example: an input of it.
    """
    with _ActivationInputs() as activations:
        output = module(example)
    return output is activations.last_output


class _LastFeatureRead(Exception):
    """Raised to end a forward whose remaining modules need not run."""


class _ModuleHooks:
    """The hooks on one module. They are bound methods, so that a deep copy of the network works."""

    def __init__(self, reader: FeatureHooks, module: nn.Module, name: str, spec: FeatureSpec) -> None:
        self._reader, self._name, self._spec = reader, name, spec
        self._activations: Optional[_ActivationInputs] = None
        if spec.before_activation:
            module.register_forward_pre_hook(self._enter)
        # always_call: the mode must also end where the module raises.
        module.register_forward_hook(self._leave, always_call=True)

    def close(self) -> None:
        """End the mode if a forward left it on, as a KeyboardInterrupt does: torch skips the hooks then."""
        if self._activations is not None:
            activations, self._activations = self._activations, None
            activations.__exit__(None, None, None)

    def _enter(self, module: nn.Module, args: Any) -> None:
        if self._reader.active:
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
                    f"feature {self._name!r}: module {self._spec.module!r} does not end in an "
                    "activation, so there is no feature before it"
                )
            feature = activations.last_input
        if self._reader.active and output is not None:
            self._reader.add(self._name, feature)


# In-place functions, and those that compute the same out of place.
_OUT_OF_PLACE = {
    torch.relu_: torch.relu,
    torch.Tensor.relu_: torch.Tensor.relu,
    F.hardtanh_: F.hardtanh,
    F.leaky_relu_: F.leaky_relu,
    F.elu_: F.elu,
    F.celu_: F.celu,
    F.selu_: F.selu,
}
# Sigmoids are not among them: in these networks they end gates, which multiply a feature.
_ACTIVATIONS = {
    *(torch.relu, torch.Tensor.relu, F.relu, F.relu6, F.hardtanh, F.leaky_relu, F.prelu, F.elu, F.celu, F.selu),
    *(F.hardswish, F.silu, F.mish, F.gelu),
}


class _ActivationInputs(TorchFunctionMode):
    """Runs every activation out of place, and keeps the last one's input and output."""

    last_input: Optional[torch.Tensor] = None
    last_output: Optional[torch.Tensor] = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        func = _OUT_OF_PLACE.get(func, func)
        if func not in _ACTIVATIONS:
            return func(*args, **kwargs)
        # The functions of torch.nn.functional always pass it on by name.
        kwargs.pop("inplace", None)
        output = func(*args, **kwargs)
        self.last_input, self.last_output = args[0] if args else kwargs["input"], output
        return output
