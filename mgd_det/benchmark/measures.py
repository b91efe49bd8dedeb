"""Time and memory of functions, interleaved in one run, so that a busy machine slows all of them equally."""

import ctypes
import gc
import random
import time
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence

import numpy as np
import torch
from tqdm import tqdm


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of some values."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Compute the spread of one value or more."""
        lower, median, upper = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
        return cls(median, lower, upper)


def ratio(over: Sequence[float], *under: Sequence[float]) -> Optional[Spread]:
    """Compute how much longer a function takes than some others together; None if those take no time.

    The ratio is taken in each round, whose functions ran at nearly the same time, because a machine's load varies.

    Args:
        over, under: times of as many rounds each.
    """
    sums = [sum(times) for times in zip(*under)]
    if min(sums) <= 0:
        return None
    return Spread.of([time / total for time, total in zip(over, sums)])


def interleaved(
    functions: Mapping[str, Callable[[], Any]],
    *,
    repeats: int,
    warmup: int = 2,
    device: torch.device = torch.device("cpu"),  # noqa: B008  (a constant)
) -> Dict[str, List[float]]:
    """Run every function once a round, in a different order each time, because a function may affect the next one.

    Args:
        repeats: rounds that count, > 0.
        warmup: rounds before those.
        device: a GPU is waited for before and after each run.

    Returns:
        The times of each function in seconds, one a round.
    """
    times: Dict[str, List[float]] = {name: [] for name in functions}
    order, shuffle = list(functions), random.Random(0).shuffle
    for done in tqdm(range(warmup + repeats), desc="rounds", unit="round"):
        shuffle(order)
        for name in order:
            _wait_for(device)
            start = time.perf_counter()
            functions[name]()
            _wait_for(device)
            if done >= warmup:
                times[name].append(time.perf_counter() - start)
    return times


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int:
    """Measure how much more memory is in use at most during a run than before it.

    On a GPU it is the count of torch's allocator; on the CPU the resident size of the process (Linux only; 0
    elsewhere), to within about 100 KiB.
    """
    gc.collect()
    if device.type == "cuda":
        _wait_for(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        _wait_for(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        # Return the freed memory that the C library keeps (glibc), or its reuse would not be seen.
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        pass
    try:
        # "5" sets the high-water mark of the resident size to what it is now (man 5 proc).
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before = _resident("VmRSS")
    except OSError:
        return 0
    function()
    return max(_resident("VmHWM") - before, 0)


def _resident(entry: str) -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(f"{entry}:"))
    return int(line.split()[1]) * 1024


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
