"""What a run leaves behind. The only place that may know a tracking server."""
