"""One function a command; each returns a result and prints nothing."""
