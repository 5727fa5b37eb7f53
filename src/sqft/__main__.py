"""`python -m sqft`."""

from sqft.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
