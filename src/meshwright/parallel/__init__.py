"""How training is split: ranks, degrees, placement and schedules. No cost, no model, no torch."""
