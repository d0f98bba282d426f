"""Settings of the engine's tests."""

from hypothesis import settings

# A shared machine may stop for a moment at any time: no example is wrong because it was slow.
settings.register_profile("vashista", deadline=None)
settings.load_profile("vashista")
