"""Compiled CPU kernels for decoding: linear products of few rows, norms, gates, dense and sparse attention (in C).

The engine's CPU paths ask `library.load()` for them and use torch where it answers None; `status()` says which of the
two it is. An installation without a C compiler, or on a platform without one's result, has no compiled library and
loses nothing but speed.
"""

from vashista.kernels.cpu.library import status

__all__ = ["status"]
