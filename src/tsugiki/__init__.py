"""Tsugiki fine-tunes large language models: every method, exact, many adapters on one frozen base.

    model, tokenizer = tg.load("path-or-hub-id")
    adapters = tg.attach(model)
    adapters.add("math", tg.LoRA(rank=16))
    tg.train(model, tokenizer, data="math.jsonl", adapter="math", out="runs/math")
"""
from tsugiki.adapters import Adapters, attach
from tsugiki.api import evaluate, generate, train, train_many, train_run
from tsugiki.config import DataConfig, EvalConfig, RunConfig, TrainConfig
from tsugiki.errors import RunError, UserError
from tsugiki.load import load
from tsugiki.methods import (
    BOFT,
    EVA,
    IA3,
    MAM,
    OFT,
    AdaLoRA,
    BitFit,
    DoRA,
    Full,
    LlamaAdapter,
    LNTuning,
    LoHa,
    LoKr,
    LoRA,
    LoRAPlus,
    LoReFT,
    OLoRA,
    Parallel,
    ParallelLinear,
    Pfeiffer,
    PiSSA,
    Prefix,
    Prompt,
    PTuning,
    Series,
    SeriesLinear,
    VeRA,
)
from tsugiki.sites import Family, Site, sites
from tsugiki.train.failure import Failure
from tsugiki.train.joint import Joint

__version__ = "0.1.0"
__all__ = ["AdaLoRA", "Adapters", "BOFT", "BitFit", "DataConfig", "DoRA", "EVA", "EvalConfig", "Failure", "Family", "Full", "IA3",
           "Joint", "LNTuning", "LlamaAdapter", "LoHa", "LoKr", "LoRA", "LoRAPlus", "LoReFT", "MAM", "OFT", "OLoRA", "PTuning",
           "Parallel", "ParallelLinear", "Pfeiffer", "PiSSA", "Prefix", "Prompt", "RunConfig", "RunError", "Series",
           "SeriesLinear", "Site", "TrainConfig", "UserError", "VeRA", "attach", "evaluate", "generate", "load", "sites",
           "train", "train_many", "train_run"]
