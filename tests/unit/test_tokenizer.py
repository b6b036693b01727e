"""What text and tokens promise each other: nothing is lost, nothing comes too early, templates read as published."""

from __future__ import annotations

import json
import random
import shutil
import threading
from pathlib import Path

import pytest
import tokenizers
from fake_backend import CHECKPOINT
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from workers.errors import InvalidConfig, InvalidRequest
from workers.text.tokenizer import IncrementalDetokenizer, Tokenizer

ERNIE_TEXT_TEMPLATE = """\
{%- if not add_generation_prompt is defined -%}
    {%- set add_generation_prompt = true -%}
{%- endif -%}
{%- if not cls_token is defined -%}
    {%- set cls_token = "<|begin_of_sentence|>" -%}
{%- endif -%}
{%- if not sep_token is defined -%}
    {%- set sep_token = "<|end_of_sentence|>" -%}
{%- endif -%}
{{- cls_token -}}
{%- for message in messages -%}
    {%- if message["role"] == "user" -%}
        {{- "User: " + message["content"] + "\\n" -}}
    {%- elif message["role"] == "assistant" -%}
        {%- generation -%}
        {{- "Assistant: " + message["content"] + sep_token -}}
        {%- endgeneration -%}
    {%- elif message["role"] == "system" -%}
        {{- message["content"] + "\\n" -}}
    {%- else -%}
        {{- raise_exception("unknown role " + message["role"] | tojson) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "Assistant: " -}}
{%- endif -%}
"""
SPECIAL = ("<unk>", "<s>", "</s>", "<|begin_of_sentence|>", "<|end_of_sentence|>")


def make_byte_fallback_checkpoint(folder: Path) -> Path:
    """A vocabulary as the published one is built: SentencePiece pieces, the 256 bytes, no blank put before a text."""
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"AUaeinrst:你好é", "▁a", "er", "User"]
    merges = [("▁", "a"), ("e", "r"), ("U", "s"), ("Us", "er")]
    pieces.insert(-1, "Us")
    model = models.BPE({piece: place for place, piece in enumerate(pieces)}, merges, byte_fallback=True, fuse_unk=True)
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(list(SPECIAL))
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "lstrip": False},
        "cls_token": "<|begin_of_sentence|>",
        "sep_token": "<|end_of_sentence|>",
        "add_bos_token": False,
        "chat_template": ERNIE_TEXT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    return Tokenizer.load(CHECKPOINT)


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(make_byte_fallback_checkpoint(tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture(params=["byte_level", "byte_fallback"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    found: Tokenizer = request.getfixturevalue(request.param)
    return found


def blanks_of_metaspace(text: str) -> str:
    """What SentencePiece's vocabularies keep of a text: they write a blank as U+2581, so that letter itself reads back as a blank."""
    return text.replace("\u2581", " ")


@given(text=st.text())
@example(text="a\u2581 b")
@settings(max_examples=200, deadline=None)
def test_any_text_survives_encoding_and_decoding(byte_level: Tokenizer, byte_fallback: Tokenizer, text: str) -> None:
    assert byte_level.decode(byte_level.encode(text)) == text
    assert byte_fallback.decode(byte_fallback.encode(text)) == blanks_of_metaspace(text)


@given(seed=st.integers(), length=st.integers(0, 60), skip=st.booleans())
@settings(max_examples=200, deadline=None)
def test_pushed_pieces_of_random_tokens_join_to_the_decoded_whole(
    byte_level: Tokenizer, byte_fallback: Tokenizer, seed: int, length: int, skip: bool
) -> None:
    for tokenizer in (byte_level, byte_fallback):
        token_ids = random.Random(seed).choices(range(-1, tokenizer.vocab_size + 1), k=length)
        detokenizer = IncrementalDetokenizer(tokenizer, (), skip)
        pieces = [detokenizer.push(token_id) for token_id in token_ids]
        assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(token_ids, skip)


@given(text=st.text(min_size=1))
@example(text="\u2581")
@settings(max_examples=200, deadline=None)
def test_pushed_pieces_are_never_taken_back(byte_level: Tokenizer, byte_fallback: Tokenizer, text: str) -> None:
    for tokenizer, expected in ((byte_level, text), (byte_fallback, blanks_of_metaspace(text))):
        detokenizer, certain = IncrementalDetokenizer(tokenizer, (), False), ""
        for token_id in tokenizer.encode(text):
            certain += detokenizer.push(token_id)
            assert expected.startswith(certain)
        assert certain == expected


def test_decoding_agrees_with_the_tokenizers_library(tokenizer: Tokenizer) -> None:
    for text in ("User: ein a", "你好 é 🜂", " a  a\n", "<s>a</s>", "a\u2581a"):
        token_ids = tokenizer.encode(text)
        for skip in (False, True):
            assert tokenizer.decode(token_ids, skip) == tokenizer._backend.decode(token_ids, skip_special_tokens=skip)


def test_an_unfinished_character_is_held_back_until_its_last_byte(tokenizer: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer, tokenizer.encode("a"), True)
    pieces = [detokenizer.push(token_id) for token_id in tokenizer.encode("🜂")]
    assert len(pieces) == 4 and pieces == ["", "", "", "🜂"] and detokenizer.flush() == ""


def test_a_character_that_never_ends_comes_out_as_one_replacement_on_flush(tokenizer: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer, (), True)
    assert [detokenizer.push(token_id) for token_id in tokenizer.encode("🜂")[:3]] == ["", "", ""]
    assert detokenizer.flush() == "�" and detokenizer.flush() == ""


def test_a_character_that_the_prompt_began_is_completed_by_the_output(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("a🜂")
    detokenizer = IncrementalDetokenizer(tokenizer, token_ids[-4:-1], True)
    assert detokenizer.push(token_ids[-1]) == "🜂"


def test_a_decoder_that_takes_the_first_blank_takes_it_only_at_the_start_of_a_text() -> None:
    backend = tokenizers.Tokenizer(models.BPE({"▁a": 0, "b": 1}, []))
    backend.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer = Tokenizer(backend, {}, {}, frozenset())
    assert tokenizer.decode([0, 1, 0]) == backend.decode([0, 1, 0]) == "ab a"
    detokenizer = IncrementalDetokenizer(tokenizer, (), True)
    assert [detokenizer.push(token_id) for token_id in (0, 0)] == ["a", " a"]
    assert IncrementalDetokenizer(tokenizer, [1], True).push(0) == " a"


def test_special_tokens_are_shown_or_skipped_as_asked(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("a</s>e")
    assert tokenizer.decode(token_ids) == "a</s>e" and tokenizer.decode(token_ids, skip_special_tokens=True) == "ae"


def test_every_token_has_its_own_bytes_and_a_printable_name(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("a🜂")
    assert b"".join(map(tokenizer.token_bytes, token_ids)) == "a🜂".encode()
    assert [tokenizer.token_text(token_id) for token_id in token_ids] == [
        "a",
        "bytes:\\xf0",
        "bytes:\\x9f",
        "bytes:\\x9c",
        "bytes:\\x82",
    ]


def test_ids_outside_the_vocabulary_have_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([-1, tokenizer.vocab_size, 10**9]) == ""


def test_a_conversation_reads_as_the_published_text_template(tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "3?"},
    ]
    text = "<|begin_of_sentence|>Be brief.\nUser: 1?\nAssistant: 2<|end_of_sentence|>User: 3?\n"
    assert tokenizer.render_chat(messages, add_generation_prompt=False) == text
    assert tokenizer.render_chat(messages) == text + "Assistant: "


def test_template_arguments_reach_the_template(byte_fallback: Tokenizer) -> None:
    rendered = byte_fallback.render_chat([{"role": "user", "content": "a"}], sep_token="<end>", cls_token="<cls>")
    assert rendered == "<cls>User: a\nAssistant: "


def test_a_template_can_refuse_a_conversation_as_the_callers_fault(byte_fallback: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match=r'unknown role "tool"'):
        byte_fallback.render_chat([{"role": "tool", "content": "a"}])
    with pytest.raises(InvalidRequest, match="cannot render"):
        byte_fallback.render_chat([{"role": "user", "content": None}])


def test_templates_run_in_a_sandbox_with_what_published_ones_use(byte_level: Tokenizer) -> None:
    source = "{% for n in [1, 2, 3] %}\n{% if n == 2 %}\n{% continue %}\n{% endif %}\n{{ n | tojson }}{% endfor %}"
    source += "{{ strftime_now('%Y') | length }}{{ {'é': 1} | tojson(indent=2) }}"
    tokenizer = Tokenizer(byte_level._backend, {"default": source}, {}, frozenset())
    assert tokenizer.render_chat([]) == '134{\n  "é": 1\n}'
    escaping = Tokenizer(byte_level._backend, {"default": "{{ messages.append(1) }}"}, {}, frozenset())
    with pytest.raises(InvalidRequest):
        escaping.render_chat([])


def test_a_list_of_templates_is_chosen_from_by_whether_there_are_tools(tmp_path: Path) -> None:
    make_byte_fallback_checkpoint(tmp_path)
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.render_chat([]) == "plain" and tokenizer.render_chat([], [{"type": "function"}]) == "tools"


def test_a_checkpoint_without_a_template_says_so(tmp_path: Path) -> None:
    make_byte_fallback_checkpoint(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer.load(tmp_path)
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequest, match="no chat template"):
        tokenizer.render_chat([{"role": "user", "content": "a"}])


def test_generation_config_decides_what_ends_a_text_then_config_then_the_tokenizer(tmp_path: Path) -> None:
    make_byte_fallback_checkpoint(tmp_path)
    assert Tokenizer.load(tmp_path).eos_token_ids == {2}
    (tmp_path / "config.json").write_text('{"eos_token_id": 1}')
    assert Tokenizer.load(tmp_path).eos_token_ids == {1}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 4]}')
    assert Tokenizer.load(tmp_path).eos_token_ids == {2, 4}


def test_a_folder_without_a_usable_tokenizer_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"neither tokenizer\.json nor tokenizer\.model"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(InvalidConfig, match=r"transformers and sentencepiece .* tokenizer\.json beside it"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InvalidConfig, match="is not a tokenizer"):
        Tokenizer.load(tmp_path)


def test_a_decoder_that_baton_does_not_know_is_refused() -> None:
    backend = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(InvalidConfig, match="WordPiece"):
        Tokenizer(backend, {}, {}, frozenset())


def test_truncation_and_padding_that_a_training_script_left_in_the_file_are_not_obeyed(tmp_path: Path) -> None:
    for path in CHECKPOINT.iterdir():
        shutil.copy(path, tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    backend.enable_truncation(8)
    backend.enable_padding(length=64)
    (tmp_path / "tokenizer.json").unlink()
    backend.save(str(tmp_path / "tokenizer.json"))
    plain, marked = Tokenizer.load(CHECKPOINT), Tokenizer.load(tmp_path)
    for text in ("Who are you?", "The sky is blue. " * 40):
        assert marked.encode(text) == plain.encode(text)
    assert 8 < len(plain.encode("The sky is blue. " * 40)) != 64


@settings(max_examples=200)
@given(
    st.text(max_size=300) | st.sampled_from([" ", "a", "User", "</s>", "<|begin_of_sentence|>"]).map(lambda s: s * 50)
)
def test_no_text_has_fewer_tokens_than_its_length_promises(
    byte_level: Tokenizer, byte_fallback: Tokenizer, text: str
) -> None:
    for tokenizer in (byte_level, byte_fallback):
        assert len(tokenizer.encode(text)) >= tokenizer.least_tokens(text)
        assert tokenizer.least_tokens("a" * 1000) >= 40


@pytest.mark.parametrize(
    "lossy",
    [
        lambda t: setattr(t, "normalizer", normalizers.NFKC()),
        lambda t: setattr(
            t, "normalizer", normalizers.Sequence([normalizers.Replace("ab", "a"), normalizers.Lowercase()])
        ),
        lambda t: setattr(
            t, "pre_tokenizer", pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel()])
        ),
        lambda t: setattr(
            t,
            "pre_tokenizer",
            pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel()]),
        ),
        lambda t: setattr(t, "pre_tokenizer", None),
        lambda t: t.add_special_tokens([tokenizers.AddedToken("<mask>", lstrip=True)]),
    ],
)
def test_nothing_is_promised_of_a_tokenizer_that_may_drop_characters(lossy) -> None:  # type: ignore[no-untyped-def]
    backend = tokenizers.Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    assert Tokenizer(backend, {}, {}, frozenset()).least_tokens("a" * 1000) > 0
    lossy(backend)
    assert Tokenizer(backend, {}, {}, frozenset()).least_tokens("a" * 1000) == 0


def test_other_threads_run_while_a_long_text_is_encoded(byte_level: Tokenizer) -> None:
    turns, is_done = 0, threading.Event()

    def take_turns() -> None:
        nonlocal turns
        while not is_done.wait(0.001):
            turns += 1

    other = threading.Thread(target=take_turns)
    other.start()
    before = turns
    byte_level.encode("hello there my friend " * 50_000)
    during = turns - before
    is_done.set()
    other.join()
    assert during >= 5  # one at most, where the interpreter's lock is held
