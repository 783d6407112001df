"""Drives one engine on behalf of a benchmark, which asks for loads over JSON lines.

    PYTHON driver.py {caesura|vllm|transformers} SETTINGS ARGUMENTS

SETTINGS is what all engines are told, {"model": directory, "max_model_len": int,
"max_num_seqs": int, "kv_cache_gib": int}, and ARGUMENTS are keyword arguments of this engine's own
API, which take precedence; both are JSON.

Run by the interpreter that has the engine; hence it stands alone and imports nothing of the
benchmark. It answers {"ready": {...}} once the engine is up, and then each line of stdin,
{"prompts": [[token id, ...], ...], "max_tokens": int}, with
{"arrivals_s": [[seconds, ...], ...], "tokens": [[token id, ...], ...]}, one list for each prompt.

Invariants
- All requests of a load are handed over at second 0, greedy and ignoring EOS; each output token
  has one arrival, the moment its caller could see it.
- Standard output carries nothing but the answers: what engines print goes to stderr.
- The end of stdin ends the engine.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import sys
import time
from typing import Any, Protocol

Outputs = tuple[list[list[float]], list[list[int]]]
"""Of each request: when its tokens arrived, in seconds from the load's begin; and its tokens."""


class Engine(Protocol):
    """An engine that is up. It was constructed with the settings and the arguments."""

    version: str

    def run(self, prompts: list[list[int]], max_tokens: int) -> Outputs: ...

    def close(self) -> None: ...


class CaesuraEngine:
    """Caesura's `AsyncEngine`, with its engine process. Arguments are those of `EngineConfig`."""

    def __init__(self, settings: dict[str, Any], arguments: dict[str, Any]) -> None:
        caesura = importlib.import_module("caesura")
        uvloop = importlib.import_module("uvloop")
        self.version = str(importlib.import_module("frontend.version").version())
        self._sampling_params = caesura.SamplingParams
        self._runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        kv_cache = {"kv_cache_memory_bytes": settings.pop("kv_cache_gib") << 30}
        defaults = {"enable_prefix_caching": False, **kv_cache, **settings}
        engine_config = caesura.EngineConfig(**(defaults | arguments))
        config = caesura.FrontendConfig(engine=engine_config)
        self._engine = self._runner.run(caesura.AsyncEngine.start(config))

    def run(self, prompts: list[list[int]], max_tokens: int) -> Outputs:
        return self._runner.run(self._run(prompts, max_tokens))

    async def _run(self, prompts: list[list[int]], max_tokens: int) -> Outputs:
        sampling_params = self._sampling_params(
            temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False
        )
        begin_s = time.monotonic()

        async def read(stream: Any) -> tuple[list[float], list[int]]:
            arrivals_s: list[float] = []
            tokens: list[int] = []
            async for output in stream:
                arrivals_s += [time.monotonic() - begin_s] * len(output.token_ids)
                tokens += output.token_ids
            return arrivals_s, tokens

        streams = [
            self._engine.generate(prompt_token_ids=prompt, sampling_params=sampling_params)
            for prompt in prompts
        ]
        outputs = await asyncio.gather(*map(read, streams))
        return [arrivals for arrivals, _ in outputs], [tokens for _, tokens in outputs]

    def close(self) -> None:
        self._runner.run(self._engine.shutdown())
        self._runner.close()


class VllmEngine:
    """vLLM's `LLM`, offline, stepped by hand. Arguments are those of `vllm.LLM`."""

    def __init__(self, settings: dict[str, Any], arguments: dict[str, Any]) -> None:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(settings.pop("kv_cache_gib")))
        vllm = importlib.import_module("vllm")
        self.version = str(vllm.__version__)
        # As in the other engines: token ids in and out, no text.
        defaults = {"skip_tokenizer_init": True, "enable_prefix_caching": False, **settings}
        self._engine = vllm.LLM(**(defaults | arguments)).llm_engine
        self._sampling_params = vllm.SamplingParams
        self._delta = importlib.import_module("vllm.sampling_params").RequestOutputKind.DELTA
        self._num_requests = 0

    def run(self, prompts: list[list[int]], max_tokens: int) -> Outputs:
        sampling_params = self._sampling_params(
            temperature=0.0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=self._delta,
        )
        begin_s = time.monotonic()
        ids = [str(self._num_requests + number) for number in range(len(prompts))]
        self._num_requests += len(prompts)
        arrivals_s: dict[str, list[float]] = {name: [] for name in ids}
        tokens: dict[str, list[int]] = {name: [] for name in ids}
        for name, prompt in zip(ids, prompts, strict=True):
            self._engine.add_request(name, {"prompt_token_ids": prompt}, sampling_params)
        while self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            now_s = time.monotonic() - begin_s
            for output in outputs:
                new = list(output.outputs[0].token_ids)
                arrivals_s[output.request_id] += [now_s] * len(new)
                tokens[output.request_id] += new
        return list(arrivals_s.values()), list(tokens.values())

    def close(self) -> None:
        self._engine.engine_core.shutdown()


class TransformersEngine:
    """Transformers' `generate`, one static batch. Arguments are those of `from_pretrained`."""

    def __init__(self, settings: dict[str, Any], arguments: dict[str, Any]) -> None:
        self._torch = importlib.import_module("torch")
        transformers = importlib.import_module("transformers")
        self.version = str(transformers.__version__)
        load = transformers.AutoModelForCausalLM.from_pretrained
        self._model = load(settings["model"], **({"dtype": "bfloat16"} | arguments)).eval()
        self._model.generation_config.eos_token_id = None
        self._model.generation_config.pad_token_id = 0

    def run(self, prompts: list[list[int]], max_tokens: int) -> Outputs:
        arrivals_s: list[float] = []
        begin_s = time.monotonic()

        class Clock:
            """As `generate` takes a streamer: it is called with the prompts, then at each step."""

            def put(self, _: object) -> None:
                arrivals_s.append(time.monotonic() - begin_s)

            def end(self) -> None:
                pass

        inputs = self._torch.tensor(prompts)
        outputs = self._model.generate(
            inputs,
            attention_mask=self._torch.ones_like(inputs),
            max_new_tokens=max_tokens,
            do_sample=False,
            streamer=Clock(),
        )
        tokens: list[list[int]] = outputs[:, inputs.shape[1] :].tolist()
        return [arrivals_s[1:] for _ in prompts], tokens

    def close(self) -> None:
        pass


ENGINES: dict[str, type[Any]] = {
    "caesura": CaesuraEngine,
    "vllm": VllmEngine,
    "transformers": TransformersEngine,
}


def main() -> None:
    kind, settings, arguments = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine: Engine = ENGINES[kind](json.loads(settings), json.loads(arguments))
    print(json.dumps({"ready": {"version": engine.version}}), file=answers, flush=True)
    try:
        for line in sys.stdin:
            arrivals_s, tokens = engine.run(**json.loads(line))
            answer = {"arrivals_s": arrivals_s, "tokens": tokens}
            print(json.dumps(answer), file=answers, flush=True)
    finally:
        engine.close()


if __name__ == "__main__":
    main()
