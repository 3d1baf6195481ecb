"""Settings out of files, `--set`, flags and Python: precedence, origins, and every fault with its place."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graftlm.errors import SettingsError
from graftlm.settings import CODES, SETTINGS, RunSettings, TrainSettings, resolve


@pytest.fixture
def run_file(tmp_path, monkeypatch):
    """Writes run.yaml into the current folder and gives its path, so that places read `run.yaml:7:3`."""
    monkeypatch.chdir(tmp_path)

    def write(text: str | bytes) -> Path:
        file = Path("run.yaml")
        file.write_bytes(text.encode() if isinstance(text, str) else text)
        return file

    return write


def faults(**sources):
    with pytest.raises(SettingsError) as caught:
        resolve(**sources)
    return caught.value.findings


def one(**sources):
    (finding,) = faults(**sources)
    return finding


# What comes from where


def test_nothing_given_is_all_defaults():
    resolved = resolve()
    assert resolved.settings == RunSettings()
    assert resolved.origin == dict.fromkeys(SETTINGS, "default")


def test_precedence_and_origins(run_file):
    file = run_file("train:\n  learning_rate: 1e-4\n  batch: 8\n  seed: 1\n  max_length: 64\nmethod: ia3\n")
    resolved = resolve(
        file=file,
        sets=["train.batch=32", "train.seed=2", "train.max_length=65"],
        flags={"seed": "3", "max_length": "66", "lr": None},
        python={"train": {"max_length": 67}},
    )
    train = resolved.settings.train
    assert (train.learning_rate, train.batch, train.seed, train.max_length) == (1e-4, 32, 3, 67)
    assert resolved.settings.method == "ia3"
    origin = {name: place for name, place in resolved.origin.items() if place != "default"}
    assert origin == {
        "train.learning_rate": "run.yaml:2:3",
        "train.batch": "--set",
        "train.seed": "--seed",
        "train.max_length": "python",
        "method": "run.yaml:6:1",
    }


@pytest.mark.parametrize("text", ["2e-4", "2E-4", "0.0002", "'2e-4'", "20_0e-6", "+.0002"])
def test_numbers_are_numbers(run_file, text):
    assert resolve(file=run_file(f"train: {{learning_rate: {text}}}")).settings.train.learning_rate == 2e-4


def test_whole_numbers_may_be_written_with_an_exponent(run_file):
    settings = resolve(file=run_file("data: {max_rows: 1e4}\ntrain: {steps: 1_000}")).settings
    assert (settings.data.max_rows, settings.train.steps) == (10_000, 1000)


def test_text_stays_as_it_is_written(run_file):
    file = run_file("data: {path: 007, eval_path: 2024-01-01}\nmodel: {name: 'null', revision: 1e3}\noutput: yes\n")
    settings = resolve(file=file).settings
    assert (settings.data.path, settings.data.eval_path) == ("007", "2024-01-01")
    assert (settings.model.name, settings.model.revision, settings.output) == ("null", "1e3", "yes")


def test_empty_values_and_sections_are_none(run_file):
    settings = resolve(file=run_file("train:\ndata:\n  path:\n  eval_share: null\n  max_rows: ~\n")).settings
    assert settings == RunSettings()


@pytest.mark.parametrize("text", ["", "# nothing\n", "\ufeff", "{}"])
def test_an_empty_file_is_all_defaults(run_file, text):
    assert resolve(file=run_file(text)).settings == RunSettings()


def test_a_dotted_key_is_the_same_as_a_nested_one(run_file):
    resolved = resolve(file=run_file("train.epochs: 3\n"), python={"train.batch": 4})
    assert resolved.settings.train == TrainSettings(epochs=3, batch=4)
    assert resolved.origin["train.epochs"] == "run.yaml:1:1"


def test_the_map_is_replaced_as_a_whole_and_added_to_by_role(run_file):
    file = run_file("data:\n  map: {prompt: question, completion: 3}\n")
    assert resolve(file=file).settings.data.map == {"prompt": "question", "completion": "3"}
    added = resolve(file=file, sets=["data.map.completion=answer"])
    assert added.settings.data.map == {"prompt": "question", "completion": "answer"}
    assert added.origin["data.map"] == "--set"
    assert resolve(file=file, flags={"map": "text=body, label=kind"}).settings.data.map == {
        "text": "body",
        "label": "kind",
    }


def test_set_takes_a_value_back(run_file):
    settings = resolve(file=run_file("train: {epochs: 3}"), sets=["train.epochs=null"], flags={"steps": "10"}).settings
    assert (settings.train.epochs, settings.train.steps) == (None, 10)


def test_python_takes_settings_and_only_what_they_were_given():
    resolved = resolve(sets=["train.seed=5", "train.batch=8"], python=RunSettings(train=TrainSettings(batch=16)))
    assert (resolved.settings.train.seed, resolved.settings.train.batch) == (5, 16)
    assert resolved.origin["train.batch"] == "python"


def test_a_run_writes_down_what_it_decided():
    resolved = resolve(flags={"lr": "1e-4"}).decide({"train.epochs": 3.0, "model.dtype": "float32"})
    assert (resolved.settings.train.epochs, resolved.settings.model.dtype) == (3.0, "float32")
    assert resolved.origin["train.epochs"] == resolved.origin["model.dtype"] == "decided"
    assert resolved.origin["train.learning_rate"] == "--lr"
    with pytest.raises(ValueError, match="already, from --lr"):
        resolved.decide({"train.learning_rate": 1e-3})
    with pytest.raises(SettingsError, match="both set"):
        resolved.decide({"train.steps": 3})


# Names


def test_unknown_setting_with_place_and_nearest(run_file):
    text = "model:\n  name: bundled\n\n\n\ntrain:\n  learning_rte: 1e-4\n"
    with pytest.raises(SettingsError) as caught:
        resolve(file=run_file(text))
    assert str(caught.value) == "run.yaml:7:3 unknown setting train.learning_rte [S101]\n  fix: train.learning_rate"


def test_unknown_setting_unlike_any_lists_what_there_is(run_file):
    finding = one(file=run_file("generate: {zzzz: 1}"))
    assert finding.code == "S101"
    assert "max_new_tokens, temperature, top_p, samples" in " ".join(finding.detail)


def test_unknown_section_is_named_once_and_looked_into(run_file):
    said = faults(file=run_file("trian:\n  epochs: 2\n  epohs: 3\n"))
    assert [(item.code, item.place, item.fix) for item in said] == [
        ("S101", "run.yaml:1:1", "train"),
        ("S101", "run.yaml:3:3", "train.epochs"),
    ]


def test_a_key_in_the_wrong_section(run_file):
    said = faults(file=run_file("learning_rate: 1e-4\ndata:\n  seed: 3\ntrain:\n  method: ia3\n"))
    assert [(item.code, item.place, item.message, item.fix) for item in said] == [
        ("S102", "run.yaml:1:1", "learning_rate belongs under train", "train.learning_rate"),
        ("S102", "run.yaml:3:3", "data.seed belongs under train", "train.seed"),
        ("S102", "run.yaml:5:3", "train.method belongs at the top", "method"),
    ]


@pytest.mark.parametrize("text", ["foo", "=3", " =3", "train.batch"])
def test_set_without_name_and_value(text):
    assert one(sets=[text]).code == "S108"


def test_set_with_an_unknown_name():
    finding = one(sets=["train.wamup=0.1"])
    assert (finding.code, finding.place, finding.fix) == ("S101", "--set", "--set train.warmup=0.1")


def test_twice(run_file):
    said = faults(file=run_file("train:\n  seed: 1\n  seed: 2\ntrain: {batch: 4}\ndata.map: {a: b, a: c}\n"))
    assert [(item.code, item.place) for item in said] == [
        ("S111", "run.yaml:3:3"),
        ("S111", "run.yaml:4:1"),
        ("S111", "run.yaml:5:18"),
    ]
    assert said[0].message == "train.seed is given twice, first at run.yaml:2:3"
    assert one(file=run_file("train.seed: 1\ntrain: {seed: 1}")).place == "run.yaml:2:9"
    assert one(sets=["train.seed=1", "train.seed=2"]).code == "S111"


# Values


@pytest.mark.parametrize(
    ("line", "code", "column", "message", "fix"),
    [
        ("epochs: three", "S104", 11, "train.epochs is 'three'; wanted a number", "epochs: 1"),
        ("batch: 2.5", "S104", 10, "train.batch is 2.5; wanted a whole number", "batch: 2"),
        ("batch: [4]", "S104", 10, "train.batch is a list; wanted a whole number", "batch: 16"),
        ("seed:", "S104", 3, "train.seed is empty; wanted a whole number", "seed: 0"),
        (
            "learning_rate: 20",
            "S105",
            18,
            "learning rate 20 is 20 000 times above the usual range (1e-5 to 1e-3). Meant 2e-4?",
            "learning_rate: 2e-4",
        ),
        (
            "learning_rate: 0.5",
            "S105",
            18,
            "learning rate 0.5 is 500 times above the usual range (1e-5 to 1e-3). Meant 5e-4?",
            "learning_rate: 5e-4",
        ),
        (
            "learning_rate: 1e-9",
            "S105",
            18,
            "learning rate 1e-9 is 10 000 times below the usual range (1e-5 to 1e-3). Meant 1e-5?",
            "learning_rate: 1e-5",
        ),
        (
            "learning_rate: -2e-4",
            "S105",
            18,
            "learning rate is -2e-4; wanted at least 1e-7 and at most 0.3 (usually 1e-5 to 1e-3)",
            "learning_rate: 2e-4",
        ),
        ("batch: 0", "S105", 10, "train.batch is 0; wanted at least 1 (usually 4 to 128)", "batch: 16"),
        (
            "epochs: -1",
            "S105",
            11,
            "train.epochs is -1; wanted above 0 and at most 100 000 (usually 1 to 10)",
            "epochs: 1",
        ),
        (
            "warmup: 1",
            "S105",
            11,
            "train.warmup 1 is 10 times above the usual range (0 to 0.1). Meant 0.1?",
            "warmup: 0.1",
        ),
        (
            "schedule: cosin",
            "S106",
            13,
            "train.schedule 'cosin' is not one of linear, cosine, constant",
            "schedule: cosine",
        ),
    ],
)
def test_wrong_values(run_file, line, code, column, message, fix):
    finding = one(file=run_file(f"train:\n  {line}\n"))
    assert (finding.code, finding.place, finding.message, finding.fix) == (code, f"run.yaml:2:{column}", message, fix)


def test_a_wrong_yes_or_no(run_file):
    finding = one(file=run_file("data:\n  drop_bad_rows: yes\n"))
    wanted = ("S104", "data.drop_bad_rows is 'yes'; wanted true or false", "drop_bad_rows: true")
    assert (finding.code, finding.message, finding.fix) == wanted


@pytest.mark.parametrize("value", [1e-7, 0.3, 0.1])
def test_unusual_learning_rates_that_can_work_are_taken(value):
    assert resolve(python={"train.learning_rate": value}).settings.train.learning_rate == value


@pytest.mark.parametrize(
    "given",
    [
        *("data.eval_share=0", "data.eval_share=1", "data.eval_share=20", "train.warmup=-0.1", "train.learning_rate=0"),
        *("train.learning_rate=nan", "train.epochs=inf", "train.epochs=1e999", "train.seed=-1", "train.steps=2e9"),
        *("generate.top_p=0", "generate.temperature=-1", "train.max_grad_norm=0", "output=", "model.name="),
    ],
)
def test_out_of_range(given):
    finding = one(sets=[given]) if given != "output=" else one(flags={"out": ""})
    assert finding.code == "S105"


def test_every_fix_for_a_wrong_value_can_be_pasted():
    for name, setting in SETTINGS.items():
        for value in ("-3", "1e99", "nan", "0.5x", "[1]"):
            try:
                resolve(sets=[f"{name}={value}"])
            except SettingsError as error:
                (finding,) = error.findings
                if finding.fix:
                    pasted = finding.fix.removeprefix("--set ").strip("'")
                    batch = ["train.batch=" + pasted.partition("=")[2]] if name == "train.accumulate" else []
                    assert resolve(sets=[pasted, *batch]).origin[name] == "--set", (setting, finding)


def test_a_fix_speaks_the_language_of_its_source():
    assert one(flags={"lr": "20"}).fix == "--lr 2e-4"
    assert one(flags={"lr": "20"}).place == "--lr"
    assert one(sets=["train.learning_rate=20"]).fix == "--set train.learning_rate=2e-4"
    assert one(python={"train": {"learning_rate": 20}}).fix == "learning_rate=0.0002"


def test_python_values_are_not_converted():
    said = faults(python={"train": {"epochs": "3", "steps": True}, "method": 3, "data": {"map": {"a": 1}}})
    assert [item.code for item in said] == ["S104"] * 4


def test_one_value_where_a_section_is_wanted(run_file):
    said = faults(file=run_file("data: faq.jsonl\nmodel: Qwen/Qwen3-0.6B\ntrain: 3\n"))
    assert [(item.place, item.fix) for item in said] == [
        ("run.yaml:1:7", "data: {path: faq.jsonl}"),
        ("run.yaml:2:8", "model: {name: Qwen/Qwen3-0.6B}"),
        ("run.yaml:3:8", ""),
    ]


# Contradictions


def test_epochs_and_steps(run_file):
    assert one(file=run_file("train: {epochs: 1, steps: 9}")).code == "S107"
    finding = one(file=run_file("train:\n  epochs: 3\n"), flags={"steps": "10"})
    assert (finding.place, finding.fix) == ("run.yaml:2:11", "--set train.epochs=null")
    assert finding.detail == ("train.epochs from run.yaml:2:3, train.steps from --steps",)


def test_batch_and_accumulate():
    finding = one(sets=["train.batch=10", "train.accumulate=4"])
    assert (finding.code, finding.fix) == ("S107", "--set train.batch=12")
    assert resolve(sets=["train.batch=12", "train.accumulate=4"]).settings.train.batch == 12
    assert one(sets=["train.accumulate=32"]).fix == "--set train.batch=32"


@pytest.mark.parametrize("method", ["full", "full()", "lora(rank=8)+full", "full(layers=0-3) + ia3"])
def test_full_fine_tuning_of_a_quantized_base(method):
    finding = one(flags={"method": method}, sets=["model.quantize=nf4"])
    assert finding.code == "S107"
    assert "full fine-tuning cannot train quantized weights" in finding.message


@pytest.mark.parametrize("method", ["lora(targets=full)", "lora(rank=8)+ia3", "fuller"])
def test_other_methods_on_a_quantized_base(method):
    assert resolve(flags={"method": method}, sets=["model.quantize=nf4"]).settings.method == method


def test_two_sources_of_evaluation_rows_and_top_p_without_sampling():
    assert one(sets=["data.eval_path=a.csv", "data.eval_share=0.1"]).code == "S107"
    assert one(sets=["generate.top_p=0.9"]).code == "S107"
    assert resolve(sets=["generate.top_p=0.9", "generate.temperature=0.7"]).settings.generate.top_p == 0.9


def test_all_faults_of_all_sources_at_once(run_file):
    file = run_file("train:\n  learning_rte: 1\n  batch: 0\n  epochs: 1\n  steps: 1\n  lr: 3\n")
    said = faults(file=file, sets=["nothing"], flags={"lr": "20", "task": "sfd"}, python={"generate": {"samples": -1}})
    assert sorted(item.code for item in said) == ["S101", "S103", "S105", "S105", "S105", "S106", "S107", "S108"]
    assert [item.place for item in said[:4]] == ["run.yaml:2:3", "run.yaml:3:10", "run.yaml:4:11", "run.yaml:6:3"]


# Files


@pytest.mark.parametrize(
    ("text", "place", "shown", "caret"),
    [
        ("train:\n  seed: 1: 2\n", "run.yaml:2:10", "  seed: 1: 2", 9),
        ("train: [1,\nb: 2", "run.yaml:2:5", "b: 2", 4),
        ("train:\n\tseed: 1", "run.yaml:2:1", " seed: 1", 0),
        ("a: \x07", "run.yaml:1:4", "a: \ufffd", 3),
        ("a: 1\n---\nb: 2", "run.yaml:2:1", "---", 0),
        ("a: @x", "run.yaml:1:4", "a: @x", 3),
    ],
)
def test_broken_yaml_is_shown_with_a_caret(run_file, text, place, shown, caret):
    finding = one(file=run_file(text))
    assert (finding.code, finding.place) == ("S110", place)
    assert finding.detail == (shown, " " * caret + "^")


def test_a_broken_file_does_not_hide_the_other_sources(run_file):
    assert [item.code for item in faults(file=run_file("a: 'x"), flags={"lr": "20"})] == ["S110", "S105"]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (b"a: 1\nab: \xff", "run.yaml:2:5"),
        (b"- a", "run.yaml:1:1"),
        (b"train:\n  seed: !env X\n", "run.yaml:2:9"),
        (b"train: !!python/object:os.system {}\n", "run.yaml:1:8"),
        (b"[" * 1000, "run.yaml"),
        (b"train: &a {}\ngenerate: *a\n", "run.yaml:1:8"),
        (b"&a {train: *a}", "run.yaml:1:1"),
    ],
)
def test_files_that_are_not_settings(run_file, text, place):
    finding = one(file=run_file(text))
    assert (finding.code, finding.place) == ("S110", place)


def test_files_that_cannot_be_opened(run_file):
    run_file("")
    assert one(file=Path("run.yml")).fix == "-c run.yaml"
    assert one(file=Path("elsewhere/run.yaml")).detail == ("there is no folder elsewhere",)
    assert one(file=Path()).code == "S109"
    big = run_file(b"# " + b"x" * (1 << 20))
    assert "bytes" in one(file=big).message


# Anything at all

_WORDS = st.sampled_from(
    [*SETTINGS, *(setting.key for setting in SETTINGS.values()), "lora_r", "lr", "data.map.a", "?"]
)
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_WORDS | st.text(max_size=5), inner, max_size=5),
    max_leaves=12,
)


def answered(**sources) -> None:
    """Either settings or an error whose every finding has a code and whose text has at most twelve lines."""
    try:
        resolve(**sources)
        return
    except SettingsError as caught:
        error = caught
    assert all(finding.code in CODES and finding.message for finding in error.findings)
    assert len(str(error).splitlines()) <= 12
    assert all(line.isprintable() for line in str(error).splitlines())


@settings(max_examples=150, deadline=None)
@given(python=st.dictionaries(_WORDS, _VALUES), sets=st.lists(st.tuples(_WORDS, st.text(max_size=6)).map("=".join)))
def test_any_values_are_answered(python, sets):
    answered(python=python, sets=sets)


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.sampled_from("ab:-[]{}&*!|>'\"#%@`,? \n\t\x00\x85~1.e"), max_size=25) | st.text(max_size=20))
def test_any_file_is_answered(tmp_path_factory, text):
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    answered(file=file)
    file.write_bytes(f"train:\n  seed: {text}\n".encode("utf-8", "surrogatepass"))
    answered(file=file)
