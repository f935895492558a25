"""The two ways a command ends badly, apart, because a user does different things about them."""


class RequestError(ValueError):
    """What was asked cannot be done: a wrong option, path, recipe or model. Exit code 2.

    The message says what was asked, what was found and what to do.
    """


class WorkFailed(RuntimeError):
    """The request was right and the work failed: a layer's numbers, a full disk. Exit code 1."""
