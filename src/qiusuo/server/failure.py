"""A server that cannot start as it was asked to."""


class ServerError(RuntimeError):
    """The message says what would do."""
