"""Who may call what.

Invariants
- With an API key, every route but the open ones needs a key.
- Control routes, which act on other people's requests, need the admin key if there is one, else the
  API key; without any key they serve this machine alone.
- Keys are compared in constant time and never logged.
"""

from __future__ import annotations

import secrets
from enum import Enum

from frontend.http.errors import ApiError
from frontend.http.exchange import Exchange


class Access(Enum):
    """Whom a route is for."""

    OPEN = "open"
    """Everybody: probes and metrics."""
    CLIENT = "client"
    """Holders of the API key, if there is one."""
    ADMIN = "admin"
    """Those who may act on other clients' requests."""


class AccessRules:
    """The keys of a server. The admin key opens the clients' routes too."""

    def __init__(self, api_key: str | None, admin_api_key: str | None) -> None:
        self._client_keys = [key for key in (api_key, admin_api_key) if key] if api_key else []
        self._admin_key = admin_api_key or api_key

    def check(self, access: Access, exchange: Exchange) -> None:
        """Raises ApiError if the request may not come in."""
        if access is Access.CLIENT and self._client_keys:
            self._require(exchange, *self._client_keys)
        elif access is Access.ADMIN:
            if self._admin_key is not None:
                self._require(exchange, self._admin_key)
            elif not exchange.peer_is_local:
                raise ApiError(
                    403,
                    "control routes serve only this machine while no key is set; start the server "
                    "with --admin-api-key, and send it",
                )

    def _require(self, exchange: Exchange, *keys: str) -> None:
        given = exchange.headers.get("authorization", "").encode("latin-1")
        if not any(secrets.compare_digest(given, f"Bearer {key}".encode()) for key in keys):
            raise ApiError(401, "the API key is missing or wrong; send Authorization: Bearer KEY")
