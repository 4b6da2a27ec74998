"""A word-level tokenizer with a chat template: 0 to 99 are one token each, as are the words of the nano world."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tinylora_lite.nano import problems, writers

PAD, END = "<|pad|>", "<|end|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"

OTHER_WORDS = "has how many does have then ok so the answer is start with"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|{{ message['role'] }}|> {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of every nano model. A token is a word or a number with the space before it, or a mark."""
    phrases = " ".join(phrase for wordings in problems.WORDINGS.values() for phrase in wordings)
    words = {*phrases.replace("{n}", "").split(), *OTHER_WORDS.split(), *problems.NAMES, *problems.THINGS}
    words |= {*writers.WRITERS, *writers.WORDS.values(), writers.ANYONE}
    marks = [".", "?", ",", " +", " -", " *", " =", " ####"]
    numbers = [f" {n}" for n in range(problems.MAX_VALUE + 1)]
    vocabulary = [PAD, END, SYSTEM, USER, ASSISTANT, *marks, *numbers, *sorted(f" {word}" for word in words)]

    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token=PAD))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[a-z]+| ?\d+| ?####| [+\-*=]|[.,?]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
