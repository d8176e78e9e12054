"""Quantizers and what corrects them: steps of least squared error, batch normalisation, DuQ."""
