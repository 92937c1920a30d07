"""What each library's checkpoints are: one folder a library."""
