"""How a model learns from what it tries: rollouts, rewards, GRPO and its relatives."""
