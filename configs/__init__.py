"""Floor 0: every knob, the files that set them, and how a file is made durable. No torch, no ray."""
