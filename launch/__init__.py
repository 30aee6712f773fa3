"""Where a run happens, never what it does: it starts `pretrain` by its command line.

The room for cluster launchers. Today `pretrain train` is started by hand (or by your own batch script) on one machine.
"""
