"""OpenAI's API: its requests parsed, its replies shaped, its routes."""

from frontend.http.openai.api import routes

__all__ = ["routes"]
