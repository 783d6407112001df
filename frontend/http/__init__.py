"""The HTTP server: thin routes over `AsyncEngine`."""
