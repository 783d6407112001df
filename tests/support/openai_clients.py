"""What tests with the official `openai` client have in common."""

from __future__ import annotations

from typing import Any

from openai import AsyncOpenAI

from tests.support.served_engine import ServedEngine

MODEL = "caesura-bundled"
TEXT = "import os\n\n\ndef read(path):\n"
CHAT: Any = [{"role": "user", "content": "Read a file."}]
NEVER_ENDS: dict[str, Any] = {"max_tokens": 8000, "extra_body": {"ignore_eos": True}}


def client_of(served: ServedEngine, **options: Any) -> AsyncOpenAI:
    """A client that does not retry, so that the first answer is seen."""
    defaults: dict[str, Any] = {"api_key": "none", "max_retries": 0, "timeout": 20.0}
    return AsyncOpenAI(base_url=f"http://127.0.0.1:{served.port}/v1", **(defaults | options))
