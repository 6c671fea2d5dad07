"""What all of a process shares: one compilation at a time, Ctrl-C, progress bars; and what several say to each other."""
