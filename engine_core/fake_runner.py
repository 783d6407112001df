"""A model runner whose tokens are arithmetic, so that every output checks itself.

It keeps a KV cache of token ids and reads them back through the block tables: the next token is a
function of the last token, of the token in the middle of the context and of the length. A block
handed to two sequences, lost, or reused with stale contents makes the output wrong, and
`expected_tokens` says what it should have been.

Its weights are one integer, the *salt*: 0 at the start, `salt_of` the paths of an update after it.
A cache cell keeps the salt of the weights that wrote it, and the next token depends on the cells'
salts and on the present one. So KV that outlived an update shows, and `token_behind` says what a
context computed under several weights should have given.

It computes row by row on plain lists: steps of a few rows, which simulations run by the thousand,
cost a few microseconds.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine_core.batch import StepBatch, StepResult
from engine_core.prompt_logprobs import OwedPromptLogprobs, PromptSpan
from engine_core.staging import StagedWeights
from ipc.output import LogprobsLists
from ipc.weights import WeightsGroup, WeightSource

FAKE_LOGPROB = -1.0

_VOCAB_SIZE = 32_000
_NUM_SALTS = 3_989
"""Few enough that two salts never look alike in a vocabulary of the default size."""
_SALT_STRIDE = 7_919
_BYTES_PER_PART = 4


def next_token(last: int, middle: int, num_tokens: int, vocab_size: int, salt: int = 0) -> int:
    """The token behind a context of `num_tokens` cells, under the weights `salt`; `middle` is what
    the cell at index `num_tokens // 2` holds. A cell of weights 0 holds the bare token id.
    """
    return (3 * last + 5 * middle + num_tokens + _SALT_STRIDE * salt) % vocab_size


def token_behind(
    context: Sequence[int], cell_salts: Sequence[int], salt: int, vocab_size: int = _VOCAB_SIZE
) -> int:
    """The token that weights `salt` give behind a context whose cells others may have written:
    the one of `context[i]` was written by weights `cell_salts[i]`.
    """
    length = len(context)
    last, middle = (_cell(context[index], cell_salts[index]) for index in (length - 1, length // 2))
    return next_token(last, middle, length, vocab_size, salt)


def expected_tokens(
    prompt: Sequence[int], num_tokens: int, vocab_size: int = _VOCAB_SIZE, salt: int = 0
) -> list[int]:
    """The outputs that a fake engine answers to `prompt` while nothing stops it, with weights that
    do not change.
    """
    context = list(prompt)
    salts = [salt] * (len(prompt) + num_tokens)
    for _ in range(num_tokens):
        context.append(token_behind(context, salts, salt, vocab_size))
    return context[len(prompt) :]


def salt_of(*paths: str) -> int:
    """The weights after an update whose parts had these paths, in order: 1 to 3,989."""
    return zlib.crc32("\n".join(paths).encode()) % _NUM_SALTS + 1


def _cell(token_id: int, salt: int) -> int:
    return token_id + _SALT_STRIDE * salt


def expected_prompt_logprobs(
    prompt: Sequence[int], num_alternatives: int, vocab_size: int = _VOCAB_SIZE
) -> LogprobsLists:
    """The log-probabilities that a fake engine with weights 0 answers for the prompt itself."""
    tokens = np.array(prompt, np.int64)
    return _prompt_logprobs(tokens[:-1], tokens[1:], num_alternatives, vocab_size)


def _prompt_logprobs(
    last: NDArray[np.int64], following: NDArray[np.int64], num_alternatives: int, vocab_size: int
) -> LogprobsLists:
    columns = np.arange(-1, num_alternatives)
    token_ids = (last[:, None] + columns) % vocab_size
    token_ids[:, 0] = following
    logprobs = -(last[:, None] % 64 + 1 + columns) / 8
    return LogprobsLists(token_ids.astype(np.int32), logprobs.astype(np.float32), last % 16 + 1)


@dataclass(frozen=True, slots=True)
class FakeStagedWeights:
    """Implements `StagedWeights`: the paths of the parts, each of which counts as one tensor."""

    paths: tuple[str, ...]

    @property
    def num_tensors(self) -> int:
        return len(self.paths)

    @property
    def num_bytes(self) -> int:
        return _BYTES_PER_PART * len(self.paths)

    @property
    def checksum(self) -> str:
        """The salt of the last path alone, in hexadecimal."""
        return f"{salt_of(self.paths[-1]):x}"


class FakeRunner:
    """Implements `ModelRunner` without a model.

    `step_time_ms` is slept in each step, as a stand-in for the time of a model.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_model_len: int,
        vocab_size: int = _VOCAB_SIZE,
        step_time_ms: float = 0.0,
    ) -> None:
        self.num_blocks = num_blocks
        self.vocab_size = vocab_size
        self._block_size = block_size
        self._step_time_s = step_time_ms / 1000
        self._salt = 0
        # By slot.
        self._tokens: list[list[int]] = [[] for _ in range(max_num_seqs)]
        self._tables: list[list[int]] = [[] for _ in range(max_num_seqs)]
        self._wants_logprobs: dict[int, int] = {}
        self._owed_prompt_logprobs = OwedPromptLogprobs(vocab_size)
        self._cache = [-1] * (num_blocks * block_size)

    # -- steps -----------------------------------------------------------------------------------

    def bind_thread(self) -> None:
        pass

    def execute(self, batch: StepBatch) -> StepResult:
        if self._step_time_s:
            time.sleep(self._step_time_s)
        self._update(batch)
        slots = batch.slots.tolist()
        for slot, computed, num_new in zip(
            slots, batch.num_computed_tokens.tolist(), batch.num_new_tokens.tolist(), strict=True
        ):
            self._write(slot, computed, computed + num_new)
        of_prompts = {
            span.slot: self._judge_span(span)
            for span in self._owed_prompt_logprobs.take_spans(batch)
        }
        token_ids: list[int] = []
        logprobs: dict[int, LogprobsLists] = {}
        for slot, samples in zip(slots, batch.samples.tolist(), strict=True):
            if samples:
                token_id = self._sample(slot)
                token_ids.append(token_id)
                if slot in self._wants_logprobs:
                    num_logprobs = self._wants_logprobs[slot]
                    logprobs[slot] = self._fake_logprobs(token_id, num_logprobs)
        return StepResult(np.array(token_ids, np.int64), logprobs, of_prompts)

    def _update(self, batch: StepBatch) -> None:
        for slot in batch.left:
            self._wants_logprobs.pop(slot, None)
        for sequence in batch.joined:
            slot = sequence.slot
            self._tokens[slot] = list(sequence.token_ids)
            self._tables[slot] = list(sequence.block_ids)
            if sequence.sampling.logprobs is not None:
                self._wants_logprobs[slot] = sequence.sampling.logprobs
        for slot, block_ids in batch.new_blocks:
            self._tables[slot] += block_ids

    def _write(self, slot: int, start: int, stop: int) -> None:
        """Fill the cells of a sequence's positions start .. stop - 1, through its block table."""
        block_size, table = self._block_size, self._tables[slot]
        tokens, offset = self._tokens[slot], _SALT_STRIDE * self._salt
        if stop - start == 1:  # a decode, for speed
            place = table[start // block_size] * block_size + start % block_size
            self._cache[place] = tokens[start] + offset
            return
        while start < stop:
            index = start // block_size
            end = min(stop, (index + 1) * block_size)
            cells = [token_id + offset for token_id in tokens[start:end]]
            first = table[index] * block_size + start % block_size
            self._cache[first : first + len(cells)] = cells
            start = end

    def _read(self, slot: int, positions: Iterable[int]) -> list[int]:
        cache, table, block_size = self._cache, self._tables[slot], self._block_size
        return [cache[table[at // block_size] * block_size + at % block_size] for at in positions]

    def _judge_span(self, span: PromptSpan) -> LogprobsLists:
        stop = span.start + len(span.next_token_ids)
        last = self._read(span.slot, range(span.start, stop))
        return _prompt_logprobs(
            np.array(last, np.int64),
            np.array(span.next_token_ids, np.int64),
            span.num_alternatives,
            self.vocab_size,
        )

    def _sample(self, slot: int) -> int:
        tokens = self._tokens[slot]
        length = len(tokens)
        last, middle = self._read(slot, (length - 1, length // 2))
        token_id = next_token(last, middle, length, self.vocab_size, self._salt)
        tokens.append(token_id)
        return token_id

    def _fake_logprobs(self, token_id: int, num_logprobs: int) -> LogprobsLists:
        num_logprobs = min(num_logprobs, self.vocab_size)
        ids = [token_id] + [(token_id + k) % self.vocab_size for k in range(num_logprobs)]
        return LogprobsLists(
            np.array([ids], np.int32),
            np.full((1, len(ids)), FAKE_LOGPROB, np.float32),
            np.ones(1, np.int64),
        )

    # -- weights ---------------------------------------------------------------------------------

    def stage(self, source: WeightSource, earlier: StagedWeights | None) -> FakeStagedWeights:
        """Take a path for weights; nothing is read from it. Raises ValueError if the path contains
        "missing", for another checksum than the path's, and for a broadcast.
        """
        if source.kind == "broadcast":
            raise ValueError(
                "the fake runner takes no broadcast; stage weights of kind 'disk' or 'file'"
            )
        if "missing" in source.path:
            raise ValueError(f"path={source.path!r}: there are no such weights")
        before = earlier.paths if isinstance(earlier, FakeStagedWeights) else ()
        staged = FakeStagedWeights((*before, source.path))
        if source.checksum not in (None, staged.checksum):
            raise ValueError(
                f"checksum={source.checksum!r}, but that of {source.path!r} is {staged.checksum!r}"
            )
        return staged

    def commit(self, staged: StagedWeights) -> None:
        assert isinstance(staged, FakeStagedWeights), "weights that another runner staged"
        self._salt = salt_of(*staged.paths)

    def join_group(self, group: WeightsGroup) -> None:
        raise ValueError(f"group_name={group.group_name!r}: the fake runner joins no group")

    def leave_group(self, group_name: str) -> None:
        raise ValueError(f"group_name={group_name!r}: the fake runner is in no group")
