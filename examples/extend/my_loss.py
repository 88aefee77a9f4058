"""A loss of your own: REINFORCE with a soft limit on the importance weight.

train:
  loss: my_loss.py:SoftLimit
  loss_arguments: {limit: 2.0}
"""

import torch

from megatron_gpc.algo.losses import LossInputs, LossOutputs


class SoftLimit:
    """-sum_t w_t A_t ln p_t, where w = tanh(r / limit) / tanh(1 / limit), which is 1 at r = 1.

    Like `cispo` it keeps every token's gradient, but its weight has no corner.
    """

    def __init__(self, limit: float = 2.0):
        self.limit = limit

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        ratio_T = (inputs.logp_T.detach() - inputs.streams.old_logp_T).exp()
        weight_T = torch.tanh(ratio_T / self.limit) / torch.tanh(torch.tensor(1 / self.limit))
        return LossOutputs(
            loss_sum=-(weight_T * inputs.advantages_T * inputs.logp_T).sum(),  # a sum, no mean
            ratio_T=ratio_T,
            clipped_low_T=torch.zeros_like(ratio_T, dtype=torch.bool),
            clipped_high_T=ratio_T > self.limit,
            metrics={"weight": weight_T},  # its mean over all tokens is logged as loss_weight
        )
