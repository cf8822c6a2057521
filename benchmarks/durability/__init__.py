"""What a run survives, one file a matrix."""
