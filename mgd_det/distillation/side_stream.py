"""Work in a CUDA stream of its own, beside what the caller queues meanwhile."""

from functools import cache
from typing import Any, Callable, Dict, Tuple, TypeVar

import torch

Result = TypeVar("Result", bound=Tuple[Dict[str, torch.Tensor], ...])


def queue_beside(function: Callable[[torch.Tensor], Result], images: torch.Tensor) -> Callable[[], Result]:
    """Queues ``function(images)`` in the side stream of the images' GPU; on another device it just runs.

    The side stream begins with what the current stream holds at this moment (the images, weights that were just
    moved). What the caller queues next may run at the same time.

    Returns:
        ``join``: makes the then current stream wait for the work, not the host, and returns its result.
    """
    if images.device.type != "cuda":
        result = function(images)
        return lambda: result
    device = images.device
    side = _side_stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        result = function(images)
    # The allocator gives a tensor's memory back to the stream that it was made in: it must know who else uses it.
    images.record_stream(side)

    def join() -> Result:
        current = torch.cuda.current_stream(device)
        current.wait_stream(side)
        for maps in result:
            for tensor in maps.values():
                tensor.record_stream(current)
        return result

    return join


@cache
def _side_stream(device: torch.device) -> Any:
    # One for the process: the allocator keeps a pool of memory for every stream.
    return torch.cuda.Stream(device)
