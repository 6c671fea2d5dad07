"""The command line: from a directory to a directory. `app` has the commands, and each has a file of its own."""
