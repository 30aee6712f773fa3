"""The decoder on a single device: no rank, no process group, no environment variable in here."""
