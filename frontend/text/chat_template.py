"""Chat templates: a model's own Jinja program that turns messages into a prompt.

A template comes with the model and may be anybody's, so it runs in Jinja's immutable sandbox: it
can format what it is given and reach nothing else. It sees what Hugging Face's templates expect:
`messages`, `add_generation_prompt`, the special tokens by name (`bos_token`, ...),
`raise_exception`, `strftime_now`, `{% generation %}` and loop controls.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox


class ChatTemplateError(ValueError):
    """The messages cannot become a prompt: no template, a broken one, or one that refuses them."""


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's words for training; here it
    renders its body."""

    tags = {"generation"}  # noqa: RUF012 (Jinja declares it as an instance variable)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


_END_OF_CONTENT = "\ue000caesura:end of content\ue000"
"""Marks, in private-use characters, where the content of the final message ends in a prompt."""


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


class ChatTemplate:
    """A compiled chat template. Immutable; rendering is safe from several threads."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Raises ChatTemplateError if `source` is no Jinja template."""
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = _to_json
        environment.globals.update(
            raise_exception=_raise_exception, strftime_now=_strftime_now, **special_tokens
        )
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"the model's chat template is broken: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: object,
    ) -> str:
        """The prompt for `messages`, special tokens spelled out; `variables` reach the template by
        name. With `continue_final_message` it ends where the last message's content does.

        Raises ChatTemplateError with the template's own words when it refuses the messages.
        """
        if continue_final_message:
            last = messages[-1]
            messages = [*messages[:-1], {**last, "content": f"{last['content']}{_END_OF_CONTENT}"}]
        try:
            prompt = self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **variables
            )
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError) as error:
            raise ChatTemplateError(f"the chat template refused the messages: {error}") from error
        if not continue_final_message:
            return prompt
        unfinished, mark, _ = prompt.rpartition(_END_OF_CONTENT)
        if not mark:
            raise ChatTemplateError(
                "the chat template leaves out the final message, so it cannot be continued; "
                "set continue_final_message=false"
            )
        return unfinished
