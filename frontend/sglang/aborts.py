"""SGLang's way to say which requests to abort."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from frontend.errors import InvalidRequestError
from frontend.requests.explicit_abort import Selector

logger = logging.getLogger(__name__)


def read_abort(
    rid: str | Sequence[str] | None,
    abort_all: bool,
    *,
    prefix: bool = False,
    tag: str | None = None,
) -> Selector | None:
    """Which requests an `abort_request` means; None, and a warning, if it names none.

    `abort_all` overrides everything. A `rid`, or several, is matched exactly, unless `prefix` makes
    it the beginning of ids. SGLang itself has neither `prefix` nor `tag`.

    Raises InvalidRequestError if both `rid` and `tag` are given, or several prefixes.
    """
    if abort_all:
        return Selector(everything=True)
    if not rid:
        if tag:
            return Selector(tag=tag)
        logger.warning("abort_request needs a rid, a tag or abort_all=True; nothing was aborted")
        return None
    if tag:
        raise InvalidRequestError(f"give either rid or tag, not both: tag={tag!r:.80}")
    if not prefix:
        return Selector(request_ids=[rid] if isinstance(rid, str) else rid)
    if not isinstance(rid, str):
        raise InvalidRequestError(f"prefix=True needs one string as rid, not {rid!r:.80}")
    return Selector(prefix=rid)
