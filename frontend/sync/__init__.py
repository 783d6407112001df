"""The engine without an event loop, under SGLang's names."""
