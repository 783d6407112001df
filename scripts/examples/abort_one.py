"""The smallest abort: start a long request, end it by its id, and keep what it wrote.

python scripts/examples/abort_one.py
"""

from __future__ import annotations

from caesura import Engine


def main() -> None:
    with Engine() as engine:
        events = engine.generate(
            "def fibonacci(n):\n", {"max_new_tokens": 4000}, rid="story", stream=True
        )
        for event in events:
            meta_info = event["meta_info"]
            if meta_info["finish_reason"] is None and meta_info["completion_tokens"] >= 30:
                # Returns when the engine has ended the request; its last event is on its way here.
                receipt = engine.abort_request("story")
                print(f"aborted: {receipt}")
        print(f"finish_reason: {meta_info['finish_reason']}")
        print(f"{meta_info['completion_tokens']} tokens were kept:\n{event['text']}")


if __name__ == "__main__":
    main()
