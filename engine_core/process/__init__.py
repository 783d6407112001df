"""The shell around the synchronous core: sockets, threads, signals, start and end."""
