from dataclasses import replace

import numpy as np
import pytest

from replicate import study
from replicate.config import ModelConfig, TrainConfig
from replicate.settings.presets import SPARSITY_PRESETS
from replicate.settings.text import config_hash
from replicate.study import completion, pool, records, results, statistics, worker
from replicate.training import checkpoint

RUN = TrainConfig(
    model=ModelConfig(vocab_size=32, n_layer=1, d_model=16, d_ff=64, n_head=2, seq_len=16),
    corpus="synthetic",
    steps=4,
    batch_size=2,
    lr_warmup=2,
    dense_warmup=2,
    eval_batches=1,
)


def fake(name, seed, losses, origin="fresh", **changes):
    """A run whose training loss is `losses`, held-out loss their mean."""
    config = study.arms("smoke", [name], [seed], **changes)[0]
    result = {
        "steps": {"loss": losses},
        "stats": [
            {"step": 0, "y2_sparsity": [0.4, 0.6], "flip_rate": {"w1": [0.1, 0.3], "w2": [0.2, 0.2]}},
            {"step": 2, "y2_sparsity": [0.8, 0.8], "flip_rate": {}},
        ],
        "final_loss": losses[-1],
        "valid_loss": sum(losses) / len(losses),
    }
    return records.make_record("train", config, result), origin


def test_differences_pair_the_seeds_in_common():
    runs = results.frame([*(fake("dense", s, [3.0, s]) for s in (1, 2, 3)), fake("w1", 3, [3.0, 3.5])])
    stats = results.differences(runs, column="final_loss")["w1"]
    assert (stats.n, stats.mean) == (1, 0.5)
    stats = results.differences(runs, base="w1", column="final_loss")["dense"]
    assert (stats.n, stats.mean) == (1, -0.5), "dense has seeds that w1 lacks"
    apart = results.frame([fake("dense", 1, [3.0]), fake("w1", 2, [3.0])])
    with pytest.raises(ValueError, match=r"no seed in common to pair runs by: w1 has \[2\], dense has \[1\]"):
        results.differences(apart)
    with pytest.raises(ValueError, match="no runs of 'w2'"):
        results.differences(runs, arms=["w2"])


def test_series_average_layers_and_weights():
    record = fake("w1", 1, [3.0])[0]
    assert results.series(record, "y2_sparsity") == [(0, 0.5), (2, 0.8)]
    assert results.series(record, "flip_rate")[0] == (0, pytest.approx(0.2))


def test_the_gap_curve_is_a_running_mean_of_paired_differences():
    dense = {1: [4.0, 3.0, 2.0, 1.0], 2: [5.0, 4.0, 3.0, 2.0]}
    extra = {1: [0.0, 0.0, 2.0, 4.0], 2: [0.0, 0.0, 4.0, 8.0]}
    runs = [fake("dense", s, loss) for s, loss in dense.items()]
    runs += [fake("w1", s, [a + b for a, b in zip(dense[s], extra[s], strict=True)]) for s in dense]
    steps, gap = results.gap_curve(results.frame(runs), "w1", window=2)
    assert steps.tolist() == [2, 3, 4]
    assert np.allclose(gap, [[0, 1, 3], [0, 2, 6]])
    _, one = results.gap_curve(results.frame([*runs, fake("w1", 3, [9.0] * 4)]), "w1", window=2)
    assert np.allclose(one, gap), "a seed that dense lacks has no pair"
    with pytest.raises(ValueError, match="no seed in common"):
        results.gap_curve(results.frame([runs[0], fake("w1", 3, [9.0] * 4)]), "w1")


def test_a_larger_study_counts_if_what_is_needed_is_recorded(tmp_path):
    def plan(scale):
        return {name: study.arms(scale, [name], (1, 2)) for name in ("dense", "w1", "w2")}

    store = records.RecordStore(tmp_path / "own", tmp_path / "recorded")
    assert results.larger("smoke", plan, store) is None
    changes = {"corpus": "stdlib"}
    for name, seed in (("dense", 1), ("dense", 2), ("w1", 1), ("w1", 2), ("w2", 1)):
        config = study.arms("laptop", [name], [seed], **changes)[0]
        record = fake(name, seed, [2.0])[0]
        store.put(records.make_record("train", config, record.results), recorded=True)
    assert results.larger("smoke", plan, store) is None  # w2 lacks a seed
    scale, runs = results.larger("smoke", plan, store, needed=["dense"])
    assert (scale, runs["arm"].tolist()) == ("laptop", ["dense", "dense", "w1", "w1"])
    assert results.larger("laptop", plan, store, needed=["dense"]) is None
    assert results.larger("smoke", plan, store, needed=["w2"]) is None
    _, runs = results.larger("smoke", plan, store, min_seeds=1)
    assert runs["arm"].tolist() == ["dense", "dense", "w1", "w1", "w2"] and runs["seed"].iloc[-1] == 1
    _, runs = results.larger("smoke", plan, store, needed=["dense"], min_seeds=2)
    assert set(runs["arm"]) == {"dense", "w1"}


def test_every_larger_scale_that_counts_is_found(tmp_path):
    def plan(scale):
        return {name: study.arms(scale, [name], (1,)) for name in ("dense", "w1")}

    store = records.RecordStore(tmp_path / "own", tmp_path / "recorded")
    for scale, names in (("laptop", ["dense", "w1"]), ("gpu", ["dense", "w1"]), ("gpu40m", ["dense"])):
        for name in names:
            config, record = study.arms(scale, [name], [1])[0], fake(name, 1, [2.0])[0]
            store.put(records.make_record("train", config, record.results), recorded=True)
    assert list(results.all_larger("smoke", plan, store)) == ["laptop", "gpu"]
    assert list(results.all_larger("laptop", plan, store, needed=["dense"])) == ["gpu", "gpu40m"]
    assert results.larger("smoke", plan, store, needed=["dense"])[0] == "gpu40m"
    assert results.larger("gpu40m", plan, store) is None


def test_the_steps_to_a_loss_lie_between_evaluations():
    record = records.make_record("train", {}, {"valid_losses": [[10, 4.0], [20, 3.0], [30, 2.5]]})
    assert [results.steps_to_loss(record, loss) for loss in (4.5, 3.5, 2.75, 2.4)] == [10, 15, 25, None]


@pytest.fixture
def in_process(monkeypatch):
    def train_all(configs, workers, *, models, **_):
        yield from ((c, worker.train_one(c, keep=config_hash(c) in models)) for c in configs)

    monkeypatch.setattr(pool, "train_all", train_all)


def test_a_plan_keeps_the_models_that_are_asked_for(in_process):
    plan = {"a": [replace(RUN, seed=11)], "b": [replace(RUN, seed=12)]}
    runs = results.run_plan(plan, models=["b", "not in this plan"])
    assert runs["arm"].tolist() == ["a", "b"] and set(runs["origin"]) == {"fresh"}
    assert [checkpoint.steps(worker.run_dir(plan[name][0])) for name in plan] == [[], [RUN.steps]]
    assert study.trained(plan["b"][0], progress=False).step == RUN.steps


def test_completions_keep_the_models_and_the_answers(in_process, monkeypatch):
    sparse = replace(RUN, model=replace(RUN.model, sparsity=SPARSITY_PRESETS["w1"]))
    runs = results.frame(study.run([RUN, sparse], progress=False))
    question = completion.QUESTION | {"n": 20, "context": 6, "length": 4}
    first = results.completions(runs, question)
    assert first["accuracy"].between(0, 1).all()
    kept = [len(checkpoint.steps(worker.run_dir(c))) for c in (RUN, sparse)]
    assert kept == [1, 1]
    monkeypatch.setattr(study, "trained", lambda *_, **__: pytest.fail("loads a model"))
    again = results.completions(runs, question)
    assert again["accuracy"].tolist() == first["accuracy"].tolist()
    elsewhere = results.completions(runs.assign(origin="recorded"), question | {"n": 21})
    assert elsewhere["accuracy"].isna().all()


def test_a_change_is_judged_where_both_arms_ran():
    ran = {
        "laptop": [
            fake("dense", 1, [2.0]),
            fake("dense", 2, [3.0]),
            fake("w1", 1, [2.5]),
            fake("w2", 9, [1.0]),
        ],
        "gpu": [fake("dense", 1, [1.0])],
    }
    studies = {scale: results.frame(runs) for scale, runs in ran.items()}
    asked = (("a weight", "dense", ("w1", "recipe")), ("another", "w1", ("dense", "w2")))
    rows = results.open_questions(studies, asked[:1])
    assert [row[:3] for row in rows] == [("a weight", "w1", "dense"), ("a weight", "recipe", "dense")]
    (first,), second = rows[0][3].values(), rows[1][3]
    assert list(rows[0][3]) == ["laptop"] and (first.mean, first.n) == (0.5, 1) and second == {}
    with pytest.raises(ValueError, match=r"w2 has \[9\], w1 has \[1\]"):
        results.open_questions(studies, asked[1:])
    back = results.open_questions(studies, [("another", "w1", ("dense",))])[0][3]["laptop"]
    assert (back.mean, back.n) == (-0.5, 1), "dense ran with more seeds"


def test_two_texts_are_never_pooled():
    """Seeds of `plans.ON_CPU` read another text."""
    values = {1: 0.1, 2: 0.2, 3: 0.3, 11: 1.1, 12: 1.2, 13: 1.3}
    runs = [
        fake(name, seed, [3.0 + x * (name == "w1")]) for seed, x in values.items() for name in ("dense", "w1")
    ]
    runs += [fake("w2", seed, [3.5]) for seed in (11, 12, 13)]
    found = results.differences(results.frame(runs), "dense", "final_loss")
    assert (found["w1"].n, found["w1"].mean) == (3, pytest.approx(0.2))
    assert (found["w2"].n, found["w2"].mean) == (3, 0.5), "on the text that both have"
    assert results.contrast(results.frame(runs), ("w1", "w2"), "final_loss").mean == pytest.approx(0.7)


def test_runs_of_two_texts_are_no_pair():
    """An arm on other prose is not above the dense model of the usual text, though they share a seed."""
    runs = [fake(name, seed, [3.0]) for seed in (1, 2) for name in ("dense", "w1")]
    texts = ["a", "b", "a", "a"]  # of seed 1: dense, w1; of seed 2: both
    runs = [(replace(r, corpus={"sha256": text}), o) for (r, o), text in zip(runs, texts, strict=True)]
    assert results.differences(results.frame(runs), column="final_loss")["w1"].n == 1
    assert results.contrast(results.frame(runs[:2]), ("w1",), "final_loss") is None
    with pytest.raises(ValueError, match="no seed in common"):
        results.differences(results.frame(runs[:2]))


def test_a_sum_of_arms_counts_dense_once():
    losses = {"dense": [2.0, 3.0], "w1": [2.5, 3.5], "w2": [2.25, 3.25], "w1+w2": [3.0, 4.5]}
    runs = results.frame([fake(n, s, [x]) for n, xs in losses.items() for s, x in enumerate(xs, 1)])
    s = results.contrast(runs, ("w1+w2", "w1", "w2"), "final_loss")
    assert (s.n, s.mean) == (2, pytest.approx((0.25 + 0.75) / 2))
    assert results.contrast(runs, ("dense",), "final_loss").mean == 0
    assert results.contrast(runs, ("recipe",), "final_loss") is None


def test_accuracies_share_the_error_of_their_questions():
    runs = results.frame([fake(name, seed, [3.0]) for name in ("dense", "w1") for seed in (1, 2)])
    right = {("dense", 1): "1100", ("dense", 2): "1100", ("w1", 1): "1000", ("w1", 2): "0100"}
    answers = [
        records.make_record("completion", {}, {"correct": text, "accuracy": text.count("1") / 4})
        for text in (
            right[arm, seed] for arm, seed in zip(["dense"] * 2 + ["w1"] * 2, [1, 2, 1, 2], strict=True)
        )
    ]
    asked = results.answered(runs.assign(arm=["dense"] * 2 + ["w1"] * 2), answers)
    s = results.differences(asked, column="accuracy")["w1"]
    assert (s.mean, s.std) == (-0.25, 0), "both seeds lose one question of four"
    by_question = np.array([-0.5, -0.5, 0, 0])  # mean over seeds
    error = np.sqrt(by_question.var(ddof=1) / 4)
    assert s.high - s.mean == pytest.approx(12.7062 * error, rel=1e-4)
    assert results.contrast(asked, ("w1",), "accuracy").high == pytest.approx(s.high)
    plain = results.differences(asked.drop(columns="correct"), column="accuracy")["w1"]
    assert plain.high == plain.mean, "without the questions the seeds alone speak"


def test_surely_is_said_after_the_correction_of_a_family():
    clear, near = statistics.summary([1.0, 1.01, 0.99]), statistics.summary([-1.0, -1.2, -0.8])
    two = statistics.summary([5.0, 5.0])
    assert statistics.p_value(near) < 0.05
    assert results.surely({"a": clear, "b": near, "c": two}) == {"a": "more", "b": "less", "c": ""}
    many = {"a": clear, "b": near} | {i: statistics.summary([-1.0, 0.0, 1.0]) for i in range(20)}
    assert {key for key, word in results.surely(many).items() if word} == {"a"}
    assert results.surely({"a": clear}, null=2.0) == {"a": "less"}
