"""What the model sees: sample number -> tokens, and samples -> micro-batches."""
