"""Who samples: rollout engines that are started or found, watched, asked and given weights."""
