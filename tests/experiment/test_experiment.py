"""A settings file from beginning to end, on the nano base; what exists already is not done again."""

import json

import pytest
import torch

import tinylora_lite as tl
from tinylora_lite import nano
from tinylora_lite.evaluation.score import Score
from tinylora_lite.experiment import runner
from tinylora_lite.experiment.models import load_model, load_tokenizer
from tinylora_lite.experiment.run import run_experiment, short_prompts, task_named
from tinylora_lite.experiment.settings import RunSettings
from tinylora_lite.utils import distributed
from tinylora_lite.utils.record import Run
from tinylora_lite.view.progress import Progress

BASIS = str(nano.basis_file())


def settings(folder, **changes) -> RunSettings:
    values = {
        "model": "nano",
        "task": "nano",
        "dtype": "float32",
        "adapter": {"rank": 8, "u": 13, "n_tie": "all", "projection": BASIS},
        "training": {
            "steps": 2,
            "prompts_per_step": 4,
            "group_size": 4,
            "max_new_tokens": nano.MAX_NEW_TOKENS,
            "learning_rate": 0.2,
        },
        "evaluation": {"tasks": ["nano"], "problems": 16, "max_new_tokens": nano.MAX_NEW_TOKENS},
        "folder": str(folder),
    }
    return RunSettings.from_dict(values | changes)


class Watching(Progress):
    """Keeps the names of all phases."""

    def __init__(self):
        super().__init__()
        self.phases = []

    def begin(self, phase, total=0):
        self.phases.append(phase.split(":")[0].split(" ")[0])
        super().begin(phase, total)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    return run_experiment(settings(tmp_path_factory.mktemp("first") / "run"))


def test_everything_is_in_the_folder(first):
    written = {path.relative_to(first.folder).as_posix() for path in first.folder.rglob("*") if path.is_file()}
    kept = {f"{name}/nano/{file}" for name in ("base", "trained") for file in ("completions.jsonl", "evaluation.json")}
    assert written == kept | {"adapter.tinylora", "checkpoint.pt", "outcome.json", "run.json", "settings.yaml"}
    assert json.loads((first.folder / "outcome.json").read_text()) == first.summary()
    assert Run.load(first.folder / "run.json") == first.run


def test_the_scores_are_of_what_was_saved(first):
    """The file that was written, on a fresh base, gives the completions that were scored."""
    model, tokenizer = nano.load()
    again = {}
    for name in ("base", "trained"):
        if name == "trained":
            tl.load(model, first.folder / "adapter.tinylora", basis=BASIS)
        options = {"problems": 16, "temperature": 0, "max_new_tokens": nano.MAX_NEW_TOKENS}
        again[name] = tl.evaluate(model, tokenizer, nano.task(), **options)
    assert [c.text for c in again["base"].completions] == [c.text for c in first.base["nano"].completions]
    assert [c.text for c in again["trained"].completions] == [c.text for c in first.adapted["nano"].completions]
    assert again["base"].completions != again["trained"].completions
    assert Score.load(first.folder / "base" / "nano") == first.base["nano"]


def test_a_second_call_does_nothing_again(first, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("sampled again")

    monkeypatch.setattr("tinylora_lite.sampling.sampler.ModelSampler.sample", never)
    again = run_experiment(settings(first.folder))
    assert again.run.steps == first.run.steps
    assert again.adapted == first.adapted


def test_another_setting_in_the_same_folder_is_refused(first):
    changed = settings(first.folder).override(["training.learning_rate=0.1"])
    before = {path: path.read_bytes() for path in first.folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"holds .*learning_rate"):
        run_experiment(changed)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(("trainer", "other"), [("own", "checkpoint-2"), ("trl", "checkpoint.pt")])
def test_the_folder_of_another_trainer_is_refused(trainer, other, tmp_path):
    (tmp_path / "lr-0.1" / other).mkdir(parents=True)
    (tmp_path / "adapter.tinylora").write_bytes(b"theirs")
    with pytest.raises(ValueError, match="holds a run of another trainer; give another folder"):
        run_experiment(settings(tmp_path, trainer=trainer, learning_rates=[0.1, 0.2]))
    assert (tmp_path / "adapter.tinylora").read_bytes() == b"theirs"


def test_what_several_processes_cannot_do_is_refused_before_the_base_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    monkeypatch.setattr(runner, "load_model", lambda *a, **o: pytest.fail("the base was loaded"))
    with pytest.raises(
        ValueError, match=r"set sampler.engine=vllm-server sampler.url=\.\.\., or train with one process"
    ):
        run_experiment(settings(tmp_path, sampler={"engine": "vllm"}))
    with pytest.raises(ValueError, match=r"with one process until .*basis\.safetensors is there"):
        run_experiment(settings(tmp_path, adapter={"projection": "calibrated"}))


def test_learning_rates_are_chosen_on_validation_problems(tmp_path):
    progress, sampled = Watching(), []
    outcome = run_experiment(
        settings(tmp_path, learning_rates=[0.01, 0.2]),
        progress=progress,
        on_rollouts=lambda rollouts, rewards: sampled.append(tuple(rewards.shape)),
    )
    assert set(outcome.rates) == {0.01, 0.2}
    best = max(outcome.rates, key=lambda rate: outcome.rates[rate].accuracy)
    assert outcome.run.settings["learning_rate"] == best
    assert sampled == [(4, 4)] * 4
    phases = ["loading", "testing", "training", "testing", "training", "testing", "training", "testing"]
    assert progress.phases == phases
    for rate, folder in ((0.01, "lr-0.01"), (0.2, "lr-0.2")):
        assert Score.load(tmp_path / folder / "validation") == outcome.rates[rate]
    prompts = {c.prompt for score in outcome.rates.values() for c in score.completions}
    assert prompts <= {e.prompt for e in nano.task().validation}


@pytest.mark.parametrize("learning_rates", [[], [1e-4, 2e-4]])
def test_all_weights(tmp_path, learning_rates):
    outcome = run_experiment(
        settings(tmp_path, adapter={"kind": "all"}, learning_rates=learning_rates).override(
            ["training.learning_rate=1e-4", "training.steps=1", "evaluation.problems=4"]
        )
    )
    assert outcome.run.parameters == sum(p.numel() for p in nano.load()[0].parameters())
    trained = load_model(str(tmp_path / "model"), dtype="float32")
    base = nano.load()[0]
    moved = max((a - b).abs().max().item() for a, b in zip(base.parameters(), trained.parameters(), strict=True))
    rate = outcome.run.settings["learning_rate"]
    assert moved == pytest.approx(rate, rel=0.05), "one step of Adam moves no weight further than the learning rate"


def test_by_trl(tmp_path):
    pytest.importorskip("trl")
    progress = Watching()
    outcome = run_experiment(settings(tmp_path, trainer="trl"), progress=progress)
    assert "trl" in outcome.run.environment
    assert progress.curves == {"grpo, rate 0.2": outcome.run.curve()}
    assert list(outcome.vectors) == [outcome.run.steps[-1][f"v{i}"] for i in range(13)]
    loaded = tl.load(nano.load()[0], tmp_path / "adapter.tinylora", basis=BASIS).vectors
    assert torch.allclose(loaded, torch.tensor([outcome.vectors]), rtol=2**-8, atol=0)
    assert run_experiment(settings(tmp_path, trainer="trl")).run.steps == outcome.run.steps


def test_imitation(tmp_path):
    training = {"steps": 2, "prompts_per_step": 4, "max_new_tokens": nano.MAX_NEW_TOKENS, "learning_rate": 0.1}
    progress = Progress()
    outcome = run_experiment(settings(tmp_path, method="sft", training=training), progress=progress)
    assert outcome.run.method == "sft"
    assert (progress.measure, progress.curves) == ("loss", {"sft, rate 0.1": outcome.run.curve("loss")})
    assert outcome.run.steps[-1]["norm"] > 0


def test_a_new_basis_is_made_once(tmp_path):
    calibrated = {"rank": 2, "u": 3, "n_tie": "all", "projection": "calibrated"}
    calibrated["calibration"] = {"problems": 24, "group_size": 4, "looks": 1, "max_new_tokens": nano.MAX_NEW_TOKENS}
    progress = Watching()
    one = run_experiment(settings(tmp_path, adapter=calibrated), progress=progress)
    assert progress.phases.count("calibrating") == 1
    basis = tl.load_basis(tmp_path / "basis.safetensors")
    assert (basis.rank, one.run.parameters) == (2, 3)
    again = Watching()
    run_experiment(settings(tmp_path, adapter=calibrated), progress=again)
    assert "calibrating" not in again.phases
    model = nano.load()[0]
    loaded = tl.load(model, tmp_path / "adapter.tinylora").vectors  # rounded to bfloat16 in the file
    assert torch.allclose(loaded, torch.tensor([one.vectors]), rtol=2**-8, atol=0)


def test_prompts_that_are_too_long_are_left_out():
    tokenizer, whole = load_tokenizer("nano"), nano.task()
    task = short_prompts(whole, tokenizer, 40)
    assert 0 < len(task.train) < len(whole.train)
    assert 0 < len(task.validation) < len(whole.validation)
    assert task.test == whole.test
    ids = tokenizer.apply_chat_template(task.messages(task.train[0]), add_generation_prompt=True)
    assert len(ids["input_ids"] if not isinstance(ids, list) else ids) <= 40


def test_prompts_that_are_all_too_long_are_noticed_before_the_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "load_model", lambda *args, **options: pytest.fail("it has begun to load"))
    with pytest.raises(ValueError, match="no training problem of nano fits max_prompt_tokens=3; raise it"):
        run_experiment(settings(tmp_path, max_prompt_tokens=3))


def test_word_problems_are_asked_after_worked_examples(tmp_path):
    run = settings(tmp_path, task="words-1", shots=2)
    task = task_named(run.task, run)
    assert task.name == "words-1"
    assert [turn["role"] for turn in task.messages(task.test[0])] == ["user", "assistant"] * 2 + ["user"]
    assert task_named("nano", settings(tmp_path)).shots == ()
