"""Parts of `rl_loop.py`: rollouts, the trainer, how its weights travel, checks, the report."""
