"""SGLang's constructor keywords: what they mean here, what is ignored and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from frontend.config import BUNDLED_MODEL_DIRECTORY, FrontendConfig
from frontend.sync.engine import Engine
from frontend.sync.sglang_arguments import read_arguments


def test_without_a_model_the_bundled_one_is_served() -> None:
    arguments = read_arguments({})
    assert arguments.config == FrontendConfig()
    assert arguments.config.engine.model == str(BUNDLED_MODEL_DIRECTORY)
    assert not arguments.skip_tokenizer_init


def test_keywords_become_the_configuration() -> None:
    config = read_arguments(
        {
            "model_path": "/models/llama",
            "tokenizer_path": "/models/llama",
            "dtype": "half",
            "device": "cpu",
            "context_length": 512,
            "max_running_requests": 8,
            "chunked_prefill_size": 256,
            "page_size": 16,
            "max_total_tokens": 1600,
            "random_seed": 7,
            "disable_radix_cache": True,
            "dp_size": 2,
            "stream_interval": 4,
            "served_model_name": "llama",
            "tp_size": 1,
            "load_format": "auto",
            "quantization": None,
        }
    ).config
    engine = config.engine
    assert (engine.model, engine.dtype, engine.device) == ("/models/llama", "float16", "cpu")
    assert (engine.max_model_len, engine.max_num_seqs, engine.max_num_batched_tokens) == (
        512,
        8,
        256,
    )
    assert (engine.block_size, engine.num_gpu_blocks_override, engine.seed) == (16, 100, 7)
    assert not engine.enable_prefix_caching
    assert (config.data_parallel_size, config.stream_interval) == (2, 4)
    assert config.served_model_name == "llama"


def test_keywords_without_meaning_are_ignored_with_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    arguments = read_arguments(
        {"mem_fraction_static": 0.8, "attention_backend": "fa3", "trust_remote_code": None}
    )
    assert arguments.config == FrontendConfig()
    (record,) = caplog.records
    assert record.getMessage().endswith(": attention_backend, mem_fraction_static")


def test_an_unknown_keyword_is_a_type_error_with_the_nearest_known_one() -> None:
    with pytest.raises(TypeError, match=r"'mem_fraction'; did you mean 'mem_fraction_static'"):
        Engine(mem_fraction=0.5)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"tp_size": 2}, "tp_size=2 is not supported; leave it out or set 1"),
        ({"quantization": "fp8"}, "quantization='fp8' is not supported"),
        ({"load_format": "dummy"}, "load_format='dummy'"),
        ({"chunked_prefill_size": -1}, "chunked_prefill_size=-1"),
        ({"context_length": 0}, "max_model_len=0"),
        ({"dtype": "int4"}, "dtype='int4'"),
        ({"model": "a", "model_path": "b"}, "different models"),
        ({"model": "a", "tokenizer_path": "b"}, "tokenizer_path='b'"),
        ({"log_level": "loud"}, "log_level='loud'"),
    ],
)
def test_what_caesura_does_not_do_is_refused(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_arguments(keywords)


def test_a_whole_configuration_takes_the_place_of_keywords() -> None:
    with pytest.raises(TypeError, match="not both: dp_size"):
        Engine(config=FrontendConfig(), dp_size=2)
