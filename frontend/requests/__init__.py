"""The life of requests: registry, streams, auto-aborts, explicit aborts and their dispatch."""
