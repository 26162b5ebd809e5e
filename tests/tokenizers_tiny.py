"""Tiny tokenizers of the two kinds in use, and chat templates in the manner of the known families, all made here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "The cat sat on the mat. What is two plus two? It is four.\n\nHello there, how are you today?\n",
    "Review: a charming film.\nSentiment: positive\n### User:\nWho are you?\n\n### Assistant:\nI am a machine.",
    "USER: Good morning! ASSISTANT: Good morning to you too. [INST] Sing a song [/INST] la la la",
    "日本語の文章です。猫が好きです。 Ünïcödé çà et là. 12345 67890",
]
SPECIALS = [
    "<unk>",
    "<s>",
    "</s>",
    "<pad>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|end|>",
    "<|endoftext|>",
]


def data_dir(*parts: str) -> Path:
    """A folder of the data beside the checkout (or in TSUGIKI_DATA); skips the test where it is absent."""
    root = Path(os.environ.get("TSUGIKI_DATA", Path(__file__).parents[2] / "shared" / "data"))
    path = root.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"no {path}: real data is not beside this checkout")
    return path


@cache
def _bytes() -> str:
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(
        CORPUS * 5,
        trainers.BpeTrainer(
            vocab_size=600, special_tokens=SPECIALS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        ),
    )
    return t.to_str()


@cache
def _pieces() -> str:
    """In the manner of SentencePiece: a space in front of everything, bytes for unknown characters, and pieces that cross
    words, so that the end of a prompt and the start of an answer fuse."""
    vocab = {t: n for n, t in enumerate([*SPECIALS, *(f"<0x{b:02X}>" for b in range(256)), "▁", *map(chr, range(33, 127))])}
    merges = []
    for pair in [("▁", "a"), ("t", "h"), (":", "▁"), ("]", "▁"), ("▁", "th"), ("e", "r"), ("i", "n"), ("▁", "▁"), (".", "▁")]:
        vocab["".join(pair)] = len(vocab)
        merges.append(pair)
    t = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    t.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS])
    return t.to_str()


def tokenizer(
    kind: str = "bytes",
    bos: str | None = None,
    eos: str | None = "</s>",
    pad: str | None = "<pad>",
    adds_bos: bool = False,
    template: str | None = None,
) -> PreTrainedTokenizerFast:
    """kind: "bytes" (GPT-2, Llama 3, Qwen) or "pieces" (Llama 2, Mistral)."""
    t = Tokenizer.from_str({"bytes": _bytes, "pieces": _pieces}[kind]())
    if adds_bos:
        bos_id = t.token_to_id(bos)
        t.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, bos_id)])
    out = PreTrainedTokenizerFast(tokenizer_object=t, bos_token=bos, eos_token=eos, pad_token=pad)
    out.add_special_tokens({"additional_special_tokens": SPECIALS})
    out.chat_template = template
    return out


@dataclass(frozen=True)
class Style:
    """A family's manner: its template, tokens, and what must be trained for an answer (written by hand, not derived)."""

    template: str
    trained: str  # with {} for the answer
    end: str  # its stop token
    bos: str | None
    eos: str
    adds_bos: bool = False
    strips: bool = False  # the template takes white space off contents
    system: bool = True
    bos_each_turn: bool = False


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set ms = messages[1:] %}{% set sys = '<<SYS>>\\n' + messages[0]['content'] "
    "+ '\\n<</SYS>>\\n\\n' %}{% else %}{% set ms = messages %}{% set sys = '' %}{% endif %}"
    "{% for m in ms %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + (sys if loop.first else '') + m['content'].strip() "
    "+ ' [/INST]' }}{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim "
    "+ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' + "
    "m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
PHI = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ m['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
VICUNA = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + ' ' }}{% elif m['role'] == 'user' %}"
    "{{ 'USER: ' + m['content'] + ' ' }}{% else %}{{ 'ASSISTANT: ' + m['content'] + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# Rewrites earlier answers (as Qwen3 does with thoughts), and writes something before the last one.
REWRITES = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' and loop.last %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{{ m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

STYLES = {
    "default": Style("", "{}</s>", "</s>", "<s>", "</s>", adds_bos=True),
    "chatml": Style(CHATML, "{}<|im_end|>", "<|im_end|>", None, "<|endoftext|>"),
    "llama2": Style(LLAMA2, " {} </s>", "</s>", "<s>", "</s>", adds_bos=True, strips=True, bos_each_turn=True),
    "llama3": Style(LLAMA3, "{}<|eot_id|>", "<|eot_id|>", "<|begin|>", "<|endoftext|>", adds_bos=True, strips=True),
    "gemma": Style(GEMMA, "{}<end_of_turn>", "<end_of_turn>", "<s>", "</s>", adds_bos=True, strips=True, system=False),
    "zephyr": Style(ZEPHYR, "{}</s>", "</s>", "<s>", "</s>", adds_bos=True),
    "phi": Style(PHI, "{}<|end|>", "<|end|>", "<s>", "<|endoftext|>", adds_bos=True),
    "mistral": Style(MISTRAL, "{}</s>", "</s>", "<s>", "</s>", adds_bos=True, system=False),
    "vicuna": Style(VICUNA, " {}</s>", "</s>", "<s>", "</s>", adds_bos=True),
    "rewrites": Style(REWRITES, "<think>\n\n</think>\n\n{}<|im_end|>", "<|im_end|>", None, "<|endoftext|>"),
}


def styled(name: str, kind: str = "bytes") -> tuple[PreTrainedTokenizerFast, Style]:
    s = STYLES[name]
    return tokenizer(kind, s.bos, s.eos, adds_bos=s.adds_bos, template=s.template or None), s
