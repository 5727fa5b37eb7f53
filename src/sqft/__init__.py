"""Fine-tune once, get one small file (sparse, INT4) that is provably the model you trained."""

__version__ = "0.1.0"
