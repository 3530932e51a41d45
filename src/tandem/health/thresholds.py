"""Where health ends and a fault begins, in one place.

Each number stands between what healthy runs do and what faults that were made on purpose do; what both did is measured
by `make calibrate` and stands in docs/diagnosis/calibration.md. A window is a number of steps that have the metric.
"""

from __future__ import annotations

WINDOW = 4
"""Steps that are looked at together, so that one odd batch says nothing."""

EARLY = 3
"""Steps at the beginning of a run that later ones are held against."""

# The value model.
WORSE_EXPLAINED_VARIANCE = -0.1
"""Median explained variance under which a constant would be a better baseline; 0 is the constant itself. The median,
since one batch whose outcomes hardly differ can have any explained variance."""

DEAD_EXPLAINED_VARIANCE = 0.02
DEAD_SPREAD = 0.05
"""Spread of the values, in spreads of what was earned, under which they do not tell states apart."""

BIASED_START = 2.0
"""Distance of the mean value from the mean outcome in the first steps, in spreads of the outcomes."""

LAGGING = 0.8
"""The same distance later on, while the policy learns."""

LAGGING_FLOOR = 0.25
"""Share of the first steps' spread that outcomes are taken to keep when the distance is measured: a policy that has
converged earns nearly the same every time, and a small distance would look large."""

SCALE_DRIFT = 3.0
"""Factor by which the size of the returns may change from the first steps on."""

LOST_CREDIT = 0.25
KEPT_CREDIT = 2.0
KNOWN_EARLY = 0.05
"""Correlation of the first quarter's advantages with what was earned, under which they say nothing of it; how many
times better the last quarter's must be for the way between them to be the reason; and the explained variance of the
first quarter from which the value model says it instead."""

# The distance to the reference.
FAR_A_TOKEN = 0.6
"""Nats a token beyond which hardly a token is what the reference would have said."""

BITING = 0.15
"""Share of what was gained that the KL penalty must come to at such a distance."""

ZERO_KL = 1e-3
MOVED = 0.05
"""A KL (nats a sequence) that reads zero, though updates have moved the policy by this much in all."""

NEGATIVE_KL = 0.1
NEGATIVE_ERRORS = 4.0
"""Nats a sequence below zero, and standard errors, at which chance no longer explains a negative mean."""

# Updates.
LARGE_APPROX_KL = 0.1
LARGE_CLIPFRAC = 0.35
"""KL(before, now) in nats a token, and share of clipped tokens, beyond which an update leaves the region where its
rollouts say something about it."""

# Stagnation.
NO_SPREAD = 1e-3
"""Spread of the scores, in units of the larger of 1 and their mean, at which all responses earn the same."""

STILL_KL = 0.02
STILL_APPROX_KL = 2e-6
STILL_STEPS = 20
"""Nats a sequence from the reference, and nats a token an update, at which a policy has not moved; and the steps after
which the first alone says so, where one update a step is measured before it is made and reads 0."""

HELD_GAIN = 0.25
"""Spreads of the score that the best policy under the KL coefficient gains, to first order spread / coefficient: less
is not worth training for."""

# Text.
COLLAPSED_ENTROPY = 0.3
"""Share of the first steps' entropy."""

REPETITIVE = 0.25
"""Rise of the share of repeated four-token runs."""

SHRUNK = 0.3
GROWN = 2.0
"""Factors of the first steps' length."""

ENDING = 0.2
ENDS_NO_MORE = 0.25
NEVER_ENDS = 0.02
"""Share of responses that must end in the first steps for an end to be part of the task; the share of it that must be
left; and the share that counts as none where the recipe wants an end."""

# Reward hacking.
GAINED = 0.5
"""Rise of the score, in spreads of the first steps, that makes a fall of another measure suspicious."""

GOLD_FELL = 3.0
"""Fall of a measure that is not trained on, in standard errors of the difference of two windows."""

FLUENCY_FELL = 0.7
"""Fall of the reference's mean log-probability, nats a token."""

# The generator.
MISMATCH = 0.05
"""Mean gap between the generator's log-probabilities and the trainer's, nats a token."""


STALE = 4.0
"""Growth of the gap since the first step that tells old weights from other arithmetic."""

# A trunk for both.
OPPOSED = -0.3
DROWNED = 10.0
"""Cosine of the two losses' gradients; and how many times the policy's gradient the value's may be."""

# The machine.
MEMORY_GROWTH = 1.5
MEMORY_GIB = 0.5
MEMORY_WINDOW = 6
"""Growth of memory in use since the first steps, as a factor and in GiB, and the steps over which it must go on."""

THROUGHPUT_LEFT = 0.3
THROUGHPUT_WINDOW = 5
"""Share of the first steps' tokens a second, by medians of so many steps."""
