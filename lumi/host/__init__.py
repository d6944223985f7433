"""The machine: files that are whole or absent, signals, workers, progress, devices."""
