"""The paper's claims C1-C11, each with its source, its test and its figure.

The tests are in `criteria.py`. A claim judged in several set-ups has a row for each (C7, C7.deep, ...). "Points" are
percentage points of test accuracy. The paper's own figures were not re-read, hence "not established".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.claims import Claim, chain, roll, swap_arms
from rotational_optimizers import criteria as test
from rotational_optimizers import figures

if TYPE_CHECKING:
    from common.records import Records

UNKNOWN = "not established"
SEEDS = "Bands and bars: 95 % confidence interval over seeds."


def starve(records: Records) -> Records:
    """Every rotational variant gets the results of a run that is too short to equilibrate."""
    starved = records["zero_shot"].query("arm == 'rv_adamw_starved'").set_index("seed")["test_accuracy"]
    for experiment in ("compare", "zero_shot"):
        frame = records[experiment]
        hit = frame["arm"].str.startswith("rv_") & ~frame["arm"].str.endswith("starved")
        accuracy = frame["test_accuracy"].where(~hit, frame["seed"].map(starved))
        records = records.replace(experiment, frame.assign(test_accuracy=accuracy))
    return records


LANGUAGE_SWAP = swap_arms("language", "adamw_gains_none", "adamw_gains_warm")

CLAIMS = [
    Claim(
        id="C1",
        title="Equilibrium norm and rotation follow the closed forms",
        statement="In rotational equilibrium a neuron's weight norm and its RMS angle per step are fixed by learning "
        "rate, weight decay and momentum, as the table of norms and rotations says.",
        source="table of equilibrium norms and rotations; random-walk appendix",
        paper_value=UNKNOWN,
        experiments=("random_walk",),
        parts={
            "AdamW: rotation within 2 %, norm within 5 %": test.walks(("adamw", "adamw_large"), **test.FIRST_ORDER),
            "SGDM and SGDW, same bands": test.walks(("sgdm", "sgdw"), **test.FIRST_ORDER),
            "Adam+L2, same bands": test.walks(("adam_l2",), **test.FIRST_ORDER),
            "exact forms of AdamW, SGDM, SGDW: both within 1.5 %": test.walks(
                ("adamw", "adamw_large", "sgdm", "sgdw"), **test.EXACT
            ),
        },
        control=roll("random_walk", ("angle", "norm")),
        figure=figures.random_walk,
        caption=f"Random walks driven by the real optimizers, 24 neurons of 128 coordinates. {SEEDS} "
        "Grey band: 2 % (angle) and 5 % (norm) around the prediction.",
    ),
    Claim(
        id="C1.lion",
        title="Lion's published rotation formula",
        statement="Lion's equilibrium norm and rotation follow the linearised form of the table.",
        source="table of equilibrium norms and rotations",
        paper_value=UNKNOWN,
        experiments=("random_walk",),
        parts={
            "Lion (.9, .99): rotation within 2 %, norm within 5 %": test.walks(("lion",), **test.FIRST_ORDER),
            "Lion without momentum, same bands": test.walks(("lion_no_momentum",), **test.FIRST_ORDER),
            "exact form (arcsine law), all momenta: both within 1.5 %": test.walks(
                ("lion", "lion_half", "lion_no_momentum"), **test.EXACT
            ),
        },
        control=roll("random_walk", ("angle", "norm")),
        caption="See the figure of C1.",
        note="The published form keeps the linear part of the sign's autocorrelation and drops its white part. The "
        "error is about 2 % at Lion's usual momenta and grows to 20 % without momentum; `equilibrium_rotation(..., "
        "exact=True)` uses the arcsine law instead.",
    ),
    Claim(
        id="C2",
        title="Gradient size does not change the rotation, except for Adam+L2",
        statement="The equilibrium rotation of AdamW, SGDM and Lion does not depend on the size of the gradient, so "
        "all neurons turn equally fast; that of Adam with an L2 term falls like the cube root of it.",
        source="balanced against imbalanced rotation; random-walk appendix",
        paper_value="about 30x spread between Adam+L2 layers (second-hand)",
        experiments=("gradient_scale",),
        parts={
            "AdamW: |slope| < 0.01": test.slope("adamw", -0.01, 0.01),
            "SGDM: |slope| < 0.01": test.slope("sgdm", -0.01, 0.01),
            "Lion: |slope| < 0.01": test.slope("lion", -0.01, 0.01),
            "Adam+L2: slope -1/3 within 0.02": test.slope("adam_l2", -1 / 3 - 0.02, -1 / 3 + 0.02),
        },
        control=roll("gradient_scale", "slope"),
        figure=figures.gradient_scale,
        caption=f"Measured RMS angle per step against the size of the gradient. {SEEDS} Thin grey: slope -1/3.",
    ),
    Claim(
        id="C3",
        title="The predicted rotation is what real networks show",
        statement="In trained networks with normalised layers the measured RMS rotation of every layer agrees with "
        "the prediction; where vectors are not scale-invariant it does not.",
        source="figures of measured rotation, ResNet-50 (SGDM) and GPT2 (AdamW)",
        paper_value=UNKNOWN,
        experiments=("equilibrium",),
        parts={
            "SGDM, BatchNorm: every convolution within 3 %": test.ratio_in("sgdm_bn", 0.97, 1.03),
            "SGDM, LayerNorm + Weight Standardization: within 3 %": test.ratio_in("sgdm_ln_ws", 0.97, 1.03),
            "AdamW, BatchNorm: within 15 %": test.ratio_in("adamw_bn", 0.85, 1.15),
            "must fail: the head, which is not scale-invariant": test.ratio_off("sgdm_bn", head=True),
            "must fail: no normalisation": test.ratio_off("sgdm_none", head=False),
        },
        control=roll("equilibrium", "angle"),
        figure=figures.equilibrium_ratio,
        caption=f"Measured over predicted RMS rotation per layer, last 40 % of 1200 steps at constant rate. {SEEDS}",
    ),
    Claim(
        id="C4",
        title="AdamW and SGDM balance neurons, Adam+L2 does not; WS, RVs do",
        statement="Neurons turn at nearly one speed under AdamW and SGDM and at very different speeds under Adam+L2; "
        "Weight Standardization (with LayerNorm) and rotational variants make the balance nearly perfect.",
        source="figures of per-neuron rotation",
        paper_value=UNKNOWN,
        experiments=("equilibrium",),
        parts={
            "spread of Adam+L2 > 2 x AdamW": test.spread_ratio("adam_l2_bn", "adamw_bn", 2.0),
            "spread of LayerNorm > 5 x LayerNorm + WS": test.spread_ratio("sgdm_ln", "sgdm_ln_ws", 5.0),
            "spread of RV-AdamW < 0.02": test.spread_below("rv_adamw_bn", 0.02),
            "spread of RV-SGDM < 0.02": test.spread_below("rv_sgdm_bn", 0.02),
        },
        control=chain(
            swap_arms("equilibrium", "adam_l2_bn", "adamw_bn"),
            swap_arms("equilibrium", "sgdm_ln", "sgdm_ln_ws"),
        ),
        figure=figures.neuron_spread,
        caption="RMS angle of every hidden neuron, all seeds, relative to the arm's mean. Spread: std of its log.",
    ),
    Claim(
        id="C5",
        title="Tuned AdamW beats tuned Adam+L2",
        statement="With both tuned on the same grid, AdamW reaches a higher accuracy than Adam with an L2 term.",
        source="CIFAR-10 ResNet-18 grid, section 5.3",
        paper_value=UNKNOWN,
        experiments=("compare",),
        parts={"AdamW - Adam+L2 > 0": test.arm_greater("compare", "adamw", "adam_l2")},
        control=swap_arms("compare", "adamw", "adam_l2"),
        figure=figures.adam_family,
        caption="Test accuracy of each seed at the arm's own best hyper-parameters; line: mean and 95 % interval.",
        note="The laptop network's layers have gradients of similar size, so Adam+L2 is only mildly imbalanced here "
        "(C4); C5.unequal makes them unequal on purpose.",
    ),
    Claim(
        id="C5.unequal",
        title="Where gradients are unequal, AdamW beats Adam+L2",
        statement="When the gradients of the layers differ by construction, Adam+L2 turns layers at unequal speeds "
        "and AdamW does not: then balance decides.",
        source="our construction from the theory of section 5.3",
        paper_value=UNKNOWN,
        experiments=("unequal",),
        parts={
            "AdamW - Adam+L2 > 0, gradients 1000 x apart": test.arm_greater("unequal", "adamw", "adam_l2"),
        },
        control=swap_arms("unequal", "adamw", "adam_l2"),
        figure=figures.adam_family_unequal,
        caption="As for C5; the gradients of the four convolutions are multiplied by 10, 1, 0.1, 0.01.",
    ),
    Claim(
        id="C5.forced",
        title="AdamW's rotation forced on Adam+L2 closes the gap",
        statement="Adam+L2's update direction, turned at AdamW's equilibrium rotation, does as well as AdamW: the "
        "balance of rotation explains the difference.",
        source="CIFAR-10 ResNet-18, section 5.3",
        paper_value="gap roughly closed (second-hand)",
        experiments=("unequal", "compare"),
        parts={
            "unequal gradients: forced - Adam+L2 > 0": test.arm_greater("unequal", "forced_adam_l2", "adam_l2"),
            "unequal gradients: forced within 1 point of AdamW": test.arm_noninferior(
                "unequal", "forced_adam_l2", "adamw", 1.0
            ),
            "plain network: forced within 1 point of AdamW": test.arm_noninferior(
                "compare", "forced_adam_l2", "adamw", 1.0
            ),
        },
        control=swap_arms("unequal", "forced_adam_l2", "adam_l2"),
        figure=figures.adam_family_unequal,
        caption="As for C5.unequal.",
    ),
    Claim(
        id="C6",
        title="Tuned rotational variants match their base optimizers",
        statement="After a search of the same size a rotational variant is not worse than its base optimizer.",
        source="tables over CIFAR-10, ImageNet, IWSLT, wikitext (few-shot)",
        paper_value="ResNet-20: RV 92.4, AdamW 92.2 (second-hand)",
        experiments=("compare", "language", "zero_shot"),
        parts={
            "RV-AdamW within 1 point of AdamW": test.arm_noninferior("compare", "rv_adamw", "adamw", 1.0),
            "RV-SGDM within 1 point of SGDM": test.arm_noninferior("compare", "rv_sgdm", "sgdm", 1.0),
            "RV-Lion within 1 point of Lion": test.arm_noninferior("compare", "rv_lion", "lion", 1.0),
            "language: RV-AdamW within 0.02 nats/byte of AdamW": test.language_noninferior,
        },
        control=starve,
        figure=figures.compare,
        caption="Test accuracy at each arm's own best hyper-parameters (12 points, same budget); kin optimizers in "
        f"grey. {SEEDS}",
    ),
    Claim(
        id="C6.zero_shot",
        title="At the base's hyper-parameters RVs stay within two points",
        statement="Without any tuning, at the base optimizer's best hyper-parameters, a rotational variant is within "
        "two points, provided that the base itself equilibrates during training.",
        source="zero-shot columns of the same tables",
        paper_value=UNKNOWN,
        experiments=("zero_shot", "compare"),
        parts={
            "RV-AdamW": test.zero_shot("rv_adamw", "adamw"),
            "RV-SGDM": test.zero_shot("rv_sgdm", "sgdm"),
            "RV-Lion": test.zero_shot("rv_lion", "lion"),
        },
        control=starve,
        figure=figures.zero_shot,
        caption=f"Zero-shot and tuned accuracy beside the base. {SEEDS}",
    ),
    Claim(
        id="C6.starved",
        title="Zero-shot fails where the base never equilibrates",
        statement="Where learning rate times weight decay times steps is far below one the base lives in its "
        "transient and a zero-shot rotational variant is clearly worse; more weight decay repairs it.",
        source="IWSLT rows of the same tables",
        paper_value="19.9 against 34.6 BLEU zero-shot (second-hand)",
        experiments=("zero_shot",),
        parts={
            "AdamW - RV-AdamW > 5 points at lr 1e-3, decay 0.01": test.starved,
            "RV-AdamW with decay 10 >= AdamW": test.arm_noninferior("zero_shot", "rv_adamw_fed", "adamw_starved", 1.0),
        },
        control=swap_arms("zero_shot", "adamw_starved", "rv_adamw_starved"),
        figure=figures.zero_shot,
        caption="See C6.zero_shot.",
    ),
    Claim(
        id="C7",
        title="Warm-up helps the base optimizer, not the rotational variant",
        statement="The base optimizer's best result needs learning-rate warm-up; a rotational variant's does not.",
        source="GPT2-124M (AdamW) and ResNet-50 at batch 8192 (SGDM), section 5.2",
        paper_value="RVs nearly close the gap, single seeds (second-hand)",
        experiments=("warmup", "language"),
        parts={
            "SGDM, large batch: warm-up gains": test.base_gains("warmup", "sgdm"),
            "SGDM gains more than RV-SGDM": test.gains_more("warmup", "sgdm", "rv_sgdm"),
            "language: AdamW gains from warm-up": test.language_gains,
            "language: AdamW gains more than RV-AdamW": test.language_gains_more,
        },
        control=chain(test.swap_warmup("warmup"), LANGUAGE_SWAP),
        figure=figures.warmup,
        caption=f"Test accuracy against learning rate, with and without 10 % warm-up. {SEEDS}",
        note="At default initialisation the norms of this network start near equilibrium (C11), so there is little "
        "transient for warm-up to tame; the deeper network and the provoked transient follow.",
    ),
    Claim(
        id="C7.deep",
        title="The same in a deeper network",
        statement="As C7, with ten convolutions and AdamW.",
        source="section 5.2, our set-up",
        paper_value=UNKNOWN,
        experiments=("warmup_deep",),
        parts={
            "AdamW gains from warm-up": test.base_gains("warmup_deep", "adamw"),
            "AdamW gains more than RV-AdamW": test.gains_more("warmup_deep", "adamw", "rv_adamw"),
        },
        control=test.swap_warmup("warmup_deep"),
        figure=figures.warmup_deep,
        caption=f"As for C7, ten convolutions in residual blocks. {SEEDS}",
    ),
    Claim(
        id="C7.provoked",
        title="With a provoked transient warm-up helps only the base",
        statement="When the initial norm is far below equilibrium, so that the first steps turn weights wildly, "
        "warm-up helps the base optimizer at a large learning rate and a rotational variant does not need it.",
        source="mechanism of section 5.2, our construction",
        paper_value=UNKNOWN,
        experiments=("warmup_provoked",),
        parts={
            "SGDM gains from warm-up": test.base_gains("warmup_provoked", "sgdm"),
            "SGDM gains more than RV-SGDM": test.gains_more("warmup_provoked", "sgdm", "rv_sgdm"),
            "AdamW gains from warm-up": test.base_gains("warmup_provoked", "adamw"),
            "AdamW gains more than RV-AdamW": test.gains_more("warmup_provoked", "adamw", "rv_adamw"),
        },
        control=test.swap_warmup("warmup_provoked"),
        figure=figures.warmup_provoked,
        caption="Gain from 10 % warm-up for each seed, convolutions initialised at 3 % of their usual norm. "
        "Learning rates fixed beforehand, from exploration on other seeds.",
    ),
    Claim(
        id="C7.range",
        title="Rotational variants widen the usable range of learning rates",
        statement="Without warm-up the range of learning rates within two points of the best is at least four times "
        "wider for RV-SGDM than for SGDM.",
        source="learning-rate sweeps of section 5.2",
        paper_value=UNKNOWN,
        experiments=("warmup",),
        parts={"RV-SGDM's range / SGDM's range >= 4": test.range_wider},
        control=swap_arms("warmup", "sgdm", "rv_sgdm"),
        figure=figures.warmup,
        caption="See C7; the range is limited by the grid of learning rates, 0.05 to 3.2.",
    ),
    Claim(
        id="C8",
        title="Poorly normalised: LayerNorm < LayerNorm + WS, about RV",
        statement="With LayerNorm (which leaves single neurons scale-sensitive) SGDM is worse than with Weight "
        "Standardization added; a rotational variant with LayerNorm alone does as well as the latter.",
        source="CIFAR-100, ResNet-18 with GroupNorm(1), section 5.3",
        paper_value=UNKNOWN,
        experiments=("normalization",),
        parts={
            "LayerNorm + WS > LayerNorm": test.arm_greater("normalization", "ln_ws", "ln"),
            "RV with LayerNorm > LayerNorm": test.arm_greater("normalization", "rv_ln", "ln"),
            "RV and WS within 1.5 points": test.rv_like_ws,
        },
        control=chain(swap_arms("normalization", "ln", "ln_ws")),
        figure=figures.normalization,
        caption="Validation accuracy over learning rates at each arm's best weight decay (2 tuning seeds).",
    ),
    Claim(
        id="C9",
        title="At constant lr x decay only biases and gains change speed",
        statement="With the product of learning rate and weight decay fixed, a rotational variant is nearly flat over "
        "five orders of learning rate; AdamW is not. With biases and gains frozen the rotational runs are identical.",
        source="CIFAR-10 ResNet-20 and GPT sweeps, section 5.2",
        paper_value=UNKNOWN,
        experiments=("lr_vs_wd",),
        parts={
            "spread of AdamW > 5 x spread of RV-AdamW": test.flatter,
            "frozen biases: losses equal bit for bit": test.frozen_identical,
            "lowest rate: within 0.5 points of frozen": test.meets_frozen,
            "RV at AdamW's best rate within 1 point of its own best": test.same_optimum,
        },
        control=swap_arms("lr_vs_wd", "adamw", "rv_adamw"),
        figure=figures.lr_vs_wd,
        caption=f"Test accuracy against learning rate; weight decay = 2^-7 / learning rate. {SEEDS}",
    ),
    Claim(
        id="C10",
        title="Imbalanced rotation hurts",
        statement="Making some neurons turn slower and others faster than the rest costs accuracy, even with weight "
        "decay re-tuned, and more so the larger the imbalance.",
        source="appendix J.6, CIFAR-10 ResNet-18",
        paper_value="10 % of the neurons at 10x already cost accuracy (second-hand)",
        experiments=("imbalance",),
        parts={
            "half of the neurons, 10 x: worse than none": test.arm_greater("imbalance", "none", "triple_s10"),
            "10 % of the neurons, 10 x: worse than none": test.arm_greater("imbalance", "none", "triple_q10"),
            "90 % of the neurons, 10 x: worse than none": test.arm_greater("imbalance", "none", "triple_q90"),
            "accuracy falls with the factor 1, 3, 10, 30": test.monotone_in_factor,
        },
        control=swap_arms("imbalance", "none", "triple_s30"),
        figure=figures.imbalance,
        caption=f"Test accuracy, weight decay re-tuned per arm; narrow: half the width, no imbalance. {SEEDS}",
    ),
    Claim(
        id="C11",
        title="A transient precedes equilibrium; RVs skip it",
        statement="At first AdamW turns weights much faster than in equilibrium while the squared norm relaxes "
        "exponentially; a rotational variant turns at the equilibrium speed from the first step.",
        source="transient phase, section 3 and its appendix",
        paper_value=UNKNOWN,
        experiments=("equilibrium", "transient_walk"),
        parts={
            "random walk: squared norm follows the exponential within 5 %": test.deviation_below,
            "AdamW's first 20 steps > 3 x equilibrium, convolutions 2-4": test.starts_fast,
            "RV-AdamW's first 20 steps within 30 %": test.starts_in_equilibrium("rv_adamw_bn"),
            "RV-SGDM's first 20 steps within 30 %": test.starts_in_equilibrium("rv_sgdm_bn"),
        },
        control=swap_arms("equilibrium", "adamw_bn", "rv_adamw_bn"),
        figure=figures.transient,
        caption=f"RMS angle per step of the third convolution over the predicted one, and the norm. {SEEDS}",
        note="The exponential holds when the second moment forgets faster than the norm relaxes, 1/(1 - beta2) << "
        "1/(2 lr decay): beta2 = 0.95 here. With 0.999 the moments remember gradients of another size.",
    ),
]
