"""Log-probabilities from the wire's arrays to one record a token."""

from __future__ import annotations

from frontend.outputs import TokenLogprobs
from ipc.output import LogprobsLists


def token_logprobs(arrays: LogprobsLists, num_tokens: int) -> list[TokenLogprobs]:
    """Records of the first `num_tokens` positions; column 0 of the arrays is the sampled token."""
    token_ids = arrays.token_ids[:num_tokens].tolist()
    logprobs = arrays.logprobs[:num_tokens].tolist()
    ranks = arrays.ranks[:num_tokens].tolist()
    return [
        TokenLogprobs(ids[0], values[0], rank, tuple(zip(ids[1:], values[1:], strict=True)))
        for ids, values, rank in zip(token_ids, logprobs, ranks, strict=True)
    ]
