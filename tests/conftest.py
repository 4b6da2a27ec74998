"""Tiny models with random weights, the nano tokenizer, and tasks that need no world knowledge."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tinylora_lite import Example, Task
from tinylora_lite.nano.tokenizer import build_tokenizer

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} {{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
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


@pytest.fixture(scope="session")
def write_gguf(make_model) -> Callable[..., PreTrainedModel]:
    """``write_gguf(path, architecture="llama", kind="Q8_0", split="smollm", without=(), scaled=0.0, **extra)``.

    It returns a tiny model with the values that the file holds, its positions scaled as Llama 3's by ``scaled``. Bytes
    are tokens, "12" and a blank line are merges, "123" is a word that no merges make, and the rows of Llama's queries
    and keys change places as in llama.cpp's own converter.
    """
    gguf = pytest.importorskip("gguf")
    alphabet = list(bytes_to_unicode().values())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>"]
    merges = [("1", "2"), ("Ċ", "Ċ"), ("a", "n"), ("Ġ", "an")]
    tokens = [*special, *alphabet, *("".join(pair) for pair in merges), "123"]

    def permuted(rows: np.ndarray, heads: int) -> np.ndarray:  # convert_hf_to_gguf.py: LlamaModel.permute
        return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)

    def write(
        path, architecture="llama", kind="Q8_0", split="smollm", without=(), scaled=0.0, **extra
    ) -> PreTrainedModel:
        tied, end = architecture == "llama", tokens.index("<|im_end|>")
        sizes = {"vocab_size": len(tokens), "intermediate_size": 64, "tie_word_embeddings": tied, "rms_norm_eps": 1e-5}
        if scaled:  # convert_hf_to_gguf.py: LlamaModel.generate_extra_tensors, for heads of 8
            rope = {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": scaled,
                "original_max_position_embeddings": 8192,
            }
            sizes["rope_parameters"] = rope | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
            smooth = ((8192 / (2 * np.pi * 5e5 ** (np.arange(0, 8, 2) / 8)) - 1) / 3).clip(0, 1)
            extra["rope_freqs.weight"] = (1 / ((1 - smooth) / scaled + smooth)).astype(np.float32)
        model = make_model(architecture, eos_token_id=end, pad_token_id=end, **sizes)
        config, writer = model.config, gguf.GGUFWriter(path, architecture)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
        writer.add_tokenizer_pre(split)
        writer.add_token_list(tokens)
        writer.add_token_types([3, 3, 3, 4, *[1] * (len(tokens) - 4)])
        writer.add_token_merges([" ".join(pair) for pair in merges])
        writer.add_bos_token_id(tokens.index("<|im_start|>"))
        writer.add_eos_token_id(end)
        writer.add_pad_token_id(end)
        for key, value in ({"tokenizer.ggml.model": "gpt2", "tokenizer.chat_template": CHAT_TEMPLATE} | extra).items():
            if isinstance(value, np.ndarray):
                writer.add_tensor(key, value)
            elif isinstance(value, int):
                writer.add_uint16(key, value)
            elif value is not None:
                writer.add_string(key, value)
        names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), config.num_hidden_layers)
        for name, parameter in model.named_parameters():
            values, own = parameter.detach().numpy(), gguf.GGMLQuantizationType[kind if parameter.ndim > 1 else "F32"]
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
            turned = heads.get(name.split(".")[-2]) if architecture == "llama" else None
            stored = gguf.quantize(values if turned is None else permuted(values, turned), own)
            if name not in without:
                writer.add_tensor(names.get_name(name, (".weight", ".bias")), stored, raw_dtype=own)
            parameter.data = torch.from_numpy(gguf.dequantize(gguf.quantize(values, own), own).copy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return model

    return write


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


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """Commands measure a machine on which one process computes, in float32, whatever is free where the tests run."""
    rates = {"float32": 100.0, "bfloat16": 100.0, "2 x float32": 100.0, "2 threads": 100.0}
    monkeypatch.setattr("tinylora_lite.utils.cpu.measure", lambda: rates)
