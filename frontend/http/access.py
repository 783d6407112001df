"""Who may call what.

Invariants
- With an API key, every route but the open ones needs a key.
- Control routes, which act on other people's requests, need the admin key if there is one, else the
  API key; without any key they serve this machine alone.
- A request that a proxy or a web page sends from this machine does not count as this machine's.
- Keys are compared in constant time and never logged.
"""

from __future__ import annotations

import secrets
from enum import Enum
from urllib.parse import urlsplit

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
        self._api_key = api_key
        self._client_keys = [key for key in (api_key, admin_api_key) if key] if api_key else []
        self._admin_key = admin_api_key or api_key

    def check(self, access: Access, exchange: Exchange) -> None:
        """Raises ApiError if the request may not come in."""
        if access is Access.CLIENT and self._client_keys:
            self._require(exchange, *self._client_keys)
        elif access is Access.ADMIN:
            if self._admin_key is not None:
                is_client = self._api_key is not None and _holds(exchange, self._api_key)
                if is_client and not _holds(exchange, self._admin_key):
                    raise ApiError(403, "this route needs the admin key, not the clients' API key")
                self._require(exchange, self._admin_key)
            elif not _is_from_this_machine(exchange):
                raise ApiError(
                    403,
                    "control routes serve only this machine while no key is set; start the server "
                    "with --admin-api-key, and send it",
                )

    def _require(self, exchange: Exchange, *keys: str) -> None:
        if not any(_holds(exchange, key) for key in keys):
            raise ApiError(401, "the API key is missing or wrong; send Authorization: Bearer KEY")


def _holds(exchange: Exchange, key: str) -> bool:
    scheme, _, given = exchange.headers.get("authorization", "").partition(" ")
    token = given.strip().encode("latin-1") if scheme.lower() == "bearer" else b""
    return secrets.compare_digest(token, key.encode())


def _is_from_this_machine(exchange: Exchange) -> bool:
    headers = exchange.headers
    if not exchange.peer_is_local or "forwarded" in headers or "x-forwarded-for" in headers:
        return False
    # A web page may have had its own name resolved to this machine; the browser still tells it.
    host = headers.get("host", "")
    if not _names_this_machine(host):
        return False
    origin = headers.get("origin")  # Sent by browsers, of the page that makes the request.
    return origin is None or urlsplit(origin).netloc == host


def _names_this_machine(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or "localhost"
    except ValueError:
        return False
    return name in ("localhost", "::1") or name.startswith("127.") or not _is_domain(name)


def _is_domain(name: str) -> bool:
    """Whether somebody's name server had a say in it: an address or a bare name is nobody's."""
    return "." in name and not name.replace(".", "").isdecimal()
