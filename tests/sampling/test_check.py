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
from tinylora_lite.cli import main
from tinylora_lite.experiment.runner import Runner
from tinylora_lite.sampling.check import judge
from tinylora_lite.sampling.openai_server import OpenAISampler
from tinylora_lite.sampling.rollouts import Rollouts
from tinylora_lite.sampling.sampler import ModelSampler
from tinylora_lite.training.grpo import GRPO
from tinylora_lite.training.sft import SFT

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
        (SomeRows, "mixed", "The adapter answered some requests, and the base the others"),
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


def test_answers_that_are_almost_certain_are_no_fault(base, adapter):
    for temperature in (0.5, 1.0):
        found = tl.check_sampler(*base, adapter, Engine(dtype=torch.bfloat16), nano.task(), temperature=temperature)
        assert found.verdict == "adapter", found


class Breaks(Engine):
    def sample(self, *prompts, **options):
        if self.adapter.vectors.any() and float(self.adapter.vectors[0]) != 0.5:
            raise ConnectionError("gone")
        return super().sample(*prompts, **options)


@pytest.mark.parametrize("size", [0.0, 0.5])
def test_where_the_sampler_raises_it_keeps_nothing_that_was_planted(base, adapter, size):
    with torch.no_grad():
        before, engine = adapter.vectors.fill_(size).clone(), Breaks()
    with pytest.raises(ConnectionError, match="gone"):
        tl.check_sampler(*base, adapter, engine, nano.task())
    assert torch.equal(adapter.vectors, before)
    assert torch.equal(engine.adapter.vectors, before)


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
    assert judge(base + 0.1 * rest, base + x, base, mask, 0.5, earlier=base - x).verdict == "base"
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


def test_training_by_imitation_does_too(base, adapter):
    imitation = SFT(*base, adapter, nano.task(), [tl.SFTSettings(steps=1, max_new_tokens=nano.MAX_NEW_TOKENS)], Never())
    with pytest.raises(RuntimeError, match="The base answered: the LoRA is not applied"):
        imitation.check_sampler()


def test_weights_that_are_quantized_in_one_program_are_a_warning(base, adapter, monkeypatch):
    objective = GRPO(*base, adapter, nano.task(), [SETTINGS], OtherWeights())
    with pytest.raises(RuntimeError, match="Neither the adapter nor the base answered"):
        objective.check_sampler()
    monkeypatch.setattr(base[0], "is_quantized", True, raising=False)
    with pytest.warns(UserWarning, match="Neither the adapter nor the base answered"):
        objective.check_sampler()


def test_a_run_that_is_done_checks_nothing(base, adapter, tmp_path, monkeypatch):
    def train():
        return tl.train_grpo(*base, adapter, nano.task(), SETTINGS, sampler=Engine(), folder=tmp_path, progress=False)

    done = train()
    monkeypatch.setattr("tinylora_lite.training.loop.check_sampler", None)
    assert train().steps == done.steps


def test_training_by_the_model_itself_checks_nothing(base, gradients, monkeypatch):
    monkeypatch.setattr("tinylora_lite.training.loop.check_sampler", None)
    gradients(ModelSampler(*base))


class Server(ThreadingHTTPServer):
    """A server of OpenAI's protocol, in the dialect of one of three programs, with an adapter or without."""

    daemon_threads = True

    def __init__(self, dialect, engine):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url, self.dialect, self.engine = f"http://127.0.0.1:{self.server_port}", dialect, engine
        self.lock, self.asked, self.keys = threading.Lock(), [], []
        self.models = {"data": [{"id": "served"}]}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.keys.append(self.headers.get("Authorization"))
        self.say(200, self.server.models)

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
        if dialect == "nothing":
            answer["logprobs"] = {"tokens": [], "token_logprobs": []}
        elif dialect == "vllm, older":
            answer["logprobs"] = {"tokens": [f"token_id:{t}" for t in tokens], "token_logprobs": logprobs}
        elif dialect == "vllm":
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


@pytest.mark.parametrize("dialect", ["vllm", "vllm, older", "llama-server", "text"])
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
    [
        ("start token", "reads a prompt as .* puts a start token"),
        ("no probabilities", "reports no log-probabilities"),
        ("nothing", "no answer holds a token"),
    ],
)
def test_a_server_that_cannot_be_compared(base, adapter, served, dialect, words):
    sampler = OpenAISampler(served(dialect, 0.0).url, base[1])
    with pytest.raises(ValueError, match=words):
        tl.check_sampler(*base, adapter, sampler, nano.task(), plant=False)


@pytest.mark.parametrize("models", [{"error": {}}, {"data": []}, [], {"data": [{}]}])
def test_what_is_no_such_server_is_named(base, served, models):
    server = served("vllm", 0.0)
    server.models = models
    with pytest.raises(ValueError, match="lists no models as OpenAI's protocol does"):
        OpenAISampler(server.url, base[1])


def test_urls_end_as_people_write_them_and_a_key_is_sent(base, served, monkeypatch):
    server = served("vllm", 0.0)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert OpenAISampler(f"{server.url}/v1/", base[1]).base == "served"
    monkeypatch.delenv("OPENAI_API_KEY")
    OpenAISampler(server.url, base[1])
    assert server.keys == ["Bearer secret", None]


def test_an_answer_ends_before_a_token_that_its_text_does_not_tell(base):
    sampler = OpenAISampler.__new__(OpenAISampler)
    sampler.tokenizer = base[1]
    ids = base[1]("12 + 3", add_special_tokens=False)["input_ids"]
    assert [sampler._token(base[1].decode([token])) for token in ids] == ids
    assert sampler._token("") is sampler._token("\ufffd") is sampler._token("12 + 3") is None


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"content": [{"id": 1, "logprob": -1.0}, {"id": 9, "logprob": -2.0}, {"id": 2, "logprob": -3.0}]}, [1]),
        ({"tokens": ["a", " ", "", "b"], "token_logprobs": [-1.0, -2.0, -3.0, -4.0]}, [1]),
    ],
)
def test_a_character_of_several_tokens_ends_what_is_compared(table, expected, monkeypatch):
    """llama-server lists the last token of one alone, and llama-cpp-python leaves their text out."""
    texts = {1: "a", 2: "b", 3: " ", 9: "\ufffd"}

    class Tokenizer:
        def decode(self, ids):
            return "".join(texts[i] for i in (ids if isinstance(ids, list) else [ids]))

        def __call__(self, text, **_):
            return {"input_ids": [i for letter in text for i, own in texts.items() if own == letter]}

    sampler = OpenAISampler.__new__(OpenAISampler)
    sampler.url, sampler.tokenizer, sampler._name = "http://here", Tokenizer(), "mine"
    choice = {"finish_reason": "stop", "logprobs": table}
    monkeypatch.setattr(sampler, "_ask", lambda *_: json.dumps({"choices": [choice]}))
    answer = sampler._complete({"prompt": [1, 2], "seed": 0})
    assert answer["token_ids"] == expected
    assert answer["logprobs"]["token_logprobs"] == [-1.0]


@pytest.fixture
def saved(adapter, tmp_path):
    """An adapter's file, and the folder of its base."""
    move(adapter, 0.1)
    for each in load(NAME):
        each.save_pretrained(tmp_path / "base")
    return [str(tl.save(adapter, tmp_path / "a.tinylora", "fp32")), "--base", str(tmp_path / "base")]


@pytest.mark.parametrize(("size", "verdict", "status"), [(0.1, "adapter", 0), (0.0, "base", 1)])
def test_the_command_asks_a_server(served, saved, capsys, size, verdict, status):
    words = ["check-sampler", *saved, "--url", served("llama-server", size).url, "--model", "mine"]
    assert main([*words, "--json"]) == status
    shown = capsys.readouterr()
    assert json.loads(shown.out.splitlines()[-1])["verdict"] == verdict
    assert ("The base answered: the LoRA is not applied" in shown.err) == (status == 1)


def test_the_command_checks_the_sampler_of_settings(tmp_path, capsys, monkeypatch):
    opened = []
    monkeypatch.setattr(Runner, "open", lambda *a, real=Runner.open, **k: opened.append(k) or real(*a, **k))
    assert main(["check-sampler", "nano", f"folder={tmp_path / 'run'}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["verdict"] == "adapter"
    assert opened[0]["lora_folder"] == tmp_path / "run" / "lora"


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["a.tinylora", "--url", "http://127.0.0.1:1"], "give both or neither"),
        (["a.tinylora", "folder=x", "--url", "http://127.0.0.1:1", "--base", NAME], "belong to settings"),
        (["nano", "--model", "mine"], "are of a server; name it with --url"),
    ],
)
def test_options_that_do_not_belong_together(words, cause, capsys):
    assert main(["check-sampler", *words]) != 0
    assert cause in capsys.readouterr().err
