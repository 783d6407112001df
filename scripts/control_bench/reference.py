"""Whether tokens are what the model says: transformers as the judge, and other weights for it.

Greedy tokens are right if the reference finds none likelier, up to a tie: logits of two programs
differ in the last bits, so a token may be `TIE_TOLERANCE` below the likeliest one.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

TIE_TOLERANCE = 1e-3
"""In logits, which are of the order of 10."""
WEIGHTS_FILE = "model.safetensors"


class Reference:
    """A model, as transformers runs it in float32."""

    def __init__(self, directory: Path) -> None:
        # Threads that wait for one another crawl on a machine that others use too.
        torch.set_num_threads(1)
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    @torch.inference_mode()
    def _run(self, token_ids: Sequence[int], cache: Any = None) -> tuple[torch.Tensor, Any]:
        """The logits behind each of these tokens, [tokens, vocabulary], and the KV cache."""
        result = self._model(torch.tensor([list(token_ids)]), past_key_values=cache, use_cache=True)
        return result.logits[0], result.past_key_values

    def errors(self, prompt: Sequence[int], tokens: Sequence[int]) -> list[bool]:
        """Of each token, whether it is wrong behind the prompt and the tokens before it."""
        if not tokens:
            return []
        logits, _ = self._run([*prompt, *tokens])
        return _are_wrong(logits[len(prompt) - 1 : -1], tokens)

    def errors_after(
        self, before: Self, prompt: Sequence[int], tokens: Sequence[int], num_before: int
    ) -> list[bool]:
        """The same of the tokens behind the first `num_before`, which `before` sampled and whose
        KV it wrote, but for the last one's: that one entered the cache with these weights.
        """
        if num_before >= len(tokens):
            return []
        sequence = [*prompt, *tokens]
        num_written = len(prompt) + num_before - 1
        _, cache = before._run(sequence[:num_written])
        logits, _ = self._run(sequence[num_written:], cache)
        return _are_wrong(logits[:-1], tokens[num_before:])


def _are_wrong(logits: torch.Tensor, tokens: Sequence[int]) -> list[bool]:
    chosen = logits.gather(1, torch.tensor([list(tokens)]).T)[:, 0]
    behind: list[bool] = (logits.amax(dim=-1) - chosen > TIE_TOLERANCE).tolist()
    return behind


def save_other_weights(model: Path, directory: Path, *, seed: int, noise: float) -> Path:
    """A copy of `model` whose matrices have Gaussian noise added, of `noise` times their standard
    deviation; returns its directory.
    """
    shutil.copytree(model, directory)
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(directory / WEIGHTS_FILE)
    for name, tensor in sorted(tensors.items()):
        if tensor.ndim > 1:
            draws = torch.randn(tensor.shape, generator=generator)
            spread = noise * tensor.float().std()
            tensors[name] = (tensor.float() + spread * draws).to(tensor.dtype)
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    return directory
