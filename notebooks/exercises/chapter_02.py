"""Chapter 02: counting a block, where attention catches up, fewer key heads, Amdahl's law both ways."""

import math

from exercises import NotAnswered, Wrong, compare, exercise
from replicate import paper
from replicate.training import flops


@exercise("02.1")
def count(answer):
    for d, f, t in ((64, 200, 50), (96, 160, 1000)):
        ffn, projections, scores = 2 * d * f, 4 * d * d, t * d
        right = 6 * (ffn + projections + scores)
        hints = [
            (
                right / 6,
                "These are the entries. Each costs a multiplication and an addition, in three products.",
            ),
            (right / 3, "That is the forward pass. The backward pass has twice as many products."),
            (2 * right / 3, "That is the backward pass alone. Add the forward pass."),
            (right / 2, "A term is a multiplication and an addition: two FLOPs."),
            (right * t, "That is a whole sequence. Count one token."),
            (
                6 * (ffn + projections + 2 * scores),
                "A token meets only those before it, T/2 on average: causal.",
            ),
            (
                6 * (ffn + projections + scores / 2),
                "Two products have a T^2 part: queries times keys, and times values.",
            ),
            (
                6 * (ffn + projections + scores / 3),
                "The T^2 part has a backward pass too, twice the forward's.",
            ),
            (6 * (1.5 * ffn + projections + scores), "Squared ReLU has two FFN matrices. SwiGLU has three."),
            (6 * (ffn / 2 + projections + scores), "The FFN has two matrices, W1 and W2."),
            (6 * (ffn + projections), "The T^2 part is missing."),
            (6 * (ffn + scores), "The projections are missing: four weights of D x D."),
            (
                6 * (ffn + projections / 4 + scores),
                "There are four projections: queries, keys, values and output.",
            ),
            (6 * (ffn + 3 * projections / 4 + scores), "The projection of the output is missing."),
            (
                6 * (ffn + projections / 2 + scores),
                "There are four projections: queries, keys, values and output.",
            ),
            (
                6 * (ffn + projections + t * t * d),
                "That is T^2 for the whole sequence. A token meets T/2 tokens.",
            ),
            (6 * (ffn + projections + t * t), "A query times a key is a product of width D. Where is D?"),
            (6 * (ffn + projections + t * t / 2), "A query times a key is a product of width D. Where is D?"),
            (6 * ffn, "That is the FFN alone. Add the projections and the T^2 part."),
        ]
        with compare.given(f"d_model = {d}, d_ff = {f} and seq_len = {t}"):
            compare.number(compare.call(answer, d, f, t), right, hints, tolerance=1e-6)
    return "That is 6 FLOPs for each entry of a weight, and T D more for attention."


@exercise("02.2")
def catches_up(answer):
    f = paper.model("1B").d_ff
    hints = [
        (f, "That would be so without the causal half, or with one FFN matrix. Solve T D = 2 D F."),
        (4 * f, "The T^2 part costs 6 T D, not 3 T D. Solve T D = 2 D F."),
        (f / 2, "You divided where you should multiply. Solve T D = 2 D F."),
        (2 * paper.model("1B").d_model, "D cancels. It is F that is left."),
        (3 * f, "With squared ReLU the FFN has two matrices. Three is SwiGLU."),
        (2 * f + 4 * paper.model("1B").d_model, "The projections are no part of the FFN. Leave them out."),
    ]
    compare.number(answer, 2 * f, hints)
    return "Twice the number of neurons, whatever the width."


@exercise("02.3")
def key_heads(answer):
    model = paper.model("7B")

    def share(kept, matrices=2, attention=1.0, head=True, queries=32):
        d, f, t = model.d_model, model.d_ff, model.seq_len
        ffn, projections, scores = matrices * d * f, 2 * d * (queries + kept) * 128, attention * t * d
        rest = d * model.vocab_size if head else 0
        return model.n_layer * ffn / (model.n_layer * (ffn + projections + scores) + rest)

    assert math.isclose(share(32), flops.honest_share(model))
    hints = [
        (share(32), "That is with 32 key heads. With 8 the projections are smaller."),
        # a quarter of the T^2 part is missing just as much as the queries' 24 heads
        (
            share(8, queries=8),
            "The queries keep their 32 heads, in the projections and in the T^2 part. "
            "Only the projections of keys and values shrink.",
        ),
        (share(8, matrices=3), "Squared ReLU has two FFN matrices."),
        (share(8, matrices=3, attention=0, head=False), "That is the paper's formula. Count all parts."),
        (share(8, head=False), "The vocabulary head is missing."),
        (share(8, attention=0), "The T^2 part is missing."),
        (share(8, attention=2), "The T^2 part is causal: 6 T D a token."),
        (
            share(8, attention=0.625),
            "The T^2 part stays: every query head still meets every token before it.",
        ),
        (1 - share(8), "That is the share of all the rest."),
        (model.n_layer * share(8), "Count the head once, and the other parts in each layer."),
    ]
    d = model.d_model
    once = (
        2
        * d
        * model.d_ff
        / (2 * d * model.d_ff + 2 * d * 40 * 128 + model.seq_len * d + d * model.vocab_size)
    )
    hints.append((once, "You count one layer against the whole head. The model has 32 layers and one head."))
    hints += [(round(wrong, 3), hint) for wrong, hint in hints]
    compare.number(answer, share(8), hints, tolerance=2e-3)
    return f"Up from {share(32):.3f}: what is left beside the FFN became smaller."


@exercise("02.4")
def run(answer):
    hints = [
        (1.6, "That is the mean of the speeds. Add up times: the slow half takes longer."),
        (1.1, "That is half of 2.2. The dense half still takes its time."),
        (0.5 + 0.5 / 2.2, "That is the time of the run, as a share of the dense one. Turn it over."),
        (math.sqrt(2.2), "Speeds do not average, not as a geometric mean either. Add up times."),
        (2.2, "That would be so if every step were sparse."),
    ]
    compare.number(answer, 1 / (0.5 + 0.5 / 2.2), hints, tolerance=4e-3)  # two decimals will do
    return "Even sparse steps that take no time would give only 2."


@exercise("02.5")
def solved(answer):
    averaged = "You averaged speeds. Add up times: 2/1.5 + 4/v."
    cases = ((1.3, 0.5), (1.41, 0.424), (1.5, 0.75), (2.0, 0.8))
    for step, r in cases:
        ffn_time = (1 / step - 1 + r) / r
        left = 6 * ffn_time - 2 / 1.5
        right = 4 / left
        assert math.isclose(flops.step_speedup(r, right), step)
        hints = [
            (
                1 / ffn_time,
                "That is the speed-up of the whole FFN. Two of its products are 2:4: solve for the others.",
            ),
            (4 / (6 * ffn_time - 2), "The two 2:4 products take 1/1.5 each, not their full time."),
            (4 / (6 * ffn_time - 2 * 1.5), "A product that is 1.5 times as fast takes 1/1.5 of the time."),
            (4 / (6 * ffn_time), "The two 2:4 products take time too: 1/1.5 each."),
            (left / 4, "That is the time of a Venom product. Its speed is the inverse."),
            (6 / left, "Four products are Venom, not six."),
            (2 / (6 * ffn_time - 4 / 1.5), "Two products are 2:4, four are Venom."),
            ((6 * step - 3) / 4, averaged),
            ((6 / ffn_time - 3) / 4, averaged),
            (4 / (6 / (step * r) - 2 / 1.5), "Take off the rest, 1 - r, first."),
            (1 / left, "That is left for four products together, so each has a quarter of it."),
            (
                4 / (6 / step - 2 / 1.5),
                "Only the FFN becomes faster. The share 1 - r takes as long as before.",
            ),
        ]
        hints = [(wrong, hint) for wrong, hint in hints if not math.isclose(wrong, right, rel_tol=0.01)]
        with compare.given(f"step = {step} and r = {r}"):
            compare.number(_finite(compare.call(answer, step, r)), right, hints)
    for step, r, why in (
        (2.0, 0.424, "the rest of the step alone takes longer than half of the dense step"),
        (1.6, 0.424, "the two 2:4 products use up what is left of the time"),
    ):
        with compare.given(f"step = {step} and r = {r}"):
            try:
                found = float(compare.call(answer, step, r))
            except NotAnswered:
                raise Wrong("Where no v is enough, give math.inf instead of None.") from None
            if found < 0:
                raise Wrong(f"{found:.3g} is no speed-up. No v is enough here, because {why}: give math.inf.")
            if found != math.inf:
                raise Wrong(f"No v is enough, because {why}: give math.inf.")
    return "With r = 0.424, the 1B model's, nothing makes a step twice as fast."


def _finite(value):
    if value == math.inf:
        raise Wrong("A finite v is enough here.")
    return value
