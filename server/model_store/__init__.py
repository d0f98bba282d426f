"""Signed models: packed on one machine, checked and installed on another, checked again before they are served."""
