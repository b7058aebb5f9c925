import pytest

from replicate import __main__ as commands
from replicate import study
from replicate.study import estimate, results, runs
from replicate.study.records import RecordStore


@pytest.fixture(autouse=True)
def nobody_has_agreed(monkeypatch):
    monkeypatch.delenv("REPLICATE_LONG", raising=False)


@pytest.fixture
def gigaflops(monkeypatch):
    """A machine whose threads make a product at 50 GFLOPs a second."""
    monkeypatch.setattr(estimate, "_rate", lambda *shape: 50e9)
    monkeypatch.setattr("replicate.study.pool._cores", lambda: 2)


@pytest.mark.usefixtures("gigaflops")
def test_the_work_left_is_shared_by_the_workers():
    configs = {str(seed): study.arms("laptop", ["dense"], [seed])[0] for seed in (1, 2, 3, 4)}
    one = estimate.work(configs["1"]) / (0.4 * 50e9)
    assert 60 < one < 1000
    assert estimate.seconds(configs, 1) == pytest.approx(4 * one)
    assert estimate.seconds(configs, 2) == pytest.approx(2 * one)
    assert estimate.seconds(configs, 9) == pytest.approx(one)


def test_the_speed_is_measured_here():
    assert 1e8 < estimate._rate("cpu", 64, 256) < 1e13


@pytest.mark.usefixtures("gigaflops")
def test_hours_of_work_are_asked_for_first(monkeypatch, store):
    monkeypatch.setattr("replicate.study.pool.train_all", lambda *_, **__: pytest.fail("trains"))
    plan = {f"arm {i}": study.arms("gpu", ["dense"], [1, 2], lr=1e-4 * i) for i in range(1, 7)}
    configs = [config for arm in plan.values() for config in arm]
    asked = [lambda: results.run_plan(plan), lambda: study.run(configs, store=store)]
    asked.append(lambda: study.trained(configs[0]))
    monkeypatch.setattr(runs, "Trainer", lambda *_, **__: pytest.fail("opens the corpus"))
    for ask in asked:
        with pytest.raises(ValueError) as long:
            ask()
        assert isinstance(long.value, study.LongWork)
        (line,) = long.value._render_traceback_()
        assert "\n" not in line and "REPLICATE_LONG=1" in line and "study run --profile gpu`" in line
    first = r"12 runs are missing \(arm 1, arm 2, arm 3, arm 4 and 2 more arms\)"
    with pytest.raises(study.LongWork, match=first):
        results.run_plan(plan)
    with pytest.raises(study.LongWork, match=r"training takes about 27 days here"):
        results.run_plan(plan)


@pytest.mark.usefixtures("gigaflops")
def test_consent_is_given_by_the_variable_or_the_command(monkeypatch, tmp_path, capsys):
    trained = []

    def train_all(configs, *_, **__):
        trained.extend(configs)
        yield from ((config, {"error": "not really"}) for config in configs)

    monkeypatch.setattr("replicate.study.pool.train_all", train_all)
    options = ["--profile", "gpu", "--arms", "dense", "--seeds", "77", "--out", str(tmp_path)]
    assert commands.main(["study", "run", *options]) == 1
    assert len(trained) == 1 and "1 run to train, 1 at a time, about " in capsys.readouterr().err
    config = study.arms("gpu", ["dense"], [77])
    for value, allowed in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv("REPLICATE_LONG", value)
        with pytest.raises(study.StudyFailed if allowed else study.LongWork):
            study.run(config, store=RecordStore(tmp_path))


def test_minutes_need_no_consent():
    smoke = study.arms("smoke", ["dense", "recipe"], [1, 2, 3])
    assert estimate.ask_first({str(i): c for i, c in enumerate(smoke)}, {}, 2) < estimate.ASK_FROM


def test_a_mistyped_scale_is_answered_with_the_scales():
    for ask in (lambda: study.arms("lptop", ["dense"]), lambda: results.all_larger("lptop", dict)):
        with pytest.raises(ValueError, match="profile is 'lptop'; choose one of smoke, laptop, gpu, gpu40m"):
            ask()
    assert study.arms("study10m", ["dense"]) == study.arms("gpu", ["dense"])


def test_spans_are_words():
    assert [estimate.span(s) for s in (1000, 3 * 3600, 56 * 3600)] == ["17 minutes", "3 hours", "2 days"]
