"""What holds for all tests."""

from hypothesis import settings

# A machine that is busy is no failure: hypothesis would take an example of more than 200 ms for one.
settings.register_profile("busy machine", deadline=None)
settings.load_profile("busy machine")
