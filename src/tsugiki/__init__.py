"""Tsugiki fine-tunes large language models: every method, exact, many adapters on one frozen base.

    model, tokenizer = tg.load("path-or-hub-id")
    adapters = tg.attach(model)
    adapters.add("math", tg.LoRA(rank=16))
    tg.train(model, tokenizer, data="math.jsonl", adapter="math", out="runs/math")
"""
from tsugiki.adapters import Adapters, attach
from tsugiki.api import evaluate, generate, train, train_run
from tsugiki.config import DataConfig, EvalConfig, RunConfig, TrainConfig
from tsugiki.errors import RunError, UserError
from tsugiki.load import load
from tsugiki.methods import BOFT, IA3, OFT, BitFit, Full, LNTuning, LoHa, LoKr, LoRA, Prefix, Prompt
from tsugiki.sites import Family, Site, sites

__version__ = "0.1.0"
__all__ = ["Adapters", "BOFT", "BitFit", "DataConfig", "EvalConfig", "Family", "Full", "IA3", "LNTuning", "LoHa", "LoKr", "LoRA",
           "OFT", "Prefix", "Prompt", "RunConfig", "RunError", "Site", "TrainConfig", "UserError", "attach", "evaluate",
           "generate", "load", "sites", "train", "train_run"]
