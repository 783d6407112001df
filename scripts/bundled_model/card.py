"""The model card: every figure and sample in it is measured by the run that writes it."""

from __future__ import annotations

import math
import platform
from dataclasses import dataclass

import torch

from scripts.bundled_model.checkpoint import LoadedModel
from scripts.bundled_model.corpus import IM_END, MEAN_PIECE_CHARS
from scripts.bundled_model.llama import Llama

BUCKETS = ((0, 512), (512, 2048), (2048, 4096), (4096, 8192))
SHORT_CONTEXT = 512
SAMPLE_TOKENS = 200
SAMPLE_LINES, SAMPLE_CHARS = 16, 700
PROMPTS = ("import os\n", "def parse(self, text):\n", "class Queue", "def ", "    return ")
QUESTION = "Write a Python function `is_empty`: Return True if the queue is empty."


@dataclass(frozen=True)
class Figures:
    """What the run measured; losses are mean nats per token."""

    train_tokens: int
    corpus_tokens: int
    held_out_tokens: int
    held_out_bytes: int
    minutes: float
    cores: float
    threads: int
    phases: list[tuple[float, int, float]]
    logit_difference: float
    short_losses: torch.Tensor
    long_losses: torch.Tensor

    def bits_per_byte(self, loss: float) -> float:
        """Bits per byte of held-out text, end-of-text tokens being paid for as well."""
        return loss * self.held_out_tokens / self.held_out_bytes / math.log(2)

    def schedule(self) -> str:
        """Table rows: share of the training time, context and rotary base of each phase."""
        starts = [0.0, *(end for end, _, _ in self.phases)]
        return "\n".join(
            f"| {start:.0%} to {end:.0%} | {context} | {rope_theta:.0f} |"
            for start, (end, context, rope_theta) in zip(starts, self.phases, strict=False)
        )

    def bucket_rows(self) -> str:
        """Table rows: loss by position, and of the same tokens given only a short context."""
        count, context = self.long_losses.shape
        pieces = context // SHORT_CONTEXT
        # Window w of the long context covers the short windows from w * pieces on.
        short = self.short_losses[: count * pieces].reshape(count, context)
        return "\n".join(
            f"| {start}-{stop} | {self.long_losses[:, start:stop].mean().item():.3f} "
            f"| {short[:, start:stop].mean().item():.3f} |"
            for start, stop in BUCKETS
        )


def _block(prompt: str, continuation: str) -> str:
    """Show the start of a sample in a fence that no sample contains; "…" is where it is cut."""
    text = f"{prompt}{continuation}".rstrip()
    start = "\n".join(text.split("\n")[:SAMPLE_LINES])[:SAMPLE_CHARS]
    return f"````python\n{start}{'' if start == text else '…'}\n````\n"


def _samples(loaded: LoadedModel, seed: int) -> str:
    """Continue each prompt greedily and at temperature 0.8, and answer one question."""
    parts = []
    for prompt in PROMPTS:
        for temperature in (0.0, 0.8):
            how = f"temperature {temperature}" if temperature else "greedy"
            text = loaded.sample(prompt, temperature, SAMPLE_TOKENS, seed)
            parts.append(f"Prompt `{prompt!r}`, {how}:\n\n{_block(prompt, text)}")
    answer = loaded.sample(loaded.chat_prompt(QUESTION), 0.0, SAMPLE_TOKENS, seed)
    parts.append(f"Chat, greedy: {QUESTION}\n\n{_block('', answer.partition(IM_END)[0])}")
    return "\n".join(parts)


def render(figures: Figures, model: Llama, loaded: LoadedModel, seed: int) -> str:
    """Return the text of the model card."""
    shape = model.shape
    parameters = sum(p.numel() for p in model.parameters())
    short, long = figures.short_losses.mean().item(), figures.long_losses.mean().item()
    return f"""---
license: other
license_name: psf-2.0
language: code
library_name: transformers
pipeline_tag: text-generation
---

# Caesura bundled model

A language model of {parameters / 1e6:.2f} million parameters that writes text which looks like
Python. It is here so that the server can be started, tried and tested with no download; it is
not a coding assistant.

## Data and licence

Only text that ships with CPython: the standard library's `.py` files of CPython
{platform.python_version()}, its tests among them, and the language reference pages of `pydoc`.
Left out are site-packages, codec tables, test data and files that are broken on purpose. Repeated
texts count once. Documented functions appear a second time as a question and an answer in the
chat format. About 3 % of the texts, chosen by the hash of their content, are held out of
everything: {figures.held_out_tokens} tokens, {figures.held_out_bytes} bytes.

The text is under the PSF licence, version 2 (some modules carry notices of their own, all
permissive); the weights, being derived from it, are given under the same licence, which is in
`LICENSE.txt`.

## Architecture

`LlamaForCausalLM`: {shape.layers} layers, hidden size {shape.hidden}, feed-forward size
{shape.intermediate}, {shape.heads} query heads and {shape.kv_heads} key and value heads of
{shape.head_dim}, tied embeddings, {shape.vocab} tokens, {shape.max_positions} positions,
bfloat16. The tokenizer is a byte-level BPE: every byte has a token, so any text comes back
exactly; each digit is a token, and so is a run of up to 31 spaces.

`<|endoftext|>` ends and precedes a document; `<|im_start|>` and `<|im_end|>` delimit chat turns.

## Training

{figures.train_tokens / 1e6:.2f} million tokens (the training set has
{figures.corpus_tokens / 1e6:.2f} million) in {figures.minutes:.0f} minutes on {figures.threads}
CPU threads ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()}), which got
{figures.cores:.2f} cores' time on average. Muon for the matrices, AdamW for the rest, bfloat16
autocast. Texts are cut at random places, every {MEAN_PIECE_CHARS} characters or so, and the pieces
encoded one by one, so that a prompt may end anywhere: within a word, or behind a space.

| part of the time | context | base of the rotary positions |
| --- | --- | --- |
{figures.schedule()}

To make it again, with the interpreter named above (the figures depend on how many tokens the
machine manages in that time; give `--tokens {figures.train_tokens}` in place of `--minutes` for the
same amount of training):

    python -m scripts.train_bundled_model --out frontend/bundled_model \\
        --minutes {figures.minutes:.0f} --threads {figures.threads} --seed {seed}

## Held-out figures

Of the exported bfloat16 weights, computed in float32, on the whole held-out set, every text encoded
in one piece, in consecutive windows:

| window | loss (nats per token) | perplexity | bits per byte |
| --- | --- | --- | --- |
| {SHORT_CONTEXT} | {short:.3f} | {math.exp(short):.2f} | {figures.bits_per_byte(short):.3f} |
| {shape.max_positions} | {long:.3f} | {math.exp(long):.2f} | {figures.bits_per_byte(long):.3f} |

Loss by position in the window of {shape.max_positions}, and of the very same tokens when cut into
windows of {SHORT_CONTEXT}. The rows hold different texts, so compare along a row:

| positions | window of {shape.max_positions} | window of {SHORT_CONTEXT} |
| --- | --- | --- |
{figures.bucket_rows()}

Loaded with `transformers`, the logits differ from those of the training code by at most
{figures.logit_difference:.1e} in float32.

## Limits

It has the look of Python and none of the sense: names are invented, code seldom runs, and what
it states is not to be relied on. It knows nothing outside the standard library and hardly any
English beyond docstrings and the language reference. It has seen one kind of chat message
("Write a Python function ...") and will answer anything else with code-like text. Continuations
tend to repeat themselves, greedy ones most, and the more so the shorter the prompt. A word's token
includes the space before it and a digit's does not, so behind a prompt that ends in a space numbers
still come too often: "def " is mostly continued with a name, "return " mostly with a number.
Prompts that end in a line break, or in a word without the space, do best.

## Samples

As they came, up to {SAMPLE_TOKENS} tokens each; "…" where more followed.

{_samples(loaded, seed)}"""
