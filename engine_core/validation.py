"""Turns an ADD frame's request into the engine's own, or says in words why it cannot run."""

from __future__ import annotations

from engine_core.config import SchedulerConfig
from engine_core.request import Request
from ipc.request import EngineCoreRequest, SamplingParams

NUM_RESUMED_TOKENS = "caesura_num_resumed_tokens"
"""In `extra_args`: so many tokens at the end of the prompt are outputs of an earlier run, and count
as outputs for penalties, `min_tokens` and `max_tokens`.
"""
MAX_PROMPT_LOGPROBS = 2**23
"""Most log-probabilities of one prompt, alternatives included: 64 MiB with their token ids."""


class InvalidRequest(ValueError):
    """A request that this engine refuses; the message names the value and the remedy."""


def build_request(
    message: EngineCoreRequest,
    client_index: int,
    arrival: int,
    config: SchedulerConfig,
    vocab_size: int,
) -> Request:
    """Check a request and resolve what it leaves open. Raises InvalidRequest."""
    if message.client_index != client_index:
        raise InvalidRequest(
            f"client_index={message.client_index} came over the socket of client {client_index}"
        )
    sampling = message.sampling_params
    if message.unsupported:
        raise InvalidRequest(f"not supported by this engine: {', '.join(message.unsupported)}")
    if sampling is None:
        raise InvalidRequest("sampling_params is missing; this engine only generates text")
    prompt = message.prompt_token_ids
    if not prompt:
        raise InvalidRequest("prompt_token_ids is empty; a prompt needs at least one token")
    if len(prompt) >= config.max_model_len:
        raise InvalidRequest(
            f"the prompt has {len(prompt)} tokens, but the model's context holds "
            f"max_model_len={config.max_model_len}, prompt and output together; shorten the prompt"
        )
    num_resumed_tokens = _num_resumed_tokens(sampling, len(prompt))
    if (largest := max(prompt)) >= vocab_size:
        is_resumed = largest in prompt[len(prompt) - num_resumed_tokens :]
        what = "resume_from.output_token_ids: token" if is_resumed else "prompt token"
        raise InvalidRequest(
            f"{what} id {largest} is outside the vocabulary of {vocab_size} tokens"
        )
    max_output_tokens = config.max_model_len - len(prompt) + num_resumed_tokens
    if sampling.max_tokens is not None:
        max_output_tokens = min(max_output_tokens, sampling.max_tokens)
    if max_output_tokens <= num_resumed_tokens:
        raise InvalidRequest(
            f"max_tokens={sampling.max_tokens} is used up by the {num_resumed_tokens} output "
            f"tokens that the request brings along; raise it"
        )
    if (allowed := sampling.allowed_token_ids) is not None:
        possible = {token_id for token_id in allowed if token_id < vocab_size}
        if not possible:
            raise InvalidRequest(
                f"allowed_token_ids={list(allowed)[:8]} leaves no token of the vocabulary "
                f"of {vocab_size}; name at least one, or leave it out"
            )
        if sampling.min_tokens > 0 and possible <= sampling.all_stop_token_ids:
            raise InvalidRequest(
                f"allowed_token_ids={list(allowed)[:8]} has only stop tokens, which "
                f"min_tokens={sampling.min_tokens} holds back; allow another token or drop "
                f"min_tokens"
            )
    if (num_alternatives := sampling.prompt_logprobs) is not None:
        num_columns = 1 + (num_alternatives if 0 <= num_alternatives < vocab_size else vocab_size)
        if (num_entries := (len(prompt) - 1) * num_columns) > MAX_PROMPT_LOGPROBS:
            raise InvalidRequest(
                f"prompt_logprobs={num_alternatives} of a prompt of {len(prompt)} tokens are "
                f"{num_entries} log-probabilities, more than {MAX_PROMPT_LOGPROBS}; "
                f"ask for fewer alternatives or shorten the prompt"
            )
    eos_token_ids = set() if sampling.eos_token_id is None else {sampling.eos_token_id}
    return Request(
        request_id=message.request_id,
        client_index=client_index,
        token_ids=list(prompt),
        num_prompt_tokens=len(prompt) - num_resumed_tokens,
        sampling=sampling,
        max_output_tokens=max_output_tokens,
        order=(message.priority, arrival),
        cache_salt=message.cache_salt,
        num_resumed_tokens=num_resumed_tokens,
        ending_token_ids=frozenset(sampling.stop_token_ids) | eos_token_ids,
    )


def _num_resumed_tokens(sampling: SamplingParams, num_known_tokens: int) -> int:
    count = (sampling.extra_args or {}).get(NUM_RESUMED_TOKENS, 0)
    if not isinstance(count, int) or not 0 <= count < num_known_tokens:
        raise InvalidRequest(
            f"{NUM_RESUMED_TOKENS}={count!r} must leave at least one of the {num_known_tokens} "
            f"tokens to the prompt"
        )
    if count and sampling.prompt_logprobs is not None:
        raise InvalidRequest(
            "prompt_logprobs of a resumed request are not supported; ask for them with the prompt"
        )
    return count
