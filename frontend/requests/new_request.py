"""What a caller asks for, before anything of it is accepted."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from frontend.errors import InvalidRequestError
from frontend.outputs import ResumeFrom
from frontend.requests.resume_from import read_resume_from
from frontend.sampling_params import SamplingParams

MAX_TIMEOUT_S = 7 * 24 * 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRequest:
    """What a caller asks for. Of `prompt`, `prompt_token_ids` and `resume_from`, one is set."""

    prompt: str | None = None
    prompt_token_ids: Sequence[int] | None = None
    resume_from: ResumeFrom | None = None
    """Of an aborted result. Seed, `min_tokens` and `max_tokens` are its own, but for a `max_tokens`
    that is less than what is left; the other sampling parameters should be those of before."""
    sampling_params: SamplingParams
    request_id: str | None = None
    """None makes one up."""
    aliases: Sequence[str] = ()
    """Further names; together with a `batch_id`, they are names of the whole batch."""
    batch_id: str | None = None
    """A name that the requests of one call share."""
    priority: int = 0
    """Lower runs first."""
    tags: Sequence[str] = ()
    timeout_s: float | None = None
    """At this age it is aborted, and returns its partial result."""
    cache_salt: str | None = None
    """Requests share cached prefixes only with those of the same salt."""
    add_special_tokens: bool = True
    """False for a chat prompt, whose template spells them out."""
    is_final_only: bool = False
    """Everything comes at once, at the end."""

    def checked(self) -> NewRequest:
        """The same, with a resume_from that is consistent. Raises InvalidRequestError."""
        if sum(given is not None for given in self._beginnings) != 1:
            raise InvalidRequestError(
                "give either prompt or prompt_token_ids or resume_from, one of them"
            )
        if self.timeout_s is not None and not 0 < self.timeout_s <= MAX_TIMEOUT_S:
            raise InvalidRequestError(
                f"timeout_s={self.timeout_s!r} must be above 0 and at most {MAX_TIMEOUT_S:g} s"
            )
        if self.resume_from is None:
            return self
        return dataclasses.replace(self, resume_from=read_resume_from(self.resume_from))

    @property
    def prompt_key(self) -> tuple[int, bool]:
        """The same for the completions of one prompt, which share its object."""
        prompt = next(given for given in self._beginnings if given is not None)
        return id(prompt), self.add_special_tokens

    @property
    def _beginnings(self) -> tuple[object, ...]:
        return self.prompt, self.prompt_token_ids, self.resume_from
