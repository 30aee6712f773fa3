"""The one exception that means "the user can mend this": the command prints it and exits with 2."""


class UserError(Exception):
    """What was found, what was wanted, what to change, in one or two sentences.

    Every room raises it for bad input; only `pretrain/cli.py` and the supervisor catch it. Anything
    else that reaches them is a defect and keeps its traceback.
    """
