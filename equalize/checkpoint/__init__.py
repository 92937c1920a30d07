"""A name on the command line -> a `Checkpoint`, and back to disk in the format it came in."""
