"""Conversations to tokens: what trainer, evaluator and server share for ids, trained mask and stop ids.

A turn is compared as two rendered texts: P, everything up to the answer with the generation prompt, and F, the same
with the answer. What F adds to P, up to and including the stop token, is trained. Ids of P are the tokenizer's own for
P, and every example starts with them, so training sees exactly what generation is fed.
"""
from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import jinja2

from tsugiki.data.conversation import Conversation, Message
from tsugiki.data.rows import Bad, Problem, raise_problems
from tsugiki.errors import UserError, nearest

# For tokenizers without a chat template: a heading for each turn, the end-of-text token after each answer.
DEFAULT_TEMPLATE = (
    "{% for m in messages %}"
    "{{ '### ' + m['role'] | capitalize + ':\\n' + m['content'] }}"
    "{{ eos_token if m['role'] == 'assistant' else '' }}{{ '\\n\\n' }}"
    "{% endfor %}"
    "{{ '### Assistant:\\n' if add_generation_prompt else '' }}"
)
TRAIN_ON = ("all", "last")
# Looked for, in this order, where a tokenizer names no eos.
ENDS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>", "<end_of_turn>", "<|eot_id|>")
# Chat tokenizers that call the end of a turn their eos: pretraining ended its texts with one of TEXT_ENDS.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")
TEXT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
ANCHORS = ("\n", "a", ".", "\ue000", "|", " ")
CHUNK_ROWS, CHUNK_CHARS = 1000, 4_000_000       # what one tokenizer call gets


@dataclass(frozen=True)
class Example:
    """One training row in tokens: ids, which of them are targets (never the first), and its "file:line"."""

    ids: list[int]
    trained: list[bool]
    where: str


@dataclass(frozen=True)
class Report:
    """What tokenising did: rows read, rows cut at max_length, examples dropped (no trained token left), extra chunks of
    long texts, and conversations split into several examples because a turn does not continue the tokens before it."""

    rows: int = 0
    cut: int = 0
    dropped: int = 0
    chunks: int = 0
    split: int = 0


@dataclass(frozen=True)
class _Turn:
    """Prompt text, then answer text with the stop token's text where the template writes one, else its id in `stop`."""

    prompt: str
    answer: str
    stop: int | None


class Renderer:
    """Conversations to ids for one tokenizer.

    template: Jinja text, else the tokenizer's own, else DEFAULT_TEMPLATE. train_on: "all" answers or the "last".
    stop: end-of-answer token for a tokenizer whose eos is missing or not what the model learned. Raises UserError when
    the template is broken or there is no token to stop at.

    The tokenizer's BOS is not added to a text that begins with one. What the template writes at every turn (Llama 2's
    `<s>`) stays.
    """

    def __init__(self, tokenizer, template: str | None = None, train_on: str = "all", stop: str | None = None):
        if train_on not in TRAIN_ON:
            allowed = f"allowed: {', '.join(TRAIN_ON)}{nearest(train_on, TRAIN_ON)}"
            raise UserError(f"train_on: unknown {train_on!r}; {allowed}")
        self.tokenizer, self.train_on = tokenizer, train_on
        own = tokenizer.chat_template
        self.template = template or (own.get("default") if isinstance(own, dict) else own) or DEFAULT_TEMPLATE
        added = {i: t for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        specials = {*tokenizer.all_special_tokens, *(t.content for t in added.values())} - {None}
        self._specials = {s: tokenizer.convert_tokens_to_ids(s) for s in specials if len(s) >= 3}
        self._stop_text = self._choose_stop(stop)
        if stop is not None and len(stop) >= 3:
            self._specials[stop] = tokenizer.convert_tokens_to_ids(stop)
        texts = sorted(map(re.escape, self._specials), key=len, reverse=True)
        self._special = re.compile("|".join(texts) or r"(?!)")
        self._prefix = self._added_prefix()
        self._tail, end = self._probe()
        if self._stop_text is None and end is None and tokenizer.bos_token is None:
            raise UserError("tokenizer: no end-of-text token, and the template writes none; name one with stop")
        self._stop_text = self._stop_text or end or tokenizer.bos_token
        self.stop_id: int = tokenizer.convert_tokens_to_ids(self._stop_text)
        ends = TEXT_ENDS if stop is None and self._stop_text in TURN_ENDS else ()
        self.text_end: int = next((self._specials[t] for t in ends if t in self._specials), self.stop_id)    # of a `text` row
        ids = {self.stop_id, tokenizer.eos_token_id, self._specials.get(end)}
        self.stop_ids: tuple[int, ...] = tuple(sorted(i for i in ids if i is not None))
        self._ints = list(range(max([len(tokenizer), *tokenizer.get_vocab().values()]) + 1))    # one int object an id
        self._anchor = self._plain_ids(["a"])[0]
        self._afters: dict[tuple[str, str], list[int]] = {}

    # What the tokenizer and the template do, found out once.

    def _added_prefix(self) -> list[int]:
        """Ids the tokenizer puts before a text (BOS), if any; ids it would put after a text are never wanted here."""
        whole, plain = self.tokenizer("a")["input_ids"], self._plain_ids(["a"])[0]
        at = next((n for n in range(len(whole)) if plain and whole[n:n + len(plain)] == plain), None)
        if at is None:
            whole = self.tokenizer("")["input_ids"]
            at = len(whole) if whole and whole[-1] != self.tokenizer.eos_token_id else 0
        return list(whole[:at])

    def _choose_stop(self, stop: str | None) -> str | None:
        vocab = self.tokenizer.get_vocab()
        if stop is not None:
            if stop not in vocab:
                raise UserError(f"stop: {stop!r} is not a token of this tokenizer{nearest(stop, self._specials)}")
            return stop
        return self.tokenizer.eos_token or next((t for t in ENDS if t in self._specials and t in vocab), None)

    def _probe(self) -> tuple[str, str | None]:
        """What the template writes after an answer, and its end-of-turn token, if it has one."""
        question, answer = Message("user", "Qxyz"), Message("assistant", "Axyz")
        try:
            before, after = self._render([[question]], True)[0], self._render([[question, answer]], False)[0]
        except jinja2.TemplateSyntaxError as e:
            raise UserError(f"template: line {e.lineno}: {str(e.message)[:150]}") from None
        except Exception:           # a template that wants more than this; each row will say what
            return "", None
        rest = after.removeprefix(before)
        if not after.startswith(before) or answer.content not in rest:
            return "", None
        tail = rest.partition(answer.content)[2]
        found = self._special.search(tail)
        return tail, found and found.group()

    def _render(self, conversations: Sequence[Sequence[Message]], generation: bool) -> list[str]:
        said = [[{"role": m.role, "content": m.content} for m in messages] for messages in conversations]
        return self.tokenizer.apply_chat_template(said, chat_template=self.template, tokenize=False,
                                                  add_generation_prompt=generation, eos_token=self._stop_text or "")

    # Text to ids.

    def _plain_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of the texts alone, nothing added."""
        if not texts:
            return []
        got = self.tokenizer(list(texts), add_special_tokens=False, padding=False, truncation=False, verbose=False,
                             return_attention_mask=False, return_token_type_ids=False)
        return got["input_ids"]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids as generation is fed them: with the tokenizer's BOS, unless the text itself begins with one."""
        ids = self._plain_ids(texts)
        if not self._prefix:
            return ids
        first = tuple({self.tokenizer.convert_ids_to_tokens(self._prefix[0]), self.tokenizer.bos_token} - {None})
        return [i if t.startswith(first) else self._prefix + i for t, i in zip(texts, ids, strict=True)]

    def _continue(self, turn: _Turn, prompt: list[int], whole: list[int]) -> list[int]:
        """Ids of an answer whose first characters fused with the prompt's last in `whole`: tokenised after an anchor
        (so no SentencePiece prefix space appears), which is taken off again."""
        text = self.tokenizer.decode(whole, clean_up_tokenization_spaces=False)
        for anchor in (turn.prompt[-1:], *ANCHORS):
            ids = self._after(anchor, turn.answer)
            if ids and self.tokenizer.decode(prompt + ids, clean_up_tokenization_spaces=False) == text:
                return ids
        raise Bad("row", "the tokenizer cannot continue the prompt with the answer")

    def _after(self, anchor: str, answer: str) -> list[int]:
        """Ids that `answer` adds to `anchor`; none when the two fuse. Short answers (labels) are remembered."""
        key = (anchor, answer)
        if key not in self._afters:
            head, both = self._plain_ids([anchor, anchor + answer])
            ids = both[len(head):] if head and both[:len(head)] == head else []
            if len(answer) > 40 or len(self._afters) > 10_000:
                return ids
            self._afters[key] = ids
        return self._afters[key]

    # Conversations to turns.

    def _check(self, conversation: Conversation) -> None:
        for n, m in enumerate(conversation.messages):
            if found := self._special.search(m.content):
                places = {"chat": f"messages[{n}]", "text": "text", "plain": "completion" if n else "prompt"}
                reason = f"holds the special token {found.group()!r} as text, which would act as one"
                raise Bad(places[conversation.kind], reason)

    def _turns(self, conversations: Sequence[Conversation], asked: list[list[int]],
               problems: list[Problem]) -> list[list[_Turn]]:
        """For each conversation the turns of the answers at `asked` (the end: the prompt alone); none with a problem."""
        jobs = [(c.messages, k) for c, ks in zip(conversations, asked, strict=True) if c.kind == "chat" for k in ks]
        prompts = self._rendered([messages[:k] for messages, k in jobs], True)
        fulls = self._rendered([messages[:k + 1] for messages, k in jobs if k < len(messages)], False)
        out = []
        for c, ks in zip(conversations, asked, strict=True):
            chat = c.kind == "chat"
            got = [(k, next(prompts), next(fulls) if k < len(c.messages) else None) for k in ks if chat]
            try:
                self._check(c)
                texts = [m.content for m in c.messages]
                last = self.text_end if c.kind == "text" else self.stop_id
                plain = [_Turn("".join(texts[:k]), "".join(texts[k:k + 1]), last) for k in ks if not chat]
                out.append(plain + [self._turn(c.messages, k, p, f) for k, p, f in got])
            except Bad as e:
                out.append([])
                problems.append(_problem(c, e))
        return out

    def _rendered(self, conversations: list[Sequence[Message]], generation: bool) -> Iterator[str | Bad]:
        """One text each; where the template refuses, a Bad in its place."""
        if not conversations:
            return
        try:
            yield from self._render(conversations, generation)
            return
        except Exception:       # find out whose fault it is, one by one
            pass
        for messages in conversations:
            try:
                yield self._render([messages], generation)[0]
            except Exception as e:      # a template may raise anything; it is the row that cannot be rendered
                reason = (str(e).splitlines() or [type(e).__name__])[0][:120]
                yield Bad("messages", f"the chat template refuses it: {reason}")

    def _turn(self, messages: Sequence[Message], k: int, prompt: str | Bad, full: str | Bad | None) -> _Turn:
        for text in (prompt, full):
            if isinstance(text, Bad):
                raise text
        for n, m in enumerate(messages[:k]):
            if m.role != "assistant" and m.content.strip() not in prompt:
                raise Bad(f"messages[{n}]", f"the chat template leaves out or changes this {m.role} message")
        if full is None:
            return _Turn(prompt, "", None)
        if not full.startswith(prompt):
            raise Bad(f"messages[{k}]", "the chat template does not continue its generation prompt with this answer")
        rest, content = full[len(prompt):], messages[k].content
        if self._tail and rest.endswith(self._tail):
            end = len(rest) - len(self._tail)
        else:
            at = max(rest.find(content), rest.find(content.strip()))
            if at < 0:
                raise Bad(f"messages[{k}]", "the chat template leaves out or changes this answer")
            end = at + len(content.strip())
            tail = rest[end:]
            if not self._special.search(tail):
                end = max(end, at + len(content)) if rest[at:].startswith(content) else end
        stop = self._special.search(rest, end)
        return _Turn(prompt, rest[:stop.end()], None) if stop else _Turn(prompt, rest[:end], self.stop_id)

    # The public part.

    def prompts(self, conversations: Sequence[Conversation]) -> list[list[int]]:
        """`prompt` of many conversations in one go."""
        problems: list[Problem] = []
        asked = [[len(c.messages) - bool(c.messages and c.messages[-1].role == "assistant")] for c in conversations]
        turns = self._turns(conversations, asked, problems)
        raise_problems(problems)
        return self._ids([t[0].prompt for t in turns])

    def prompt(self, conversation: Conversation) -> list[int]:
        """Ids before the last answer, identical to what training saw before it. The answer may be missing."""
        return self.prompts([conversation])[0]

    def answer(self, ids: Sequence[int]) -> str:
        """Text of generated ids up to the first stop id, as it continues the prompt (a leading space stays)."""
        ids = [int(i) for i in ids]
        end = next((n for n, i in enumerate(ids) if i in self.stop_ids), len(ids))

        def decode(i: list[int]) -> str:
            return self.tokenizer.decode(i, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        head, both = decode(self._anchor), decode(self._anchor + ids[:end])
        return both[len(head):] if both.startswith(head) else decode(ids[:end])

    def examples(self, conversations: Sequence[Conversation], max_length: int,
                 progress: Callable[[int, int], None] | None = None) -> tuple[list[Example], Report]:
        """Token rows of at most max_length ids, and what was cut; progress(rows done, rows) is called now and then.

        Raises UserError listing the first rows that cannot be rendered, or when nothing trained is left.
        """
        if max_length < 2:
            raise UserError(f"max_length: is {max_length}; must be at least 2")
        out: list[Example] = []
        problems: list[Problem] = []
        counts, done = Counter(), 0
        for part in parts(conversations):
            out += self.part(part, max_length, problems, counts)
            done += len(part)
            if progress is not None:
                progress(done, len(conversations))
        raise_problems(problems)
        if not out:
            raise UserError(f"max_length: {max_length} leaves no answer token in any of {len(conversations)} rows")
        return out, Report(rows=len(conversations), **counts)

    def part(self, part: Sequence[Conversation], max_length: int, problems: list[Problem], counts: Counter) -> Iterator[Example]:
        """The token rows of some conversations; problems go to the list, and what was cut is counted under Report's names."""
        for c, rows in zip(part, self._tokenise(part, problems), strict=True):
            counts["split"] += len(rows) > 1
            if c.kind == "text":
                rows = [piece for ids, trained in rows for piece in chunks(ids, trained, max_length)]
                counts["chunks"] += max(len(rows) - 1, 0)
            counts["cut"] += any(len(ids) > max_length for ids, _ in rows)
            for ids, trained in rows:
                if True in trained[:max_length]:
                    yield Example(list(map(self._ints.__getitem__, ids[:max_length])), trained[:max_length], c.where)
                else:
                    counts["dropped"] += 1

    def text_ids(self, piece: Conversation, first: bool) -> list[int]:
        """Ids of a piece of a text that goes on from the end of a line, where it is not the first. Raises Bad."""
        self._check(piece)
        text = piece.reference
        return self._ids([text])[0] if first else self._after("\n", text) or self._plain_ids([text])[0]

    def problems(self, conversations: Sequence[Conversation]) -> list[Problem]:
        """Every row that this tokenizer and template cannot render."""
        found: list[Problem] = []
        for part in parts(conversations):
            self._tokenise(part, found)
        return found

    def _tokenise(self, part: Sequence[Conversation],
                  problems: list[Problem]) -> list[list[tuple[list[int], list[bool]]]]:
        """(ids, trained) of each conversation: usually one sequence, more where later turns rewrite earlier tokens."""
        asked = []
        for c in part:
            answers = [n for n, m in enumerate(c.messages) if m.role == "assistant" and m.trained]
            asked.append(answers if self.train_on == "all" else answers[-1:])
        turns = self._turns(part, asked, problems)
        flat = [t for ts in turns for t in ts]
        prompts = iter(self._ids([t.prompt for t in flat]))
        wholes = iter(self._ids([t.prompt + t.answer for t in flat]))
        out = []
        for c, ts in zip(part, turns, strict=True):
            pairs = [(t, next(prompts), next(wholes)) for t in ts]
            try:
                out.append(_joined([self._sequence(*pair) for pair in pairs]))
            except Bad as e:
                out.append([])
                problems.append(_problem(c, e))
        return out

    def _sequence(self, turn: _Turn, prompt: list[int], whole: list[int]) -> tuple[int, list[int]]:
        """(how many ids are prompt, all ids) of one turn."""
        if whole[:len(prompt)] != prompt:
            whole = prompt + self._continue(turn, prompt, whole)
        return len(prompt), whole if turn.stop is None else [*whole, turn.stop]


def _problem(c: Conversation, bad: Bad) -> Problem:
    file, _, line = c.where.rpartition(":")
    file, line = (file, int(line)) if file and line.isdigit() else (c.where, 0)
    return Problem(file, line, bad.field, bad.reason)


def _joined(turns: list[tuple[int, list[int]]]) -> list[tuple[list[int], list[bool]]]:
    """Turns that continue each other become one sequence; a turn that does not starts its own, with its full prompt."""
    out: list[tuple[list[int], list[bool]]] = []
    for start, ids in turns:
        before, trained = out[-1] if out else ([], [])
        if out and start >= len(before) and ids[:len(before)] == before:
            out.pop()
        else:
            before, trained = [], []
        out.append((ids, trained + [False] * (start - len(before)) + [True] * (len(ids) - start)))
    for _, trained in out:
        trained[:1] = [False] * len(trained[:1])        # the first token has nothing to be predicted from
    return out


def chunks(ids: list[int], trained: list[bool], size: int) -> Iterator[tuple[list[int], list[bool]]]:
    """A text in pieces of at most `size` ids. Each begins with the last token of the one before, as context: so every token
    of the text but its first is trained, once."""
    for start in range(0, max(1, len(ids) - 1), size - 1):
        yield ids[start:start + size], [False] + trained[start + 1:start + size]


def parts(conversations: Iterable[Conversation]) -> Iterator[list[Conversation]]:
    """Slices of bounded rows and characters."""
    part, size = [], 0
    for c in conversations:
        part.append(c)
        size += sum(len(m.content) for m in c.messages)
        if len(part) == CHUNK_ROWS or size >= CHUNK_CHARS:
            yield part
            part, size = [], 0
    if part:
        yield part
