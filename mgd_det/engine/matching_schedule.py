"""When the channel matching is updated."""

from typing import Sequence

from mgd_det.errors import UserError


class MatchingSchedule:
    """Updates every so many iterations, by a period that may change at milestones (MGD, section 3.4)."""

    def __init__(self, periods: Sequence[int], milestones: Sequence[int] = ()) -> None:
        """
        Args:
            periods: iterations between updates, > 0; ``periods[i]`` from iteration ``milestones[i - 1]`` on.
                An iteration is due when its number is a multiple of the period then in force.
            milestones: ascending iterations, one less than periods.

        Raises UserError for others.
        """
        if len(periods) != len(milestones) + 1 or any(period <= 0 for period in periods):
            raise UserError(
                f"MODEL.MGD.MATCHING.PERIODS is {list(periods)} with MILESTONES {list(milestones)}: give periods > 0, "
                "one more than milestones"
            )
        if list(milestones) != sorted(milestones):
            raise UserError(f"MODEL.MGD.MATCHING.MILESTONES is {list(milestones)}; give them in ascending order")
        self._periods, self._milestones = list(periods), list(milestones)

    def next_due(self, iteration: int) -> int:
        """The first iteration after ``iteration`` that is due."""
        due = 0
        for period, start, end in zip(self._periods, [1, *self._milestones], [*self._milestones, float("inf")]):
            first = max(iteration + 1, start)
            due = -(-first // period) * period
            if due < end:
                break
        return due
