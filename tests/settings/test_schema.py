"""The schema: defaults, the Python face, and what is derived from it for a command line."""

import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from graftlm.errors import SettingsError
from graftlm.settings import CODES, FLAGS, SETTINGS, DataSettings, RunSettings, TrainSettings

ROOM = Path(__file__).parents[2] / "src" / "graftlm" / "settings"


_IMPORTED = """
import sys, time
start = time.process_time(); import pydantic, ruamel.yaml; below_s = time.process_time() - start
start = time.process_time(); import graftlm.settings; above_s = time.process_time() - start
print(below_s, above_s, 'torch' in sys.modules, 'click' in sys.modules)
"""


def test_import_is_light_and_without_torch():
    runs = [
        subprocess.run(
            [sys.executable, "-c", _IMPORTED],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONPATH": str(ROOM.parents[1])},
        )
        for _ in range(6)  # the first may compile, and a busy machine only ever adds: the fastest counts
    ]
    found = [run.stdout.split() for run in runs]
    assert all(each[2:] == ["False", "False"] for each in found)
    # Against the libraries below, measured in the same process: seconds differ twofold between machines.
    below_s, above_s = (min(float(each[at]) for each in found) for at in (0, 1))
    assert above_s < 4 * below_s, (above_s, below_s)


@pytest.mark.parametrize("name", ["schema", "faults", "foreign", "reading", "writing", ""])
def test_examples_in_docstrings(name):
    module = importlib.import_module(f"graftlm.settings.{name}".rstrip("."))
    result = doctest.testmod(module)
    assert result.failed == 0
    assert result.attempted > 0


def test_every_default_passes_its_own_limits():
    for name, setting in SETTINGS.items():
        section, _, key = name.rpartition(".")
        if setting.default is not None:
            value = {key: setting.default}
            assert setting.of(RunSettings(**({section: value} if section else value))) == setting.default


def test_every_setting_has_a_line_and_numbers_have_a_usual_range():
    for setting in SETTINGS.values():
        assert setting.text
        assert "\n" not in setting.text
        if setting.kind in ("a number", "a whole number") and setting.key != "seed":
            low, high = setting.usual
            assert low < high
            if setting.default is not None:
                assert low <= setting.default <= high, setting.name


def test_keys_are_unique_so_that_a_misplaced_one_has_one_home():
    keys = [setting.key for setting in SETTINGS.values()]
    assert len(keys) == len(set(keys))


def test_flags_follow_the_schema():
    assert [flag.label for flag in FLAGS] == [
        *(
            "DATA",
            "--test",
            "--map",
            "--stream",
            "--model",
            "--quantize",
            "--device-map",
            "--max-memory",
            "--method",
            "--from",
        ),
        *("--task", "--epochs", "--steps", "--lr", "--batch", "--max-length", "--optimizer", "--seed", "--track"),
        *("--reward", "--out", "--config", "--set"),
    ]
    assert all(flag.setting in SETTINGS for flag in FLAGS[:-2])
    by_key = {flag.key: flag for flag in FLAGS}
    assert by_key["lr"].setting == "train.learning_rate"
    assert by_key["lr"].kind == "a number"
    assert "1e-5 to 1e-3" in by_key["lr"].help
    assert by_key["model"].names == ("-m", "--model")
    assert by_key["data"].is_argument
    assert not by_key["out"].is_argument
    assert by_key["task"].choices[:4] == ("auto", "lm", "mlm", "sft")
    assert by_key["set"].repeatable
    assert len(by_key) == len(FLAGS)
    assert all(key.isidentifier() for key in by_key)


def test_settings_are_frozen_and_do_not_share_a_map():
    first, second = RunSettings(), RunSettings()
    with pytest.raises(ValueError, match="frozen"):
        first.train.batch = 3
    first.data.map["prompt"] = "question"
    assert second.data.map == DataSettings().map == {}


def test_paths_become_text():
    assert DataSettings(path=Path("a") / "b.csv").path == "a/b.csv"


def test_faults_in_python_are_settings_errors_all_at_once():
    with pytest.raises(SettingsError) as caught:
        TrainSettings(learning_rate=20, epohs=3, batch="16")
    messages = {finding.code: (finding.message, finding.fix) for finding in caught.value.findings}
    assert messages["S101"] == ("unknown setting train.epohs", "train.epochs")
    assert messages["S104"] == ("train.batch is '16'; wanted a whole number", "batch=16")
    assert messages["S105"][1] == "learning_rate=0.0002"
    with pytest.raises(SettingsError, match=r"unknown setting train\.epohs"):
        RunSettings(train={"epohs": 3})
    with pytest.raises(SettingsError, match=r"train\.epochs and train\.steps are both set"):
        RunSettings(train=TrainSettings(epochs=1, steps=2))
    with pytest.raises(SettingsError, match=r"goes under data\.path"):
        RunSettings(data="faq.jsonl")


def test_codes_are_those_that_the_room_uses():
    import re

    used = set(re.findall(r'"(S\d{3})"', "".join(path.read_text() for path in ROOM.glob("*.py"))))
    assert used == set(CODES)
    assert all(CODES.values())
