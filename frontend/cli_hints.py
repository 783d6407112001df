"""What to say of a flag of `caesura serve` that is not known: the remedy for those of vLLM that
scripts have most, or the flag that may have been meant."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence

_MIN_LIKENESS = 0.6
_NO_NEED = "leave it out, there is no need for it"
_ONE_GPU = "one engine is one GPU; --data-parallel-size N starts N engines"
_NO_QUANTIZATION = "leave it out; weights are served in float32, bfloat16 or float16 (--dtype)"
_REMEDIES = {
    "--model": "name it without a flag: caesura serve MODEL",
    "--tokenizer": "leave it out; the tokenizer is the one in the MODEL's directory",
    "--tensor-parallel-size": _ONE_GPU,
    "-tp": _ONE_GPU,
    "--pipeline-parallel-size": _ONE_GPU,
    "-pp": _ONE_GPU,
    "-dp": "write it out: --data-parallel-size",
    "--gpu-memory-utilization": "give --kv-cache-memory-bytes, the size of the KV cache",
    "--swap-space": "leave it out; what is preempted is recomputed",
    "--quantization": _NO_QUANTIZATION,
    "-q": _NO_QUANTIZATION,
    "--kv-cache-dtype": "leave it out; the KV cache has the model's --dtype",
    "--trust-remote-code": "leave it out; code that comes with a model is never run",
    "--enable-log-requests": "write --log-requests",
    "--disable-log-requests": "leave it out; requests are logged only with --log-requests",
    "--disable-log-stats": "leave it out; statistics are at /metrics alone",
    "--enforce-eager": _NO_NEED,
    "--enable-chunked-prefill": _NO_NEED,
    "--distributed-executor-backend": _NO_NEED,
    "--load-format": "leave it out; weights are read from safetensors files",
    "--revision": "leave it out; give the directory of that revision as MODEL",
}
"""By vLLM's flag."""


def unknown_flags(unknown: Sequence[str], known: Collection[str]) -> str:
    """`unrecognized arguments: --prot 80; did you mean --port?`"""
    hints = (_hint(word.partition("=")[0], known) for word in unknown if word.startswith("-"))
    return "; ".join((f"unrecognized arguments: {' '.join(unknown)}", *filter(None, hints)))


def _hint(flag: str, known: Collection[str]) -> str:
    if flag in _REMEDIES:
        return f"{flag}: {_REMEDIES[flag]}"
    nearest = difflib.get_close_matches(flag, known, n=1, cutoff=_MIN_LIKENESS)
    return f"did you mean {nearest[0]}?" if nearest else ""
