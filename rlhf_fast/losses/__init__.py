"""Formulas without a kernel of their own."""
