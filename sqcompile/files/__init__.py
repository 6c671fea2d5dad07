"""files: what is read from files of others, in bounded time and memory; and what is written, whole or not at all."""
