"""The engine process: a synchronous core between two I/O threads, and the models it runs."""
