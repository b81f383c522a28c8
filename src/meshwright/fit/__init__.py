"""Predictions against measured runs, and the fitting of the cost model's factors to them."""
