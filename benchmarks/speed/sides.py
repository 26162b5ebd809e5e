"""The sides: one process each, `python -m speed.sides JOB.json NAME`. Every side trains through its own public entry."""
from __future__ import annotations

import json
import sys
from pathlib import Path

from speed.link import Link

SIDES = {
    "tsugiki": "Tsugiki",
    "trainer": "Trainer + PEFT, as shipped",
    "trainer-tuned": "Trainer + PEFT, tuned",
    "trl": "TRL, packing, checkpointing (its default)",
    "trl-no-checkpointing": "TRL, packing, no checkpointing",
    "unsloth": "Unsloth, packing",
}
SAME_ROWS = ("tsugiki", "trainer")                    # these see the same rows in the same order
LR = {"lora": 2e-4, "series": 1e-3, "parallel": 1e-3, "prefix": 1e-2, "full": 2e-5}
RANK, ALPHA, PREFIX = 8, 16, 8


def offers(side: str, method: str) -> bool:
    """Whether the side trains the method at all. PEFT has no series and no parallel adapters, and its prefixes break on the
    mask that transformers makes of packed rows."""
    there = {"trainer": ("lora", "prefix", "full"), "trl": ("lora", "full"), "unsloth": ("lora",)}
    return side == "tsugiki" or method in there[side.partition("-")[0]]


def order(count: int, seed: int) -> list[int]:
    """The order in which Tsugiki's first epoch visits its rows: the peers get theirs laid out in it."""
    from tsugiki.data.batch import epoch_order
    return epoch_order(count, seed, 0)


def tsugiki(job: dict, link: Link) -> None:
    """`train_run` on a file of rows. The only place that touches the library's inside: its step waits for its turn."""
    import tsugiki as tg
    from tsugiki.config import RunConfig, build
    from tsugiki.train import loop
    out = Path(job["work"]) / "run-tsugiki"
    step = loop.Steps.step

    def timed(self, bar) -> None:
        link.wait()
        step(self, bar)
        seconds = link.took()
        line = self.metrics.read()[-1]
        link.tell(seconds=seconds, tokens=line["tokens"] - timed.before, supervised=line["supervised"], loss=line["loss"],
                  norm=line["norm"])
        timed.before = line["tokens"]

    class Ready(loop.Steps):
        def __init__(self, *args):
            super().__init__(*args)
            link.tell(ready=True)

        step = timed

    timed.before, loop.Steps = 0, Ready
    # One step more, which never gets its turn: what a run does at its end would disturb the others.
    train = {"steps": job["steps"] + 1, "batch_size": job["batch_size"], "max_length": job["max_length"], "lr": LR[job["method"]],
             "schedule": "constant", "warmup": 0.0, "seed": job["seed"], "log_steps": 1, "save_steps": 10**6,
             "compile": job["compile"]}
    method = {"lora": {"rank": RANK, "alpha": ALPHA}, "prefix": {"tokens": PREFIX}}.get(job["method"], {})
    tg.train_run(build(RunConfig, {
        "base": job["base"], "out": str(out), "device": job["device"], "data": {"files": [job["rows"]]}, "train": train,
        "method": {"name": job["method"]} | method}), quiet=True)


def dataset(job: dict):
    """The rows in Tsugiki's order, as ids and labels: what is trained is the same everywhere."""
    from datasets import Dataset
    rows = [json.loads(line) for line in Path(job["rows"]).read_text().splitlines()]
    made = []
    for i in order(len(rows), job["seed"]):
        prompt, completion = ([int(w) for w in rows[i][k].split()] for k in ("prompt", "completion"))
        made.append({"input_ids": [*prompt, *completion, 1], "labels": [-100] * len(prompt) + [*completion, 1]})
    return Dataset.from_list(made)


def wait_in(trainer, link: Link) -> None:
    """Let a transformers Trainer take turns: a step is all that lies between two logs, data loading and logging included."""
    from transformers import TrainerCallback
    collate, seen = trainer.data_collator, []

    def counted(features):                            # the loader runs a batch ahead, so counts queue up
        batch = collate(features)
        real = batch["attention_mask"].sum() if "attention_mask" in batch else batch["input_ids"].numel()
        seen.append((int(real), int((batch["labels"] != -100).sum())))
        return batch

    class Turns(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            link.tell(ready=True)
            link.wait()

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                tokens, supervised = seen.pop(0)
                link.tell(seconds=link.took(), tokens=tokens, supervised=supervised, loss=logs["loss"], norm=logs["grad_norm"])
                link.wait()

    trainer.data_collator = counted
    trainer.add_callback(Turns())
    trainer.train()


def settings(job: dict, name: str) -> dict:
    """What all Trainers are told, so that they do the same steps: rates, order, and nothing saved."""
    return dict(output_dir=str(Path(job["work"]) / f"run-{name}"), max_steps=job["steps"], learning_rate=LR[job["method"]],
                per_device_train_batch_size=job["batch_size"], lr_scheduler_type="constant", train_sampling_strategy="sequential",
                logging_steps=1, save_strategy="no", report_to="none", seed=job["seed"], use_cpu=job["device"] == "cpu")


def peft_config(job: dict):
    from peft import LoraConfig, PrefixTuningConfig
    if job["method"] == "prefix":
        return PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PREFIX)
    return LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules="all-linear")


def trainer(job: dict, link: Link, tuned: bool = False) -> None:
    """transformers' Trainer. As shipped: base in bf16, adapters in float32, padded batches in the order given. Tuned: adapters
    in bf16 too, rows grouped by length; full fine-tuning keeps float32 weights and computes in bf16 by autocast."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments
    torch.manual_seed(job["seed"])
    full = job["method"] == "full"
    model = AutoModelForCausalLM.from_pretrained(job["base"], **{"dtype": torch.float32} if full and tuned else {})
    if not full:
        model = get_peft_model(model, peft_config(job), autocast_adapter_dtype=not tuned)
    more = {"train_sampling_strategy": "group_by_length", "bf16": full} if tuned else {}
    tokenizer = AutoTokenizer.from_pretrained(job["base"])
    wait_in(Trainer(model=model, args=TrainingArguments(**settings(job, "trainer") | more), train_dataset=dataset(job),
                    data_collator=DataCollatorForSeq2Seq(tokenizer), processing_class=tokenizer), link)


def packed(job: dict, name: str) -> dict:
    """Packed rows of the longest length, as many as hold about one batch's tokens."""
    rows = dataset(job)
    mean = sum(map(len, rows["input_ids"])) / len(rows)
    return settings(job, name) | {"packing": True, "max_length": job["max_length"], "dataset_num_proc": None,
                                  "per_device_train_batch_size": max(1, round(job["batch_size"] * mean / job["max_length"]))}


def trl(job: dict, link: Link, checkpointing: bool = True) -> None:
    """TRL's SFTTrainer with packing; its defaults but for what `settings` and `packed` say."""
    from trl import SFTConfig, SFTTrainer
    more = {} if checkpointing else {"gradient_checkpointing": False}
    wait_in(SFTTrainer(model=job["base"], args=SFTConfig(**packed(job, "trl") | more), train_dataset=dataset(job),
                       peft_config=None if job["method"] == "full" else peft_config(job)), link)


def unsloth(job: dict, link: Link) -> None:
    """Unsloth's LoRA in 16 bits under TRL's packing; it needs a GPU."""
    import unsloth as us
    from trl import SFTConfig, SFTTrainer
    model, tokenizer = us.FastLanguageModel.from_pretrained(job["base"], max_seq_length=job["max_length"], load_in_4bit=False)
    model = us.FastLanguageModel.get_peft_model(model, r=RANK, lora_alpha=ALPHA, random_state=job["seed"])
    wait_in(SFTTrainer(model=model, processing_class=tokenizer, args=SFTConfig(**packed(job, "unsloth")),
                       train_dataset=dataset(job)), link)


RUN = {"tsugiki": tsugiki, "trainer": trainer, "trainer-tuned": lambda job, link: trainer(job, link, tuned=True), "trl": trl,
       "trl-no-checkpointing": lambda job, link: trl(job, link, checkpointing=False), "unsloth": unsloth}

if __name__ == "__main__":
    RUN[sys.argv[2]](json.loads(Path(sys.argv[1]).read_text()), Link(json.loads(Path(sys.argv[1]).read_text())["device"]))
