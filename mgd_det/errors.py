"""The one exception that means "the user can mend this"."""


class UserError(Exception):
    """A mistake in what the user gave: a config value, a file, a data set.

    The message stands alone: it names the value at fault and says what to do. The programs under
    ``tools/`` print it without a traceback and exit with status 1.
    """
