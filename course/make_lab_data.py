"""Cuts the data of labs L5 and L6 out of the records and the paper: python course/make_lab_data.py."""

import json
from pathlib import Path

from replicate.study import completion, results
from replicate.system import paths

SOURCE = Path(__file__).parent / "source"
SCALE, SEEDS = "gpu", (1, 2, 3)
ARMS = (
    *("dense", "act24", "act24, soft", "act24+wgrad", "no-mask-reuse", "w1, same", "w2, same"),
    *("active16x32", "venom16, 64 clusters", "venom16", "recipe, same", "recipe"),
)
ANSWERS_SCALE, ANSWERS_SEED, ANSWERS_OF = "gpu40m", 1, ("dense", "act24", "recipe")
NUMBERS = ("two4_speedup", "venom_speedup_table2", "venom_speedup_text", "mix_1b", "mix_7b", "headline")


def losses():
    """L5: a line for each arm and seed with its held-out loss, as CSV."""
    runs = results.recorded_study(SCALE, SEEDS)
    value = {(row.arm, row.seed): row.valid_loss for row in runs.itertuples()}
    lines = [f'"{arm}",{seed},{value[arm, seed]:.6f}' for arm in ARMS for seed in SEEDS]
    return "\n".join(["arm,seed,loss", *lines]) + "\n"


def printed():
    """L6: the paper's shapes of two models, its Table 2, some of its numbers, and the sizes of its tests."""
    paper = json.loads((paths.DATA / "paper.json").read_text("utf-8"))
    table = paper["tables"]["2"]
    return {
        "models": {size: paper["models"][size] for size in ("1B", "7B")},
        "table2": [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]],
        "numbers": {name: paper["numbers"][name] for name in NUMBERS},
        "test_items": paper["test_items"],
    }


def answers():
    """L6: for each of our models one character an item, 1 where its answer was right."""
    runs = results.recorded_study(ANSWERS_SCALE, (ANSWERS_SEED,))
    runs = runs[runs["arm"].isin(ANSWERS_OF)]
    store = results.RecordStore()
    found = {}
    for arm, record in zip(runs["arm"], runs["record"], strict=True):
        question = {"train": record.config_hash, **completion.QUESTIONS[ANSWERS_SCALE]}
        reply, _ = store.find("completion", question, record.corpus["sha256"])
        found[arm] = reply.results["correct"]
    return {arm: found[arm] for arm in ANSWERS_OF}


def files():
    """path -> text of every file that this script makes."""
    return {
        SOURCE / "L5" / "losses.csv": losses(),
        SOURCE / "L6" / "paper.json": json.dumps(printed(), indent=1) + "\n",
        SOURCE / "L6" / "answers.json": json.dumps(answers(), indent=1) + "\n",
    }


if __name__ == "__main__":
    for path, text in files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
        print(path)
