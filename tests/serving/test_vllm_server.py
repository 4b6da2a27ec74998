"""vLLM's own server on this machine answers as the model itself does, to one process that trains and to two.

`make test-vllm` sets up a Python that has vLLM and runs these tests with it in ``VLLM_PYTHON``.
"""

import json
import os
import socket
import subprocess
import sys
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import tinylora_lite as tl
from tinylora_lite import nano
from tinylora_lite.sampling.logprobs import completion_logprobs
from tinylora_lite.sampling.openai_server import OpenAISampler
from tinylora_lite.sampling.rollouts import encode_prompts
from tinylora_lite.sampling.sampler import ModelSampler
from tinylora_lite.sampling.vllm_server import VllmServerSampler, serve_command

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif("VLLM_PYTHON" not in os.environ, reason="needs vLLM: run `make test-vllm`"),
]

NANO = nano.CHECKPOINTS / nano.BASE
PROMPTS = 16
TOLERANCE = 1e-3
LIMIT = {"max_new_tokens": nano.MAX_NEW_TOKENS}
ON_A_CPU = {"dtype": "float32", "enforce_eager": True, "enable_chunked_prefill": False, "max_model_len": 256}
QUIET = {"DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive", "VLLM_LOGGING_LEVEL": "WARNING"}


@dataclass
class World:
    """A model that answers here, the server that serves the same base, and the prompts."""

    model: torch.nn.Module
    tokenizer: object
    url: str
    prompts: tuple[torch.Tensor, torch.Tensor]


@contextmanager
def served(command: list[str], folder: Path):
    settings = os.environ | QUIET
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(command, env=settings, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield
    except ConnectionError:
        print((folder / "server.log").read_text(encoding="utf-8")[-4000:])
        raise
    finally:
        server.terminate()
        server.wait(timeout=300)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    model, tokenizer = nano.load()
    command = serve_command(
        NANO, 8, port=port, python=os.environ["VLLM_PYTHON"], kv_cache_memory_bytes=2**27, **ON_A_CPU
    )
    prompts = encode_prompts(tokenizer, nano.task(), nano.task().test[:PROMPTS])
    with served(command, folder):
        yield World(model, tokenizer, f"http://127.0.0.1:{port}", prompts)


@pytest.fixture
def sampler(world, tmp_path):
    sampler = VllmServerSampler(world.url, world.tokenizer, model=NANO, folder=tmp_path, wait=600)
    yield sampler
    sampler.sync(None)


@pytest.fixture
def adapter(world):
    adapter = tl.attach(world.model, tl.TinyLoraConfig(rank=8, u=13, n_tie="all", projection=nano.basis()))
    move(adapter, 4)
    yield adapter
    adapter.detach()


def move(adapter, seed: int) -> None:
    with torch.no_grad():
        noise = torch.randn(adapter.vectors.shape, generator=torch.Generator().manual_seed(seed))
        adapter.vectors.copy_(0.4 * noise)


def check(world: World, sampler: VllmServerSampler) -> list[str]:
    """The greedy answers, which are the model's."""
    ours = ModelSampler(world.model, world.tokenizer).sample(*world.prompts, temperature=0.0, **LIMIT)
    theirs = sampler.sample(*world.prompts, temperature=0.0, **LIMIT)
    assert torch.equal(theirs.completion_ids, ours.completion_ids)
    assert torch.equal(theirs.completion_mask, ours.completion_mask)
    assert torch.equal(theirs.truncated, ours.truncated)
    assert theirs.texts == ours.texts
    gap = (theirs.logprobs - ours.logprobs).abs().max().item()
    print(f"within {gap:.1e}")
    assert gap < TOLERANCE
    return theirs.texts


def test_greedy_answers_are_those_of_the_model_after_every_sync(world, sampler, adapter, tmp_path):
    with adapter.disabled():
        base = check(world, sampler)
    said = []
    for seed in (4, 5):
        move(adapter, seed)
        sampler.sync(adapter)
        said.append(check(world, sampler))
        assert len(list(tmp_path.iterdir())) == 1  # the LoRA that answers, and none before it
    sampler.sync(None)
    with adapter.disabled():
        assert check(world, sampler) == base
    assert not list(tmp_path.iterdir())
    for one, other in ((base, said[0]), (said[0], said[1])):
        assert sum(a == b for a, b in zip(one, other, strict=True)) < PROMPTS / 2


def test_the_server_keeps_no_adapter_but_the_last(world, sampler, adapter):
    for _ in range(5):
        sampler.sync(adapter)
    with urllib.request.urlopen(f"{world.url}/v1/models", timeout=60) as answer:
        assert len(json.load(answer)["data"]) == 2  # the base and one LoRA


def test_samples_have_the_odds_of_the_model_and_follow_the_seed(world, sampler, adapter):
    sampler.sync(adapter)
    drawn = sampler.sample(*world.prompts, temperature=0.7, seed=3, **LIMIT)
    with torch.no_grad():
        odds = completion_logprobs(world.model, drawn, 0.7) * drawn.completion_mask
    assert (odds - drawn.logprobs).abs().max() < TOLERANCE
    parts = [
        sampler.sample(*(t[part] for t in world.prompts), temperature=0.7, seed=3, first_row=part.start, **LIMIT)
        for part in (slice(0, 5), slice(5, PROMPTS))
    ]
    assert [text for part in parts for text in part.texts] == drawn.texts
    otherwise = sampler.sample(*world.prompts, temperature=0.7, seed=4, **LIMIT)
    assert sum(a == b for a, b in zip(otherwise.texts, drawn.texts, strict=True)) < PROMPTS / 2


def test_the_check_says_who_answered(world, sampler, adapter):
    before = adapter.vectors.clone()
    found = tl.check_sampler(world.model, world.tokenizer, adapter, sampler, nano.task())
    print(repr(found))
    assert found.verdict == "adapter"
    assert torch.equal(adapter.vectors, before)
    for name, verdict in ((sampler._name, "adapter"), (None, "base")):
        served = OpenAISampler(world.url, world.tokenizer, name=name)
        found = tl.check_sampler(world.model, world.tokenizer, adapter, served, nano.task(), plant=False)
        print(repr(found))
        assert found.verdict == verdict


def test_a_rank_without_room_is_named_and_the_adapter_before_stays(world, sampler, adapter):
    sampler.sync(adapter)
    before = sampler.sample(*world.prompts, temperature=0.0, **LIMIT).texts
    adapter.detach()
    larger = tl.attach(world.model, tl.TinyLoraConfig(rank=16, u=1))
    try:
        with pytest.raises(ValueError, match=r"greater than max_lora_rank 8.* --max-lora-rank 16"):
            sampler.sync(larger)
    finally:
        larger.detach()
    assert sampler.sample(*world.prompts, temperature=0.0, **LIMIT).texts == before


def test_a_folder_that_the_server_cannot_see_is_named(sampler, adapter, monkeypatch):
    ask = sampler._ask

    def elsewhere(path, body=None):
        return ask(path, body if body is None or "lora_path" not in body else body | {"lora_path": "/nowhere/lora"})

    monkeypatch.setattr(sampler, "_ask", elsewhere)
    with pytest.raises(ValueError, match=r"No adapter found for /nowhere/lora; it must see"):
        sampler.sync(adapter)


def test_a_server_of_another_kind_is_told_apart(world, tmp_path, adapter):
    port = free_port()
    command = serve_command(NANO, port=port, python=os.environ["VLLM_PYTHON"], **ON_A_CPU)
    wrong = [word for word in command if word not in ("env", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1")]
    wrong[wrong.index("--logprobs-mode") + 1] = "raw_logprobs"
    with served([*wrong, "--kv-cache-memory-bytes", str(2**27)], tmp_path):
        sampler = VllmServerSampler(f"http://127.0.0.1:{port}", world.tokenizer, wait=120)
        with pytest.raises(ValueError, match=r"Not Found; .* started for such LoRAs: env VLLM_ALLOW"):
            sampler.sync(adapter)
        with pytest.raises(ValueError, match="start it with --logprobs-mode processed_logprobs"):
            sampler.sample(*world.prompts, temperature=0.7, **LIMIT)
        with pytest.raises(ValueError, match=r"exceed vLLM's max_model_len of 256"):
            sampler.sample(*world.prompts, max_new_tokens=256)


def test_two_processes_with_a_server_make_the_steps_of_one(world, tmp_path):
    pytest.importorskip("accelerate")
    found = {}
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        where = ["--multi_gpu", "--main_process_port=0"] if count > 1 else ["--cpu"]
        launch = [sys.executable, "-m", "accelerate.commands.launch", *where, f"--num_processes={count}"]
        launch += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--num_cpu_threads_per_process=1"]
        script = Path(__file__).with_name("train_with_server.py")
        environment = os.environ | QUIET | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
        done = subprocess.run(
            [*launch, str(script), world.url, str(folder)],
            env=environment, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        found[count] = [json.loads((folder / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(count)]
    (one,), two = found[1], found[2]
    assert [each["rows"] for each in (one, *two)] == [[32] * 4, [16] * 4, [16] * 4]
    assert two[0]["numbers"] == two[1]["numbers"] == pytest.approx(one["numbers"], abs=2e-4)
    assert [step["reward"] for step in two[0]["steps"]] == [step["reward"] for step in one["steps"]]
    assert max(step["logprob_diff_max"] for step in (*one["steps"], *two[0]["steps"])) < TOLERANCE


def test_infinity_is_noticed(world, tmp_path, adapter):
    # The last one: vLLM on a CPU keeps NaN among its keys and values, and reads it again for later prompts.
    sampler = VllmServerSampler(world.url, world.tokenizer, folder=tmp_path)
    with torch.no_grad():
        adapter.vectors.fill_(1e30)
    sampler.sync(adapter)
    with pytest.raises(FloatingPointError, match="the model puts out NaN"):
        sampler.sample(*world.prompts, **LIMIT)
