"""The one exception that is the user's to mend."""


class UserError(ValueError):
    """A wrong value, a missing file, an impossible budget.

    The message is one sentence that names the key or the file and says what would work. Commands
    print it without a traceback and exit with code 2.
    """
