"""A config that knows why each value is not that of its base config."""

from typing import Any, Dict, Iterator, List, Sequence, Tuple

from detectron2.config import CfgNode
from tabulate import tabulate

from mgd_det.config import merge_config, override
from mgd_det.model_zoo import get_config_file


class Settings:
    """A config that starts as a base config of this project and is changed key by key.

    Attributes:
        base: name of the base config in this project's model zoo.
        cfg: the config, not frozen.
    """

    def __init__(self, base: str) -> None:
        self.base = base
        self.cfg = merge_config(get_config_file(base), [], base)
        self._base = self.cfg.clone()
        self._why: Dict[str, str] = {}

    def set(self, key: str, value: Any, why: str) -> None:
        """Set one key, or all keys below it.

        Args:
            key: "SOLVER.BASE_LR", or a node such as "MODEL.FPN".
            value: of the key; of a node, a CfgNode or a dict.
            why: the reason, for the table.
        """
        if isinstance(value, dict):
            for name, below in value.items():
                self.set(f"{key}.{name}", below, why)
            return
        *path, name = key.split(".")
        node = self.cfg
        for part in path:
            node = node[part]
        node[name] = type(node[name])(value) if isinstance(node.get(name), (tuple, list)) else value
        self._why[key] = why

    def override(self, opts: Sequence[Any], why: str = "your override") -> None:
        """Apply overrides KEY, VALUE...

        Raises:
            UserError: an override does not fit the config.
        """
        override(self.cfg, opts)
        self._why.update(dict.fromkeys(opts[::2], why))

    def why(self, key: str) -> str:
        """Return the reason that a key was set for, or ""."""
        return self._why.get(key, "")

    def differences(self) -> List[Tuple[str, Any, str]]:
        """Return key, value and reason of all that differs from the base config, in the order of the config."""
        base = dict(_leaves(self._base))
        return [
            (key, value, self.why(key)) for key, value in _leaves(self.cfg) if key not in base or value != base[key]
        ]

    def __str__(self) -> str:
        rows = [[key, _shown(value), why] for key, value, why in self.differences()]
        return tabulate(rows, headers=[f"differs from {self.base}", "", "why"], disable_numparse=True)


def _leaves(node: CfgNode, prefix: str = "") -> Iterator[Tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _lists(value: Any) -> Any:
    """Return a value with lists for tuples: a config that was read from yaml has only lists within lists."""
    return [_lists(part) for part in value] if isinstance(value, (list, tuple)) else value


def _shown(value: Any) -> str:
    if isinstance(value, str) and value:
        return value  # whole: the end of a path says the most
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
