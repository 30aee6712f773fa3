"""A run on disk: what is written (fragments), when it counts (commit), what is kept (retention)."""
