"""Exports: equal to the adapter for every kind of merge and base, refused when they are not, and nothing left then."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from graftlm.core import Adapter, attach, use
from graftlm.errors import GraftError, NotMergeable
from graftlm.formats import exporting
from graftlm.formats.exporting import export_adapter
from graftlm.methods import read_method
from graftlm.models import load_base
from graftlm.quantisation import quantize, quantized
from models_for_tests import inputs_for, logits_of, perturb, tiny

ROWS = [[5, 9, 17, 23, 41], [7, 7, 30], [60, 3, 12, 8, 8, 19, 33]]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    words = {f"w{at}": at for at in range(60)} | {"<pad>": 60, "</s>": 61}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")),
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="w0",
    )


def trained(model: str, text: str, format: str | None = None) -> Adapter:
    """An adapter that changes something, on a base that is packed in `format`."""
    base: Any = tiny(model) if format is None else quantize(tiny(model), format)
    samples = [inputs_for(base) | {"labels": inputs_for(base)["input_ids"]}]
    adapter = attach(base, read_method(text), name="tuned", samples=samples)
    perturb(adapter)
    return adapter


@pytest.mark.parametrize("model", ["llama", "gpt2", "qwen2"])  # Conv1D in gpt2, tied embeddings in gpt2 and qwen2
@pytest.mark.parametrize(
    "text",
    [
        "lora(rank=4,targets=all-linear)", "dora(rank=2)", "ia3", "sparse(fraction=0.05)", "lora+norm",
        "modules(targets=embed)", "sparse(score=gradient,fraction=0.02)",
    ],
)  # fmt: skip
def test_merged_exports_are_the_adapter(model: str, text: str, tokenizer: Any, tmp_path: Path) -> None:
    adapter = trained(model, text)
    wanted, before = logits_of(adapter.model), adapter.model.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    found = export_adapter(adapter, tokenizer, tmp_path / "out", to="merged", rows=ROWS)
    assert found.difference < 1e-3
    assert found.agreement == 1.0
    alone, _ = load_base(tmp_path / "out")
    torch.testing.assert_close(logits_of(alone), wanted, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits_of(alone), logits_of(tiny(model)), atol=1e-3), "the adapter changed nothing"
    torch.testing.assert_close(logits_of(adapter.model), wanted, atol=0, rtol=0)
    for name, tensor in adapter.model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize(
    ("model", "format", "text"),
    [
        *((model, "nf4", text) for model in ("llama", "gpt2", "qwen2") for text in ("lora(rank=4)", "dora(rank=2)")),
        *((model, "int8", text) for model in ("llama", "gpt2", "qwen2") for text in ("ia3", "lora+norm")),
        *(
            (model, format, text)
            for model in ("llama", "gpt2")
            for format in ("nf4", "int8")
            for text in ("bitfit", "sparse(fraction=0.05)")
        ),
    ],
)
def test_a_packed_base_is_merged_into_a_plain_model(
    model: str, format: str, text: str, tokenizer: Any, tmp_path: Path
) -> None:
    adapter = trained(model, text, format)
    wanted, before = logits_of(adapter.model), {k: v.clone() for k, v in adapter.model.state_dict().items()}
    found = export_adapter(adapter, tokenizer, tmp_path / "out", to="merged", rows=ROWS)
    assert found.agreement == 1.0
    alone = type(adapter.model).from_pretrained(tmp_path / "out").eval()  # as plain transformers has it
    assert not any(quantized(alone))
    assert getattr(alone.config, "quantization_config", None) is None
    torch.testing.assert_close(logits_of(alone), wanted, atol=1e-4, rtol=1e-4)
    with use(adapter.model, None):
        assert not torch.allclose(logits_of(adapter.model), wanted, atol=1e-3), "the adapter changed nothing"
    torch.testing.assert_close(logits_of(adapter.model), wanted, atol=0, rtol=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.model.state_dict().items())
    if text in ("lora(rank=4)", "dora(rank=2)", "ia3"):
        again = export_adapter(adapter, tokenizer, tmp_path / "peft", to="peft", rows=ROWS)
        assert again.difference == 0


@pytest.mark.parametrize("text", ["bitfit", "bitfit(targets=[query,down])"])
@pytest.mark.parametrize("model", ["gpt2", "opt", "llama"])
def test_bitfit_is_merged_where_the_class_has_a_place_for_biases(
    model: str, text: str, tokenizer: Any, tmp_path: Path
) -> None:
    adapter = trained(model, text)
    wanted = logits_of(adapter.model)
    switches = {key: value for key, value in adapter.model.config.to_dict().items() if key.endswith("bias")}
    assert export_adapter(adapter, tokenizer, tmp_path / "out", to="merged", rows=ROWS).agreement == 1.0
    alone = type(adapter.model).from_pretrained(tmp_path / "out").eval()  # as plain transformers has it
    torch.testing.assert_close(logits_of(alone), wanted, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits_of(tiny(model)), wanted, atol=1e-3), "the adapter changed nothing"
    assert switches.items() <= adapter.model.config.to_dict().items()


def test_biases_that_the_class_has_no_place_for_are_noticed(tokenizer: Any, tmp_path: Path) -> None:
    adapter = trained("qwen2", "bitfit")
    with pytest.raises(GraftError, match="A245"):
        export_adapter(adapter, tokenizer, tmp_path / "out", to="merged", rows=ROWS)
    assert list(tmp_path.iterdir()) == []
    assert not adapter.merged


def test_a_classifier_keeps_its_classes(tokenizer: Any, tmp_path: Path) -> None:
    adapter = trained("bert", "lora+head")
    labels = ["no", "yes"]
    export_adapter(adapter, tokenizer, tmp_path / "out", to="merged", rows=ROWS, labels=labels)
    alone, _ = load_base(tmp_path / "out", task="classify", labels=labels)
    torch.testing.assert_close(logits_of(alone), logits_of(adapter.model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("to", ["merged", "peft"])
@pytest.mark.parametrize("kind", ["numbers", "tags", "two stacks"])
def test_every_kind_of_head_is_read_back_as_itself(kind: str, to: Any, tokenizer: Any, tmp_path: Path) -> None:
    config = tiny("bert").config
    labels = {"numbers": None, "tags": ["O", "B-x", "I-x"], "two stacks": None}[kind]
    config.num_labels = len(labels or ["score"])
    made = {"numbers": tf.BertForSequenceClassification, "tags": tf.BertForTokenClassification}
    base: Any = made[kind](config).eval() if kind in made else tiny("t5")
    adapter = attach(base, read_method("lora" if kind == "two stacks" else "lora+head"), name="tuned")
    perturb(adapter)
    found = export_adapter(adapter, tokenizer, tmp_path / "out", to=to, rows=ROWS, labels=labels)
    assert found.difference < 1e-4


@pytest.mark.parametrize(
    ("model", "format", "text", "to"),
    [
        *((model, format, "lora(rank=4)", to) for model in ("llama", "gpt2") for format in (None, "nf4")
          for to in ("merged", "peft")),
        *(("llama", None, text, to) for text in ("dora(rank=2)", "ia3") for to in ("merged", "peft")),
        *((model, None, text, "merged") for model in ("llama", "gpt2") for text in ("sparse(fraction=0.05)", "bitfit")),
    ],
)  # fmt: skip
def test_a_corrupted_export_is_refused(
    model: str, format: str | None, text: str, to: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = trained(model, text, format)
    read = exporting._read_merged if to == "merged" else exporting._read_adapter

    def corrupted(fresh: Path, *args: Any) -> Any:
        file = next(path for path in fresh.iterdir() if path.suffix == ".safetensors")
        tensors = load_file(file)
        name = next(name for name in sorted(tensors) if any(each in name for each in ("k_proj", "c_attn")))
        tensors[name] = tensors[name] * 1.05
        save_file(tensors, file, metadata={"format": "pt"})
        return read(fresh, *args)

    monkeypatch.setattr(exporting, read.__name__, corrupted)
    with pytest.raises(GraftError, match="A245"):
        export_adapter(adapter, tokenizer, tmp_path / "out", to=to, rows=ROWS)
    assert list(tmp_path.iterdir()) == []
    assert adapter.attached


def test_peft_reads_what_was_exported(tokenizer: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapter = trained("llama", "lora(rank=4)")
    found = export_adapter(adapter, tokenizer, tmp_path / "out", to="peft", rows=ROWS)
    assert found.difference == 0
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "out")
    torch.testing.assert_close(logits_of(theirs), logits_of(adapter.model), atol=1e-5, rtol=1e-5)
    with use(adapter.model, None):
        torch.testing.assert_close(logits_of(adapter.model), logits_of(tiny("llama")), atol=0, rtol=0)


def test_vllm_gets_what_it_takes_and_nothing_else(tokenizer: Any, tmp_path: Path) -> None:
    found = export_adapter(
        trained("llama", "lora(rank=12)"), tokenizer, tmp_path / "fine", to="vllm", rows=ROWS, base="my/base"
    )
    assert "--max-lora-rank 16" in found.command
    assert found.command.endswith(f" fine={tmp_path / 'fine'}")
    # The script finds the adapter from anywhere, and where it was moved to.
    moved, programs = tmp_path / "moved here", tmp_path / "bin"
    (tmp_path / "fine").rename(moved)
    programs.mkdir()
    (programs / "vllm").write_text('#!/bin/sh\nfor word; do last=$word; done\necho "$last"\n')
    (programs / "vllm").chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    said = subprocess.run(["sh", moved / "serve.sh"], capture_output=True, text=True, cwd="/", env=environment)
    assert said.stdout.strip() == f"fine={moved}"
    for text, why in (("dora", "dora"), ("lora+bitfit", "bitfit"), ("ia3", "LoRA alone")):
        with pytest.raises(GraftError, match=why) as caught:
            export_adapter(trained("gpt2", text), tokenizer, tmp_path / "no", to="vllm", rows=ROWS)
        assert caught.value.findings[0].code == "A244"
    assert not (tmp_path / "no").exists()


def test_what_cannot_be_exported_says_so(tokenizer: Any, tmp_path: Path) -> None:
    adapter = trained("llama", "prefix(length=3)")
    with pytest.raises(NotMergeable):
        export_adapter(adapter, tokenizer, tmp_path / "out", to="merged", rows=ROWS)
    with pytest.raises(GraftError, match="A243"):
        export_adapter(trained("llama", "sparse"), tokenizer, tmp_path / "out", to="peft", rows=ROWS)
    with pytest.raises(GraftError, match="A242"):
        export_adapter(adapter, tokenizer, tmp_path / "out", to="peft", rows=[])
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    with pytest.raises(GraftError, match="A241"):
        export_adapter(adapter, tokenizer, tmp_path / "out", to="peft", rows=ROWS)
