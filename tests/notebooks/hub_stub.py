"""A hub in a folder: Qwen2.5-7B-Instruct's place in the cache, with a small random model in it, and GSM8K's.

With ``HF_HOME`` on the folder and ``HF_HUB_OFFLINE=1`` the code of the 7B chapter runs unchanged, where there is no
network and no GPU. Files and names are those of the real repositories: the sampling parameters that Qwen recommends in
``generation_config.json`` (which training must not take up), two end tokens, a byte-level tokenizer of Qwen2's with its
chat template. ``python tests/notebooks/hub_stub.py FOLDER --layers 24`` makes one by hand.
"""

import argparse
import json
import random
from itertools import islice
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2Config, Qwen2ForCausalLM

from tinylora_lite.adapter.tying import find_target_modules
from tinylora_lite.experiment.presets import preset
from tinylora_lite.nano.problems import problems
from tinylora_lite.nano.writers import careful
from tinylora_lite.planning.shapes import SHAPES
from tinylora_lite.tasks.catalog import PROBLEM_SETS

MODEL = "Qwen/Qwen2.5-7B-Instruct"
COMMIT = preset("qwen2.5-7b/gsm8k").revision
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
DEFAULT_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."

# Qwen2.5's, without the part about tools.
CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>system\\n" + DEFAULT_SYSTEM + "<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}{%- if not (message.role == 'system' and loop.first) %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# How Qwen2 cuts text before merging bytes: every digit by itself, for one.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make_hub(home: Path, *, layers: int = 2, vocabulary: int = 2048, seed: int = 0) -> Path:
    """Writes the stub below ``home``, which becomes ``HF_HOME``, and returns the model's snapshot.

    Args:
        home: an empty folder.
        layers: of a model that is otherwise as wide as Qwen2.5-0.5B; 24 is its full depth.
        vocabulary: rows of the embedding; 151,936 is its full size.
        seed: of the weights.
    """
    repository = home / "hub" / f"models--{MODEL.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT, encoding="ascii")
    ids = write_tokenizer(snapshot)
    config = Qwen2Config(
        **SHAPES["qwen2.5-0.5b"] | {"num_hidden_layers": layers, "vocab_size": vocabulary},
        max_position_embeddings=32_768,
        eos_token_id=ids["<|im_end|>"],
        bos_token_id=ids["<|endoftext|>"],
        dtype="bfloat16",
    )
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM._from_config(config, dtype=torch.bfloat16)
    for site in find_target_modules(model):
        stand_out(model.get_submodule(site.name).weight.data)
    model.save_pretrained(snapshot)
    recommended = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}
    ends = {"eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]], "pad_token_id": ids["<|endoftext|>"]}
    (snapshot / "generation_config.json").write_text(json.dumps(recommended | ends), encoding="utf-8")
    write_gsm8k(home)
    return snapshot


@torch.no_grad()
def stand_out(weight: torch.Tensor, count: int = 4) -> None:
    """Gives a random weight a few directions above its noise, as trained weights have, for the SVD to find."""
    edge = float(weight.float().std()) * (weight.shape[0] ** 0.5 + weight.shape[1] ** 0.5)
    left, right = (torch.linalg.qr(torch.randn(size, count)).Q for size in weight.shape)
    weight += ((left * torch.tensor([3.0, 2.4, 1.9, 1.5])[:count] * edge) @ right.T).to(weight.dtype)


def write_tokenizer(folder: Path) -> dict[str, int]:
    """Trains a tokenizer of Qwen2's kind on a little text; returns the ids of its special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator((text for pair in gsm8k_pairs("train", 500) for text in pair), trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))
    ids = {name: tokenizer.token_to_id(name) for name in SPECIAL}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    settings = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(number): {"content": name} | flags for name, number in ids.items()},
        "additional_special_tokens": list(SPECIAL[1:]),
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131_072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    return ids


def write_gsm8k(home: Path) -> None:
    """GSM8K's place in the cache: as many rows as it has, of the nano world's problems, in its columns."""
    from pyarrow import Table, parquet

    source = PROBLEM_SETS["gsm8k"]
    folder = home / "hub" / f"datasets--{source.hub.replace('/', '--')}" / "snapshots" / source.revision / "main"
    folder.mkdir(parents=True)
    for split, count in source.rows.items():
        rows = [{"question": question, "answer": answer} for question, answer in gsm8k_pairs(split, count)]
        parquet.write_table(Table.from_pylist(rows), folder / f"{split}-00000-of-00001.parquet")


def gsm8k_pairs(split: str, count: int) -> list[tuple[str, str]]:
    """Problems with their worked answers, the last line ``#### n``."""
    drawn = islice(problems("train" if split == "train" else "test", seed=0), count)
    return [(p.text, careful(p, random.Random(0)).replace(" ####", "\n####")) for p in drawn]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=2048)
    arguments = parser.parse_args()
    print(make_hub(arguments.folder, layers=arguments.layers, vocabulary=arguments.vocabulary))
