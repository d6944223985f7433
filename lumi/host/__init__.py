"""The machine: files, folders that are whole or absent, locks, signals, workers, progress, devices."""
