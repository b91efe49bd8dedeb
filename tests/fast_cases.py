"""Cases of parametrized tests: which of them `make test-fast` runs."""

import pytest


def fast(cases, *chosen):
    """All cases, those that are not among the chosen ones (by default: the first) marked slow.

    A case is a value, or a tuple of the values of several arguments.
    """
    chosen = chosen or (next(iter(cases)),)
    return [case if case in chosen else pytest.param(*_values(case), marks=pytest.mark.slow) for case in cases]


def _values(case):
    return case if isinstance(case, tuple) else (case,)
