"""Reading, checking, resampling and writing of volumes. No torch, no config, no tracking."""
