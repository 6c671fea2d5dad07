"""What all of a process shares: one compilation at a time, Ctrl-C, progress bars."""
