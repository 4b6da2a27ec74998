"""A sampler that follows the adapter passes, and each way not to follow it is told by its name."""

import copy
import functools
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

import tinylora_lite as tl
from tinylora_lite import nano
from tinylora_lite.sampling.check import judge
from tinylora_lite.sampling.openai_server import OpenAISampler
from tinylora_lite.sampling.rollouts import Rollouts
from tinylora_lite.sampling.sampler import ModelSampler
from tinylora_lite.training.grpo import GRPO

NAME = "qwen2-0.4m"
CONFIG = tl.TinyLoraConfig(rank=2, u=1, n_tie=2)


load = functools.cache(nano.load)  # what it returns is copied before it carries an adapter


@pytest.fixture(scope="module")
def base():
    return copy.deepcopy(load(NAME))


@pytest.fixture
def adapter(base):
    adapter = tl.attach(base[0], CONFIG)
    yield adapter
    adapter.detach()


def move(adapter, size: float) -> torch.Tensor:
    with torch.no_grad():
        noise = torch.randn(adapter.vectors.shape, generator=torch.Generator().manual_seed(1))
        return adapter.vectors.copy_(size * noise).clone()


class Engine:
    """Another program: a model of its own, to which ``sync`` brings v."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        model, self.tokenizer = load(NAME)
        self.model = copy.deepcopy(model).to(dtype)
        self.adapter = tl.attach(self.model, CONFIG)

    def sync(self, adapter):
        self.take(torch.zeros_like(self.adapter.vectors) if adapter is None else adapter.vectors)

    @torch.no_grad()
    def take(self, v):
        self.adapter.vectors.copy_(v)

    def sample(self, *prompts, **options):
        return ModelSampler(self.model, self.tokenizer).sample(*prompts, **options)


class Never(Engine):
    def take(self, v):
        """Leaves the LoRA out."""


class Once(Engine):
    def take(self, v):
        if not self.adapter.vectors.any():
            super().take(v)


class Late(Engine):
    def take(self, v):
        super().take(getattr(self, "next", v))
        self.next = v.clone()


class Half(Engine):
    def take(self, v):
        super().take(0.5 * v)


class SomeRows(Engine):
    def sample(self, ids, mask, **options):
        rows, v = len(ids) // 2, self.adapter.vectors.clone()
        adapted = super().sample(ids[:rows], mask[:rows], **options)
        self.take(0 * v)
        base = super().sample(ids[rows:], mask[rows:], first_row=rows, **options)
        self.take(v)
        return Rollouts.cat([adapted, base], self.tokenizer.pad_token_id)


class SomeModules(Engine):
    def __init__(self):
        super().__init__()
        hooks = self.adapter._hooks[-len(self.adapter.names) :]
        for name, hook in zip(self.adapter.names, hooks, strict=True):
            if name.endswith("up_proj"):
                hook.remove()


class AtOne(Engine):
    def sample(self, *prompts, temperature, **options):
        return super().sample(*prompts, **options)


class OtherWeights(Engine):
    def __init__(self):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in self.model.parameters():
                weight += 0.2 * weight.std() * torch.randn(weight.shape, generator=draw)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_sampler_that_follows_the_adapter(base, adapter, temperature):
    before, engine = move(adapter, 0.3), Engine()
    for sampler in (engine, ModelSampler(*base)):
        found = tl.check_sampler(*base, adapter, sampler, nano.task(), temperature=temperature)
        assert found.verdict == "adapter"
        assert found.share == pytest.approx(1, abs=1e-3)
        assert found.to_adapter < 1e-5 < 1e-3 < found.to_base
        assert torch.equal(adapter.vectors, before)
    assert torch.equal(engine.adapter.vectors, before)


def test_another_dtype_is_no_fault(base, adapter):
    found = tl.check_sampler(*base, adapter, Engine(dtype=torch.bfloat16), nano.task())
    assert found.verdict == "adapter"
    assert found.noise > 1e-5


@pytest.mark.parametrize(
    ("sampler", "verdict", "words"),
    [
        (Never, "base", "The base answered: the LoRA is not applied"),
        (Once, "stale", "An earlier adapter answered"),
        (Late, "stale", "An earlier adapter answered"),
        (Half, "between", "Compare the LoRA's scale"),
        (SomeModules, "between", "the modules that the engine adapts"),
        (SomeRows, "rows", "The adapter answered some requests, and the base the others"),
        (AtOne, "temperature", "--logprobs-mode processed_logprobs"),
        (OtherWeights, "neither", "Compare the engine's weights"),
    ],
)
def test_a_sampler_that_does_not(base, adapter, sampler, verdict, words):
    before = move(adapter, 0.3)
    found = tl.check_sampler(*base, adapter, sampler(), nano.task(), temperature=0.7)
    assert found.verdict == verdict
    assert words in str(found)
    assert torch.equal(adapter.vectors, before)


def test_a_share_is_the_slope_of_least_squares():
    draw = torch.Generator().manual_seed(0)
    base, x, rest = (torch.randn(8, 20, generator=draw) for _ in range(3))
    mask = torch.ones(8, 20, dtype=torch.long)
    mask[3, 5:] = 0
    for share, verdict in ((0.0, "base"), (1.0, "adapter"), (0.5, "between"), (2.0, "between"), (-1.0, "between")):
        found = judge(base + share * x + 0.02 * rest, base + x, base, mask, 0.02)
        assert found.verdict == verdict
        assert found.share == pytest.approx(share, abs=2 * found.error)
        assert found.tokens == 145
    assert judge(base + x, base + x, base, mask, 0.02, earlier=base + x).verdict == "stale"
    assert judge(base + 0.1 * rest, base + 0.01 * x, base, mask, 0.1).verdict == "unclear"
    assert judge(base + 1.3 * rest, base + x, base, mask, 0.02).verdict == "neither"
    assert judge(base, base, base, mask, 0.02).verdict == "unclear"


SETTINGS = tl.GRPOSettings(steps=2, prompts_per_step=4, group_size=4, max_new_tokens=24, learning_rate=0.05)


@pytest.fixture
def gradients(base, monkeypatch):
    """Trains, and returns v's gradient in every step and the record without its seconds."""
    seen = []
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda own, most: seen.append(own[0].grad.clone()) or clip(own, most)
    )

    def train(sampler):
        adapter = tl.attach(base[0], CONFIG)
        seen.clear()
        try:
            run = tl.train_grpo(*base, adapter, nano.task(), SETTINGS, sampler=sampler, progress=False)
        finally:
            adapter.detach()
        return [*seen], [{key: value for key, value in step.items() if "seconds" not in key} for step in run.steps]

    return train


def test_training_checks_the_sampler_first_and_goes_on_as_without(gradients, monkeypatch):
    engine, synced = Engine(), []
    monkeypatch.setattr(engine, "take", lambda v: synced.append(v.clone()) or Engine.take(engine, v))
    first, checked = gradients(engine)
    assert [bool(v.any()) for v in synced] == [False, True, True, False, False, True]  # four of the check, two steps
    assert torch.equal(synced[1], -synced[2])
    monkeypatch.setattr(GRPO, "check_sampler", lambda self: None)
    second, unchecked = gradients(Engine())
    assert checked == unchecked
    assert all(torch.equal(a, b) and a.any() for a, b in zip(first, second, strict=True))
    assert len(first) == SETTINGS.steps


def test_training_stops_where_the_base_answers(gradients):
    with pytest.raises(RuntimeError, match="The base answered: the LoRA is not applied"):
        gradients(Never())


def test_training_by_the_model_itself_checks_nothing(base, gradients, monkeypatch):
    monkeypatch.setattr("tinylora_lite.training.grpo.check_sampler", None)
    gradients(ModelSampler(*base))


class Server(ThreadingHTTPServer):
    """A server of OpenAI's protocol, in the dialect of one of three programs, with an adapter or without."""

    daemon_threads = True

    def __init__(self, dialect, engine):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url, self.dialect, self.engine = f"http://127.0.0.1:{self.server_port}", dialect, engine
        self.lock, self.asked = threading.Lock(), []


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.say(200, {"data": [{"id": "served"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:  # hooks of one model serve one request at a time
            self.server.asked.append(body)
            self.say(*self.complete(body))

    def complete(self, body):
        dialect, tokenizer = self.server.dialect, self.server.engine.tokenizer
        prompt = body["prompt"]
        if dialect in ("text", "start token", "no probabilities"):
            if not isinstance(prompt, str):
                return 422, {"error": {"message": "Input should be a valid string"}}
            prompt = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([prompt])
        drawn = self.server.engine.sample(
            ids, torch.ones_like(ids), max_new_tokens=body["max_tokens"], temperature=1.0, seed=body["seed"]
        )
        tokens, logprobs = drawn.completion_ids[0].tolist(), drawn.logprobs[0].tolist()
        answer = {"finish_reason": "stop"}
        if dialect == "vllm":
            answer |= {"token_ids": tokens, "logprobs": {"token_logprobs": logprobs}}
        elif dialect == "llama-server":
            rows = [{"id": t, "token": "?", "logprob": p} for t, p in zip(tokens, logprobs, strict=True)]
            answer["logprobs"] = {"content": rows}
        elif dialect != "no probabilities":
            texts = [tokenizer.decode([token]) for token in tokens]
            answer["logprobs"] = {"tokens": texts, "token_logprobs": logprobs}
        read = len(prompt) + (dialect == "start token")
        return 200, {"choices": [answer], "usage": {"prompt_tokens": read}}

    def say(self, status, said):
        text = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture
def served():
    running = []

    def start(dialect, size):
        engine = Engine()
        move(engine.adapter, size)
        server = Server(dialect, engine)
        running.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        return server

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("dialect", ["vllm", "llama-server", "text"])
@pytest.mark.parametrize(("size", "verdict"), [(0.1, "adapter"), (0.0, "base")])
def test_a_server_that_was_started_with_the_adapter(base, adapter, served, dialect, size, verdict):
    server, before = served(dialect, size), move(adapter, 0.1)
    sampler = OpenAISampler(server.url, base[1], name="mine")
    found = tl.check_sampler(*base, adapter, sampler, nano.task(), plant=False)
    assert found.verdict == verdict
    assert min(found.to_adapter, found.to_base) < 1e-5
    assert torch.equal(adapter.vectors, before)
    asked = {(body["model"], body["temperature"], body["top_p"], body["repeat_penalty"]) for body in server.asked}
    assert asked == {("mine", 1.0, 1.0, 1.0)}
    assert len({body["seed"] for body in server.asked}) == 8
    with pytest.raises(ValueError, match="cannot follow an adapter; compare it with plant=False"):
        tl.check_sampler(*base, adapter, sampler, nano.task())


@pytest.mark.parametrize(
    ("dialect", "words"),
    [("start token", "reads a prompt as .* puts a start token"), ("no probabilities", "reports no log-probabilities")],
)
def test_a_server_that_cannot_be_compared(base, adapter, served, dialect, words):
    sampler = OpenAISampler(served(dialect, 0.0).url, base[1])
    with pytest.raises(ValueError, match=words):
        tl.check_sampler(*base, adapter, sampler, nano.task(), plant=False)


def test_an_answer_ends_before_a_token_that_its_text_does_not_tell(base):
    sampler = OpenAISampler.__new__(OpenAISampler)
    sampler.tokenizer = base[1]
    ids = base[1]("12 + 3", add_special_tokens=False)["input_ids"]
    assert [sampler._token(base[1].decode([token])) for token in ids] == ids
    assert sampler._token("") is sampler._token("\ufffd") is sampler._token("12 + 3") is None
