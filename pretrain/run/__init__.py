"""A run as a folder and as processes: who owns it, who starts it, how it ends."""
