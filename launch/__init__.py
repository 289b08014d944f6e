"""Run the launcher from videos to text. See `tokenring --help`."""
