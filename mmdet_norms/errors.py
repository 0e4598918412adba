"""The one error that is an answer to the user."""


class UserError(Exception):
    """Something the caller can put right: the tools show it as one message, without a traceback, and exit with 2."""
