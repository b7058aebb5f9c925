"""A trained model behind EleutherAI's lm-evaluation-harness: `pip install replicate[eval]`.

    import lm_eval
    from replicate.lm_eval_adapter import ReplicateLM

    lm = ReplicateLM.from_trainer(study.trained(config))
    lm_eval.simple_evaluate(lm, tasks=["arc_easy"])

Text begins with the token that ends a document in training (a NUL byte). What does not fit into seq_len
loses its beginning. At the scales of this project most benchmarks of the paper's Table 2 are out of reach:
the answers are chance's, and the vocabulary was learnt on Python.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from replicate.gpt import GPT
from replicate.tokenizer import Tokenizer

if TYPE_CHECKING:
    from replicate.train import Trainer

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    HAVE_LM_EVAL = True
except ImportError:
    TemplateLM, HAVE_LM_EVAL = object, False

END = 0  # see data.END
MAX_NEW = 64  # tokens, where a request says nothing else


class ReplicateLM(TemplateLM):
    """`lm_eval.api.model.LM` for a GPT of this project and its tokenizer.

    Args:
        model: in the phase it is to be judged in.
        tokenizer: the one it was trained with.
        batch_size: sequences at a time.
        autocast: precision to run in, such as `trainer.autocast()`; by default the weights' own.

    Raises:
        ImportError: if lm-evaluation-harness is not installed.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        *,
        batch_size: int = 32,
        autocast: AbstractContextManager | None = None,
    ) -> None:
        if not HAVE_LM_EVAL:
            raise ImportError("lm-evaluation-harness is not installed: pip install 'replicate[eval]'")
        super().__init__()
        self.model, self.tokens, self.batch_size = model.eval(), tokenizer, batch_size
        self.autocast, self._device = autocast or nullcontext(), model.embed.weight.device

    @classmethod
    def from_trainer(cls, trainer: Trainer, *, batch_size: int = 32) -> ReplicateLM:
        """The adapter for a trainer's model, in its precision."""
        return cls(trainer.model, trainer.data.tokenizer, batch_size=batch_size, autocast=trainer.autocast())

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        return END

    @property
    def max_length(self) -> int:
        """Tokens the model reads at once."""
        return self.model.config.seq_len

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text; there are no special tokens to add."""
        return self.tokens.encode(string).tolist()

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of both, cut where the text is; jointly encoded unless a token reaches over the cut."""
        pair = super()._encode_pair(context, continuation)
        joined = self.tok_encode(context + continuation)
        if pair[1] and pair[0] + pair[1] == joined:
            return pair
        return self.tok_encode(context), self.tok_encode(continuation)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text in nats, in windows of seq_len that do not overlap."""
        sums = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(self.tok_encode(text), END, self.max_length, 1)
            pairs = [("", *make_disjoint_window(window)) for window in windows]
            sums.append(sum(value for value, _ in self._loglikelihood_tokens(pairs)))
        return sums

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding would give it) of each continuation."""
        found: dict[int, tuple[float, bool]] = {}
        for group in _batches(requests, self.batch_size):
            # Padding on the right: what comes later moves no earlier logit.
            rows = [(context + answer)[-self.max_length - 1 :] for _, (_, context, answer) in group]
            width = max(map(len, rows))
            ids = torch.tensor([row + [END] * (width - len(row)) for row in rows], device=self._device)
            log_p = self._logits(ids[:, :-1]).log_softmax(-1)
            chosen = log_p.gather(2, ids[:, 1:, None])[..., 0]
            greedy = log_p.argmax(-1) == ids[:, 1:]
            for i, (place, (_, _, answer)) in enumerate(group):
                end = len(rows[i]) - 1
                part = slice(max(0, end - len(answer)), end)
                found[place] = chosen[i, part].sum().item(), bool(greedy[i, part].all())
        return [found[place] for place in range(len(requests))]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each context up to the first stop text or `max_gen_toks`; greedy unless `do_sample`."""
        texts = []
        for context, options in (request.args for request in requests):
            stops = options.get("until") or []
            stops = [stops] if isinstance(stops, str) else stops
            heat = options.get("temperature", 0.0) if options.get("do_sample") else 0.0
            limit = options.get("max_gen_toks", MAX_NEW)
            texts.append(self._continue(context, limit, [stop for stop in stops if stop], heat))
        return texts

    def _continue(self, context: str, limit: int, stops: Sequence[str], temperature: float) -> str:
        start = self.tok_encode(context) or [END]
        ids = torch.tensor([start], device=self._device)
        text = ""
        for step in range(limit):
            with self.autocast:
                ids = self.model.generate(ids, 1, temperature, seed=step + 1)
            text = self.tokens.decode(ids[0, len(start) :]).decode(errors="replace")
            cuts = [text.find(stop) for stop in (*stops, "\0") if stop in text]
            if cuts:
                return text[: min(cuts)]
        return text

    def _logits(self, ids: torch.Tensor) -> torch.Tensor:
        with self.autocast:
            return self.model(ids)[0].float()


def _batches(requests: Sequence[Any], size: int) -> Iterator[list[tuple[int, Any]]]:
    """(place, request) in groups of similar length, the longest first."""
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
    for start in range(0, len(order), size):
        yield [(i, requests[i]) for i in order[start : start + size]]
