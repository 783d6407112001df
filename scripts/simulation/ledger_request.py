"""A request as an engine should know it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class LedgerRequest:
    """Made of its ADD, and changed by what comes after."""

    internal_id: str
    context: list[int]
    num_prompt_tokens: int
    num_resumed: int
    """Outputs that it brought along."""
    max_tokens: int
    min_tokens: int
    ending_token_ids: frozenset[int]
    order: tuple[int, int]
    """(priority, arrival)"""
    tenant: str | None
    """Its cache salt."""
    has_begun: bool = False
    """Whether a step has computed some of it."""
    is_retracted: bool = False
    """A pause or a flush took its KV, and no step has computed any since."""
    cell_salts: list[int] = field(default_factory=list)
    """The weights under which the KV of each token was computed, as far as it was."""
    is_aborted: bool = False
    """By a call; its terminal is still to come."""

    @property
    def num_output_tokens(self) -> int:
        return len(self.context) - self.num_prompt_tokens

    @property
    def num_new_tokens(self) -> int:
        return self.num_output_tokens - self.num_resumed
