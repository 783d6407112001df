"""The wire between front ends and engines."""
