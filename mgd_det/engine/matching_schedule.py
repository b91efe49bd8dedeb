"""The iterations at which the channel matching is updated."""

from typing import Sequence

from mgd_det.errors import ArgumentError


class MatchingSchedule:
    """An update every so many iterations; the period may change at milestones (MGD, section 3.4)."""

    def __init__(self, periods: Sequence[int], milestones: Sequence[int] = ()) -> None:
        """
        Args:
            periods: iterations between updates, > 0; ``periods[i]`` applies from iteration ``milestones[i - 1]`` on.
                An update is due at each multiple of the current period.
            milestones: ascending iterations, one fewer than periods.

        Raises:
            ArgumentError: a period or the milestones are not as above.
        """
        for name, values, least in (("periods", periods, 1), ("milestones", milestones, 0)):
            if any(type(value) is not int or value < least for value in values):
                raise ArgumentError(name, f"is {list(values)}; give whole numbers >= {least}")
        if len(periods) != len(milestones) + 1:
            raise ArgumentError(
                "periods",
                f"is {list(periods)} with milestones {list(milestones)}; give one period more than milestones",
            )
        if list(milestones) != sorted(milestones):
            raise ArgumentError("milestones", f"is {list(milestones)}; give ascending iterations")
        self._periods, self._milestones = list(periods), list(milestones)

    def next_due(self, iteration: int) -> int:
        """Return the first iteration after ``iteration`` at which an update is due."""
        for period, start, end in zip(self._periods, [1, *self._milestones], [*self._milestones, float("inf")]):
            due = -(-max(iteration + 1, start) // period) * period  # rounded up to a multiple
            if due < end:
                break
        return due
