"""LayerScale meets the rules of all methods, and has as many parameters as the paper says."""

import pytest

from conformance.one_method import checks, hold, models_of
from graftlm.core import attach
from graftlm_layerscale import LayerScale
from models_for_tests import tiny


@pytest.mark.parametrize(
    ("check", "model_name"), [(check, model) for check in checks() for model in models_of(check)], ids=str
)
def test_it_conforms(check, model_name, monkeypatch, tmp_path):
    hold(check, "layerscale", LayerScale(), model_name, monkeypatch=monkeypatch, tmp_path=tmp_path)


def test_two_vectors_a_layer():
    model = tiny("llama")
    adapter = attach(model, LayerScale())
    assert adapter.parameter_count == 2 * model.config.hidden_size * model.config.num_hidden_layers


def test_its_text():
    assert str(LayerScale(targets="down", layers="-4:")) == "layerscale(targets=down,layers='-4:')"
