"""The fake servers of the site's tests serve the launcher's too."""

from tests.unit.site.conftest import events, fake_python, make_site

__all__ = ["events", "fake_python", "make_site"]
