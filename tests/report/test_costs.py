"""What docs/replication.md says of cost, settings and texts: from records, with nothing left out."""

from dataclasses import replace

import pytest

from replicate.report import study_coverage
from replicate.report import study_tables as study
from replicate.settings.text import from_dict
from replicate.study import plans, results
from replicate.study.records import RecordStore


def recorded(kind):
    return [record for record, origin in RecordStore().all(kind) if origin == "recorded"]


def test_every_record_that_took_time_is_counted_once():
    counted = [record.config_hash for record, _ in study_coverage._everything()]
    kinds = {path.name for path in RecordStore().recorded.iterdir()}
    took = [r.config_hash for kind in kinds for r in recorded(kind) if r.seconds]
    assert sorted(counted) == sorted(took) and len(took) > 500


def test_energy_is_hours_times_board_power_and_cpus_do_not_count():
    record = recorded("train")[0]
    card, cpu = (replace(record, device=d, seconds=7200.0) for d in ("NVIDIA H200", "CPU (AMD EPYC)"))
    assert study_coverage._used([card, cpu, card]) == pytest.approx((4.0, 2.8))
    with pytest.raises(ValueError, match="device is 'NVIDIA B200'; add its board power"):
        study_coverage._used([replace(record, device="NVIDIA B200")])


def test_arms_and_totals_agree():
    training = study_coverage.costs().query(
        "what.str.startswith('training') and device.str.startswith('NVIDIA')"
    )
    table = study_coverage.arms()
    assert float(table["GPU hours"].astype(float).sum()) == pytest.approx(
        training["hours"].astype(float).sum(), abs=0.05
    )
    runs = table.filter(like="minutes").map(lambda cell: int(cell.rpartition("(")[2][:-1]) if cell else 0)
    assert runs.to_numpy().sum() == training["records"].astype(int).sum()
    whole, total = (study_coverage.costs().iloc[i]["hours"] for i in (slice(0, -1), -1))
    on_cpu = study_coverage.costs()["device"].str.startswith("CPU").iloc[:-1]
    assert float(total) == pytest.approx(whole.astype(float)[~on_cpu].sum(), abs=0.05)


def test_every_setting_in_which_arms_differ_is_named():
    for scale in study.SIZES:
        plan = study_coverage.planned(scale).values()
        differ = {name for name in next(iter(plan)) if len({values[name] for values in plan}) > 1}
        named = set(study_coverage.TRIED) | study_coverage.OF_ARMS
        assert differ == named - ({"corpus"} if scale == "laptop" else set()), scale
        assert all(len({values[name] for values in plan}) == 1 for name in study_coverage.FIXED)


def test_what_the_prose_says_of_the_search():
    chosen, *_ = (row["how it was chosen"] for _, row in study_coverage.tried().iterrows())
    assert "lowest" in chosen
    for scale in study.SCALES:
        for rate in ("0.5", "2"):
            assert results.contrast(study.runs(scale), (f"dense, lr x {rate}",), study.TRAIN).mean > 0
    small, large = (plans.everything(scale, (1,))["dense"][0] for scale in ("gpu", "gpu40m"))
    assert large.lr * large.model.d_model == pytest.approx(small.lr * small.model.d_model)
    table = study_coverage.tried().set_index("setting")
    assert table.loc["learning rate", "other runs, gpu40m"] == "0", "no search there"
    assert table.loc["share of sparse steps", "used in Table 3"] == "1"
    others = [from_dict(record.config).lr != small.lr for record in study.every_run("gpu")["record"]]
    assert table.loc["learning rate", "other runs, gpu"] == str(sum(others))


def test_what_the_prose_says_of_the_texts():
    table = study_coverage.corpora().set_index("")
    assert table.loc["runs"].astype(int).sum() == len(recorded("train"))
    (pysrc,) = [name for name in table if name.startswith("pysrc")]
    assert table.loc["read at scale", pysrc] == "gpu, gpu40m, gpu100m", "one text at all"
    lost = table.filter(regex="stdlib|pysrc").loc["packages, versions, licences"]
    assert (lost == study_coverage.NOT_RECORDED).all(), "the page says so"
    named = {name for r in study.runs("gpu")["record"] for name in r.versions}
    assert named - {"python", "platform", "code", "replicate"} == {"torch", "triton", "numpy"}


def test_how_runs_were_computed_is_said_where_it_is_recorded():
    one, two, three = recorded("train")[:3]
    known = {"attention": "cudnn", "backend": "cusparselt", "cuda_graph": True}
    one = replace(one, results=known)
    two = replace(two, results=known | {"backend": None, "cuda_graph": False})
    shown = study_coverage.how_it_ran([one, two, replace(three, results={})])
    assert shown["attention kernel"] == "cudnn (2), not recorded (1)"
    assert shown["engine of sparse steps"] == "cusparselt (1), none (1), not recorded (1)"
    assert shown["steps as CUDA graphs"].startswith("yes (1), no (1), ")
