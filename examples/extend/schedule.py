"""A clip schedule of your own: hold the entropy near a target.

clip:
  schedule: schedule.py:HoldEntropy
  schedule_arguments: {target: 1.2}
"""

from megatron_gpc.algo.clipping import affine_bounds


class HoldEntropy:
    """Below the target the upper threshold opens, which raises entropy; above it the lower one."""

    def __init__(self, clip, steps, target=None):
        self.clip = clip  # the section `clip` of the configuration
        self.target = target  # nats a token; None: the entropy of the first step

    def bounds(self, k, entropy):
        """Thresholds of the step after k finished ones; each is (slope, intercept) over p."""
        if self.target is None:
            self.target = entropy
        high, low = (0.0, self.clip.eps_high), (0.0, self.clip.eps_low)
        if entropy < self.target:
            high = (self.clip.hi_slope, self.clip.hi_intercept)
        else:
            low = (self.clip.lo_slope, self.clip.lo_intercept)
        return affine_bounds(high, low)

    def state(self):
        """What a continued run needs to know."""
        return {"target": self.target}

    def restore(self, state):
        self.target = state["target"]
