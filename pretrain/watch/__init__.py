"""What is measured, where it is written, where it is shown."""
