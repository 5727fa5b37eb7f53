"""Running what was written: transformers, llama.cpp and OpenVINO, their speed, and how to serve with them."""

from sqft.runtimes.commands import serving_commands
from sqft.runtimes.hf import run_transformers
from sqft.runtimes.llama_cpp import LlamaCpp
from sqft.runtimes.openvino import OpenVinoModel
from sqft.runtimes.speed import measure_speed, open_artefact

__all__ = [
    "LlamaCpp",
    "OpenVinoModel",
    "measure_speed",
    "open_artefact",
    "run_transformers",
    "serving_commands",
]
