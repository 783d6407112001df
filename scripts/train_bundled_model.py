"""Train the small language model bundled with the front end, from nothing, on a CPU.

Reads the sources that ship with the running CPython, trains a 4096-token byte-level BPE
tokenizer and a 4-million-parameter Llama on them, and writes a folder that
`transformers.AutoModelForCausalLM` and `AutoTokenizer` load unchanged.

    python -m scripts.train_bundled_model --out frontend/bundled_model --minutes 38

Needs torch, tokenizers, safetensors and, for the last check, transformers. A C++ compiler makes it
faster but is not needed.

Invariants:
- Every file in `--out` is replaced atomically: a reader never sees half a checkpoint.
- A usable checkpoint is in `--out` from the first `--export-minutes` on; only its weights, card
  and, with the last phase, `rope_theta` change after that.
- With `--tokens`, the sequence of batches and learning rates depends on the options alone; with
  `--minutes`, on the machine's speed too. A run continued from `--state` keeps its weights, its
  optimizer and its place in the schedule, but draws its windows anew.
- The held-out texts are never trained on, nor are they seen by the tokenizer's training.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

# An OpenMP thread that waits must not spin on a core that another process wants. Read once, when
# torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch

from scripts.bundled_model import card, checkpoint, corpus
from scripts.bundled_model.llama import Llama, ModelShape

Losses = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Phase:
    """A stretch of training: the share of the budget at its end, and what holds until then."""

    end: float
    context: int
    rope_theta: float


# Attention over thousands of tokens costs several times what the rest of the network does, so long
# contexts come last. The slower rotations of the last phase make the positions it adds look like
# those already learnt: without them so short a phase leaves the loss beyond 4096 positions nearly
# a nat higher.
PHASES = (Phase(0.80, 512, 10000.0), Phase(0.88, 2048, 10000.0), Phase(1.0, 8192, 80000.0))
MICRO_BATCH_TOKENS = 2048
BATCH_TOKENS = 8192
WARM_UP_STEPS = 40
DECAY_FROM = 0.4
FINAL_LR_SHARE = 0.03
MATRIX_LR, MATRIX_DECAY = 0.003, 0.1
OTHER_LR = 0.003
CLIP_NORM = 1.0
QUICK_WINDOWS = 32


@dataclass
class Progress:
    """What has been spent so far; saved with the weights so that a run can be continued."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--minutes", type=float, default=38.0, help="training time")
    parser.add_argument("--tokens", type=int, help="training tokens, instead of --minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--export-minutes", type=float, default=5.0, help="between checkpoints")
    parser.add_argument("--state", type=Path, help="file to keep the run in, and to go on from")
    return parser.parse_args()


def windows(stream: torch.Tensor, context: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield windows [context + 1] of `stream` for ever, each part once before any part twice.

    Each pass starts at another offset, so that a text is not always cut at the same places.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        offset = int(torch.randint(context, (1,), generator=generator))
        starts = torch.arange(offset, len(stream) - context, context)
        for i in torch.randperm(len(starts), generator=generator).tolist():
            yield stream[starts[i] : starts[i] + context + 1]


def phase_at(share: float) -> Phase:
    """The phase when `share` of the budget is spent."""
    return next((phase for phase in PHASES if share < phase.end), PHASES[-1])


def rate_at(step: int, share: float) -> float:
    """Learning rate as a share of its peak: warm-up, constant, then linear decay."""
    warm = min(1.0, (step + 1) / WARM_UP_STEPS)
    left = min(1.0, (1.0 - share) / (1.0 - DECAY_FROM))
    return warm * (FINAL_LR_SHARE + (1.0 - FINAL_LR_SHARE) * left)


def make_optimizers(model: Llama) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between layers, AdamW for the embedding and the norms.

    The matrices are dealt out to two optimizers, so that two threads can share Muon's work.
    """
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(
            share, lr=MATRIX_LR, weight_decay=MATRIX_DECAY, adjust_lr_fn="match_rms_adamw"
        )
        for share in (matrices[::2], matrices[1::2])
    ] + [torch.optim.AdamW(others, lr=OTHER_LR, betas=(0.9, 0.95), weight_decay=0.0)]


def micro_batch_rows(context: int) -> int:
    """Windows that go through the network at once."""
    return max(1, MICRO_BATCH_TOKENS // context)


def gradients_of(
    model: Llama, losses: Losses, ids: torch.Tensor, share: float
) -> tuple[float, tuple[torch.Tensor, ...]]:
    """`share` of the mean loss in nats of ids [sequences, context + 1], and its gradients."""
    with torch.autocast("cpu", torch.bfloat16):
        loss = losses(ids).mean() * share
    return loss.item(), torch.autograd.grad(loss, list(model.parameters()))


def compiled_losses(model: Llama) -> Losses:
    """`model.token_losses`, compiled for the shapes of every phase where the machine allows it."""
    losses: Losses = torch.compile(model.token_losses, dynamic=False)
    try:
        for phase in PHASES:
            ids = torch.zeros(micro_batch_rows(phase.context), phase.context + 1, dtype=torch.int64)
            gradients_of(model, losses, ids, 1.0)
    except Exception as error:  # Most often there is no C++ compiler; nothing else needs it.
        print(f"not compiled: {type(error).__name__}", flush=True)
        return model.token_losses
    return losses


def batch_gradients(
    model: Llama, losses: Losses, batches: list[torch.Tensor], pool: ThreadPoolExecutor
) -> tuple[float, list[torch.Tensor]]:
    """Mean loss in nats and its gradients over micro-batches of ids [sequences, context + 1].

    Each thread of `pool` takes whole micro-batches. Splitting each operation over the threads
    instead makes them wait for one another thousands of times a step, which is ruinous as soon
    as another process wants one of the cores.
    """

    def one(ids: torch.Tensor) -> tuple[float, tuple[torch.Tensor, ...]]:
        return gradients_of(model, losses, ids, 1.0 / len(batches))

    total, summed = 0.0, [torch.zeros_like(p) for p in model.parameters()]
    for loss, gradients in pool.map(one, batches):
        total += loss
        torch._foreach_add_(summed, gradients)
    return total, summed


@torch.no_grad()
def held_out_losses(
    model: Llama, stream: torch.Tensor, context: int, pool: ThreadPoolExecutor
) -> torch.Tensor:
    """Losses in nats [windows, context] of consecutive windows of `stream`, in float32."""
    count = (len(stream) - 1) // context
    parts = [stream[i * context : (i + 1) * context + 1][None] for i in range(count)]

    def one(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model.token_losses(ids)

    return torch.cat(list(pool.map(one, parts)))


def train(
    options: argparse.Namespace,
    model: Llama,
    stream: torch.Tensor,
    held_out: torch.Tensor,
    pool: ThreadPoolExecutor,
) -> Progress:
    """Spend the budget on `model`, exporting now and then; returns what was spent."""
    optimizers = make_optimizers(model)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    progress = Progress()
    if options.state is not None and options.state.exists():
        saved = torch.load(options.state, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        progress = Progress(**saved["progress"])

    def save() -> None:
        checkpoint.export_weights(options.out, model)
        if options.state is not None:
            states = [optimizer.state_dict() for optimizer in optimizers]
            saved = {"model": model.state_dict(), "optimizers": states, "progress": vars(progress)}
            torch.save(saved, options.state.with_suffix(".partial"))
            options.state.with_suffix(".partial").replace(options.state)

    losses = compiled_losses(model)
    quick = held_out[: QUICK_WINDOWS * 512 + 1]
    context = 0
    source: Iterator[torch.Tensor] = iter(())
    last_save = progress.seconds
    resumed_at, started = progress.seconds, time.monotonic()
    cpu_resumed_at, cpu_started = progress.cpu_seconds, time.process_time()
    while True:
        spent = (
            progress.tokens / options.tokens
            if options.tokens
            else (progress.seconds / 60.0 / options.minutes)
        )
        if spent >= 1.0:
            break
        if phase_at(spent).context != context:
            context = phase_at(spent).context
            model.set_rope_theta(phase_at(spent).rope_theta)
            checkpoint.export_config(options.out, model.shape)
            source = windows(stream, context, options.seed + progress.step)
        rows = micro_batch_rows(context)
        count = max(BATCH_TOKENS, 2 * context) // (rows * context)
        batches = [torch.stack([next(source) for _ in range(rows)]) for _ in range(count)]
        loss, gradients = batch_gradients(model, losses, batches, pool)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate_at(progress.step, spent)
        list(pool.map(lambda optimizer: optimizer.step(), optimizers))
        progress.step += 1
        progress.tokens += count * rows * context
        progress.seconds = resumed_at + time.monotonic() - started
        progress.cpu_seconds = cpu_resumed_at + time.process_time() - cpu_started
        if progress.step % 10 == 0:
            speed = progress.tokens / progress.seconds
            print(
                f"step {progress.step} context {context} loss {loss:.3f} "
                f"tokens {progress.tokens} {speed:.0f} tokens/s {progress.seconds / 60:.1f} min",
                flush=True,
            )
        if progress.seconds - last_save > 60.0 * options.export_minutes:
            last_save = progress.seconds
            save()
            quick_loss = held_out_losses(model, quick, 512, pool).mean().item()
            print(f"exported; held-out loss (part) {quick_loss:.4f}", flush=True)
    # Needed here as well when all of the budget was spent by the run that is continued.
    model.set_rope_theta(PHASES[-1].rope_theta)
    checkpoint.export_config(options.out, model.shape)
    save()
    return progress


def main() -> None:
    """Train, export, measure and describe the model."""
    options = parse_options()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    # One thread per operation: the parallelism is over micro-batches, see batch_gradients.
    torch.set_num_threads(1)

    texts = corpus.load_corpus()
    tokenizer = corpus.train_tokenizer(texts.train)
    stream = corpus.encode_stream(tokenizer, texts.train + texts.lessons, options.seed, True)
    held_out = corpus.encode_stream(tokenizer, texts.held_out, options.seed)
    model = Llama(ModelShape())
    size = sum(p.numel() for p in model.parameters())
    print(f"{size} parameters, {len(stream)} tokens, {len(held_out)} held out", flush=True)

    checkpoint.export_fixed_files(options.out, model.shape, tokenizer)
    with ThreadPoolExecutor(options.threads) as pool:
        progress = train(options, model, stream, held_out, pool)
        # From here on the weights are those of the file.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16).float()
        loaded = checkpoint.LoadedModel(options.out)
        figures = card.Figures(
            train_tokens=progress.tokens,
            corpus_tokens=len(stream),
            held_out_tokens=len(held_out),
            held_out_bytes=sum(len(text.encode()) for text in texts.held_out),
            minutes=progress.seconds / 60.0,
            cores=progress.cpu_seconds / progress.seconds,
            threads=options.threads,
            phases=[(phase.end, phase.context, phase.rope_theta) for phase in PHASES],
            logit_difference=loaded.check(model, tokenizer, texts.held_out[0][:4000]),
            short_losses=held_out_losses(model, held_out, card.SHORT_CONTEXT, pool),
            long_losses=held_out_losses(model, held_out, model.shape.max_positions, pool),
        )
    text = card.render(figures, model, loaded, options.seed)
    checkpoint.write_atomically(options.out / "README.md", text.encode())


if __name__ == "__main__":
    main()
