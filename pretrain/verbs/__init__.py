"""The verbs of the command, by what they are about; `pretrain/cli.py` puts them together."""
