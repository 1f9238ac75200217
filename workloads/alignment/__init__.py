"""Learning from rewards and preferences: advantages and losses (pure), the PPO learner, rollouts."""
