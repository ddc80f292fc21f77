"""What can go wrong outside the program."""


class DataUnavailableError(ConnectionError, ValueError):
    """A hub set cannot be had here and now; the message is one line and names an embedded set that can."""
