"""Methods at existing parameters train what they name, and fresh heads start as they say."""

from __future__ import annotations

import pytest
import torch

from graftlm.core import Samples, attach, use
from graftlm.errors import MethodError
from graftlm.methods import Head, Last, Layers, NormTuning
from models_for_tests import logits_of, tiny


def places(adapter):
    return {part.site.key for part in adapter.parts}


@pytest.mark.parametrize("model_name", ["llama", "gpt2", "bert", "bart"])
def test_the_last_layers_are_all_of_theirs_and_nothing_else(model_name):
    model = tiny(model_name)
    names = {name for name, _ in model.named_parameters()}
    last = {name for name in names if any(word in name for word in (".layers.1.", ".h.1.", ".layer.1."))}
    assert places(attach(model, Last(1), name="one")) == last
    assert places(attach(model, Layers("-1:"), name="layers")) == last
    both = places(attach(model, Last(2), name="two"))
    assert both == last | {
        name.replace("s.1.", "s.0.").replace("h.1.", "h.0.").replace("r.1.", "r.0.") for name in last
    }
    with pytest.raises(MethodError, match="T111"):
        attach(model, Last(3), name="three")


def test_norms_are_all_norms():
    model = tiny("llama")
    found = places(attach(model, NormTuning()))
    assert found == {name for name, _ in model.named_parameters() if "norm" in name}


def test_a_fresh_head_forgets_the_base():
    model = tiny("bert")
    torch.manual_seed(0)
    adapter = attach(model, Head(start="fresh"))
    weight, bias = model.classifier.weight, model.classifier.bias
    values = {part.site.key: part.delta.value.detach() for part in adapter.parts}
    assert not torch.allclose(values["classifier.weight"], weight)
    assert 0.01 < float(values["classifier.weight"].std()) < 0.03
    assert float(values["classifier.bias"].abs().max()) == 0 < float(bias.abs().max())
    assert not torch.allclose(logits_of(model), logits_of(tiny("bert")))


def test_a_head_of_more_outputs_is_fresh_in_its_last_map_alone():
    model = tiny("roberta")  # its head has two maps
    adapter = attach(model, Head(outputs=5))
    values = {part.site.key: part.delta.value.detach() for part in adapter.parts}
    assert values["classifier.out_proj.weight"].shape == (5, 32)
    assert torch.equal(values["classifier.dense.weight"], model.classifier.dense.weight)
    assert logits_of(model).shape == (3, 5)


def labelled_batches(classes, rows=48, *, tokens=False):
    """Rows whose class shows in their first word; padded on the right, each with a length of its own."""
    torch.manual_seed(3)
    batches = []
    for at in range(0, rows, 8):
        labels = torch.arange(at, at + 8) % classes
        ids = torch.randint(20, 60, (8, 9))
        ids[:, 0] = 5 + labels
        mask = (torch.arange(9)[None] < torch.randint(4, 10, (8, 1))).long()
        ids = torch.where(mask.bool(), ids, 0)
        if tokens:
            labels = torch.where(mask.bool(), ids % classes, -100)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def loss_of(model, batch):
    logits = model(**{key: batch[key] for key in ("input_ids", "attention_mask")}).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, -2), batch["labels"].flatten(), reduction="sum")


def logits_and_labels(model, batches):
    """Of all rows or tokens that have a label."""
    with torch.no_grad():
        logits = [model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits for b in batches]
    labels = torch.cat([batch["labels"].flatten() for batch in batches])
    return torch.cat([found.flatten(0, -2) for found in logits])[labels >= 0], labels[labels >= 0]


@pytest.mark.parametrize(
    ("kind", "classes"),
    [("BertForSequenceClassification", 2), ("BertForSequenceClassification", 3), ("LlamaForSequenceClassification", 3),
     ("BertForTokenClassification", 3)],
)  # fmt: skip
def test_a_head_from_a_regression_tells_the_rows_it_saw(kind, classes):
    model = classifier(kind, classes)
    batches = labelled_batches(classes, tokens="Token" in kind)
    before = logits_and_labels(model, batches)[0]
    adapter = attach(model, Head(start="probe"), samples=Samples(batches, loss_of))
    logits, labels = logits_and_labels(model, batches)
    assert (logits.argmax(1) == labels).float().mean() > 0.6
    assert logits.std(0).mean() < 0.101, "the body's first steps would be coarse"
    with use(model, None):
        assert torch.equal(logits_and_labels(model, batches)[0], before)
    assert adapter.method == Head(start="probe")


@pytest.mark.parametrize("kind", ["BertForSequenceClassification", "LlamaForSequenceClassification"])
@pytest.mark.parametrize("several", [True, False])
def test_a_head_from_a_regression_tells_several_labels_and_numbers(kind, several):
    model = classifier(kind, 3 if several else 1)
    batches = labelled_batches(3)
    for batch in batches:  # what is told follows from the token at which the head reads
        read = 0 if "Bert" in kind else batch["attention_mask"].sum(1) - 1
        word = batch["input_ids"][torch.arange(8), read]
        batch["labels"] = torch.stack([word % 2, word > 40, word > 90], 1).float() if several else word / 32 - 1.0
        if "Bert" in kind and several:
            batch["labels"][:, 1] = (word > 5).float()

    def loss(model, batch):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return ((logits.squeeze(1) - batch["labels"]) ** 2).sum()

    attach(model, Head(start="probe"), samples=Samples(batches, loss))
    with torch.no_grad():
        logits = torch.cat(
            [model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits for b in batches]
        )
    labels = torch.cat([batch["labels"] for batch in batches])
    if several:
        told = logits - logits.mean(0)  # a head of decoders has no bias
        assert (
            torch.stack([torch.corrcoef(torch.stack([told[:, at], labels[:, at]]))[0, 1] for at in (0, 1)]).min() > 0.3
        )
        assert (logits[:, 2] <= 0).all(), "no row has the label"
    else:
        assert torch.corrcoef(torch.stack([logits[:, 0], labels]))[0, 1] > 0.4
    same = [batch | {"labels": torch.ones_like(batch["labels"])} for batch in batches]
    with pytest.raises(MethodError, match="have one label"):
        attach(classifier(kind, 3 if several else 1), Head(start="probe"), samples=Samples(same, loss), name="other")


def test_a_regression_needs_classes_and_more_than_one():
    model = classifier("BertForSequenceClassification", 2)
    one = [batch | {"labels": torch.zeros_like(batch["labels"])} for batch in labelled_batches(2)]
    with pytest.raises(MethodError, match="have one label") as caught:
        attach(model, Head(start="probe"), samples=Samples(one, loss_of))
    assert caught.value.findings[0].code == "T165"
    with pytest.raises(MethodError, match="does not tell classes"):
        attach(tiny("llama"), Head(start="probe"), samples=Samples(one, loss_of))
    with pytest.raises(MethodError, match="start=probe finds as many outputs"):
        Head(start="probe", outputs=3)


def classifier(kind, classes):
    """A tiny random classifier in evaluation mode."""
    import transformers

    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
             "num_attention_heads": 4, "num_labels": classes, "pad_token_id": 0, "max_position_embeddings": 32,
             "initializer_range": 0.3}  # fmt: skip
    config = (transformers.LlamaConfig if "Llama" in kind else transformers.BertConfig)(**shape)
    return getattr(transformers, kind)(config).eval()
