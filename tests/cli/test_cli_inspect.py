"""Looking into models of all kinds, adapters and data files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from graftlm.cli import inspect_model
from graftlm.core import attach
from graftlm.formats import save_adapter
from graftlm.methods import read_method
from graftlm.models import load_base
from models_for_tests import MODELS, tiny
from training.tiny_runs import save_llama

_FEW = ("llama", "gpt2", "bert", "t5", "bart", "mixtral", "gpt_neox", "distilbert", "llama_classifier", "modernbert")

#: T5 has its table of positions in the first layer only, ModernBERT no norm there.
_FIRST_LAYER_DIFFERS = ("t5", "t5_gated", "modernbert")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model folders with a configuration and nothing else."""
    root = tmp_path_factory.mktemp("models")
    for name in MODELS:
        tiny(name).config.save_pretrained(root / name)
    return root


def test_bundled_tree(cli: Callable) -> None:
    said = cli("inspect", "bundled", "--method", "lora(rank=8,targets=attention)+head")
    assert said.code == 0, said.err
    lines = {line.split()[0]: line.split()[1:] for line in said.out.splitlines() if line.strip()}
    assert lines["q_proj"] == ["query", "256", "->", "256"]
    assert lines["layers.0-4"][:4] == ["5", "x", "737", "792"]
    assert "(is model.embed_tokens.weight)" in said.out
    assert lines["query"] == ["5", "sites", "20", "480"]
    assert lines["head"] == ["1", "sites", "1", "048", "576"]


def test_it_is_said_who_unpacks_four_bits(cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    for own in ("torch", "bitsandbytes"):
        monkeypatch.setattr(inspect_model, "unpacked_by", lambda *_, own=own, **__: own)
        assert f"with --quantize nf4 its maps are unpacked by {own} here (cpu)" in cli("inspect", "bundled").out


@pytest.mark.parametrize("name", MODELS)
def test_tree_of_every_kind_of_model(cli: Callable, folders: Path, name: str) -> None:
    said = cli("inspect", str(folders / name), "--json")
    assert said.code == 0, said.err
    found = json.loads(said.out)
    model = tiny(name)
    if found["class"] == type(model).__name__:
        assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["layers"] == 2
    assert found["roles"]["embed"] >= 1
    assert {"output", "qkv"} & found["roles"].keys()
    assert sum(node["parameters"] for node in found["tree"]) == found["parameters"]
    assert ('"name": "0-1"' in said.out) is (name not in _FIRST_LAYER_DIFFERS)


@pytest.mark.parametrize("name", _FEW)
def test_text_of_every_kind_of_model(cli: Callable, folders: Path, name: str) -> None:
    said = cli("inspect", str(folders / name), "--method", "lora(targets=all-linear)")
    assert said.code == 0, said.err
    lines = said.out.splitlines()
    assert len(lines) <= 90
    assert (".0-1" in said.out) is (name not in _FIRST_LAYER_DIFFERS)
    assert any(line.startswith("lora") and "on disk" in line for line in lines)
    assert all(line == line.rstrip() for line in lines)


def test_task_chooses_the_head(cli: Callable, folders: Path) -> None:
    found = json.loads(cli("inspect", str(folders / "llama"), "--task", "classify", "--json").out)
    assert found["class"] == "LlamaForSequenceClassification"
    assert "no task" in cli("inspect", str(folders / "llama"), "--task", "clasify").err
    assert "has no model for task lm" in cli("inspect", str(folders / "distilbert"), "--task", "lm").err


def test_what_a_method_would_train_is_what_it_trains(cli: Callable, folders: Path) -> None:
    model = tiny("llama")
    whole = sum(p.numel() for p in model.parameters())
    for text in ("lora(rank=4)", "head", "full", "layers(layers='-1:')"):
        found = json.loads(cli("inspect", str(folders / "llama"), "--method", text, "--json").out)["method"]
        adapter = attach(model, read_method(text))
        assert found["parameters"] == adapter.parameter_count
        assert found["bytes"] == 4 * adapter.parameter_count
        assert found["percent"] == pytest.approx(100 * adapter.parameter_count / whole)
        assert sum(part["parameters"] for part in found["by_role"].values()) == adapter.parameter_count
        adapter.detach()


@pytest.mark.parametrize(
    ("method", "said"),
    [("lorra", "Did you mean lora?"), ("bitfit(add=false)", "no biases to train"), ("lora(targets=qproj)", "q_proj")],
)
def test_methods_that_do_not_fit(cli: Callable, folders: Path, method: str, said: str) -> None:
    answer = cli("inspect", str(folders / "llama"), "--method", method)
    assert (answer.code, said in answer.err) == (2, True)


@pytest.mark.parametrize(
    "content", ["{", "{}", '{"model_type": "nonsense"}', '{"model_type": "llama", "hidden_size": "x"}']
)
def test_a_broken_configuration(cli: Callable, tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    answer = cli("inspect", str(tmp_path))
    assert answer.code == 2
    assert "[M116]" in answer.err


# --- adapters ---


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = tiny("llama")
    adapter = attach(model, read_method("lora(rank=2)+head"))
    folder = tmp_path / "runs" / "x-1" / "adapter"
    save_adapter(adapter, folder, facts={"task": "sft", "base": "some/base", "labels": None})
    return folder


def test_adapter(cli: Callable, saved: Path) -> None:
    found = json.loads(cli("inspect", str(saved.parent), "--json").out)
    assert found["method"] == "lora(rank=2)+head"
    assert (found["base"], found["base_class"], found["task"]) == ("some/base", "LlamaForCausalLM", "sft")
    assert len(found["fingerprint"]) >= 8
    assert found["checksums_ok"] is True
    tensors = {tensor["name"]: tensor for tensor in found["tensors"]}
    assert found["parameters"] == sum(tensor["size"] for tensor in tensors.values())
    one = next(tensor for name, tensor in tensors.items() if name.endswith("0.self_attn.q_proj.lora_A.weight"))
    assert one["shape"] == [2, 32]
    assert 0 < one["norm"] < 10
    text = cli("inspect", str(saved)).out
    assert "layers.*.self_attn.q_proj.lora_A.weight" in text
    assert "checksums  ok" in text


def test_a_changed_adapter(cli: Callable, saved: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = saved / "adapter_model.safetensors"
    tensors = load_file(file)
    first, second, *_ = sorted(tensors)
    tensors[first] = tensors[first] + 1
    del tensors[second]
    save_file({**tensors, "more": torch.zeros(2)}, file)
    said = cli("inspect", str(saved))
    assert said.code == 2
    assert "checksums  wrong" in said.out
    assert f"{first} was changed" in said.err
    assert f"{second} is missing" in said.err
    assert "more was not written by graftlm" in said.err


def test_an_adapter_of_another_tool(cli: Callable, saved: Path) -> None:
    (saved / "graftlm.json").unlink()
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "a/b"}))
    found = json.loads(cli("inspect", str(saved), "--json").out)
    assert (found["method"], found["base"], found["checksums_ok"]) == ("LORA", "a/b", None)


def test_damaged_adapters(cli: Callable, saved: Path) -> None:
    file = saved / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    assert "damaged or cut short" in cli("inspect", str(saved)).err
    file.unlink()
    (saved / "adapter_model.bin").write_bytes(b"x")
    answer = cli("inspect", str(saved))
    assert (answer.code, "unpickles nothing" in answer.err) == (2, True)
    (saved / "adapter_config.json").write_text("[]")
    assert cli("inspect", str(saved)).code == 2


# --- data ---


def test_labelled_data(cli: Callable) -> None:
    found = json.loads(cli("inspect", "bundled:messages", "--json").out)
    assert (found["task"], found["rows"], found["roles"]) == ("classify", 600, {"text": "text", "label": "label"})
    assert sum(found["labels"].values()) == 600
    assert found["tokens"]["shortest"] <= found["tokens"]["median"] <= found["tokens"]["longest"]
    assert len(found["examples"]) == 2
    text = cli("inspect", "bundled:messages").out
    assert ["change_address", "75", "12.5", "%"] in [line.split() for line in text.splitlines()]


def test_chat_data_shows_what_is_trained(cli: Callable, tmp_path: Path) -> None:
    file = tmp_path / "faq.jsonl"
    row = {"prompt": "Why?", "completion": "Because.", "id": 1}
    file.write_text("".join(json.dumps(r) + "\n" for r in (row, row, row | {"prompt": "How?"})))
    found = json.loads(cli("inspect", str(file), "--json").out)
    assert (found["task"], found["unused"], found["duplicates"]) == ("sft", ["id"], 1)
    trained = "".join(piece["text"] for piece in found["examples"][0] if piece["trained"])
    assert trained.startswith("Because.")
    assert 0 < found["tokens"]["trained"] < found["tokens"]["total"]
    out = cli("inspect", str(file)).out
    assert "[[Because." in out
    assert "1 duplicate" in out
    assert "\x1b" not in out


@pytest.mark.parametrize(
    ("task", "row", "shown"),
    [
        ("choice", {"prompt": "Which?", "choices": ["this", "that"], "answer": "that"}, "[[that"),
        ("classify", {"text": "a lamp", "label": "odd"}, "a lamp -> [[odd]]"),
        ("classify", {"text": "a lamp", "labels": ["odd", "red"]}, "a lamp -> [[odd, red]]"),
        ("classify", {"text": "a lamp", "labels": []}, "a lamp -> [[none of them]]"),
        ("dpo", {"prompt": "Hi", "chosen": "Yes", "rejected": "No"}, "[[Yes"),
        ("grpo", {"prompt": "Hi"}, "Hi"),
        ("kto", {"prompt": "Hi", "completion": "Yes", "label": False}, "[[Yes<|end|>]] (not wanted)"),
        ("lm", {"text": "a whole text"}, "[[a whole text"),
        ("mlm", {"text": "a whole text"}, "a whole text"),
        ("regress", {"text": "a lamp", "score": 1.5}, "a lamp -> [[1.5]]"),
        ("reward", {"prompt": "Hi", "chosen": "Yes", "rejected": "No"}, "-> [[the better answer]]"),
        ("seq2seq", {"prompt": "a b", "completion": "b a"}, "[["),
        ("sft", {"prompt": "Hi", "completion": "Yes"}, "[[Yes"),
        ("tag", {"tokens": ["a", "lamp"], "tags": ["O", "B-x"]}, "a/[[O]] lamp/[[B-x]]"),
        ("tfew", {"prompt": "Which?", "choices": ["this", "that"], "answer": 1}, "[[that"),
    ],
)
def test_rows_of_every_kind_show_what_is_learnt(
    cli: Callable, tmp_path: Path, task: str, row: dict[str, Any], shown: str
) -> None:
    file = tmp_path / "rows.jsonl"
    other = row | {"label": "even"} if row.get("label") == "odd" else row
    other = other | {"labels": ["odd", "red", "big"]} if "labels" in row else other
    other = other | {"tags": ["O", "O"]} if task == "tag" else other
    file.write_text("".join(json.dumps(r) + "\n" for r in (row, row, other, other)))
    said = cli("inspect", str(file), "--task", task)
    assert (said.code, said.err) == (0, "")
    assert shown in said.out.partition("example 1")[2].partition("example 2")[0]
    found = json.loads(cli("inspect", str(file), "--task", task, "--json").out)
    assert len(found["examples"]) == 2
    if task == "classify" and row.get("labels") == []:
        assert found["labels"] == {"(none)": 2, "odd": 2, "red": 2, "big": 2}


def test_faulty_data_is_told_and_fails(cli: Callable, tmp_path: Path) -> None:
    file = tmp_path / "faq.jsonl"
    file.write_text('{"text": "a", "label": "x"}\n{"text": null, "label": "y"}\n{"text": "b", "label": "x"}\n')
    said = cli("inspect", str(file))
    assert said.code == 2
    assert "task     classify" in said.out
    assert "1 row has null 'text' (row 2)" in said.err
    found = cli("inspect", str(file), "--json")
    assert found.code == 2
    faults = json.loads(found.out)["faults"]
    assert "D120" in {fault["code"] for fault in faults}


def test_columns_that_are_not_understood(cli: Callable, tmp_path: Path) -> None:
    file = tmp_path / "odd.csv"
    file.write_text("a,b\n1,2\n3,4\n")
    answer = cli("inspect", str(file))
    assert (answer.code, answer.out) == (2, "")
    assert "found a, b" in answer.err
    mapped = cli("inspect", str(file), "--map", "text=a")
    assert mapped.code == 0, mapped.err
    assert "task     lm  text=a" in mapped.out


def test_data_with_another_tokenizer(cli: Callable) -> None:
    answer = cli("inspect", "bundled:answers", "-m", "./nothing")
    assert answer.code == 2
    assert "no model folder './nothing'" in answer.err


# --- rows that are alike, runs, and whether an adapter fits ---


def test_rows_that_are_alike_are_told(cli: Callable, tmp_path: Path) -> None:
    texts = [f"Where is parcel {'abcdefghij'[at] * 9} that I asked about on a day in spring?" for at in range(10)]
    rows = [{"text": text, "label": "ab"[at % 2]} for at, text in enumerate(texts)]
    rows.append({"text": texts[0].upper().replace("?", " !"), "label": "a"})
    file, held = tmp_path / "rows.jsonl", tmp_path / "held.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    held.write_text("".join(json.dumps(row) + "\n" for row in [
        rows[1], {"text": texts[2] + " Please.", "label": "a"}, {"text": "Nothing like it at all", "label": "b"},
    ]))  # fmt: skip
    found = json.loads(cli("inspect", str(file), "--eval", str(held), "--json").out)
    assert found["near_duplicates"] == {"rows": 1, "pairs": [[1, 11]]}
    assert found["leakage"] == {"eval": str(held), "rows": 3, "same": 1, "near": 1}
    said = cli("inspect", str(file), "--eval", str(held)).out
    assert "1 row nearly the same as an earlier one, such as 11 of 1" in said
    assert "1 also in train, 1 nearly so" in said
    alone = json.loads(cli("inspect", str(file), "--json").out)["leakage"]
    assert alone["rows"] == 2
    assert alone["same"] == 0
    assert "[L103]" in cli("inspect", "bundled", "--eval", str(held)).err


def test_whether_an_adapter_fits_a_base_is_told(cli: Callable, tmp_path: Path) -> None:
    same, other = save_llama(tmp_path / "same"), save_llama(tmp_path / "other", layers=2)
    model, _ = load_base(same)
    save_adapter(attach(model, read_method("lora(rank=2)")), tmp_path / "adapter", facts={"task": "lm"})
    for base, fits in ((same, True), (other, False)):
        answer = cli("inspect", str(tmp_path / "adapter"), "-m", str(base), "--json")
        assert json.loads(answer.out)["fits"] == {str(base): fits}
        assert answer.code == (0 if fits else 2)
    assert f"fits       {same}: yes" in cli("inspect", str(tmp_path / "adapter"), "-m", str(same)).out


def test_of_a_run_its_course_is_told(cli: Callable, saved: Path) -> None:
    run = saved.parent
    scores = [
        {"name": "tuned", "title": "LoRA", "loss": 1.25},
        {"name": "base", "title": "untouched base", "loss": 2.5},
    ]
    record = {"status": "done", "steps": 7, "command": "graftlm train x.csv", "results": {"scores": scores}}
    (run / "run.json").write_text(json.dumps(record))
    said = cli("inspect", str(run)).out
    for part in ("LoRA: loss 1.250", "untouched base: loss 2.500", "graftlm train x.csv", "steps      7"):
        assert part in said
