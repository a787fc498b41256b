"""Foreign checkpoints in and out: readers and exporters are plugin tables, one file per format."""
