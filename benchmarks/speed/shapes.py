"""What is trained: models of real shapes with random weights, and rows of token ids that every side gets alike."""
from __future__ import annotations

import json
import random
from pathlib import Path

COMMON = dict(tie_word_embeddings=True, pad_token_id=0, bos_token_id=None, eos_token_id=1, max_position_embeddings=2048)
# name: (architecture, its configuration)
SHAPES = {
    "tiny": ("llama", dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128,
                           vocab_size=512)),
    "smollm2-135m": ("llama", dict(hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
                                   intermediate_size=1536, vocab_size=49152, rope_theta=100000.0)),
    "qwen2.5-0.5b": ("qwen2", dict(hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
                                   intermediate_size=4864, vocab_size=151936, rope_theta=1000000.0)),
    "llama-3.2-1b": ("llama", dict(hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
                                   intermediate_size=8192, vocab_size=128256, head_dim=64, rope_theta=500000.0)),
}
FIRST_ID = 3                                          # 0 pads, 1 ends a row, 2 is unknown
SOURCES = {"gsm8k": "GSM8K, question as prompt, answer as completion, ids of GPT-2's tokenizer (wrapped to the vocabulary)",
           "synthetic": "random ids, lengths drawn log-normally like GSM8K's: prompts about 50 tokens, completions about 105",
           "full": "rows of exactly the longest length, random ids, every token trained"}


def linears(shape: str) -> list[tuple[str, int, int, int]]:
    """(name, outputs N, inputs K, how many of it) of every distinct linear of the layers, and of the head."""
    c = SHAPES[shape][1]
    d, ff, n = c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"]
    kv = d // c["num_attention_heads"] * c["num_key_value_heads"]
    return [("q, o", d, d, 2 * n), ("k, v", kv, d, 2 * n), ("gate, up", ff, d, 2 * n), ("down", d, ff, n),
            ("head", c["vocab_size"], d, 1)]


def flops(shape: str, rows: list[tuple[list[int], list[int]]], full: bool) -> float:
    """FLOPs that training on `rows` needs: 4 a weight and token (6 with weight gradients), the head on trained tokens alone,
    causal attention 6 T^2 d a layer. What an adapter itself adds is not counted."""
    c, each = SHAPES[shape][1], 6 if full else 4
    body = sum(n * k * times for name, n, k, times in linears(shape) if name != "head")
    head = c["vocab_size"] * c["hidden_size"]
    total = 0.0
    for prompt, completion in rows:
        length = len(prompt) + len(completion) + 1
        total += each * (body * length + head * (len(completion) + 1))
        total += 6.0 * length**2 * c["hidden_size"] * c["num_hidden_layers"]
    return total


def write_base(shape: str, folder: Path) -> Path:
    """The model's folder, made once: weights from a fixed seed in bf16, and a tokenizer whose word "17" is token 17."""
    base = folder / f"base-{shape}"
    if (base / "done").exists():
        return base
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
    kind, values = SHAPES[shape]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **COMMON | values)).to(torch.bfloat16)
    model.save_pretrained(base)
    words = ["<pad>", "</s>", "<unk>", *map(str, range(FIRST_ID, values["vocab_size"]))]
    ids = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    ids.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=ids, eos_token="</s>", pad_token="<pad>", unk_token="<unk>").save_pretrained(base)
    (base / "done").touch()
    return base


def make_rows(shape: str, data: str, folder: Path | None, count: int, longest: int, seed: int) -> tuple[str, list]:
    """(what they are, `count` rows of (prompt ids, completion ids)); an end token makes a row complete, at most `longest`."""
    vocab, draw = SHAPES[shape][1]["vocab_size"], random.Random(seed)

    def ids(n: int) -> list[int]:
        return [draw.randrange(FIRST_ID, vocab) for _ in range(n)]

    if data == "full":
        return data, [(ids(1), ids(longest - 2)) for _ in range(count)]
    if folder is None:
        pairs = [(ids(round(draw.lognormvariate(3.85, 0.4)) + 4), ids(round(draw.lognormvariate(4.55, 0.5)) + 4))
                 for _ in range(count)]
        data = "synthetic"
    else:
        from tokenizers import Tokenizer
        words = Tokenizer.from_file(str(folder / "tokenizers" / "gpt2" / "tokenizer.json"))
        lines = (folder / data / "train.jsonl").read_text(encoding="utf-8").splitlines()
        picked = [json.loads(line) for line in draw.sample(lines, count)]
        pairs = [[[FIRST_ID + i % (vocab - FIRST_ID) for i in words.encode(text).ids]
                  for text in (row["question"] + "\n", row["answer"])] for row in picked]
    return data, [(p[:longest // 2], c[:longest - 1 - len(p[:longest // 2])]) for p, c in pairs]
