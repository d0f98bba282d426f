"""Vashista."""
