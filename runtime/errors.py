"""The one exception that means: the user can fix this."""


class DLRError(Exception):
    """A mistake that the user can correct.

    The message is one line: what was wrong and what to do about it. The command line prints it and exits
    with status 2; a library caller catches it by this name.
    """
