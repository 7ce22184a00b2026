"""Settings of the property-based tests here."""

from hypothesis import settings

settings.register_profile("transport", deadline=None)
settings.load_profile("transport")
