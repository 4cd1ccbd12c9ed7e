"""Exceptions that are messages to a user."""


class GeoLinkError(Exception):
    """A user's mistake or bad input, as one clear sentence: what, where, what to do.

    The CLI prints it without a traceback and exits with status 2.
    """


class NetworkFault(GeoLinkError):
    """A fault of the network or of a server that may pass: the same run again can succeed."""
