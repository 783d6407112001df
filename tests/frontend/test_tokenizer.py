"""The tokenizer against the `tokenizers` library, and its words when something is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from frontend.errors import PromptTooLongError
from frontend.text.chat_template import ChatTemplateError
from frontend.text.token_bytes import TokenizerError, compile_decoder
from frontend.text.tokenizer import Tokenizer
from tests.support.tiny_tokenizers import (
    EOS,
    KINDS,
    new_library_tokenizer,
    save_model,
    tiny_tokenizer,
    token_id,
)

REPOSITORY = Path(__file__).parents[2]
LLAMA_LIKE = tiny_tokenizer("byte_fallback")


def byte_level() -> tokenizers.Tokenizer:
    return new_library_tokenizer("byte_level")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip_special_tokens", [True, False])
def test_decoding_a_text_gives_what_the_library_gives(kind: str, skip_special_tokens: bool) -> None:
    ours, library = tiny_tokenizer(kind), new_library_tokenizer(kind)
    for text in [
        "Hello world",
        "  two  spaces ",
        "fox" + EOS + " jumps<|im_start|>over",
        "",
        "é€😀 x",
    ]:
        ids = ours.encode(text)
        assert ids == library.encode(text).ids
        assert ours.decode(ids, skip_special_tokens=skip_special_tokens) == library.decode(
            ids, skip_special_tokens=skip_special_tokens
        )


@given(data=st.data(), skip_special_tokens=st.booleans())
def test_decoding_any_byte_level_ids_gives_what_the_library_gives(
    data: st.DataObject, skip_special_tokens: bool
) -> None:
    ours, library = tiny_tokenizer("byte_level"), byte_level()
    ids = data.draw(st.lists(st.integers(0, ours.vocab_size + 3), max_size=12))
    expected = library.decode(ids, skip_special_tokens=skip_special_tokens)
    assert ours.decode(ids, skip_special_tokens=skip_special_tokens) == expected


def test_a_bad_byte_spoils_no_good_character_beside_it() -> None:
    euro_and_half = [0xE2, 0x82, 0xAC, 0xE2, 0x82]
    ids = [token_id("byte_fallback", f"<0x{byte:02X}>") for byte in euro_and_half]
    assert LLAMA_LIKE.decode(ids) == "€\ufffd"


def test_ids_beyond_the_vocabulary_stand_for_nothing() -> None:
    ids = LLAMA_LIKE.encode("fox")
    assert LLAMA_LIKE.decode([*ids, LLAMA_LIKE.vocab_size + 5]) == "fox"
    assert LLAMA_LIKE.token_bytes(LLAMA_LIKE.vocab_size + 5) == b""


def test_a_token_has_bytes_and_a_text_of_its_own() -> None:
    half = token_id("byte_fallback", "<0xE2>")
    assert LLAMA_LIKE.token_bytes(half) == b"\xe2"
    assert LLAMA_LIKE.token_text(half) == "\ufffd"
    assert LLAMA_LIKE.token_text(LLAMA_LIKE.eos_token_ids[0]) == EOS


def test_special_tokens_are_added_only_when_asked_for(tmp_path: Path) -> None:
    library = byte_level()
    bos = library.token_to_id("<s>")
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    tokenizer = Tokenizer(save_model(tmp_path, library))
    assert tokenizer.encode("fox")[0] == bos
    assert bos not in tokenizer.encode("fox", add_special_tokens=False)


def test_padding_and_truncation_in_tokenizer_json_are_switched_off(tmp_path: Path) -> None:
    library = byte_level()
    library.enable_truncation(3)
    library.enable_padding(length=8)
    tokenizer = Tokenizer(save_model(tmp_path, library))
    text = "the quick brown fox jumps"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_eos_ids_come_from_the_tokenizer_first_and_then_the_generation_configuration(
    tmp_path: Path,
) -> None:
    library = byte_level()
    eos, other = library.token_to_id(EOS), library.token_to_id("<|im_start|>")
    config = {"eos_token_id": 77}
    plain = Tokenizer(save_model(tmp_path / "plain", library))
    assert plain.eos_token_ids == (eos,)
    with_config = Tokenizer(save_model(tmp_path / "config", library, config=config))
    assert with_config.eos_token_ids == (eos, 77)
    generation_config = {"eos_token_id": [other, eos]}
    both = save_model(
        tmp_path / "both", library, config=config, generation_config=generation_config
    )
    assert Tokenizer(both).eos_token_ids == (eos, other)


def test_the_eos_token_may_be_an_object_or_stand_in_the_special_tokens_map(tmp_path: Path) -> None:
    library = byte_level()
    directory = save_model(
        tmp_path, library, tokenizer_config={}, special_tokens_map={"eos_token": {"content": EOS}}
    )
    assert Tokenizer(directory).eos_token_ids == (library.token_to_id(EOS),)


def test_a_lone_surrogate_is_refused_as_a_value_error() -> None:
    with pytest.raises(ValueError, match="surrogate"):
        LLAMA_LIKE.encode("a\ud800")


def test_a_directory_without_tokenizer_json_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json in .*copy"):
        Tokenizer.load(str(tmp_path))
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(TokenizerError, match=r"convert tokenizer\.model"):
        Tokenizer.load(str(tmp_path))


def test_damaged_files_are_named(tmp_path: Path) -> None:
    directory = save_model(tmp_path, byte_level())
    (directory / "config.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"config\.json is not JSON"):
        Tokenizer(directory)
    (directory / "tokenizer.json").write_text("[]")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be read"):
        Tokenizer(directory)


def test_what_is_no_directory_and_no_hub_id_is_refused_with_the_remedy() -> None:
    with pytest.raises(TokenizerError, match=r"'/no/such/model'.*path of a model directory"):
        Tokenizer.load("/no/such/model")


def test_decoders_that_cannot_be_streamed_are_refused_by_name() -> None:
    with pytest.raises(TokenizerError, match="WordPiece"):
        compile_decoder({"type": "WordPiece", "prefix": "##"})
    with pytest.raises(TokenizerError, match="no decoder"):
        compile_decoder(None)


CHAT = [{"role": "user", "content": "hi <b>"}, {"role": "assistant", "content": "yo"}]
TEMPLATE = """{{ bos_token }}
{%- for message in messages %}
{%- if message.role == 'system' %}{{ raise_exception('no system messages') }}{% endif %}
[{{ message.role }}]{% generation %}{{ message.content }}{% endgeneration %}
{%- endfor %}
{%- if add_generation_prompt %}[assistant]{% endif %}"""


def test_a_chat_becomes_a_prompt(tmp_path: Path) -> None:
    config = {"eos_token": EOS, "bos_token": "<s>", "chat_template": TEMPLATE}
    tokenizer = Tokenizer(save_model(tmp_path, byte_level(), tokenizer_config=config))
    assert tokenizer.apply_chat_template(CHAT) == "<s>[user]hi <b>[assistant]yo[assistant]"
    prompt = tokenizer.apply_chat_template(CHAT, add_generation_prompt=False)
    assert prompt == "<s>[user]hi <b>[assistant]yo"
    with pytest.raises(ChatTemplateError, match="no system messages"):
        tokenizer.apply_chat_template([{"role": "system", "content": ""}])


def test_the_template_file_wins_and_of_several_the_default_one(tmp_path: Path) -> None:
    templates = [
        {"name": "tool_use", "template": "tools"},
        {"name": "default", "template": "{{ tools | tojson }}"},
    ]
    directory = save_model(
        tmp_path, byte_level(), tokenizer_config={"chat_template": templates, "eos_token": EOS}
    )
    prompt = Tokenizer(directory).apply_chat_template(CHAT, tools=[{"name": "é<"}])
    assert prompt == '[{"name": "é<"}]'
    (directory / "chat_template.jinja").write_text("from the file")
    assert Tokenizer(directory).apply_chat_template(CHAT) == "from the file"


def test_a_chat_without_a_template_is_refused_with_the_remedy() -> None:
    with pytest.raises(ChatTemplateError, match="no chat template; send a plain prompt"):
        LLAMA_LIKE.apply_chat_template(CHAT)


@pytest.mark.parametrize(
    "template",
    ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ messages[0].role.x.y }}"],
)
def test_a_template_reaches_nothing_but_what_it_is_given(tmp_path: Path, template: str) -> None:
    config = {"chat_template": template}
    tokenizer = Tokenizer(save_model(tmp_path, byte_level(), tokenizer_config=config))
    with pytest.raises(ChatTemplateError):
        tokenizer.apply_chat_template(CHAT)


def test_a_broken_template_is_found_when_it_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ChatTemplateError, match="broken"):
        Tokenizer(save_model(tmp_path, byte_level(), tokenizer_config={"chat_template": "{% if"}))


def test_the_front_end_side_never_imports_torch_or_transformers() -> None:
    code = (
        "import sys, frontend.text.tokenizer, frontend.text.output_processor;"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=REPOSITORY)


def test_a_long_text_is_encoded_as_the_library_does_and_refused_as_a_short_one() -> None:
    ours, library, text = tiny_tokenizer("byte_level"), byte_level(), "fox fox " * 1000
    assert ours.encode(text) == library.encode(text).ids
    for refused in ("\ud800", "\ud800" + text):
        with pytest.raises(ValueError, match="without lone surrogates"):
            ours.encode(refused)


def test_a_text_that_cannot_fit_is_refused_without_tokenizing_it() -> None:
    longest = LLAMA_LIKE.longest_token_chars
    assert longest >= max(len(LLAMA_LIKE.token_text(i)) for i in range(LLAMA_LIKE.vocab_size))
    LLAMA_LIKE.check_fits("x" * longest * 8, 8)
    with pytest.raises(PromptTooLongError, match=f"{longest * 8 + 1} characters, .*at most"):
        LLAMA_LIKE.check_fits("x" * (longest * 8 + 1), 8)
