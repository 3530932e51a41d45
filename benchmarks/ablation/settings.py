"""What is varied, one thing at a time: the name of each setting and the recipe lines that make it."""

from __future__ import annotations

STORIES: dict[str, list[str]] = {
    "as the recipe": [],
    "lambda_policy 1": ["--advantage.lambda_policy=1.0"],
    "lambda_value .95": ["--advantage.lambda_value=0.95"],
    "TD(0) / TD(0)": ["--advantage.lambda_policy=0.0", "--advantage.lambda_value=0.0"],
    "length-adaptive lambda, alpha .3": ["--advantage.length_adaptive=0.3"],
    "whitened advantages": ["--advantage.whiten=true"],
    "adaptive baseline": ["--advantage.baseline=adaptive"],
    "value epochs 1": ["--value.epochs=1"],
    "value epochs 6": ["--value.epochs=6"],
    "adaptive value epochs, to 8": ["--value.adaptive.max_epochs=8"],
    "value warm-up, 8 steps": ["--value.warmup.steps=8"],
    "KL in the loss, k2": ["--kl.placement=loss", "--kl.estimator=k2"],
    "A2C": ["--policy.loss=a2c"],
    "sharing adapters": ["--sharing.mode=adapters", "--policy.lr=3e-3", "--value.lr=3e-3"],
    "sharing head": ["--sharing.mode=head", "--value.epochs=1", "--value.schedule=constant"],
    "sharing head, gradient stopped": [
        "--sharing.mode=head",
        "--sharing.head_gradient=stop",
        "--value.epochs=1",
        "--value.schedule=constant",
    ],
}

DEMO: dict[str, list[str]] = {
    "as the demo": [],
    "lambda_value 1": ["--advantage.lambda_value=1.0"],
    "KL in the loss, k2": ["--kl.placement=loss", "--kl.estimator=k2"],
    "whitened advantages": ["--advantage.whiten=true"],
}
