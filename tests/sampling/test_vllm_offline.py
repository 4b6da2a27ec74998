"""vLLM without vLLM: what it is asked, how its answers are read, and what follows where it fails."""

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from types import ModuleType, SimpleNamespace

import pytest
import torch

import tinylora_lite as tl
from tinylora_lite import nano
from tinylora_lite.sampling.rollouts import encode_prompts
from tinylora_lite.sampling.sampler import sample
from tinylora_lite.sampling.vllm import Answer, VllmEngine, VllmSampler, engine_settings
from tinylora_lite.sampling.vllm_server import VllmServerSampler, serve_command
from tinylora_lite.utils import distributed
from tinylora_lite.utils.record import seed_of

NOT_JSON = {"error": {"message": "Out of range float values are not JSON compliant", "code": 400}}
TOO_HIGH = {"error": {"message": "failed: 'LoRA rank 16 is greater than max_lora_rank 8.'", "code": 500}}
NO_FOLDER = {"error": {"message": "Loading lora x failed: No adapter found for /there", "code": 404}}
NO_LORA = {"error": {"message": "RuntimeError('LoRA is not enabled. Use --enable-lora to enable LoRA.')", "code": 500}}


@pytest.fixture(scope="module")
def base():
    return nano.load()


@pytest.fixture
def adapter(base):
    adapter = tl.attach(base[0], tl.TinyLoraConfig(rank=2, u=1))
    yield adapter
    adapter.detach()


class Server(ThreadingHTTPServer):
    """In place of vLLM's server: answers every prompt with its own first token and the end token.

    ``answers`` replaces the answer of a path: a status and a body, or a function of the request.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.seen: list[tuple[str, dict, dict]] = []
        self.answers: dict = {}

    def handle_error(self, *_):
        """Nothing: who asks may have given up."""

    def of(self, path: str) -> list[dict]:
        """The bodies that were sent to a path."""
        return [body for at, body, _ in self.seen if at == path]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({})

    def do_POST(self):
        self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def answer(self, body):
        self.server.seen.append((self.path, body, dict(self.headers)))
        status, said = 200, {
            "/v1/models": {"data": [{"id": "base", "root": "/models/base", "parent": None, "max_model_len": 100}]},
            "/v1/load_lora_adapter": "Success",
            "/v1/unload_lora_adapter": "Success",
            "/v1/completions": {"choices": [completion(body)] if body else []},
        }[self.path]  # fmt: skip
        replaced = self.server.answers.get(self.path)
        if replaced is not None:
            status, said = replaced(body) if callable(replaced) else replaced
        text = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


def completion(body, logprobs=(-0.5, -0.25)):
    tokens = [body.get("prompt", [0])[0], 1][: body.get("max_tokens")]
    top = [{"token_id:1": -1.0 / body.get("temperature", 1.0)}]
    return {
        "index": 0,
        "token_ids": tokens,
        "logprobs": {"token_logprobs": list(logprobs)[: len(tokens)], "top_logprobs": top},
        "finish_reason": "stop" if tokens[-1] == 1 else "length",
    }


@pytest.fixture
def server():
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def sampler(server, base, tmp_path):
    return VllmServerSampler(server.url, base[1], folder=tmp_path / "loras", wait=2, timeout=5)


PROMPTS = torch.tensor([[0, 7, 8], [5, 6, 9], [5, 6, 9]]), torch.tensor([[0, 1, 1], [1, 1, 1], [1, 1, 1]])


def answered(tokenizer, prompts, answers):
    class Engine(VllmEngine):
        limit = 1000

        def _answer(self, *_):
            return answers

    return Engine(tokenizer).sample(*prompts, max_new_tokens=12)


def test_answers_become_the_rollouts_that_the_model_makes_of_the_same_tokens(base):
    model, tokenizer = base
    prompts = encode_prompts(tokenizer, nano.task(), nano.task().test[:6])
    ours = sample(model, tokenizer, *prompts, max_new_tokens=12, seed=2)
    assert 0 < ours.truncated.sum() < 6
    rows = zip(*(t.tolist() for t in (ours.completion_ids, ours.logprobs, ours.truncated, ours.lengths)), strict=True)
    answers = [Answer(ids[:length], logprobs[:length], cut) for ids, logprobs, cut, length in rows]
    again = answered(tokenizer, prompts, answers)
    for part in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "logprobs", "truncated"):
        mine, its = getattr(ours, part), getattr(again, part)
        assert torch.equal(mine, its), part
        assert mine.dtype == its.dtype, part
    assert again.texts == ours.texts
    assert torch.equal(again.entropies, -again.logprobs)


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), float("inf")])
def test_log_probabilities_that_are_not_finite_are_an_error(base, value):
    answers = [Answer([1], [logprob], False) for logprob in (-1.0, value, -1.0)]
    with pytest.raises(FloatingPointError, match="the model puts out NaN; lower the learning rate"):
        answered(base[1], PROMPTS, answers)


def test_every_row_has_a_seed_of_its_own_that_vllm_takes(base, vllm):
    def seeds(rows: int, **settings) -> list[int]:
        sampler = VllmSampler("base", base[1])
        sampler.sample(torch.zeros(rows, 1, dtype=torch.long), torch.ones(rows, 1), max_new_tokens=2, **settings)
        return [each.seed for each in sampler.llm.sampled]

    all_of_them = seeds(1000, seed=5)
    assert len(set(all_of_them)) == 1000
    assert not set(all_of_them) & set(seeds(1000, seed=6))
    assert all(0 <= seed < 2**63 for seed in all_of_them)
    assert all_of_them[400:] == seeds(600, seed=5, first_row=400)


@pytest.mark.parametrize(("rank", "reserved"), [(1, 1), (2, 8), (8, 8), (9, 16), (300, 320), (512, 512)])
def test_a_rank_takes_the_next_larger_one_that_vllm_reserves(rank, reserved):
    assert engine_settings("base", rank)["max_lora_rank"] == reserved


@pytest.mark.parametrize("rank", [0, 513])
def test_ranks_that_vllm_does_not_serve(rank):
    with pytest.raises(ValueError, match=f"rank 1 to 512, not {rank}"):
        engine_settings("base", rank)


def test_the_command_that_serves():
    command = serve_command(
        "some/model", 2, python="python3", port=8123, max_model_len=4096, enforce_eager=True, dev=False
    )
    assert command[:3] == ["env", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1", "python3"]
    pairs = dict(pairwise(command))
    wanted = {"--model": "some/model", "--host": "127.0.0.1", "--port": "8123", "--max-lora-rank": "8"}
    wanted |= {"--max-model-len": "4096", "--logprobs-mode": "processed_logprobs"}
    assert wanted.items() <= pairs.items()
    assert {"--enable-lora", "--enforce-eager", "--no-dev"} < set(command)
    assert command[-1] == "--no-dev"


def test_what_the_server_is_asked(server, sampler):
    rollouts = sampler.sample(*PROMPTS, max_new_tokens=2, temperature=1.0, seed=3)
    seeds = [seed_of("row", 3, row) for row in range(3)]
    bodies = sorted(server.of("/v1/completions"), key=lambda body: seeds.index(body["seed"]))
    assert [body["prompt"] for body in bodies] == [[7, 8], [5, 6, 9], [5, 6, 9]]
    plain = {"model": "base", "max_tokens": 2, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    plain |= {"repetition_penalty": 1.0, "logprobs": 0, "return_token_ids": True, "stop_token_ids": [1]}
    assert all(plain.items() <= body.items() for body in bodies)
    assert rollouts.completion_ids.tolist() == [[7, 1], [5, 1], [5, 1]]
    assert rollouts.logprobs.tolist() == [[-0.5, -0.25]] * 3
    assert not rollouts.truncated.any()
    server.seen.clear()
    cut = sampler.sample(*(t[1:] for t in PROMPTS), max_new_tokens=1, temperature=1.0, seed=3, first_row=1)
    assert {body["seed"] for body in server.of("/v1/completions")} == set(seeds[1:])
    assert cut.truncated.tolist() == [True, True]


def test_an_adapter_is_loaded_under_a_new_name_and_its_forerunner_goes(server, sampler, adapter, tmp_path):
    names = []
    for _ in range(3):
        sampler.sync(adapter)
        loaded = server.of("/v1/load_lora_adapter")[-1]
        names.append(loaded["lora_name"])
        (folder,) = (tmp_path / "loras").iterdir()  # one, the others are gone
        assert loaded["lora_path"] == str(folder / "lora")
        assert {path.name for path in (folder / "lora").iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
        }
        assert folder.stat().st_mode & 0o055 == 0o055  # whoever runs the server may read it
        sampler.sample(*PROMPTS, max_new_tokens=2)
        assert server.of("/v1/completions")[-1]["model"] == names[-1]
    assert len(set(names)) == 3
    assert [body["lora_name"] for body in server.of("/v1/unload_lora_adapter")] == names[:2]
    sampler.sync(None)
    assert [body["lora_name"] for body in server.of("/v1/unload_lora_adapter")] == names
    assert not list((tmp_path / "loras").iterdir())
    sampler.sample(*PROMPTS, max_new_tokens=2)
    assert server.of("/v1/completions")[-1]["model"] == "base"


@pytest.mark.parametrize(
    ("status", "said", "expected"),
    [
        (404, {"detail": "Not Found"}, r"Not Found; .* started for such LoRAs: env VLLM_ALLOW_RUNTIME"),
        (500, NO_LORA, r"LoRA is not enabled.* started for such LoRAs: env VLLM_ALLOW_RUNTIME"),
        (500, TOO_HIGH, r"LoRA rank 16 is greater than max_lora_rank 8.* --max-lora-rank 8"),
        (404, NO_FOLDER, r"No adapter found for /there; it must see .*/lora, and"),
        (500, {"error": {"message": "something else"}}, "refused /v1/load_lora_adapter: something else"),
    ],
)
def test_a_server_that_refuses_the_adapter_keeps_the_one_before(
    server, sampler, adapter, tmp_path, status, said, expected
):
    sampler.sync(adapter)
    before = server.of("/v1/load_lora_adapter")[-1]["lora_name"]
    server.answers["/v1/load_lora_adapter"] = status, said
    with pytest.raises(ValueError, match=expected):
        sampler.sync(adapter)
    sampler.sample(*PROMPTS, max_new_tokens=2)
    assert server.of("/v1/completions")[-1]["model"] == before
    assert server.of("/v1/unload_lora_adapter") == []
    assert (tmp_path / "loras" / before / "lora").is_dir()


def test_a_server_that_was_started_again_is_no_obstacle(server, sampler, adapter):
    sampler.sync(adapter)
    server.answers["/v1/unload_lora_adapter"] = 404, {"error": {"message": "cannot be found"}}
    sampler.sync(adapter)
    server.answers["/v1/completions"] = 404, {"error": {"message": "The model `x` does not exist."}}
    with pytest.raises(ValueError, match="refused /v1/completions: The model `x` does not exist"):
        sampler.sample(*PROMPTS, max_new_tokens=2)


@pytest.mark.parametrize(
    "said", [(400, NOT_JSON), lambda body: (200, {"choices": [completion(body, (-0.5, None))]})], ids=["error", "null"]
)
def test_nan_is_noticed_in_either_form(server, sampler, said):
    server.answers["/v1/completions"] = said
    with pytest.raises(FloatingPointError, match="the model puts out NaN"):
        sampler.sample(*PROMPTS, max_new_tokens=2)


def test_probabilities_at_another_temperature_are_noticed(server, sampler):
    sampler.sample(*PROMPTS, max_new_tokens=2, temperature=0.7)  # this server scales its probabilities

    def raw(body):
        return 200, {"choices": [completion(body | {"temperature": 1.0})]}

    server.answers["/v1/completions"] = raw
    sampler.sample(*PROMPTS, max_new_tokens=2, temperature=1.0)  # at 1 there is nothing to scale
    with pytest.raises(ValueError, match="start it with --logprobs-mode processed_logprobs"):
        sampler.sample(*PROMPTS, max_new_tokens=2, temperature=0.7)


def test_a_request_that_cannot_be_met(server, sampler):
    with pytest.raises(ValueError, match="a prompt of 3 tokens and 98 new ones exceed vLLM's max_model_len of 100"):
        sampler.sample(*PROMPTS, max_new_tokens=98)
    assert server.of("/v1/completions") == []


def test_no_server_is_an_error_in_bounded_time(base):
    started = time.monotonic()
    with pytest.raises(ConnectionError, match=r"no server answers at http://127.0.0.1:9 .*; serve_command says"):
        VllmServerSampler("http://127.0.0.1:9", base[1], wait=0.5)
    assert 0.4 < time.monotonic() - started < 5


def test_a_server_that_is_still_starting_is_waited_for(server, base):
    refusals = iter([503, 503])
    ready = {"data": [{"id": "base", "max_model_len": 100}]}
    server.answers["/v1/models"] = lambda _: (next(refusals, 200), ready)
    assert VllmServerSampler(server.url, base[1], wait=10).base == "base"
    assert len(server.of("/v1/models")) == 3


def test_a_server_that_falls_silent_is_given_up(server, base, tmp_path):
    sampler = VllmServerSampler(server.url, base[1], folder=tmp_path, wait=30, timeout=0.5)
    done = threading.Event()
    server.answers["/v1/completions"] = lambda _: (done.wait(10), (200, {}))[1]
    started = time.monotonic()
    with pytest.raises(ConnectionError, match=r"the server at .* took longer than 0\.5 seconds"):
        sampler.sample(*PROMPTS, max_new_tokens=2)
    assert time.monotonic() - started < 5
    done.set()
    assert len(server.of("/v1/completions")) == len(PROMPTS[0])  # none was sent again


@pytest.mark.parametrize("model", ["base", "/models/base"])
def test_the_model_may_be_named_as_it_was_started_or_as_it_is_served(server, base, model):
    VllmServerSampler(server.url, base[1], model=model)


def test_another_model_is_an_error(server, base):
    with pytest.raises(ValueError, match="serves base, not other/model; start one that does"):
        VllmServerSampler(server.url, base[1], model="other/model")


def test_a_proxy_of_the_environment_is_passed_by(server, base, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    VllmServerSampler(server.url, base[1], wait=0)


def test_the_processes_beside_the_first_take_its_name_and_load_nothing(server, sampler, adapter, monkeypatch):
    monkeypatch.setattr(distributed, "barrier", lambda: None)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(distributed, "all_gather_object", lambda value: ["tinylora-first", value])
    for _ in range(2):
        sampler.sync(adapter)
    assert {path for path, *_ in server.seen} == {"/v1/models"}
    sampler.sample(*PROMPTS, max_new_tokens=2)
    assert server.of("/v1/completions")[-1]["model"] == "tinylora-first"
    monkeypatch.setattr(distributed, "all_gather_object", lambda value: [ValueError("no room"), value])
    with pytest.raises(ValueError, match="no room"):
        sampler.sync(adapter)


def test_the_first_process_tells_the_others_what_it_found(server, sampler, adapter, monkeypatch):
    told = []
    monkeypatch.setattr(distributed, "barrier", lambda: None)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    monkeypatch.setattr(distributed, "all_gather_object", lambda value: told.append(value) or [value, None])
    sampler.sync(adapter)
    assert told == [server.of("/v1/load_lora_adapter")[-1]["lora_name"]]
    server.answers["/v1/load_lora_adapter"] = 500, TOO_HIGH
    with pytest.raises(ValueError, match="greater than max_lora_rank"):
        sampler.sync(adapter)
    assert isinstance(told[-1], ValueError)


@pytest.mark.parametrize("missing", ["eos_token_id", "pad_token_id", "chat_template"])
def test_a_tokenizer_must_have_its_tokens(server, missing):
    tokenizer = SimpleNamespace(eos_token_id=1, pad_token_id=0, chat_template="{{ messages }}")
    setattr(tokenizer, missing, None)
    for make in (lambda: VllmServerSampler(server.url, tokenizer), lambda: VllmSampler("base", tokenizer)):
        with pytest.raises(ValueError, match=r"the tokenizer has no (end token|pad token|chat template)"):
            make()


class Engine:
    """In place of ``vllm.LLM``: records what is done to it."""

    quantization = None

    def __init__(self, **settings):
        self.settings, self.done = settings, []
        self.model_config = SimpleNamespace(max_model_len=100, quantization=self.quantization, dtype=torch.float32)
        self.llm_engine = SimpleNamespace(vllm_config=SimpleNamespace(parallel_config=SimpleNamespace(world_size=1)))
        torch.manual_seed(settings.get("seed", 0))

    def __getattr__(self, name):
        return lambda *_, **__: self.done.append(name) or True

    def generate(self, requests, settings, **_):
        self.done.append("generate")
        self.sampled = settings
        answer = SimpleNamespace(
            token_ids=[7, 1], logprobs=SimpleNamespace(logprobs=[-1.0, -1.0]), finish_reason="stop"
        )
        return [SimpleNamespace(outputs=[answer]) for _ in requests]


@pytest.fixture
def vllm(monkeypatch):
    """A vLLM on a GPU, as far as the sampler looks."""
    module, platforms = ModuleType("vllm"), ModuleType("vllm.platforms")
    module.LLM, module.SamplingParams = type("LLM", (Engine,), {}), SimpleNamespace
    platforms.current_platform = SimpleNamespace(is_cpu=lambda: False)
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    return module


def test_without_vllm_the_error_names_the_extra(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r'pip install "tinylora_lite\[vllm\]"'):
        VllmSampler("base", base[1])


def test_the_engine_has_the_settings_that_training_needs(base, vllm):
    state = torch.get_rng_state()
    settings = VllmSampler("base", base[1], tensor_parallel_size=2, max_lora_rank=2, seed=9).llm.settings
    wanted = {"model": "base", "tensor_parallel_size": 2, "gpu_memory_utilization": 0.3, "max_lora_rank": 8, "seed": 9}
    wanted |= {"enable_lora": True, "logprobs_mode": "processed_logprobs", "enforce_eager": False}
    assert wanted.items() <= settings.items()
    assert torch.equal(torch.get_rng_state(), state)
    assert "enable_lora" not in VllmSampler("base", base[1], sync="merged", max_lora_rank=1000).llm.settings
    assert VllmSampler("base", base[1], gpu_memory_utilization=0.2).llm.settings["gpu_memory_utilization"] == 0.2


def test_a_cache_that_cannot_be_reset_is_an_error(base, vllm, adapter, monkeypatch):
    sampler = VllmSampler("base", base[1], sync="merged")
    monkeypatch.setattr(sampler.llm, "reset_prefix_cache", lambda: False, raising=False)
    with pytest.raises(RuntimeError, match="prefix cache is in use"):
        sampler.sync(adapter)


def test_merged_weights_need_a_model_and_a_plain_engine(base, vllm):
    model = tl.nano.load()[0]
    sampler = VllmSampler("base", base[1], sync="merged")
    sampler.sync(tl.attach(model, tl.TinyLoraConfig(rank=2, u=1)))
    assert sampler.llm.done.count("collective_rpc") == 49  # of seven blocks, seven weights each
    del model
    with pytest.raises(ValueError, match="the adapter's model no longer exists"):
        sampler.sync(None)
    vllm.LLM.quantization = "fp8"
    with pytest.raises(ValueError, match="cannot be merged into a quantized engine; use sync='lora'"):
        VllmSampler("base", base[1], sync="merged")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({"sync": "pushed"}, "sync must be one of lora, merged"), ({"max_lora_rank": 600}, "rank 1 to 512, not 600")],
)
def test_settings_that_no_engine_can_have(base, vllm, settings, expected):
    with pytest.raises(ValueError, match=expected):
        VllmSampler("base", base[1], **settings)


def test_several_processes_are_sent_to_a_server(base, vllm, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(ValueError, match="share a server: VllmServerSampler"):
        VllmSampler("base", base[1])
