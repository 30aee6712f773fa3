"""How things end: the exit statuses, and the one exception that means "the user can mend this"."""

EXIT_DONE, EXIT_DEFECT, EXIT_MISTAKE, EXIT_RESUMABLE = 0, 1, 2, 75
"""Of every command. 75: stopped early, and the same command goes on (launchers start it again)."""


class UserError(Exception):
    """What was found, what was wanted, what to change, in one or two sentences.

    Every room raises it for bad input; only `pretrain/cli.py` and the supervisor catch it. Anything
    else that reaches them is a defect and keeps its traceback.
    """
