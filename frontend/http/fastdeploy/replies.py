"""What all of FastDeploy's control replies have."""

from __future__ import annotations

import json
import uuid

from frontend.http.errors import ApiError


def control_id() -> str:
    """The id of a control call, made up when it is answered."""
    return f"control-{uuid.uuid4()}"


def error_body(error: ApiError) -> bytes:
    """FastDeploy's shape of an error, and OpenAI's beside it."""
    reply = {
        "request_id": control_id(),
        "status": "error",
        "error_message": str(error),
        "result": None,
    }
    return json.dumps(reply | json.loads(error.body())).encode()
