"""Run a trained GPT with other FFN formats, without further training: what a format costs by itself."""

from dataclasses import replace

import torch
from torch import Tensor

from replicate import evaluate
from replicate.config import SparsityConfig
from replicate.gpt import GPT


@torch.no_grad()
def with_sparsity(
    model: GPT, sparsity: SparsityConfig, sample: Tensor, seed: int = 1, *, clustered: bool = True
) -> GPT:
    """A copy of `model`, in the sparse phase of `sparsity`; the original is left as it is.

    Args:
        model: a trained squared-ReLU GPT.
        sample: token ids [B, S]; each FFN's inputs on it choose the clusters of routing "static".
        seed: of the clustering.
        clustered: False takes neighbouring neurons as clusters, in the order they have.

    Raises ValueError if the formats do not fit the model's shape.
    """
    copy = GPT(replace(model.config, sparsity=sparsity)).to(model.embed.weight.device)
    own = dict(model.named_parameters())
    for name, parameter in copy.named_parameters():
        if name in own:  # learned scores have no counterpart and stay at zero
            parameter.copy_(own[name])
    if sparsity.activation == "venom":
        for ffn, x in zip(copy.ffns(), evaluate.ffn_inputs(copy, sample), strict=True):
            if clustered:
                ffn.make_clusters(seed, x)
            ffn.clustered.fill_(sparsity.n_clusters)
    copy.set_phase("sparse")
    return copy.eval()
