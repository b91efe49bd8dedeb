"""When the channel matching is updated."""

from typing import Sequence

from mgd_det.errors import ArgumentError


class MatchingSchedule:
    """Updates every so many iterations, by a period that may change at milestones (MGD, section 3.4)."""

    def __init__(self, periods: Sequence[int], milestones: Sequence[int] = ()) -> None:
        """
        Args:
            periods: iterations between updates, > 0; ``periods[i]`` from iteration ``milestones[i - 1]`` on.
                An update is due at each multiple of the period then in force.
            milestones: ascending iterations, one less than periods.

        Raises:
            ArgumentError: other values.
        """
        if len(periods) != len(milestones) + 1 or any(period <= 0 for period in periods):
            raise ArgumentError(
                "periods",
                f"is {list(periods)} with milestones {list(milestones)}; give periods > 0, one more than milestones",
            )
        if list(milestones) != sorted(milestones):
            raise ArgumentError("milestones", f"is {list(milestones)}; give ascending iterations")
        self._periods, self._milestones = list(periods), list(milestones)

    def next_due(self, iteration: int) -> int:
        """Return the first iteration after ``iteration`` at which an update is due."""
        due = 0
        for period, start, end in zip(self._periods, [1, *self._milestones], [*self._milestones, float("inf")]):
            first = max(iteration + 1, start)
            due = -(-first // period) * period
            if due < end:
                break
        return due
