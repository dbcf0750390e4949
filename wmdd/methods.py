"""Public names for distillation methods of other packages: ``from wmdd.methods import ClassData, Method``."""

from wmdd.config.schema import BarycenterConfig, SynthesisConfig
from wmdd.distill.methods.base import ClassData, ClassPlan, Method
from wmdd.distill.synthesis.objective import Objective

__all__ = ["BarycenterConfig", "ClassData", "ClassPlan", "Method", "Objective", "SynthesisConfig"]
