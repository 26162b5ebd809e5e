"""Train the embedded base model from random weights on public-domain novels, with this library's own `train`.

    python scripts/pretrain_base.py --novels DIR --work runs/base [--stable-steps N] [--decay-steps N]

Steps, each skipped when its result is there, so the command can be stopped and given again:
1. passages: every novel cleaned (BOM, CRLF, hard line breaks) and cut at paragraph ends into passages of about 900 characters;
2. a byte-level BPE tokenizer trained on the same passages;
3. random weights (Llama shape), then two runs of full fine-tuning on text: a constant learning rate, then a linear decay to zero;
4. the result in bfloat16, with a model card, in --assets.
"""
from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import tsugiki as tg

HELD_OUT = ("Burnett_Garden_1911", "Conrad_Almayer_1895")
BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
PLAIN = str.maketrans({"\u201c": '"', "\u201d": '"', "\u2018": "'", "\u2019": "'", "\u2014": " - ", "\u2013": "-", "\u00a0": " "})
PROMPTS = ("The old man looked at", '"I am very glad to see you,"', "In the morning the children", "She was not happy, because")
CHARACTERS = 900
SENTENCE_END = re.compile(r"(?<=[.!?][\"']) |(?<=[.!?]) ")
BATCH = 32


def paragraphs(text: str) -> list[str]:
    """Paragraphs of a novel, whether its file has a line per paragraph or breaks lines at a margin."""
    lines = [re.sub(r"\s+", " ", line).strip() for line in text.lstrip("\ufeff").replace("\r\n", "\n").translate(PLAIN).split("\n")]
    margin = sorted(len(line) for line in lines if line)[int(0.9 * sum(map(bool, lines)))]
    found, current = [], []
    for line in lines:
        if line:
            current.append(line)
        if current and (not line or margin > 120 or (len(line) < 0.8 * margin and line[-1] in ".!?\"':")):
            found.append(" ".join(current).replace("--", " - "))
            current = []
    return [re.sub(r" +", " ", p).replace("_", "") for p in [*found, " ".join(current)] if p]


def passages(text: str) -> list[str]:
    """Neighbouring paragraphs joined up to about CHARACTERS; a longer paragraph is cut after a sentence."""
    pieces = [("\n", p) if n == 0 else (" ", p) for paragraph in paragraphs(text)
              for n, p in enumerate([paragraph] if len(paragraph) <= CHARACTERS else SENTENCE_END.split(paragraph))]
    found, current = [], ""
    for joint, piece in pieces:
        if current and len(current) + len(piece) > CHARACTERS:
            found.append(current)
            current = ""
        current = f"{current}{joint}{piece}" if current else piece
    return [p for p in [*found, current] if len(p) > 80]


def write_passages(novels: Path, work: Path) -> None:
    train, held = [], []
    for path in sorted(novels.glob("*.txt")):
        (held if path.stem in HELD_OUT else train).extend(passages(path.read_text(encoding="utf-8", errors="replace")))
    random.Random(0).shuffle(held)
    for name, rows in (("train", train), ("held_out", held[:300])):
        lines = "".join(json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in rows)
        (work / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    print(f"{len(train):,} passages to train on, {len(held[:300])} held out, from {', '.join(HELD_OUT)}")


def train_tokenizer(work: Path, vocabulary: int) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[PAD, BEGIN, END],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator((json.loads(line)["text"] for line in open(work / "train.jsonl", encoding="utf-8")), trainer)
    begin = tokenizer.token_to_id(BEGIN)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, begin)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, pad_token=PAD,
                            model_max_length=512).save_pretrained(work / "random")


def random_weights(work: Path, vocabulary: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=256, intermediate_size=704, num_hidden_layers=8, num_attention_heads=4,
                         num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True,
                         pad_token_id=0, bos_token_id=1, eos_token_id=2)
    LlamaForCausalLM(config).save_pretrained(work / "random")


def stage(work: Path, name: str, base: Path, steps: int, schedule: str, seed: int, lr: float) -> Path:
    """One run of the library's own training; a run found there goes on or is left as it is."""
    cfg = tg.RunConfig(
        base=str(base), out=str(work / name), method={"name": "full"},
        data=tg.DataConfig(files=[str(work / "train.jsonl")], eval=[str(work / "held_out.jsonl")], format="text"),
        train=tg.TrainConfig(steps=steps, lr=lr, schedule=schedule, warmup=0.02, batch_size=BATCH, max_length=256, weight_decay=0.1,
                             beta2=0.95, seed=seed, eval_steps=250, dtype="bf16", layout="pad"))
    tg.train_run(cfg)
    return work / name / "model"


def write_assets(model_dir: Path, work: Path, assets: Path, runs: list[str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    _, tokenizer = tg.load(str(model_dir))
    model.to(torch.bfloat16).save_pretrained(assets)
    tokenizer.save_pretrained(assets)
    samples = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        torch.manual_seed(0)
        out = model.float().generate(ids, max_new_tokens=60, do_sample=True, temperature=0.7, top_p=0.9, pad_token_id=0)
        samples.append(tokenizer.decode(out[0], skip_special_tokens=True))
    tokens, lines = 0, []
    for name in runs:
        metrics = [json.loads(line) for line in open(work / name / "metrics.jsonl", encoding="utf-8")]
        tokens += max(m.get("tokens", 0) for m in metrics)
        score = [m["eval"] for m in metrics if "eval" in m][-1]
        lines.append(f"| {name} | {max(m['step'] for m in metrics):,} | {score['loss']:.3f} | {score['perplexity']:.1f} |")
    card = CARD.format(parameters=model.num_parameters(), vocabulary=len(tokenizer), tokens=tokens, rows="\n".join(lines),
                       samples="\n\n".join("> " + s.replace("\n", "\n> ") for s in samples), held=", ".join(HELD_OUT))
    (assets / "README.md").write_text(card, encoding="utf-8")
    print(card)


CARD = """---
license: apache-2.0
language: en
---
# Tsugiki embedded base

A small English language model, so that every command of Tsugiki works on a machine that has nothing else.
It is a base model: it continues text in the manner of old novels, and knows nothing of instructions until it is fine-tuned.

- **Shape**: Llama, {parameters:,} parameters, 8 layers, hidden 256, 4 heads, tied embeddings,
  byte-level BPE of {vocabulary:,} tokens, bfloat16.
- **Data**: 92 English novels of the 1840s to 1930, in the public domain, cut into passages of about 900 characters.
  Held out whole: {held}.
- **Training**: from random weights by `scripts/pretrain_base.py`, this library's own `train` on a CPU;
  {tokens:,} tokens seen.

| run | steps | held-out loss (nats a token) | perplexity |
|---|---|---|---|
{rows}

- **Limits**: it has read little and long ago. It states falsehoods, and repeats the attitudes of its sources, some of them ugly.
  Use it to try methods and to test software, not to answer people.

## Samples (temperature 0.7, top-p 0.9, float32, seed 0)

{samples}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--novels", type=Path, required=True, help="folder of .txt novels")
    parser.add_argument("--work", type=Path, default=Path("runs/base"), help="working folder (default: %(default)s)")
    parser.add_argument("--assets", type=Path, help="where the result goes (%(default)s)",
                        default=Path(__file__).parents[1] / "src/tsugiki/assets/base")
    parser.add_argument("--stable-steps", type=int, default=2100, help="steps at a constant rate (default: %(default)s)")
    parser.add_argument("--decay-steps", type=int, default=600, help="steps of decay (default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=6144)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if not (args.work / "held_out.jsonl").exists():
        write_passages(args.novels, args.work)
    if not (args.work / "random" / "tokenizer.json").exists():
        train_tokenizer(args.work, args.vocabulary)
    if not (args.work / "random" / "config.json").exists():
        random_weights(args.work, args.vocabulary)
    stable = stage(args.work, "stable", args.work / "random", args.stable_steps, "constant", 0, 2e-3)
    decayed = stage(args.work, "decay", stable, args.decay_steps, "linear", 1, 2e-3)
    write_assets(decayed, args.work, args.assets, ["stable", "decay"])


if __name__ == "__main__":
    main()
