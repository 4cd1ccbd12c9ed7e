"""The one exception that is a message to a user."""


class GeoLinkError(Exception):
    """A user's mistake or bad input, as one clear sentence: what, where, what to do.

    The CLI prints it without a traceback and exits with status 2.
    """
