"""Every setting of sqft: one class for each section of a recipe.

Nothing else configures the package. The classes hold plain values and import no torch, so the command line
and editors read them at once; the functions that do the work take the section they are named after.
Rules that concern two sections stand in `pipeline/recipe.py`.
"""

from sqft.sections.adapters import (
    AdapterMethod,
    AdapterSection,
    SearchSection,
    TrainingSection,
    TrainSection,
    TuneSection,
)
from sqft.sections.base import Section
from sqft.sections.compression import QuantizeSection, ReconstructSection, SparsifySection
from sqft.sections.distillation import DistillationSection
from sqft.sections.foreign import MergeRung, MergeSection
from sqft.sections.inputs import (
    CalibrationSection,
    DataForm,
    DataSection,
    DataSource,
    HubSource,
    ModelSection,
)
from sqft.sections.outputs import EvaluateSection, ExportFormat, ExportSection, ReportedModel
from sqft.sections.runtime import RuntimeSection

__all__ = [
    "AdapterMethod",
    "AdapterSection",
    "CalibrationSection",
    "DataForm",
    "DataSection",
    "DataSource",
    "DistillationSection",
    "EvaluateSection",
    "ExportFormat",
    "ExportSection",
    "HubSource",
    "MergeRung",
    "MergeSection",
    "ModelSection",
    "QuantizeSection",
    "ReconstructSection",
    "ReportedModel",
    "RuntimeSection",
    "SearchSection",
    "Section",
    "SparsifySection",
    "TrainSection",
    "TrainingSection",
    "TuneSection",
]
