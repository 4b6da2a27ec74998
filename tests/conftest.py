"""Tiny models with random weights, the nano tokenizer, and tasks that need no world knowledge."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from tinylora_lite import Example, Task
from tinylora_lite.nano.tokenizer import build_tokenizer

ARCHITECTURES = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny matrices are slower on more threads, and sums come out the same on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def _no_cache_of_the_user():
    """What tests decompose is not left in the user's cache, and does not come from there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINYLORA_CACHE", "off")
        yield


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="session")
def make_model(tokenizer) -> Callable[..., PreTrainedModel]:
    """``make_model(architecture="qwen2", seed=0, **config)``: two layers of width 32, float32, evaluation mode."""

    def make(architecture: str = "qwen2", seed: int = 0, **config) -> PreTrainedModel:
        torch.manual_seed(seed)
        config_class, model_class = ARCHITECTURES[architecture]
        shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        shape |= {"intermediate_size": 48, "max_position_embeddings": 256, "initializer_range": 0.2}
        tokens = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        tokens |= {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
        return model_class(config_class(**shape | tokens | config)).eval()

    return make


@pytest.fixture
def model(make_model) -> PreTrainedModel:
    return make_model()


@pytest.fixture(scope="session")
def task() -> Task:
    """Questions of different lengths; an answer is worth 1 if a digit-free "has" occurs in it. Learnable in seconds."""
    names = ("ann", "ben", "tom", "eva")

    def examples(first: int, count: int) -> list[Example]:
        return [
            Example(f"{names[i % len(names)]} has {i} {'and then ' * (i % 3)}?", str(i))
            for i in range(first, first + count)
        ]

    return Task("tiny", examples(0, 12), examples(12, 6), examples(20, 6), lambda text, gold: float("has" in text))


@pytest.fixture(scope="session")
def number_words() -> Callable[[str, str], float]:
    """The share of words that are numbers: a reward that every random model earns a part of."""

    def reward(text: str, gold: str) -> float:
        words = text.split()
        return sum(word.isdigit() for word in words) / len(words) if words else 0.0

    return reward


@pytest.fixture(scope="session")
def texts() -> Callable[..., list[str]]:
    """``texts(figure)``: the words of a drawn figure."""
    from tinylora_lite.view import plot

    def found(drawn) -> list[str]:
        root = ElementTree.fromstring(plot.show(drawn, "a figure under test").svg)
        return [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]

    return found


@pytest.fixture(scope="session")
def contrast() -> Callable[[str, str], float]:
    """``contrast(one, other)`` of two colours, as WCAG 2 defines it."""

    def luminance(colour: str) -> float:
        parts = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    def of(one: str, other: str) -> float:
        high, low = sorted((luminance(one), luminance(other)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    return of
