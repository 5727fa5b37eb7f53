"""`sqft demo`."""

__all__ = ["demo"]


def demo() -> None:
    """Placeholder."""
