"""`python -m replicate overlap`: how much held-out text stands verbatim in the training text."""

import argparse
import time
from collections.abc import Sequence

from replicate.data import TokenData
from replicate.settings.presets import PRESET_OF, preset_of, train_preset
from replicate.study.records import RecordStore, make_record
from replicate.text.overlap import WINDOW, overlap

KIND = "overlap"


def main(argv: Sequence[str] | None = None) -> int:
    """Print, and store, the share of held-out windows that the training text of a scale contains too."""
    parser = argparse.ArgumentParser(prog="replicate overlap", description=main.__doc__)
    parser.add_argument("--profile", default="laptop", help=f"scale, for its text: {', '.join(PRESET_OF)}")
    parser.add_argument("--corpus", help="another text than the scale's")
    parser.add_argument("--window", type=int, default=WINDOW, help="tokens (default: %(default)s)")
    parser.add_argument("--record", action="store_true", help="keep the result in data/recorded")
    args = parser.parse_args(argv)
    config, start = train_preset(preset_of(args.profile)), time.perf_counter()
    corpus = args.corpus or config.corpus
    data = TokenData(corpus, config.model.vocab_size, config.model.seq_len)
    share = overlap(data.train, data.valid, args.window)
    asked = {"corpus": corpus, "vocab_size": config.model.vocab_size, "window": args.window}
    made = {"corpus": data.provenance(), "device": "cpu", "seconds": time.perf_counter() - start}
    path = RecordStore().put(make_record(KIND, asked, {"share": share}, **made), recorded=args.record)
    print(f"{share:.1%} of the held-out windows of {args.window} tokens stand in the training text too")
    print(f"{data.corpus.name}, {len(data.valid):,} tokens held out of {len(data.train):,} more; {path}")
    return 0
