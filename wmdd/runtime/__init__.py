"""The process: ranks and their peers, seeds, stop signals, the log, progress bars, the meter."""
