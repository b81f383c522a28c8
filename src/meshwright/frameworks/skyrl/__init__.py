"""SkyRL: its reinforcement learning and SFT trainers on the Megatron and FSDP backends."""
