"""lm-evaluation-harness on this engine: the same numbers as its own "hf" model, for a base and for adapters, offline."""
import json

import pytest
import torch
from kit import ADAPTERS, TOKENIZER, llama
from tiny import fill
from tokenizers_tiny import data_dir

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra [eval], 325 MB with what it brings)")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.evaluator import simple_evaluate  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from tsugiki.adapters import attach  # noqa: E402
from tsugiki.cli.main import main  # noqa: E402
from tsugiki.data import Renderer  # noqa: E402
from tsugiki.errors import UserError  # noqa: E402
from tsugiki.evaluate import harness  # noqa: E402
from tsugiki.evaluate.harness import run_harness  # noqa: E402
from tsugiki.evaluate.harness_model import HarnessModel  # noqa: E402
from tsugiki.formats.export import export_model  # noqa: E402

PAIRS = [("The cat sat on", " the mat"), ("Once upon a time", " there was a bird"), ("", "Hello there"), ("A ", "b c"),
         ("one two three four five six seven", " eight"), ("so " * 60, "long"), ("Q: why?\nA:", " because it is so")]
TEXTS = ["Once upon a time there was a cat. " * n for n in (1, 3, 20)]
KINDS = {"multiple_choice": 'doc_to_choice: ["good", "bad"]\ndoc_to_target: label\n'
                            'metric_list: [{metric: acc}, {metric: acc_norm}]',
         "loglikelihood_rolling": 'doc_to_target: "{{text}}"\nmetric_list: [{metric: word_perplexity}]',
         "generate_until": 'doc_to_target: "{{answer}}"\ngeneration_kwargs: {until: ["."], max_gen_toks: 6}\n'
                           'metric_list: [{metric: exact_match}]'}


@pytest.fixture
def local(tmp_path):
    """A folder with a task of each kind, and its rows."""
    rows = [{"text": f"Review {i}: it is {'so ' * (i % 4)}nice\nThis was", "label": i % 2, "answer": "x"} for i in range(9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for kind, more in KINDS.items():
        (tmp_path / f"{kind}.yaml").write_text(
            f"task: local_{kind}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}, "
            f"cache_dir: {tmp_path}/cache}}\ntest_split: test\noutput_type: {kind}\n"
            f"doc_to_text: {'' if 'rolling' in kind else 'text'!r}\n{more}\n")
    return tmp_path


def requests(kind, args):
    return [Instance(kind, {}, a, n) for n, a in enumerate(args)]


def both(model, tokenizer, **more):
    return HarnessModel(model, Renderer(tokenizer), batch_size=3), HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, **more)


def agree(ours, theirs, close):
    """Log-likelihoods, whether they are greedy, those of long texts, and answers."""
    got, want = (m.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True) for m in (ours, theirs))
    assert [g for _, g in got] == [g for _, g in want] and max(abs(a - b) for (a, _), (b, _) in zip(got, want, strict=True)) < close
    got, want = (m.loglikelihood_rolling(requests("loglikelihood_rolling", [(t,) for t in TEXTS])) for m in (ours, theirs))
    assert max(abs(a - b) for a, b in zip(got, want, strict=True)) < close * 10 and min(got) < -100
    # its own model looks for the end in the prompt's last tokens too, so the end here is none of the prompt's characters
    asked = [(t[:40 + 7 * n], {"until": ["%"] if n else [], "max_gen_toks": 6 + n, "do_sample": False})
             for n, t in enumerate(TEXTS)]
    got, want = (m.generate_until(requests("generate_until", asked)) for m in (ours, theirs))
    assert got == want and any(got)


def test_a_base_gets_the_log_likelihoods_of_plain_transformers():
    model = llama(torch.float64)
    ours, theirs = both(model, TOKENIZER, softmax_dtype="float64")
    agree(ours, theirs, 1e-9)
    assert ours.max_length == theirs.max_length == 256


@pytest.mark.parametrize("name", ["stories260k-hf", "tinystories-656k"])
def test_real_bases_do_too(name):
    from tsugiki.load import load
    model, tokenizer = load(str(data_dir("models", name)), dtype="fp32")
    agree(*both(model, tokenizer), 1e-5 * 30)          # sums of up to some hundred tokens in float32; each token within 1e-5
    pair = requests("loglikelihood", PAIRS[:2])
    ours, theirs = both(model, tokenizer)
    assert all(abs(a - b) < 1e-5 for (a, _), (b, _) in zip(ours.loglikelihood(pair), theirs.loglikelihood(pair), strict=True))


@pytest.mark.parametrize("name", ["lora", "prefix", "prompt", "bitfit"])
def test_adapters_are_scored_too(name):
    model = llama(torch.float64)
    base = both(model, TOKENIZER)[0].loglikelihood(requests("loglikelihood", PAIRS))
    adapters = attach(model)
    fill(adapters.add("a", ADAPTERS[name]), seed=3, scale=0.3)
    with adapters.use("a"):
        ours, theirs = both(model, TOKENIZER, softmax_dtype="float64", max_length=200)
        ours.max_length = 200
        agree(ours, theirs, 1e-9)
        changed = ours.loglikelihood(requests("loglikelihood", PAIRS))
    assert max(abs(a - b) for (a, _), (b, _) in zip(base, changed, strict=True)) > 1e-3
    with adapters.use(None):
        again = both(model, TOKENIZER)[0].loglikelihood(requests("loglikelihood", PAIRS))
    assert max(abs(a - b) for (a, _), (b, _) in zip(base, again, strict=True)) < 1e-9


def test_a_local_task_of_each_kind_scores_as_on_the_harnesss_own_model(local):
    model, names = llama(torch.float64), [f"local_{kind}" for kind in KINDS]
    ours = run_harness(model, Renderer(TOKENIZER), names, include_path=str(local))
    theirs = simple_evaluate(HFLM(pretrained=model, tokenizer=TOKENIZER), tasks=names, bootstrap_iters=1000, log_samples=False,
                             task_manager=TaskManager(include_path=str(local), include_defaults=False))["results"]
    for name in names:
        for key, value in ours.tasks[name].items():
            assert value == theirs[name][key] or value == pytest.approx(theirs[name][key], rel=1e-6), (name, key)
    assert ours.samples == dict.fromkeys(names, 9) and {m for _, m, *_ in ours.lines()} >= {"acc", "word_perplexity", "exact_match"}
    assert run_harness(model, Renderer(TOKENIZER), names[:1], include_path=str(local), limit=4).samples == {names[0]: 4}


def test_what_cannot_be_scored_is_told_in_one_line(local, monkeypatch):
    model, renderer = llama(), Renderer(TOKENIZER)
    with pytest.raises(UserError, match="--harness local_choise: no such task"):
        run_harness(model, renderer, ["local_choise"], include_path=str(local))
    with pytest.raises(UserError, match="no folder"):
        run_harness(model, renderer, ["x"], include_path=str(local / "nowhere"))
    ours = HarnessModel(model, renderer)
    with pytest.raises(UserError, match="sampled"):
        ours.generate_until(requests("generate_until", [("a", {"do_sample": True, "temperature": 0.7})]))
    with pytest.raises(UserError, match="answers of 400 tokens"):
        ours.generate_until(requests("generate_until", [("a", {"max_gen_toks": 400})]))
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="tsugiki.eval."):
        harness.needed()


def test_the_command_prints_a_table_or_one_json_object(local, capsys, tmp_path_factory):
    base = str(export_model(llama(), TOKENIZER, tmp_path_factory.mktemp("base") / "base", dtype=torch.float32))
    said = ["eval", "--base", base, "--dtype", "fp32", "--quiet", "--harness", "local_multiple_choice",
            "--include-path", str(local)]
    assert main([*said, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["n"] == {"local_multiple_choice": 9} and 0 <= values["harness"]["local_multiple_choice"]["acc,none"] <= 1
    assert main(said) == 0 and "local_multiple_choice" in capsys.readouterr().out
