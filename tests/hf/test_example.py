"""README's example with a model of Hugging Face runs as it stands."""

import re

import torch

from replicate.system.paths import ROOT

STEP = """
for _ in range(2):
    ids = torch.randint(64, (2, 32))
    gpt2(ids, labels=ids).loss.backward()
    gpt2_optimizer.step()
    gpt2_optimizer.zero_grad()
"""


def test_the_example_with_a_model_of_hugging_face_runs(capsys):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    example = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[2]
    code, n_steps = re.subn(r"# \.\.\. .* \.\.\.\n", STEP, example)
    assert n_steps == 2
    scope = {"torch": torch}
    exec(compile(code, "README.md", "exec"), scope)
    assert "2 feed-forward blocks are sparse FFNs: squared ReLU as before" in capsys.readouterr().out
    assert type(scope["gpt2"].transformer.h[0].mlp.c_fc).__name__ == "Conv1D"
