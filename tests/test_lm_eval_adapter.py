"""Our models under lm-evaluation-harness, on small local tasks without a network."""

import importlib.util
import json
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from replicate import lm_eval_adapter, tokenizer
from replicate.config import ModelConfig, SparsityConfig
from replicate.gpt import GPT
from replicate.lm_eval_adapter import ReplicateLM

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed"
)
TOKENS = tokenizer.load(512)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    sparsity = SparsityConfig(activation="venom", n_clusters=4, top_k=2)
    model = GPT(ModelConfig(n_layer=2, d_model=32, d_ff=64, n_head=2, seq_len=24, sparsity=sparsity))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # so that the answers differ by more than rounding
    for ffn in model.ffns():
        ffn.make_clusters(1)
    model.set_phase("sparse")
    return model.eval()


@pytest.fixture
def lm(model):
    return ReplicateLM(model, TOKENS, batch_size=3)


def requests(*arguments):
    return [SimpleNamespace(args=pair) for pair in arguments]


@torch.no_grad()
def by_hand(model, context, answer):
    """Sum of the answer's log-likelihoods, one position after the other."""
    total = 0.0
    for i in range(len(answer)):
        seen = torch.tensor([[*context, *answer[:i]]])[:, -model.config.seq_len :]
        total += F.log_softmax(model(seen)[0][0, -1].float(), -1)[answer[i]].item()
    return total


@needs_lm_eval
def test_likelihoods_are_the_models_own(lm, model):
    pairs = [("def f(", "x):"), ("", "import os"), ("a = ", "1\n"), ("return", " None")]
    found = lm.loglikelihood(requests(*pairs), disable_tqdm=True)
    for (context, answer), (value, _) in zip(pairs, found, strict=True):
        ids = [TOKENS.encode(text).tolist() for text in (context, answer)]
        if context.endswith(" "):
            ids = [TOKENS.encode("a =").tolist(), TOKENS.encode(" 1\n").tolist()]
        assert value == pytest.approx(by_hand(model, ids[0] or [0], ids[1]), abs=1e-4)


@needs_lm_eval
def test_greedy_answers_are_called_greedy(lm):
    context = "for i in "
    answer = lm.generate_until(requests((context.rstrip(), {"max_gen_toks": 1})))[0]
    other = "zzz" if answer != "zzz" else "qqq"
    flags = [greedy for _, greedy in lm._loglikelihood_tokens(
        [("", lm.tok_encode(context.rstrip()), lm.tok_encode(text)) for text in (answer, other)]
    )]  # fmt: skip
    assert flags[1] is False
    assert flags[0] is (len(lm.tok_encode(answer)) == 1)


@needs_lm_eval
def test_a_token_over_the_cut_is_split(lm):
    assert lm._encode_pair("sel", "f.x") == (lm.tok_encode("sel"), lm.tok_encode("f.x"))
    context, answer = lm._encode_pair("return ", "x")
    assert context + answer == lm.tok_encode("return x")


@needs_lm_eval
def test_a_long_text_is_read_in_windows_and_every_token_once(lm, model):
    text = "def long_name(argument):\n    return argument + 1\n" * 3
    ids = TOKENS.encode(text).tolist()
    assert len(ids) > 2 * model.config.seq_len
    total, start = 0.0, 0
    while start < len(ids):  # each window sees one token of the one before
        piece = ids[start : start + model.config.seq_len]
        if start and len(piece) < model.config.seq_len:
            context = ids[len(ids) - model.config.seq_len - 1 : start]
        else:
            context = [ids[start - 1]] if start else [0]
        total += by_hand(model, context, piece)
        start += len(piece)
    assert lm.loglikelihood_rolling(requests((text,)))[0] == pytest.approx(total, abs=1e-3)


@needs_lm_eval
def test_generation_stops_where_it_is_told(lm):
    free = lm.generate_until(requests(("import ", {"max_gen_toks": 12})))[0]
    assert lm.generate_until(requests(("import ", {"max_gen_toks": 12})))[0] == free
    stop = free[2:4]
    stopped = lm.generate_until(requests(("import ", {"max_gen_toks": 12, "until": [stop]})))[0]
    assert stopped == free[: free.index(stop)]


@needs_lm_eval
def test_the_harness_scores_a_local_task(lm, tmp_path):
    import lm_eval
    from lm_eval.api.task import ConfigurableTask

    rows = [
        {"question": f"x = {i}\nprint(", "choices": ["x", "y)", "import"], "gold": i % 3} for i in range(9)
    ]
    file = tmp_path / "questions.json"
    file.write_text("\n".join(map(json.dumps, rows)))
    task = ConfigurableTask(config={
        "task": "local", "dataset_path": "json", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}", "target_delimiter": "", "metric_list": [{"metric": "acc"}],
    })  # fmt: skip
    found = lm_eval.simple_evaluate(lm, tasks=[task], bootstrap_iters=0, verbosity="ERROR")
    right = 0
    for row in rows:
        pairs = requests(*((row["question"], choice) for choice in row["choices"]))
        scores = [value for value, _ in lm.loglikelihood(pairs, disable_tqdm=True)]
        right += scores.index(max(scores)) == row["gold"]
    assert found["results"]["local"]["acc,none"] == pytest.approx(right / 9)


def test_without_the_harness_it_says_what_to_install(model, monkeypatch):
    monkeypatch.setattr(lm_eval_adapter, "HAVE_LM_EVAL", False)
    with pytest.raises(ImportError, match=r"pip install 'replicate\[eval\]'"):
        ReplicateLM(model, TOKENS)
