"""A plan against reality."""
