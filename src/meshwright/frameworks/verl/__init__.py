"""verl: its PPO/GRPO trainer on the Megatron and FSDP engines (January 2026)."""
