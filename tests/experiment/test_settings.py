"""A settings file: exact round trip, errors that name the line and the cure, epochs, sweeps, overrides."""

import dataclasses
import doctest
import re
from pathlib import Path

import pytest

from tinylora_lite.experiment import settings
from tinylora_lite.experiment.presets import preset
from tinylora_lite.experiment.settings import (
    TRAINING,
    AdapterSettings,
    CalibrationSettings,
    EvaluationSettings,
    RunSettings,
    SamplerSettings,
    load_settings,
)
from tinylora_lite.experiment.settings_file import SettingsError, read
from tinylora_lite.training.settings import GRPOSettings, SFTSettings

HERE = Path(__file__).parent

FULL = RunSettings(
    model="Qwen/Qwen2.5-7B-Instruct",
    task="gsm8k",
    revision="a09a354",
    dtype="float16",
    quantize="nf4",
    gradient_checkpointing=True,
    data="folder: with # marks",
    prompt="####",
    adapter=AdapterSettings(
        rank=8, u=13, n_tie="all", projection="calibrated", calibration=CalibrationSettings(problems=17, looks=1)
    ),
    training={"epochs": 3, "learning_rate": 1e-7, "tis_cap": None, "truncated": "mask"},
    sampler=SamplerSettings(engine="vllm-server", url="http://127.0.0.1:8000", batch_size=4),
    evaluation=EvaluationSettings(tasks=("gsm8k", "math500"), problems=5, every=3),
    learning_rates=(1e-7, 5e-6, 2e-4),
    folder="runs/ünï",
)


@pytest.mark.parametrize(
    "run", [FULL, RunSettings(model="nano", task="nano"), RunSettings(model="a", task="b", method="sft")]
)
def test_a_file_gives_the_settings_back(run, tmp_path):
    path = run.save(tmp_path / "settings.yaml", header="A header\n\nof three lines: # too")
    assert load_settings(path) == run
    assert RunSettings.from_dict(run.to_dict()) == run
    assert [p.name for p in tmp_path.iterdir()] == ["settings.yaml"]


def test_readers_of_yaml_1_1_find_the_same():
    yaml = pytest.importorskip("yaml")
    settings = FULL.override(["data=yes", "prompt='1:30'"])
    assert yaml.safe_load(settings.to_yaml("yes: 1")) == settings.to_dict()


def test_the_file_of_version_0_1_0():
    wanted, path = preset("qwen2.5-math-7b/math/calibrated", "t4"), HERE / "settings_0.1.0.yaml"
    assert load_settings(path) == wanted
    kept = [line for line in path.read_text().splitlines() if not re.match(r" *(sigma|sync|samples|shard):", line)]
    assert len(kept) == len(path.read_text().splitlines()) - 4
    assert RunSettings.from_dict(read("\n".join(kept))) == wanted  # missing keys take their defaults


def test_worked_examples():
    assert doctest.testmod(settings) == (0, 3)


def test_every_key_has_a_comment():
    training = {f.name for kind in (GRPOSettings, SFTSettings) for f in dataclasses.fields(kind)} | {"epochs"}
    assert training - {"evaluate_every"} == set(TRAINING)
    assert all(TRAINING.values())
    for line in FULL.to_yaml().splitlines():
        assert "  # " in line, line


BASE = "model: nano\ntask: nano\n"
WRONG = {
    "adaptr: 3": ("line 3", "unknown setting adaptr; did you mean adapter?"),
    "adapter:\n  rnak: 3": ("line 4", "did you mean adapter.rank?"),
    "adapter:\n  rank: 0": ("line 4", "adapter.rank should be greater than 0, not 0"),
    "adapter:\n  rank: true": ("line 4", "adapter.rank should be a valid integer, not True"),
    "adapter:\n  n_tie: some": ("line 4", "adapter.n_tie should be a valid integer or be 'all', not 'some'"),
    "adapter: 3": ("line 3", "adapter must hold settings"),
    "adapter:\n  calibration:\n    looks: 3": ("line 5", "adapter.calibration.looks should be 1 or 2, not 3"),
    "adapter:\n  projection: calibrated\n  u: 9\n  calibration:\n    problems: 8": (
        "line 7",
        "8 problems have no 9 directions",
    ),
    "training:\n  group_size: 1": ("line 4", "group_size must be "),
    "training:\n  groupsize: 8": ("line 4", "did you mean training.group_size?"),
    "training:\n  evaluate_every: 8": ("line 4", "evaluation.every says how often"),
    "training:\n  steps: 3\n  epochs: 3": ("line 5", "leave one out"),
    "training:\n  epochs: -1": ("line 4", "epochs must be a finite number above 0"),
    "method: sft\ntraining:\n  group_size: 8": ("line 5", "unknown setting training.group_size"),
    "dtype: bf16": ("line 3", "dtype should be 'auto', 'bfloat16', 'float32' or 'float16', not 'bf16'"),
    "shard: yes please": ("line 3", "shard should be true or false, not 'yes please'"),
    "sampler:\n  gpu_memory: 1.5": ("line 4", "sampler.gpu_memory should be less than or equal to 1, not 1.5"),
    "sampler:\n  engine: vllm-server": ("line 3", "url names the server"),
    "learning_rates: [1e-4, 0]": ("line 3", "learning_rates should be greater than 0, not 0"),
    "learning_rates: [fast]": ("line 3", "learning_rates should be a valid number, not 'fast'"),
    "adapter:\n  kind: all\nquantize: nf4": ("line 5", "cannot train all of its weights"),
    "adapter:\n  kind: all\nsampler:\n  engine: vllm": ("line 6", "vLLM follows an adapter"),
    "trainer: trl\nmethod: sft": ("line 3", "trl trains an adapter by GRPO and nothing else"),
    "trainer: trl\nshard: true": ("line 4", "trl shards as accelerate's own settings say"),
    "sampler:\n  engine: vllm-server\n  sync: merged\n  url: http://x": ("line 5", "a server is sent LoRAs"),
    "trainer: trl\ndtype: float16": ("line 3", "set trainer: own"),
    "adapter:\n  kind: all\nshard: true": ("line 5", "only a frozen base is spread"),
    "learning_rates: [1e-4, 1.0000001e-4]": ("line 3", "would share a folder"),
    "learning_rates: fast": ("line 3", "learning_rates should be a list, not 'fast'"),
    "quantize: nf8": ("line 3", "quantize should be 'nf4', 'int8' or null, not 'nf8'"),
    "folder: ''": ("line 3", "folder should have at least 1 character, not ''"),
    "evaluation:\n  temperature: .inf": ("line 4", "evaluation.temperature should be a finite number, not inf"),
    "adapter:\n  seed: -1": ("line 4", "adapter.seed should be greater than or equal to 0, not -1"),
    "3: 3": ("settings.yaml: ", "unknown setting 3; there are: model, "),
    "model: other": ("line 3", "duplicate key"),
    "a: : b": ("line 3", "this is no YAML"),
}


@pytest.mark.parametrize("text", WRONG)
def test_a_mistake_is_named_with_its_line(text, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(BASE + text + "\n")
    with pytest.raises(ValueError, match=r".") as error:
        load_settings(path)
    line, words = WRONG[text]
    assert words in str(error.value)
    assert line in str(error.value)
    assert "settings.yaml" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "the file must hold settings"),
        ("[1]", "the file must hold settings"),
        ("model: a", "task is missing"),
        ("modle: a\ntask: b", "line 1: unknown setting modle; did you mean model?"),
    ],
)
def test_what_is_missing_is_named(text, words, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=re.escape(words)):
        load_settings(path)
    with pytest.raises(FileNotFoundError, match=r"no settings file at .*none\.yaml; `tinylora preset NAME"):
        load_settings(tmp_path / "none.yaml")


def test_numbers_as_people_write_them():
    assert read("1e-4") == 1e-4
    assert read("5E+2") == 500.0
    assert read("1.5e3") == 1500.0
    assert read("1e-4x") == "1e-4x"
    assert read("a: 1e-7\nb:\n  c: 0x10\n") == {"a": 1e-7, "b": {"c": 16}}


def test_epochs_become_whole_steps():
    settings = RunSettings(model="a", task="gsm8k", training={"epochs": 3, "prompts_per_step": 64, "warmup": 2})
    training = settings.training_settings(7473)
    assert (training.steps, training.warmup, training.evaluate_every) == (350, 2, 0)
    assert settings.training_settings(10).steps == 1
    sft = RunSettings(model="a", task="gsm8k", method="sft", training={"epochs": 3, "prompts_per_step": 64})
    assert sft.training_settings(7473) == SFTSettings(epochs=3, prompts_per_step=64).in_steps(7473)
    assert FULL.training_settings(100).evaluate_every == 3


def test_a_sweep_is_one_run_for_each_rate():
    runs = FULL.sweep()
    assert [run.training["learning_rate"] for run in runs] == [1e-7, 5e-6, 2e-4]
    assert len({run.folder for run in runs}) == 3
    assert all(run.sweep() == [run] for run in runs)


def test_overrides():
    settings = FULL.override(
        ["adapter.n_tie=4", "training.learning_rate=2e-4", "quantize=null", "evaluation.tasks=[aime24]"]
    )
    assert settings.adapter.n_tie == 4
    assert settings.training["learning_rate"] == 2e-4
    assert settings.quantize is None
    assert settings.evaluation.tasks == ("aime24",)
    assert FULL.override(["training.steps=7"]).training_settings(100).steps == 7
    assert FULL.override([]) == FULL
    for wrong, words in (
        ("rank=4", "unknown setting rank"),
        ("adapter.rank", "key=value"),
        ("model.name=x", "holds no further"),
    ):
        with pytest.raises(ValueError, match=words):
            FULL.override([wrong])


def test_settings_of_python_are_checked_too():
    for wrong in (
        lambda: AdapterSettings(rank=0),
        lambda: AdapterSettings(rnak=2),
        lambda: RunSettings(model="a", task="b", quantize="nf4", adapter=AdapterSettings(kind="all")),
    ):
        with pytest.raises(ValueError, match=r"rank|rnak|quantize"):
            wrong()
    with pytest.raises(ValueError, match="frozen"):
        FULL.model = "other"


def test_the_adapter_that_is_meant(make_model):
    import tinylora_lite as tl

    assert AdapterSettings(n_tie=16, seed=3).config() == tl.TinyLoraConfig(n_tie=16, seed=3)
    assert AdapterSettings(kind="lora_xs", rank=4, sigma="right").config() == tl.lora_xs(4)
    assert AdapterSettings(kind="all").config() is None
    with pytest.raises(SettingsError, match="needs its basis"):
        FULL.adapter.config()
