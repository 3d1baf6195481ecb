"""Settings written down read back to the same."""

import json

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from graftlm.errors import SettingsError
from graftlm.settings import SETTINGS, RunSettings, dump, resolve, to_yaml

TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30) | st.sampled_from(
    [
        "null",
        "~",
        "true",
        "1e3",
        "- a",
        "a: b",
        "#x",
        "'",
        '"',
        " x ",
        "a\nb",
        "lora(rank=8,targets=all-linear)",
        "\x85",
    ]
)


def _values(setting):
    """Values of one setting, within its usual range where it is a number."""
    if setting.choices:
        return st.sampled_from(setting.choices)
    if setting.kind in ("a number", "a whole number"):
        low, high = setting.usual or (0, 2**32 - 1)
        numbers = st.integers(int(low), int(high)) if setting.kind == "a whole number" else st.floats(low, high)
        return numbers | st.none() if setting.optional else numbers
    if setting.name == "data.mixture":
        return st.dictionaries(TEXT, st.sampled_from([0.5, 1.0, 2.25]), max_size=3)
    kinds = {"true or false": st.booleans(), "name=value pairs": st.dictionaries(TEXT, TEXT, max_size=3)}
    return kinds.get(setting.kind, TEXT | st.none() if setting.optional else TEXT)


@st.composite
def run_settings(draw):
    chosen = draw(st.lists(st.sampled_from(sorted(SETTINGS)), unique=True, max_size=12))
    nested = {}
    for name in chosen:
        section, _, key = name.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[key] = draw(_values(SETTINGS[name]))
    try:
        return RunSettings(**nested)
    except SettingsError as error:
        assume(any(finding.code not in ("S105", "S107") for finding in error.findings))
        raise


@pytest.mark.parametrize("only_changed", [True, False])
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(value=run_settings())
def test_a_run_file_reads_back_to_the_same(tmp_path_factory, only_changed, value):
    file = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    file.write_bytes(to_yaml(value, only_changed).encode())
    assert resolve(file=file).settings == value


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(value=run_settings())
def test_dump_is_json_and_makes_the_same_settings(value):
    assert RunSettings(**json.loads(json.dumps(dump(value)))) == value


def test_only_changed_leaves_out_defaults():
    assert to_yaml(RunSettings()) == "{}\n"
    assert to_yaml(RunSettings(train={"learning_rate": 2e-4})) == "train:\n  learning_rate: 0.0002\n"


def test_the_whole_file_explains_every_setting():
    text = to_yaml(RunSettings(), only_changed=False)
    for setting in SETTINGS.values():
        (line,) = [line for line in text.splitlines() if line.strip().startswith(f"{setting.key}:")]
        assert setting.text in line
