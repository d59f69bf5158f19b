from tests.model.fixtures import demo_parts, recording_engine

__all__ = ["demo_parts", "recording_engine"]
