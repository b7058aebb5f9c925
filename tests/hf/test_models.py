"""Models of Hugging Face with our feed-forward layer: random weights, nothing is downloaded."""

import pytest
import torch
import transformers

from replicate import SparseFFN, SparsityConfig, restore_ffn, start_sparse, swap_ffn

VENOM = SparsityConfig(activation="venom", n_clusters=4, top_k=2)
SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "GPT2": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "activation_function": "relu2"},
    "GPTNeoX": SMALL | {"intermediate_size": 64, "hidden_act": "relu2"},
    "Nemotron": SMALL | {"intermediate_size": 64, "hidden_act": "relu2", "num_key_value_heads": 4},
    "OPT": SMALL | {"ffn_dim": 64, "activation_function": "relu2", "word_embed_proj_dim": 32},
}


def hugging_face(name):
    config = getattr(transformers, f"{name}Config")(
        **MODELS[name], pad_token_id=0, bos_token_id=0, eos_token_id=0
    )
    kind = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    torch.manual_seed(0)
    return getattr(transformers, kind)(config).eval()


@pytest.mark.parametrize("name", MODELS)
def test_the_function_stays_and_comes_back(name, tmp_path):
    net = hugging_face(name)
    ids = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = net(ids).logits
        assert len(swap_ffn(net, VENOM).blocks) == 2
        torch.testing.assert_close(net(ids).logits, before, atol=1e-5, rtol=1e-4)
        start_sparse(net)
        sparse = net(ids).logits
        assert not torch.allclose(sparse, before, atol=1e-6)
        restore_ffn(net)
    net.save_pretrained(tmp_path)
    again = type(net).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, before, atol=1e-5, rtol=1e-4)


def test_it_trains_under_their_trainer(tmp_path):
    net = hugging_face("GPT2")
    swap_ffn(net, VENOM)
    switch_at = 4

    class Switch(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, optimizer=None, **_):
            if state.global_step == switch_at:
                start_sparse(model, optimizer=getattr(optimizer, "optimizer", optimizer))

    ids = torch.arange(16).repeat(64, 1) % 8
    rows = [{"input_ids": row, "labels": row} for row in ids]
    options = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=12, per_device_train_batch_size=8, learning_rate=1e-2,
        activation_checkpointing=True, report_to=[], save_strategy="no", use_cpu=True, logging_steps=1,
        disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(net.train(), options, train_dataset=rows, callbacks=[Switch()])
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < 0.7 * losses[0]
    assert {ffn.phase for ffn in net.modules() if isinstance(ffn, SparseFFN)} == {"sparse"}
