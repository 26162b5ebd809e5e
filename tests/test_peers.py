"""Other people's trainers train an attached model unchanged: transformers.Trainer and TRL's SFTTrainer."""
import pytest
import torch
from tiny import METHOD_CASES, attached, difference, ids, tiny
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

QUIET = dict(report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, use_cpu=True, learning_rate=1e-2, max_steps=3,
             per_device_train_batch_size=2, warmup_steps=0)


class Rows(Dataset):
    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"input_ids": self.x[i], "labels": self.x[i], "attention_mask": torch.ones_like(self.x[i])}


def trained_alone(model, adapters, name, run):
    """Run a trainer; the adapter has changed, the base has not, and the loss it saw is finite and falls."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    start = {k: p.detach().clone() for k, p in adapters.get(name).parameters().items()}
    others = {n: [p.detach().clone() for p in adapters.get(n).parameters().values()] for n in adapters.names() if n != name}
    adapters.active = name
    losses = run()
    assert all(not torch.equal(p, start[k]) for k, p in adapters.get(name).parameters().items()), "a parameter did not train"
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "the base changed"
    for n, kept in others.items():
        assert all(torch.equal(p, q) for p, q in zip(kept, adapters.get(n).parameters().values(), strict=True)), n
    assert losses[-1] < losses[0]


def losses_of(trainer):
    trainer.train()
    return [h["loss"] for h in trainer.state.log_history if "loss" in h]


@pytest.mark.share(8)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("name", METHOD_CASES)
def test_transformers_trainer(kind, name, checkpointing, tmp_path):
    model = tiny(kind)
    adapters = attached(model, scale=0.05)
    for other in adapters.names():
        if other != name:
            for p in adapters.get(other).parameters().values():
                p.requires_grad_(False)
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": False}} if checkpointing else {}
    args = TrainingArguments(str(tmp_path), gradient_checkpointing=checkpointing, **options, **QUIET)
    x = ids(1, 12).repeat(6, 1)
    trained_alone(model, adapters, name, lambda: losses_of(Trainer(model, args, train_dataset=Rows(x))))


def test_transformers_trainer_on_a_batch_of_several_adapters(tmp_path):
    model = tiny("llama")
    adapters = attached(model, "lora", "bitfit", scale=0.05)
    start = [p.detach().clone() for p in adapters.parameters()]

    def collate(rows):
        batch = {k: torch.stack([r[k] for r in rows]) for k in rows[0]}
        return batch | {"adapter_ids": ["lora", "bitfit"]}
    args = TrainingArguments(str(tmp_path), remove_unused_columns=False, **QUIET)
    losses = losses_of(Trainer(model, args, train_dataset=Rows(ids(1, 12).repeat(6, 1)), data_collator=collate))
    assert losses[-1] < losses[0] and all(not torch.equal(p, q) for p, q in zip(start, adapters.parameters(), strict=True))


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    words = ["<pad>", "<s>", "</s>", "<unk>", *"what is red blue green sky grass the a rose ? .".split()]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("options", [{}, {"completion_only_loss": True}, {"loss_type": "chunked_nll"}], ids=str)
def test_trls_sft_trainer(options, tmp_path):
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    rows = [{"prompt": "what is red ?", "completion": " the rose ."}, {"prompt": "what is blue ?", "completion": " the sky ."}] * 3
    model = tiny("llama")
    adapters = attached(model, "lora", scale=0.05)
    args = trl.SFTConfig(str(tmp_path), max_length=16, gradient_checkpointing=False, bf16=False, **QUIET, **options)
    trained_alone(model, adapters, "lora", lambda: losses_of(trl.SFTTrainer(
        model, args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer())))


def test_trl_trains_what_the_model_then_computes(tmp_path):
    """The loss TRL reports at step 1 is the loss of the attached model, adapter included."""
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    model = tiny("llama")
    attached(model, "lora", scale=0.3)
    tok = tokenizer()
    text = "the sky is blue . the grass is green ."
    x = torch.tensor([tok(text).input_ids + [tok.eos_token_id]])
    with torch.no_grad():
        right, base = (float(model(x, labels=x, adapter_ids=a).loss) for a in ("lora", ()))
    args = trl.SFTConfig(str(tmp_path), max_length=32, bf16=False, gradient_checkpointing=False, **QUIET)
    rows = datasets.Dataset.from_list([{"text": text}] * 4)
    losses = losses_of(trl.SFTTrainer(model, args, train_dataset=rows, processing_class=tok))
    assert abs(losses[0] - right) < 1e-3 and abs(right - base) > 1e-2
    assert difference(model(x).logits, model(x, adapter_ids=()).logits) > 1e-3
