"""How many examples the fuzz tests run, how long one may take, and how far a long run is."""

import os
import signal
import sys
import time
from contextlib import contextmanager

import pytest
from hypothesis import HealthCheck, settings

PROFILE = os.environ.get("MGD_FUZZ", "ci")
PROFILES = {
    # Every run draws the same examples: a change of the code is the only thing that can break it.
    "ci": settings(derandomize=True, database=None),
    "nightly": settings(print_blob=True),
}
SECONDS = 20.0  # CPU time of one example; all take milliseconds
_BETWEEN_REPORTS = 10.0


def load_profile() -> None:
    for name, profile in PROFILES.items():
        checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
        settings.register_profile(name, profile, deadline=None, suppress_health_check=checks)
    if PROFILE not in PROFILES:
        raise ValueError(f"MGD_FUZZ is {PROFILE!r}; use one of {', '.join(PROFILES)}")
    settings.load_profile(PROFILE)


def examples(ci: int, nightly: int):
    """Decorator of a test under ``given``: so many examples, each within SECONDS; a nightly run says how far it is."""

    def decorate(test):
        number = {"ci": ci, "nightly": nightly}[PROFILE]
        inner = test.hypothesis.inner_test
        progress = _Progress(number)

        def limited(*args, **kwargs):
            with time_limit(SECONDS):
                inner(*args, **kwargs)
            progress.step()

        test.hypothesis.inner_test = limited
        return settings(max_examples=number)(test)

    return decorate


@contextmanager
def time_limit(seconds: float):
    """Fails what runs longer. CPU time, so that a loaded machine makes no difference."""

    def stop(signum, frame):
        # No Exception, which the code under test may take for one of its own.
        pytest.fail(f"an example did not end within {seconds} s of CPU time")

    # Not SIGALRM, which is pytest-timeout's: it ends what sleeps.
    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


class _Progress:
    def __init__(self, number: int) -> None:
        self._number, self._name = number, ""

    def step(self) -> None:
        now, name = time.monotonic(), os.environ["PYTEST_CURRENT_TEST"].rpartition("::")[2]
        if name != self._name:  # the next of a parametrised test
            self._name, self._done, self._start, self._reported = name, 0, now, now
        self._done += 1
        if PROFILE == "nightly" and now - self._reported > _BETWEEN_REPORTS:
            self._reported = now
            left = (now - self._start) / self._done * max(self._number - self._done, 0)
            print(f"{name}: {self._done}/{self._number}, about {left:.0f} s left", file=sys.stderr, flush=True)
