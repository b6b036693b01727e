"""Checkpoints made to harm: each is refused in one sentence, before memory is taken for what it promises, and nothing waits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.preflight import check_model
from workers.checkpoint_files import read_object
from workers.errors import BatonError, InvalidConfig
from workers.model.checkpoint.ernie_config import ErnieConfig
from workers.model.checkpoint.weight_files import read_header
from workers.text.tokenizer import Tokenizer

SHIPPED = Path(__file__).parents[2] / "models" / "ernie-4.5-tiny"
EXAMPLES = int(os.environ.get("BATON_FUZZ_EXAMPLES", "60"))
FUZZ = settings(max_examples=EXAMPLES)

Spoil = Callable[[Path], object]


def make_model(folder: Path) -> Path:
    """The shipped checkpoint, with weights that are all zero and take no room on the disk."""
    shutil.copytree(SHIPPED, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    with (SHIPPED / "model.safetensors").open("rb") as stream:
        size = stream.read(8)
        header = stream.read(int.from_bytes(size, "little"))
    (folder / "model.safetensors").write_bytes(size + header)
    os.truncate(folder / "model.safetensors", (SHIPPED / "model.safetensors").stat().st_size)
    return folder


def edited(name: str, **changes: object) -> Spoil:
    def spoil(model: Path) -> None:
        document = json.loads((model / name).read_text()) if (model / name).exists() else {}
        (model / name).write_text(json.dumps(document | changes))

    return spoil


def raw(name: str, field: str, text: str) -> Spoil:
    """The field with a value that json.dumps would not write."""

    def spoil(model: Path) -> None:
        document = json.loads((model / name).read_text()) | {field: "@"}
        (model / name).write_text(json.dumps(document).replace('"@"', text))

    return spoil


def written(name: str, content: str | bytes) -> Spoil:
    return lambda model: (model / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def template(source: str) -> Spoil:
    return written("chat_template.jinja", source)


def replaced(name: str, make: Callable[[Path], object]) -> Spoil:
    def spoil(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        make(model / name)

    return spoil


def with_header(change: Callable[[dict[str, Any]], None]) -> Spoil:
    """The weights' header changed, the bytes after it left."""

    def spoil(model: Path) -> None:
        data = (model / "model.safetensors").read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        (model / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])

    return spoil


def with_vocabulary(token_id: int) -> Spoil:
    def spoil(model: Path) -> None:
        document = json.loads((model / "tokenizer.json").read_text())
        document["model"]["vocab"]["<far>"] = token_id
        (model / "tokenizer.json").write_text(json.dumps(document))

    return spoil


def outside(path: Path) -> None:
    (path.parent.parent / "secret").write_text('{"model_type": "secret"}')
    path.symlink_to("../secret")


DEEP = "[" * 200_000
FILES = (
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip
KINDS: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link out of the folder": outside,
    "a link in a circle": lambda path: path.symlink_to(path.name),
    "a folder": lambda path: path.mkdir(),
}
HOSTILE: dict[str, Spoil] = {
    f"{kind} as {name}": replaced(name, make) for name in FILES for kind, make in KINDS.items()
}
HOSTILE |= {
    f"{name} that is {what}": written(name, content)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
    for what, content in {"deep": DEEP, "no text": b"\xff\xfe", "cut": '{"a": ', "a number": "1", "empty": ""}.items()
}
HOSTILE |= {
    f"{field} {value!r:.20}": edited("config.json", **{field: value})
    for field, values in {
        "vocab_size": (0, -1, 10**12, True, "1408", 1409, [10**12], 1.5),
        "hidden_size": (0, 10**6, 10**9),
        "num_hidden_layers": (0, 10**9, 4000),
        "num_attention_heads": (0, 10**9, 3),
        "num_key_value_heads": (10**9, 3),
        "head_dim": (10**9, 3, 512),
        "intermediate_size": (10**12,),
        "max_position_embeddings": (10**12, 0, "many"),
        "moe_num_experts": (10**9, 60000),
        "moe_k": (10**9, 0),
        "rope_theta": (0, -1, "x", True),
        "rms_norm_eps": (0, -1, 10**9),
        "rope_scaling": ([1], {"rope_type": ["default"]}, {"type": {"a": 1}}),
        "tie_word_embeddings": ("yes", 1),
        "use_bias": (True, 0, [False]),
        "hidden_act": (["silu"], {"a": 1}),
        "model_type": (["ernie4_5"], {"a": 1}, None),
        "eos_token_id": ({"a": 1}, "x"),
    }.items()
    for value in values
}
HOSTILE |= {
    f"{field} {text:.12}": raw("config.json", field, text)
    for field in ("rope_theta", "rms_norm_eps", "vocab_size", "moe_norm_min")
    for text in ("NaN", "Infinity", "-Infinity", "1e999", "9" * 4000, "9" * 5000)
}
HOSTILE |= {
    f"generation eos {value!r:.20}": edited("generation_config.json", eos_token_id=value)
    for value in ("x", [[1]], [True], -1, 10**12, list(range(5000)), {"a": 1}, 1.5)
}
HOSTILE |= {
    "a header beyond the file": written("model.safetensors", (2**62).to_bytes(8, "little") + b"{}"),
    "a header of a gigabyte": lambda model: (
        (model / "model.safetensors").write_bytes((2**30).to_bytes(8, "little")),
        os.truncate(model / "model.safetensors", 2**30 + 8),
    ),
    "a deep header": written("model.safetensors", (200_000).to_bytes(8, "little") + DEEP.encode()),
    "a header of blanks": written("model.safetensors", (8).to_bytes(8, "little") + b" " * 8),
    "a tensor beyond the file": with_header(lambda h: h["model.norm.weight"].update(data_offsets=[0, 2**40])),
    "a tensor of another shape": with_header(lambda h: h["model.norm.weight"].update(shape=[2**40])),
    "a tensor of a negative shape": with_header(lambda h: h["model.norm.weight"].update(shape=[-1])),
    "a tensor whose shape overflows": with_header(lambda h: h["model.norm.weight"].update(shape=[2**33, 2**33])),
    "a tensor of an unknown type": with_header(lambda h: h["model.norm.weight"].update(dtype="F7")),
    "a tensor without offsets": with_header(lambda h: h["model.norm.weight"].pop("data_offsets")),
    "tensors missing": with_header(lambda h: h.update(x=h.pop("model.norm.weight"))),
    "an index to elsewhere": lambda model: (
        (model / "model.safetensors").unlink(),
        (model / "model.safetensors.index.json").write_text('{"weight_map": {"w": "../../etc/passwd"}}'),
    ),
    "an index of many files": lambda model: (
        (model / "model.safetensors").unlink(),
        (model / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {str(at): f"{at}.safetensors" for at in range(5000)}})
        ),
    ),
    "an index of lists": lambda model: (
        (model / "model.safetensors").unlink(),
        (model / "model.safetensors.index.json").write_text('{"weight_map": {"w": ["a"]}}'),
    ),
    "token id 10^8": with_vocabulary(10**8),
    "token id 2^31": with_vocabulary(2**31),
    "token id -1": with_vocabulary(-1),
    "a tokenizer of another kind": edited("tokenizer.json", model={"type": "Evil"}),
    "a tokenizer's decoder of another kind": edited(
        "tokenizer.json", decoder={"type": "WordPiece", "prefix": "#", "cleanup": True}
    ),
    "a template of templates": edited("tokenizer_config.json", chat_template=[{"name": ["x"], "template": 1}]),
}
HOSTILE["a template of templates"] = lambda model: (
    (model / "chat_template.jinja").unlink(),
    edited("tokenizer_config.json", chat_template=[{"name": ["x"], "template": "1"}])(model),
)
HOSTILE |= {
    f"template: {source[:40]}": template(source)
    for source in (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{{ b }}{% endfor %}{% endfor %}",
        "{{ 9 ** 9 ** 9 ** 9 }}",
        "{{ 'a' * 10 ** 10 }}",
        "{{ [0] * 10 ** 10 }}",
        "{{ 'a' | center(10 ** 10) }}",
        "{{ 'a'.ljust(10 ** 10) }}",
        "{{ '%09999999999d' % 1 }}",
        "{{ '%*d' % (10 ** 9, 1) }}",
        "{{ '{:>9999999999}'.format(1) }}",
        "{{ '{:>{}}'.format(1, 10 ** 10) }}",
        "{{ '%09999999999d' | format(1) }}",
        "{% set s = namespace(x='aaaaaaaa') %}{% for a in range(60) %}{% set s.x = s.x ~ s.x %}{% endfor %}{{ s.x }}",
        "{% set s = namespace(x='aaaaaaaa') %}{% for a in range(60) %}{% set s.x = s.x + s.x %}{% endfor %}{{ s.x }}",
        "{% set s = namespace(x='aaaaaaaa') %}{% for a in range(60) %}{% set s.x = s.x | replace('a', s.x) %}{% endfor %}",
        "{% set s = namespace(x='aaaaaaaa') %}{% for a in range(60) %}{% set s.x = s.x.replace('a', s.x) %}{% endfor %}",
        "{% set s = namespace(x=[1]) %}{% for a in range(60) %}{% set s.x = [s.x, s.x] %}{% endfor %}{{ s.x | tojson }}",
        "{% set s = namespace(x=[1]) %}{% for a in range(60) %}{% set s.x = [s.x, s.x] %}{% endfor %}{{ s.x }}",
        "{% for a in range(99999) %}" + "x" * 100_000 + "{% endfor %}",
        "{% set x %}{% for a in range(99999) %}" + "x" * 100_000 + "{% endfor %}{% endset %}",
        "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}" + "{% for a in range(10**9) %}{% endfor %}",
        "{% for a in [[1]] recursive %}{{ loop(a) }}{% endfor %}",
        "{{ 'x' | slice(10 ** 9) | list }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{{ " + "-" * 100_000 + "1 }}",
        "{% if x %}" * 3000 + "{% endif %}" * 3000,
        "x" * (1 << 21),
    )
}
HARMLESS = {
    "eos_token_id 'x'", "eos_token_id {'a': 1}",  # generation_config.json decides
    # A link in a circle names no file, and these may be missing.
    *(f"a link in a circle as {name}" for name in FILES if name not in ("config.json", "model.safetensors", "tokenizer.json")),
}  # fmt: skip


def test_the_shipped_checkpoint_passes_also_by_the_links_of_a_hub_cache(tmp_path: Path) -> None:
    check_model(str(SHIPPED))
    snapshot = tmp_path / "models--x" / "snapshots" / "0a1b"
    snapshot.mkdir(parents=True)
    shutil.copytree(SHIPPED, tmp_path / "models--x" / "blobs")
    for file in SHIPPED.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    check_model(str(snapshot))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", sorted(HOSTILE.keys() - HARMLESS))
def test_a_hostile_checkpoint_is_refused_in_one_sentence(tmp_path: Path, kind: str) -> None:
    model = make_model(tmp_path / "model")
    HOSTILE[kind](model)
    with pytest.raises(InvalidConfig) as refused:
        check_model(str(model))
    sentence = str(refused.value)
    assert str(model) in sentence and "\n" not in sentence and len(sentence) < 700, sentence


@pytest.mark.parametrize("kind", ["a pipe as model.safetensors", "max_position_embeddings 1000000000000"])
def test_baton_serve_ends_with_exit_code_2(tmp_path: Path, kind: str) -> None:
    model = make_model(tmp_path / "model")
    HOSTILE[kind](model)
    command = [sys.executable, "-m", "cluster.cli", "serve", "--port", "0", "--model", str(model)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2, ended
    assert ended.stderr.startswith("baton: ") and ended.stderr.count("\n") == 1, ended.stderr


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
NAMES = tuple(json.loads((SHIPPED / "config.json").read_text()))


@FUZZ
@given(
    st.dictionaries(st.sampled_from((*NAMES, "rope_parameters", "head_dim", "quantization_config")), JSON, max_size=5)
)
def test_a_config_of_any_values_is_read_or_refused(changes: dict[str, Any]) -> None:
    folder = Path(tempfile.mkdtemp())
    document = json.loads((SHIPPED / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(document))
    try:
        config = ErnieConfig.load(folder)
    except InvalidConfig as refused:
        assert str(folder) in str(refused) and "\n" not in str(refused)
    else:
        assert (
            0 < config.rope_theta < 1e16 and 0 < config.rms_norm_eps <= 1 and config.max_position_embeddings <= 1 << 21
        )
    shutil.rmtree(folder)


@FUZZ
@given(
    st.binary(max_size=300)
    | st.builds(lambda size, text: size.to_bytes(8, "little") + text, st.integers(0, 400), st.binary(max_size=300))
)
def test_a_safetensors_file_of_any_bytes_is_read_or_refused(data: bytes) -> None:
    path = Path(tempfile.mkdtemp()) / "model.safetensors"
    path.write_bytes(data)
    try:
        read_header(path)
    except InvalidConfig as refused:
        assert str(path) in str(refused)
    shutil.rmtree(path.parent)


@FUZZ
@given(
    st.sampled_from(("model", "decoder", "pre_tokenizer", "normalizer", "added_tokens", "post_processor", "version")),
    JSON,
)
def test_a_tokenizer_of_any_values_is_read_or_refused(field: str, value: Any) -> None:
    folder = Path(tempfile.mkdtemp())
    document = json.loads((SHIPPED / "tokenizer.json").read_text()) | {field: value}
    (folder / "tokenizer.json").write_text(json.dumps(document))
    try:
        Tokenizer.load(folder)
    except BatonError as refused:
        assert str(folder) in str(refused)
    shutil.rmtree(folder)


@FUZZ
@given(st.binary(max_size=200))
def test_json_of_any_bytes_is_read_or_refused(data: bytes) -> None:
    path = Path(tempfile.mkdtemp()) / "config.json"
    path.write_bytes(data)
    try:
        assert isinstance(read_object(path), dict)
    except InvalidConfig as refused:
        assert str(path) in str(refused)
    shutil.rmtree(path.parent)
