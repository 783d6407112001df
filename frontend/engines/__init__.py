"""Engines as the front end has them: processes, sockets and the handshake."""
