"""The one type for a user's mistake."""


class UserError(ValueError):
    """A mistake of the user's.

    The message names the value, the rule and the remedy. The command line prints it as one line, with exit code 2; any
    other exception is a defect and keeps its traceback.
    """


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that was named is not there."""
