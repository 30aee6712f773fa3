"""Where a run happens, never what it does: it starts `pretrain` by its command line.

In: a run file and a cluster file. Out: a `LaunchPlan` (`plan.py`), and what one launcher of a cluster makes of it: a module for each.
"""
