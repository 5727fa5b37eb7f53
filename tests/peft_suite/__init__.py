"""PEFT's own tests, run on SQFT's configurations: `python -m tests.peft_suite`."""
