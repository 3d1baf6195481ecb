"""Loading bases: what is refused and in which words, no network for folders, no noise, a head that follows the seed."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from graftlm.errors import ModelError
from graftlm.models import load_base, load_tokenizer, resolve_base
from training.tiny_runs import Tiny, save_llama


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base in a folder must never make anyone look up a name or open a connection."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def copy(tiny_base: Path, tmp_path: Path) -> Path:
    """The tiny base, to be damaged."""
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def code_of(caught: pytest.ExceptionInfo[ModelError]) -> str:
    assert len(str(caught.value).splitlines()) <= 12
    return caught.value.findings[0].code


def test_a_base_loads_in_evaluation_mode_and_in_silence(tiny_base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = load_base(tiny_base)
    assert not model.training
    assert model.dtype == torch.float32
    assert model.config.pad_token_id == tokenizer.pad_token_id
    load_base(tiny_base, task="classify", labels=["no", "yes"])
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")


def test_an_encoder_with_a_new_head_loads_in_silence(tiny_bert: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, _ = load_base(tiny_bert, task="classify", labels=["no", "perhaps", "yes"])
    assert model.config.num_labels == 3
    assert model.config.id2label == {0: "no", 1: "perhaps", 2: "yes"}
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")


@pytest.mark.parametrize("kind", ["tiny_base", "tiny_bert"])
def test_the_head_follows_the_seed_and_nothing_else_does(kind: str, request: pytest.FixtureRequest) -> None:
    base = request.getfixturevalue(kind)
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(load_base(base, task="classify", labels=["no", "yes"])[0].state_dict())
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name])
        assert torch.equal(tensor, found[2][name]) == (not name.startswith(("score.weight", "classifier.weight"))), name


@pytest.mark.parametrize(
    ("dtype", "wanted"), [("auto", torch.float32), ("bfloat16", torch.bfloat16), (torch.float16, torch.float16)]
)
def test_types(dtype: Any, wanted: torch.dtype, tiny_base: Path) -> None:
    assert load_base(tiny_base, dtype=dtype)[0].dtype == wanted


def test_wrong_words_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    for code, options in (
        ("M108", {"dtype": "float8"}),
        ("Q101", {"quantize": "nf5"}),
        ("M109", {"task": "classify"}),
    ):
        with pytest.raises(ModelError) as caught:
            load_base(tmp_path / "nowhere", **options)
        assert code_of(caught) == code


def test_a_file_is_no_base(copy: Path) -> None:
    with pytest.raises(ModelError) as caught:
        load_base(copy / "model.safetensors")
    assert code_of(caught) == "M101"


def test_a_missing_folder_is_answered_with_the_nearest(copy: Path) -> None:
    with pytest.raises(ModelError) as caught:
        resolve_base(str(copy.with_name("bse")))
    assert code_of(caught) == "M102"
    assert caught.value.findings[0].fix == f"-m {copy}"
    for name in ("./nowhere", "/no/where", "~/nowhere", "a/b/c"):
        with pytest.raises(ModelError) as caught:
            resolve_base(name)
        assert code_of(caught) == "M102"


def test_names_of_hubs_pass(copy: Path) -> None:
    assert resolve_base("owner/model-7B.v2") == "owner/model-7B.v2"
    assert resolve_base("gpt2") == "gpt2"


def _pickled(base: Path) -> None:
    torch.save({}, base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()


def _edit(base: Path, name: str, **changes: Any) -> None:
    config = json.loads((base / name).read_text()) | changes
    (base / name).write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def _cut(base: Path, name: str) -> None:
    data = (base / name).read_bytes()
    (base / name).write_bytes(data[: len(data) // 2])


DAMAGES: dict[str, tuple[str, str, Callable[[Path], Any]]] = {
    "pickled only": ("M103", "unpickles nothing", _pickled),
    "no weights": ("M104", "no .safetensors", lambda base: (base / "model.safetensors").unlink()),
    "no config": ("M106", "no config.json", lambda base: (base / "config.json").unlink()),
    "weights cut short": ("M116", "cannot load", lambda base: _cut(base, "model.safetensors")),
    "weights empty": ("M116", "cannot load", lambda base: (base / "model.safetensors").write_bytes(b"")),
    "config cut short": ("M116", "cannot load", lambda base: _cut(base, "config.json")),
    "unknown type": ("M116", "llamarama", lambda base: _edit(base, "config.json", model_type="llamarama")),
    "no type": ("M116", "cannot load", lambda base: _edit(base, "config.json", model_type=None, architectures=None)),
    "other shape": ("M115", "wrong shape", lambda base: _edit(base, "config.json", intermediate_size=40)),
    "more layers": ("M114", "lacks", lambda base: _edit(base, "config.json", num_hidden_layers=2)),
    "no tokenizer": ("M112", "no tokenizer", lambda base: [f.unlink() for f in base.glob("token*")]),
    "tokenizer cut short": ("M112", "no tokenizer", lambda base: _cut(base, "tokenizer.json")),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_base_is_refused(name: str, copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, says, damage = DAMAGES[name]
    damage(copy)
    with pytest.raises(ModelError) as caught:
        load_base(copy)
    assert code_of(caught) == code, str(caught.value)
    assert says in str(caught.value)
    assert str(copy) in str(caught.value)
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")


@pytest.mark.parametrize("name", ["config cut short", "unknown type", "no tokenizer", "weights cut short"])
def test_a_run_on_a_damaged_base_is_refused(name: str, copy: Path, tiny: Tiny, answered: Path, tmp_path: Path) -> None:
    code, says, damage = DAMAGES[name]
    damage(copy)
    with pytest.raises(ValueError, match=says) as caught:
        tiny(answered, base=copy)
    assert caught.value.findings[0].code == code  # type: ignore[attr-defined]
    assert not (tmp_path / "run").exists()


def test_an_adapter_is_no_base(tiny: Tiny, tiny_base: Path, answered: Path) -> None:
    run = tiny(answered)
    for place in (run.folder, run.folder / "adapter"):
        with pytest.raises(ModelError) as caught:
            load_base(place)
        assert code_of(caught) == "M105"
        assert str(tiny_base) in caught.value.findings[0].fix


def test_an_encoder_cannot_write(tiny_bert: Path) -> None:
    for task in ("lm", "sft"):
        with pytest.raises(ModelError) as caught:
            load_base(tiny_bert, task=task)
        assert code_of(caught) == "M113"


def test_a_writer_without_its_head_is_refused(tmp_path: Path) -> None:
    # transformers would draw a random one and say so in a warning only.
    from safetensors.torch import load_file, save_file

    base = save_llama(tmp_path / "base", tie_word_embeddings=False)
    tensors = load_file(base / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lacks lm_head.weight") as caught:
        load_base(base)
    assert code_of(caught) == "M114"
    assert load_base(base, task="classify", labels=["no", "yes"])[0].config.num_labels == 2


def test_a_classifier_of_other_classes_gets_a_new_head(tiny_bert: Path, tmp_path: Path) -> None:
    model, tokenizer = load_base(tiny_bert, task="classify", labels=["a", "b", "c", "d", "e"])
    model.save_pretrained(tmp_path / "five")
    tokenizer.save_pretrained(tmp_path / "five")
    again, _ = load_base(tmp_path / "five", task="classify", labels=["no", "yes"])
    assert again.classifier.weight.shape == (2, 32)
    assert float(again.classifier.weight.detach().std()) > 0
    assert torch.equal(again.bert.embeddings.word_embeddings.weight, model.bert.embeddings.word_embeddings.weight)


def test_a_tokenizer_larger_than_the_table_is_refused(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base", vocab_size=100)
    with pytest.raises(ModelError) as caught:
        load_base(base)
    assert code_of(caught) == "M111"


def test_code_of_the_models_author_does_not_run(copy: Path, tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    (copy / "theirs.py").write_text(f"open({str(witness)!r}, 'w')\nclass C: pass\nclass M: pass\n")
    _edit(
        copy,
        "config.json",
        model_type="theirs",
        auto_map={"AutoConfig": "theirs.C", "AutoModelForCausalLM": "theirs.M"},
    )
    with pytest.raises(ModelError):
        load_base(copy)
    _edit(copy, "config.json", model_type="llama")
    _edit(copy, "tokenizer_config.json", auto_map={"AutoTokenizer": ["theirs.M", None]})
    load_base(copy)
    load_tokenizer(str(copy))
    assert not witness.exists()
