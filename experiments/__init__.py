"""Trainings that show what CAPI does at a small scale: each a command, its sweep of runs, and what these gave."""
