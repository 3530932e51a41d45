"""The mathematics alone: rewards, advantages and losses of two responses, with nothing but torch."""

import torch

from tandem import algo

# Two responses of three and two tokens; the mask says which entries exist.
mask = torch.tensor([[True, True, True], [True, True, False]])
logprobs = torch.tensor([[-1.0, -0.5, -0.7], [-2.0, -0.1, 0.0]])
reference_logprobs = torch.tensor([[-1.1, -0.9, -0.6], [-1.5, -0.3, 0.0]])
values = torch.tensor([[0.2, 0.4, 0.6], [0.0, -0.1, 0.0]])
scores = torch.tensor([1.0, -0.5])

rewards = algo.token_rewards(scores, logprobs, reference_logprobs, mask, kl_coefficient=0.1)
advantages = algo.gae(rewards, values, mask, gamma=1.0, lam=0.95)
returns = algo.gae(rewards, values, mask, gamma=1.0, lam=1.0) + values
print("rewards   ", rewards)
print("advantages", advantages)
print("returns   ", returns)

# A loss is a sum; divide by the count over the whole minibatch.
new_logprobs = (logprobs + 0.1).requires_grad_()
loss = algo.ppo_policy_loss(new_logprobs, logprobs, advantages, mask, clip_low=0.2, clip_high=0.2)
(loss.total / mask.sum()).backward()
print("policy loss", (loss.total / mask.sum()).item(), "clipped tokens", int(loss.clipped))
print("value loss ", (algo.value_loss(values, returns, mask) / mask.sum()).item())
print(
    "KL k1, k3  ",
    *(algo.masked_mean(algo.kl_estimate(logprobs, reference_logprobs, k), mask).item() for k in ("k1", "k3")),
)
print("preference ", algo.preference_loss(torch.tensor([1.0]), torch.tensor([0.2])).item())
