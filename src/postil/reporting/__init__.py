"""Pages and pictures from logs, score cards and spectra."""
