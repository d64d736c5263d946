"""The error for users. It is separate from ``types``, so that the command line starts without torch."""


class UserError(Exception):
    """A mistake that the user can correct. The command line prints only its message and exits with code 2."""
