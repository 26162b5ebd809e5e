"""The harness's idea of a model, on this engine: log-likelihoods and greedy answers; imported only where lm_eval is installed."""
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import nn

from tsugiki.data.batch import IGNORE, Batch, micro_batches
from tsugiki.data.render import Renderer
from tsugiki.errors import UserError
from tsugiki.evaluate.answers import generate_ids, room
from tsugiki.evaluate.metrics import cut
from tsugiki.load import pad_id
from tsugiki.train.loss import target_logits

MOST = 4096                                           # tokens of a forward
POSITIONS, ANSWER = 2048, 256                         # as the harness has them, where neither model nor task says
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class HarnessModel(TemplateLM):
    """Tokens are split as the harness's own "hf" model splits them, so that scores can be compared with published ones."""

    def __init__(self, model: nn.Module, renderer: Renderer, batch_size: int = 32, max_length: int | None = None):
        super().__init__()
        self.model, self.renderer, self.tokenizer, self.batch_size = model, renderer, renderer.tokenizer, batch_size
        limits = [n for n in (room(model), max_length) if n]
        self.max_length = min(limits) if limits else POSITIONS

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id if self.tokenizer.eos_token_id is not None else self.renderer.stop_id

    @property
    def prefix_token_id(self) -> int:
        return self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(chat_history, chat_template=self.renderer.template, tokenize=False,
                                                  add_generation_prompt=add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """The tokenizer's ids; its beginning of text is not added to a text that begins with one."""
        given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            given = {"add_special_tokens": False}
        return self.tokenizer.encode(string, **given)

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests: Sequence[tuple], **kwargs) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding would say it) of each (_, context ids, continuation ids)."""
        rows = []
        for _, context, continuation in requests:
            ids = (context + continuation)[-(self.max_length + 1):]
            counted = min(len(continuation), len(ids) - 1)
            rows.append((ids[:-1], [IGNORE] * (len(ids) - 1 - counted) + ids[len(ids) - counted:]))
        device = self.model.get_input_embeddings().weight.device
        sums, greedy = torch.zeros(len(rows), dtype=torch.float64), torch.ones(len(rows), dtype=torch.bool)
        for forward in micro_batches([len(ids) for ids, _ in rows], range(len(rows)), "pad", MOST):
            logits, targets, numbers = target_logits(self.model, _batch(rows, [i for [i] in forward], device))
            losses = F.cross_entropy(logits, targets, reduction="none")
            sums.index_add_(0, numbers.cpu(), -losses.double().cpu())
            greedy[numbers.cpu()[(logits.argmax(-1) != targets).cpu()]] = False
        return list(zip(sums.tolist(), greedy.tolist(), strict=True))

    def loglikelihood_rolling(self, requests: Sequence, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text, in windows of the model's length that do not overlap in what they predict."""
        windows, counts = [], []
        for (text,) in (r.args for r in requests):
            own = [(None, *make_disjoint_window(w)) for w in get_rolling_token_windows(
                token_list=self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1)]
            windows += own
            counts.append(len(own))
        found = iter(self._loglikelihood_tokens(windows))
        return [sum(next(found)[0] for _ in range(n)) for n in counts]

    def generate_until(self, requests: Sequence, disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, each cut at the first of its `until`."""
        answers: list[str] = [""] * len(requests)
        by_length: dict[int, list[int]] = {}
        for n, r in enumerate(requests):
            by_length.setdefault(_longest(r.args[1]), []).append(n)
        for longest, numbers in by_length.items():
            if longest >= self.max_length:
                raise UserError(f"the task wants answers of {longest} tokens, the model takes {self.max_length} with the prompt")
            kept = self.max_length - longest
            prompts = [tuple(self.tok_encode(requests[n].args[0])[-kept:]) for n in numbers]
            said = generate_ids(self.model, prompts, self.renderer.stop_ids, longest, self.batch_size, pad_id(self.tokenizer))
            for n, ids in zip(numbers, said, strict=True):
                until = requests[n].args[1].get("until") or []
                until = [until] if isinstance(until, str) else list(until)
                answers[n] = cut(self._text(ids), [u for u in until if u])
        return answers

    def _text(self, ids: Sequence[int]) -> str:
        end = next((n for n, i in enumerate(ids) if i in self.renderer.stop_ids), len(ids))
        return self.tokenizer.decode(ids[:end], skip_special_tokens=True)


def _longest(options: dict) -> int:
    """New tokens of a request; UserError where it asks for sampling, which this engine's answers do not do."""
    if options.get("do_sample") and options.get("temperature", 1.0):
        raise UserError("the task asks for sampled answers (do_sample); answers here are greedy")
    return next((int(options[key]) for key in LENGTHS if options.get(key)), ANSWER)


def _batch(rows: Sequence[tuple[list[int], list[int]]], numbers: Sequence[int], device: torch.device) -> Batch:
    """Right-padded rows of (ids, targets), (B, T) each."""
    width = max(len(rows[n][0]) for n in numbers)
    fill = [width - len(rows[n][0]) for n in numbers]
    ids = torch.tensor([rows[n][0] + [0] * f for n, f in zip(numbers, fill, strict=True)])
    targets = torch.tensor([rows[n][1] + [IGNORE] * f for n, f in zip(numbers, fill, strict=True)])
    samples = torch.tensor([[n] * (width - f) + [-1] * f for n, f in zip(numbers, fill, strict=True)])
    positions = torch.tensor([[*range(width - f)] + [0] * f for f in fill])
    return Batch(ids, targets, positions, samples, packed=False).to(device)
