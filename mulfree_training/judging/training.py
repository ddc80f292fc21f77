"""Claims on trainings in piecewise affine arithmetic and their tests, fixed before the judging run."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from common.claims import Claim, chain, swap_arms
from common.statistics import Outcome, every, mean_greater
from mulfree_training import figures
from mulfree_training.judging.samples import (
    ACCURACY,
    BANDS,
    BLEU,
    FULL_NATS,
    FULL_POINTS,
    NATS,
    NLL,
    POINTS,
    POINTS_OF_BLEU,
    UNKNOWN,
    Test,
    beats,
    equals,
    gaps,
    keeps,
    table,
    worsened,
)
from mulfree_training.names import ROWS, name

if TYPE_CHECKING:
    from common.records import Records

SET_UP = "All arms share seeds, split, order of the data, initial weights and the hyper-parameters tuned for float32."
VISION, LANGUAGE = "vision", "language"
IMAGES = "ViT on 8x8 digits, 395 test images, another split each seed"
TEXT = "character GPT on English prose"


def calibration(experiment: str) -> Test:
    """The exact rule costs likelihood, and more than half of it goes when one temperature is refitted.

    Effect: the gap, or half of it less the gap that is left, whichever is less clear.
    """

    def test(records: Records) -> Outcome:
        frame = table(records, experiment)
        gap, left = (gaps(frame, "full_exact", "full", metric).to_numpy() for metric in (NLL, f"{NLL}_tempered"))
        tests = [mean_greater(x, 0.0, unit="nats") for x in (gap, gap / 2 - left)]
        outcome = every(tests, ["the gap", "half of the gap less what is left"])
        words = f"{outcome.detail}; gap {gap.mean():.3f}, left with a temperature {left.mean():.3f} nats"
        return replace(outcome, detail=words)

    return test


CLAIMS = [
    Claim(
        id="C1",
        title="Piecewise affine matrix products cost little",
        statement="Transformers train nearly as well with piecewise affine matrix products and no other change.",
        source="abstract; official commands for DeiT and IWSLT14",
        paper_value=UNKNOWN,
        experiments=(VISION, LANGUAGE),
        parts={
            f"vision: loses < {POINTS} points": keeps(VISION, "matmul", ACCURACY, POINTS),
            f"language: loses < {NATS} nats": keeps(LANGUAGE, "matmul", NLL, NATS),
        },
        control=chain(worsened(VISION, ("matmul",)), worsened(LANGUAGE, ("matmul",))),
        figure=figures.rows_of_ablation,
        caption=f"Difference from float32, paired by seed. Left: {IMAGES}; right: {TEXT}. {BANDS} Dashed: the margin.",
        note=SET_UP,
    ),
    Claim(
        id="C1.long",
        title="A longer training keeps up",
        statement="After half as many steps again piecewise affine arithmetic still costs little in language.",
        source="ours: a short training might hide a gap",
        paper_value=UNKNOWN,
        experiments=("language_long",),
        parts={
            f"matrix products: loses < {NATS} nats": keeps("language_long", "matmul", NLL, NATS),
            f"no multiplication: loses < {FULL_NATS} nats": keeps("language_long", "full", NLL, FULL_NATS),
        },
        control=worsened("language_long", ("matmul", "full")),
        figure=figures.training_lengths,
        caption=f"Test loss less that of float32 after 400 and 600 steps, each with a schedule of its own. {BANDS} "
        "Dashed: the margin.",
    ),
    Claim(
        id="C2",
        title="Convolutional networks too",
        statement="Convolutional networks train nearly as well with piecewise affine convolutions and linear layers.",
        source="CIFAR-10 experiments (official commands: VGG13, ResNets, ResNeXt, ConvMixer)",
        paper_value=UNKNOWN,
        experiments=("convolution",),
        parts={
            f"digits, three convolutions without norm: loses < {POINTS} points": keeps(
                "convolution", "matmul", ACCURACY, POINTS
            )
        },
        control=worsened("convolution", ("matmul",)),
        figure=figures.convolution,
        caption="Test accuracy of both arms, a line a seed.",
        note="No norm absorbs the mean loss of 4 % a product here.",
    ),
    Claim(
        id="C3",
        title="All non-linearities can be replaced",
        statement="Softmax, scalings, layer norm and the loss can be piecewise affine too, one after the other.",
        source="ablation on IWSLT14",
        paper_value=UNKNOWN,
        experiments=(VISION, LANGUAGE),
        parts={
            **{
                f"vision, row {name(arm)}: loses < {POINTS} points": keeps(VISION, arm, ACCURACY, POINTS)
                for arm in ROWS[:-1]
            },
            **{f"language, row {name(arm)}: loses < {NATS} nats": keeps(LANGUAGE, arm, NLL, NATS) for arm in ROWS[:-1]},
        },
        control=chain(worsened(VISION, ROWS[:-1]), worsened(LANGUAGE, ROWS[:-1])),
        caption="See the figure of C1.",
        note=SET_UP,
    ),
    Claim(
        id="C4",
        title="Training without any multiplication works",
        statement="With the optimizer replaced as well, training is free of multiplications and still works (with the "
        "approximate rule).",
        source="abstract; last row of the ablation",
        paper_value=UNKNOWN,
        experiments=(VISION, LANGUAGE),
        parts={
            f"vision: loses < {FULL_POINTS:g} points": keeps(VISION, "full", ACCURACY, FULL_POINTS),
            f"language: loses < {FULL_NATS} nats": keeps(LANGUAGE, "full", NLL, FULL_NATS),
        },
        control=chain(worsened(VISION, ("full",)), worsened(LANGUAGE, ("full",))),
        caption="See the figure of C1.",
        note=SET_UP + " That nothing multiplies is judged by C4.proof.",
    ),
    Claim(
        id="C5",
        title="The exact rule costs likelihood when nothing multiplies",
        statement="In fully multiplication-free training the exact derivative gives a worse test likelihood than the "
        "approximate one, in vision and in language.",
        source="both rules are in the official code, all published commands use the approximate one; the direction is "
        "that of a pilot",
        paper_value=UNKNOWN,
        experiments=(VISION, LANGUAGE),
        parts={
            "vision: approximate has the lower loss": beats(VISION, "full", "full_exact", NLL),
            "language: approximate has the lower loss": beats(LANGUAGE, "full", "full_exact", NLL),
        },
        control=chain(swap_arms(VISION, "full", "full_exact"), swap_arms(LANGUAGE, "full", "full_exact")),
        figure=figures.rules,
        caption=f"Test loss less that of float32, paired by seed, left vision, right language. {BANDS}",
    ),
    Claim(
        id="C5.accuracy",
        title="The exact rule costs accuracy when nothing multiplies",
        statement="In fully multiplication-free training the exact derivative gives a lower accuracy in vision than "
        "the approximate one.",
        source="ours: both rules are in the official code; the direction is that of an earlier run on other seeds",
        paper_value=UNKNOWN,
        experiments=(VISION,),
        parts={"vision: approximate has the higher accuracy": beats(VISION, "full", "full_exact", ACCURACY)},
        control=swap_arms(VISION, "full", "full_exact"),
        caption="See the figure of C5.",
    ),
    Claim(
        id="C5.matmul",
        title="In matrix products alone the rule hardly matters",
        statement="With only matrix products piecewise affine, both rules train to nearly the same likelihood.",
        source="both rules are in the official code",
        paper_value=UNKNOWN,
        experiments=(VISION, LANGUAGE),
        parts={
            f"vision: within {NATS} nats": equals(VISION, "matmul_exact", "matmul", NLL, NATS),
            f"language: within {NATS} nats": equals(LANGUAGE, "matmul_exact", "matmul", NLL, NATS),
        },
        control=chain(worsened(VISION, ("matmul_exact",)), worsened(LANGUAGE, ("matmul_exact",))),
        caption="See the figure of C5.",
    ),
    Claim(
        id="C5.loss",
        title="The exact rule hurts in the loss",
        statement="With the approximate rule in the loss alone, training with the exact rule ends in a better "
        "likelihood.",
        source="ours: a reason for C5",
        paper_value=UNKNOWN,
        experiments=(VISION, LANGUAGE),
        parts={
            "vision: exact but in the loss is below exact": beats(VISION, "full_exact_but_loss", "full_exact", NLL),
            "language: exact but in the loss is below exact": beats(LANGUAGE, "full_exact_but_loss", "full_exact", NLL),
        },
        control=chain(
            swap_arms(VISION, "full_exact_but_loss", "full_exact"),
            swap_arms(LANGUAGE, "full_exact_but_loss", "full_exact"),
        ),
        caption="See the figure of C5.",
    ),
    Claim(
        id="C5.temperature",
        title="Most of it is calibration",
        statement="More than half of what the exact rule costs goes when a temperature is refitted on validation data.",
        source="ours: a reason for C5",
        paper_value=UNKNOWN,
        experiments=(VISION, LANGUAGE),
        parts={
            "vision: over half of the gap goes": calibration(VISION),
            "language: over half of the gap goes": calibration(LANGUAGE),
        },
        control=chain(worsened(VISION, ("full_exact",)), worsened(LANGUAGE, ("full_exact",))),
        caption="See the figure of C5.",
    ),
    Claim(
        id="C9",
        title="The constant alpha changes little",
        statement="Multiplying every product with alpha = 1.0552, which makes it right on average, changes results by "
        "less than the margins.",
        source="section 2.7 proposes it (read in a third party's summary); the value is the official code's",
        paper_value=UNKNOWN,
        experiments=(VISION, LANGUAGE),
        parts={
            f"vision, matrix products: within {POINTS} points": equals(
                VISION, "matmul_alpha", "matmul", ACCURACY, POINTS
            ),
            f"vision, everything: within {POINTS} points": equals(VISION, "full_alpha", "full", ACCURACY, POINTS),
            f"vision, matrix products: within {NATS} nats": equals(VISION, "matmul_alpha", "matmul", NLL, NATS),
            f"vision, everything: within {NATS} nats": equals(VISION, "full_alpha", "full", NLL, NATS),
            f"language, matrix products: within {NATS} nats": equals(LANGUAGE, "matmul_alpha", "matmul", NLL, NATS),
            f"language, everything: within {NATS} nats": equals(LANGUAGE, "full_alpha", "full", NLL, NATS),
        },
        control=chain(
            worsened(VISION, ("matmul_alpha", "full_alpha")), worsened(LANGUAGE, ("matmul_alpha", "full_alpha"))
        ),
        figure=figures.constant,
        caption=f"With alpha less without, paired by seed, left vision, right language. {BANDS} Dashed: the margin.",
    ),
    Claim(
        id="C10",
        title="It beats AdderNet's layers while replacing more",
        statement="Piecewise affine transformers are more accurate than those with AdderNet's layers, which replace "
        "fewer multiplications.",
        source="comparison with adder transformers (read in a third party's summary)",
        paper_value=UNKNOWN,
        experiments=(VISION,),
        parts={
            "matrix products above AdderNet's": beats(VISION, "matmul_own", "adder", ACCURACY),
            "no multiplication above AdderNet's": beats(VISION, "full_own", "adder", ACCURACY),
        },
        control=swap_arms(VISION, "matmul_own", "adder"),
        figure=figures.baselines,
        caption=f"Test accuracy, {IMAGES}. {BANDS}",
        note="All at the learning rate that suits each best, from the same grid. AdderNet's distances, each followed "
        "by a batch norm as its authors do, stand in the hidden layers only.",
    ),
    Claim(
        id="C10.power",
        title="It beats weights rounded to powers of two",
        statement="Piecewise affine products cost less accuracy than rounding the weights to powers of two, which also "
        "needs no multiplier in the forward pass.",
        source="our baseline (DeepShift's idea)",
        paper_value=UNKNOWN,
        experiments=(VISION,),
        parts={"matrix products above powers of two": beats(VISION, "matmul_own", "power_of_two", ACCURACY)},
        control=swap_arms(VISION, "matmul_own", "power_of_two"),
        caption="See the figure of C10.",
    ),
    Claim(
        id="C1.paper",
        title="Paper scale: DeiT-Ti on CIFAR-10",
        statement="DeiT-Ti with piecewise affine matrix products is nearly as accurate on CIFAR-10.",
        source="official command",
        paper_value=UNKNOWN,
        experiments=(VISION,),
        parts={f"loses < {POINTS} points": keeps(VISION, "matmul", ACCURACY, POINTS)},
        control=worsened(VISION, ("matmul",)),
        scale_needed="paper",
    ),
    Claim(
        id="C1.imagenet",
        title="Paper scale: DeiT-Ti on ImageNet",
        statement="DeiT-Ti with piecewise affine matrix products is nearly as accurate on ImageNet.",
        source="official command",
        paper_value=UNKNOWN,
        experiments=("imagenet",),
        parts={f"loses < {POINTS} points": keeps("imagenet", "matmul", ACCURACY, POINTS)},
        control=worsened("imagenet", ("matmul",)),
        scale_needed="paper",
    ),
    Claim(
        id="C2.paper",
        title="Paper scale: five networks on CIFAR-10",
        statement="VGG13, ResNet-20 and 110, ResNeXt-20 and ConvMixer are nearly as accurate with piecewise affine "
        "products.",
        source="official commands",
        paper_value=UNKNOWN,
        experiments=("convolution",),
        parts={
            f"{arm}: loses < {POINTS} points": keeps("convolution", f"{arm}_matmul", ACCURACY, POINTS, arm)
            for arm in ("vgg13", "resnet20", "resnet110", "resnext20", "convmixer")
        },
        control=worsened(
            "convolution", tuple(f"{x}_matmul" for x in ("vgg13", "resnet20", "resnet110", "resnext20", "convmixer"))
        ),
        scale_needed="paper",
    ),
    Claim(
        id="C4.paper",
        title="Paper scale: IWSLT14 German-English, row by row",
        statement="The translation transformer nearly keeps its likelihood and BLEU through all rows of the ablation.",
        source="ablation on IWSLT14",
        paper_value=UNKNOWN,
        experiments=("translation",),
        parts={
            f"row {name(arm)}: loses < {FULL_NATS if arm == 'full' else NATS} nats": keeps(
                "translation", arm, NLL, FULL_NATS if arm == "full" else NATS
            )
            for arm in ROWS
        }
        | {
            f"row {name(arm)}: loses < {POINTS_OF_BLEU} BLEU": keeps("translation", arm, BLEU, POINTS_OF_BLEU)
            for arm in ROWS
        },
        control=worsened("translation", ROWS),
        scale_needed="paper",
        note="Margins in nats are those of laptop scale, that in BLEU is ours.",
    ),
]
