"""Writing the folder that `transformers` loads, and checking that it does.

Invariant: every file is replaced in one step, so a reader never sees half of one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from tokenizers import Tokenizer

from scripts.bundled_model import corpus
from scripts.bundled_model.llama import Llama, ModelShape

# Both sides compute in float32, in another order of operations.
LOGIT_TOLERANCE = 1e-3

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` in one step."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def export_config(out: Path, shape: ModelShape) -> None:
    """Write the description of the network."""
    _write_json(out / "config.json", shape.hf_config())


def export_fixed_files(out: Path, shape: ModelShape, tokenizer: Tokenizer) -> None:
    """Write everything that does not change while training."""
    write_atomically(out / "LICENSE.txt", corpus.licence_text().encode())
    write_atomically(out / "tokenizer.json", tokenizer.to_str(pretty=False).encode())
    _write_json(
        out / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_prefix_space": False,
            "bos_token": corpus.EOS,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": corpus.EOS,
            "model_max_length": shape.max_positions,
            "pad_token": corpus.EOS,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    _write_json(
        out / "generation_config.json",
        {
            "bos_token_id": corpus.EOS_ID,
            "eos_token_id": [corpus.EOS_ID, corpus.IM_END_ID],
            "pad_token_id": corpus.EOS_ID,
        },
    )


def export_weights(out: Path, model: Llama) -> None:
    """Write the weights, rounded to bfloat16; the tied output matrix is not written twice."""
    tensors = {name: t.detach().to(torch.bfloat16) for name, t in model.state_dict().items()}
    content = safetensors_bytes(tensors, metadata={"format": "pt"})
    write_atomically(out / "model.safetensors", content)


class LoadedModel:
    """The folder as a user of `transformers` gets it, in float32."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(str(folder))
        self.model: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)

    @torch.no_grad()
    def check(self, model: Llama, tokenizer: Tokenizer, text: str) -> float:
        """Compare with what was trained; returns the largest difference of a logit.

        `model` must hold the weights as rounded on export.
        """
        ids = tokenizer.encode(text).ids
        if self.tokenizer(text).input_ids != ids or self.tokenizer.decode(ids) != text:
            raise ValueError("the exported tokenizer does not give the text back")
        batch = torch.tensor([ids])
        difference = (self.model(batch).logits - model(batch)).abs().max().item()
        if not difference < LOGIT_TOLERANCE:
            raise ValueError(f"the exported model's logits differ by {difference}")
        return float(difference)

    def sample(self, prompt: str, temperature: float, new_tokens: int, seed: int) -> str:
        """Continue `prompt`, greedily if `temperature` is 0; returns the new text alone."""
        torch.manual_seed(seed)
        batch = self.tokenizer(prompt, return_tensors="pt")
        choice = {"do_sample": True, "temperature": temperature} if temperature else {}
        ids = self.model.generate(**batch, max_new_tokens=new_tokens, **choice)[0]
        text: str = self.tokenizer.decode(ids[batch.input_ids.shape[1] :])
        return text

    def chat_prompt(self, question: str) -> str:
        """The prompt that the chat template makes of one user message."""
        message = {"role": "user", "content": question}
        prompt: str = self.tokenizer.apply_chat_template(
            [message], tokenize=False, add_generation_prompt=True
        )
        return prompt
