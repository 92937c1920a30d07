"""The only place that opens files of unknown origin."""
