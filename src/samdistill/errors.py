"""The one error a user sees. Apart from ``types`` so that the command line can start without torch."""


class UserError(Exception):
    """A mistake the user can mend: the command line prints its message alone and exits with 2."""
