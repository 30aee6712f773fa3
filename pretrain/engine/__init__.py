"""What knows DeepSpeed: run configuration -> engine, ranks, optimizer."""
