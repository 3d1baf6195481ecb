"""Methods at existing parameters train what they name, and fresh heads start as they say."""

from __future__ import annotations

import pytest
import torch

from graftlm.core import attach
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
